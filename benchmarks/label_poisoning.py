"""Accuracy under label flips, for every attack, rate and defense, through the harness (docs/poisoning.md).

    python benchmarks/label_poisoning.py                      # docs/label_poisoning.json
    python benchmarks/label_poisoning.py --tables --figures   # what the page shows of it
    python benchmarks/label_poisoning.py --only digits svm    # cells whose task or defense begins with one of these

A cell that is in the file already is not run again; delete it from the file to run it anew. The whole grid takes hours
on one core, for adaptive attackers train slow defenses again and again; `--seconds` ends after so many.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import advkit
from advkit.core.errors import AdvkitError
from advkit.defenses import DEFENSES

DOCS = Path(__file__).parents[1] / "docs"
FILE = DOCS / "label_poisoning.json"
TRIALS = 8
RATES = (0.25, 0.10, 0.05)
TASKS = {"digits": "digits-pair:classes=1+7", "moons": "moons"}
ATTACKS = {
    "random_labels": "random_labels",
    "farfirst": "farfirst",
    "nearfirst": "nearfirst",
    "svflip": "svflip",
    "floral_inner": "floral_inner",
    "alfa": "alfa",
    "alfa_tilt": "alfa_tilt:draws=20",
    "lfa_greedy": "lfa_greedy:candidates=5",
}
DEFENSES_OF = {
    "digits": (
        "svm:C=1",
        "svm:C=10",
        "floral:C=1",
        "floral:C=10",
        "floral:C=1,budget=0",
        "floral:C=10,budget=0",
        "ln_svm:C=1",
        "ls_svm:C=1",
        "curie:C=1",
        "k_lid:C=1",
        "cleanlab",
        "nn",
        "nn_pgd_at",
    ),
    "moons": (
        "svm:C=1,gamma=1",
        "floral:C=1,gamma=1",
        "floral:C=1,gamma=1,budget=0",
        "ln_svm:C=1,gamma=1",
        "ls_svm:C=1,gamma=1",
        "curie:C=1,gamma=1",
        "k_lid:C=1,gamma=1",
        "cleanlab",
        "nn",
        "nn_pgd_at",
    ),
}
"""The settings of FLORAL's small experiments; the others by their defaults. budget=0 is FLORAL without its attacker."""
SLOW = "nn_pgd_at"
"""One training takes five seconds: evaluated at the largest rate, against these attacks by an oblivious attacker."""
AGAINST_SLOW = ("random_labels", "farfirst", "alfa", "alfa_tilt")
KEPT = (
    "clean_accuracy",
    "robust_accuracy",
    "attack_success",
    "flip_recovery_precision",
    "flip_recovery_recall",
    "retrainings_attacker",
    "retrainings_final",
)


def cells() -> Iterator[dict[str, Any]]:
    """Everything that the grid asks for, the quick cells first."""
    for attacker, task, rate, attack in itertools.product(("oblivious", "adaptive"), TASKS, RATES, ATTACKS):
        for defense in DEFENSES_OF[task]:
            yield {"task": task, "attack": attack, "rate": rate, "defense": defense, "attacker": attacker}


def left_out(cell: dict[str, Any]) -> str:
    """Why a cell is not run; empty where it is."""
    name = cell["defense"].partition(":")[0]
    if name == SLOW and (cell["attacker"] == "adaptive" or cell["rate"] < 0.25 or cell["attack"] not in AGAINST_SLOW):
        return "one training takes five seconds"
    if cell["attack"] == "lfa_greedy" and name not in ("svm", "floral"):
        return "a greedy search of thousands of trainings for every defense"
    if cell["attacker"] != "adaptive":
        return ""
    if cell["attack"] == "random_labels":
        return "trains nothing: one attacker"
    if cell["attack"] in ("svflip", "floral_inner", "alfa_tilt") and not DEFENSES.build(cell["defense"]).duals:
        return "reads dual variables, which the defense has none of"
    if cell["attack"] == "lfa_greedy" and (cell["rate"] > 0.05 or cell["task"] == "moons"):
        return "hundreds of trainings of this defense in every trial"
    return ""


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """One cell: the figures of its report."""
    start = time.process_time()
    report = advkit.evaluate(
        attack=ATTACKS[cell["attack"]],
        defense=cell["defense"],
        task=TASKS[cell["task"]],
        threat_model=f"label-flips:rate={cell['rate']},trials={TRIALS},attacker={cell['attacker']}",
        device="cpu",
        beside=False,
    )
    metrics = report.metrics
    return {**cell, **{name: figure(metrics[name]) for name in KEPT}, "seconds": round(time.process_time() - start, 1)}


def figure(entry: dict[str, Any]) -> dict[str, Any]:
    """Value and interval, rounded to what a table shows and a bit more."""
    ci = entry.get("ci")
    value = entry["value"]
    found = {"value": None if value is None else round(value, 5)}
    return found | ({} if ci is None else {"low": round(ci["low"], 5), "high": round(ci["high"], 5)})


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("task", "attack", "rate", "defense", "attacker"))


def save(held: dict[str, Any]) -> None:
    lines = ",\n".join("  " + json.dumps(cell) for cell in held["cells"])
    head = {key: value for key, value in held.items() if key != "cells"}
    FILE.write_text(json.dumps(head)[:-1] + ',\n "cells": [\n' + lines + "\n ]}\n", encoding="utf-8")


def tables(found: list[dict[str, Any]]) -> str:
    """The page's tables of the largest rate: robust accuracy by defense and attack, for either attacker."""
    lines = []
    for task, attacker in itertools.product(TASKS, ("oblivious", "adaptive")):
        own = [c for c in found if (c["task"], c["attacker"], c["rate"]) == (task, attacker, RATES[0])]
        attacks = [name for name in ATTACKS if any(c["attack"] == name for c in own)]
        lines += [f"### {task}, 25 %, {attacker} attacker", "", f"| defense | clean | {' | '.join(attacks)} |"]
        lines.append("|---|---|" + "---|" * len(attacks))
        for defense in DEFENSES_OF[task]:
            mine = {c["attack"]: c for c in own if c["defense"] == defense}
            if mine:
                clean = next(iter(mine.values()))["clean_accuracy"]["value"]
                values = [f"{mine[a]['robust_accuracy']['value']:.3f}" if a in mine else "-" for a in attacks]
                lines.append(f"| `{defense}` | {clean:.3f} | {' | '.join(values)} |")
        lines.append("")
    return "\n".join(lines)


def draw(found: list[dict[str, Any]]) -> None:
    """The figures of the page: accuracy against the rate for each task, and boundaries on moons."""
    import torch

    from advkit.attacks import ATTACKS as REGISTRY
    from advkit.core.retraining import Retraining
    from advkit.core.rng import RowRng
    from advkit.evaluation.figures.plots import Point, save
    from advkit.evaluation.figures.poisoning_plots import accuracy_by_rate, boundaries
    from advkit.evaluation.scenarios.poisoning import Trials
    from advkit.tasks import TASKS as DATA
    from advkit.threat_models import THREAT_MODELS

    for task in TASKS:
        panels: dict[str, dict[str, list[Point]]] = {}
        for attack, defense in itertools.product(("farfirst", "alfa", "alfa_tilt"), DEFENSES_OF[task]):
            own = [c for c in found if (c["task"], c["attack"], c["defense"]) == (task, attack, defense)]
            points = [
                Point(c["rate"], *(c["robust_accuracy"][key] for key in ("value", "low", "high")))
                for c in own
                if c["attacker"] == "oblivious"
            ]
            if len(points) > 1:
                panels.setdefault(attack, {})[defense] = points
        if panels:
            drawn = accuracy_by_rate(panels, title=f"{task}, oblivious attacker, {TRIALS} trials")
            save(drawn, DOCS / "images" / f"label_poisoning_{task}.png")
    split = Trials(DATA.build("moons"), 1, 200, seed=0).of(0)
    svm, floral = DEFENSES.build("svm:C=1,gamma=1"), DEFENSES.build("floral:C=1,gamma=1")
    oracle = Retraining(split.x, split.y, 2, svm.learner, 0)
    flips, stream = THREAT_MODELS.build("label-flips:rate=0.2"), RowRng.from_ids(0, ["moons"]).at("attack")
    labels = REGISTRY.build("farfirst")(oracle, torch.from_numpy(split.y), None, flips, stream).numpy()
    models = {
        "trained on clean labels": (split.y, svm.learner(0).fit(split.x, split.y)),
        "SVM on flipped labels": (labels, svm.learner(0).fit(split.x, labels)),
        "FLORAL on flipped labels": (labels, floral.learner(0).fit(split.x, labels)),
    }
    save(boundaries(split.x, models), DOCS / "images" / "label_poisoning_boundaries.png")


def main() -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of tasks, attacks, defenses or attackers")
    parser.add_argument("--skip", nargs="*", default=[], help="the same, left out")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--tables", action="store_true", help="print the page's tables, and run nothing")
    parser.add_argument("--figures", action="store_true", help="draw the page's figures, and run nothing")
    asked = parser.parse_args()
    held: dict[str, Any] = {"trials": TRIALS, "tasks": TASKS, "attacks": ATTACKS, "cells": []}
    if FILE.exists():
        held["cells"] = json.loads(FILE.read_text(encoding="utf-8"))["cells"]
    if asked.tables:
        print(tables(held["cells"]))
    if asked.figures:
        draw(held["cells"])
    if asked.tables or asked.figures:
        return
    end = time.monotonic() + asked.seconds

    def named(cell: dict[str, Any], words: list[str]) -> int:
        return sum(any(str(value).startswith(word) for value in cell.values()) for word in words)

    for cell in cells():
        if time.monotonic() > end:
            break
        if named(cell, asked.only) < len(asked.only) or named(cell, asked.skip):
            continue
        if cell["defense"].partition(":")[0] not in DEFENSES or left_out(cell):
            continue
        if any(same(cell, each) for each in held["cells"]):
            continue
        try:
            held["cells"].append(run(cell))
        except AdvkitError as error:
            print(f"{cell}: {error}", flush=True)
            continue
        done = held["cells"][-1]
        print(*cell.values(), done["clean_accuracy"]["value"], done["robust_accuracy"]["value"], done["seconds"])
        order = {json.dumps(each): place for place, each in enumerate(cells())}
        keys = ("task", "attack", "rate", "defense", "attacker")
        held["cells"].sort(key=lambda each: order.get(json.dumps({key: each[key] for key in keys}), 10**6))
        save(held)


if __name__ == "__main__":
    main()
