"""FLORAL beside the SVM it is made of, and each of its settings alone, through the harness (docs/floral.md).

python benchmarks/floral.py [--out docs] [--seconds 3600]

Writes OUT/floral.json. Two tasks of two classes; the attacker flips a quarter of the labels (of moons a tenth, too). He
is oblivious (trains a logistic regression or an SVM) or adaptive (trains the defense itself). Figures are means over 8
trials. The line of acceptance is run with three seeds. Cells that are in the file already are not run again. The grid
of all attacks, rates and defenses is benchmarks/label_poisoning.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits, make_moons
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import train_test_split

import advkit
from advkit import FLORAL
from advkit.defenses.labels.dual import objective, svm
from advkit.defenses.labels.floral import Game
from advkit.defenses.labels.kernels import Dense, largest_eigenvalue

TRIALS = 8
DIGITS, MOONS = "digits-pair:classes=1+7", "moons"
ATTACKS = ("random_labels", "farfirst", "alfa")
VARIANTS = (
    "svm:C=10",
    "floral:C=10",
    "floral:C=10,budget=0",
    "floral:C=10,budget=0.1",
    "floral:C=10,init=zero",
    "floral:C=10,budget=0,init=zero",
    "floral:C=10,rounds=200",
    "floral:C=10,output=last",
    "svm:C=1",
    "floral:C=1",
    "ln_svm:C=1",
)
ON_MOONS = ("svm:C=1,gamma=1", "floral:C=1,gamma=1", "floral:C=1,gamma=1,budget=0")
SEEDS = (0, 1, 2)
KEYS = ("task", "attack", "attacker", "rate", "seed", "defense")
GAIN, DROP = 0.04, 0.01


def cells() -> list[dict[str, Any]]:
    """All that is run, the lines of acceptance first."""

    def cell(task: str, attack: str, attacker: str, rate: float, seed: int, defense: str) -> dict[str, Any]:
        return dict(zip(KEYS, (task, attack, attacker, rate, seed, defense), strict=True))

    asked = [cell(DIGITS, "farfirst", "oblivious", 0.25, seed, defense) for seed in SEEDS for defense in VARIANTS[:2]]
    for attacker, attack in itertools.product(("oblivious", "adaptive"), ATTACKS):
        if attacker == "adaptive" and attack == "random_labels":  # it trains nothing: one attacker
            continue
        asked += [cell(DIGITS, attack, attacker, 0.25, 0, defense) for defense in VARIANTS]
    for rate, attack in itertools.product((0.1, 0.25), ATTACKS):
        asked += [cell(MOONS, attack, "oblivious", rate, 0, defense) for defense in ON_MOONS]
    return [each for number, each in enumerate(asked) if each not in asked[:number]]


def run(cell: dict[str, Any]) -> dict[str, Any]:
    """The accuracies of one cell."""
    report = advkit.evaluate(
        attack=cell["attack"],
        defense=cell["defense"],
        task=cell["task"],
        threat_model=f"label-flips:rate={cell['rate']},trials={TRIALS},attacker={cell['attacker']}",
        seed=cell["seed"],
        device="cpu",
        beside=False,
    )
    robust = report.metrics["robust_accuracy"]
    return {
        **cell,
        "clean": round(report.metrics["clean_accuracy"]["value"], 5),
        "robust": round(robust["value"], 5),
        "low": round(robust["ci"]["low"], 5),
        "high": round(robust["ci"]["high"], 5),
    }


def acceptance(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Digits, farthest first, C = 10: what FLORAL gains on the SVM, and what it costs on clean labels."""
    held = {tuple(each[key] for key in KEYS): each for each in done}
    pairs = [[held.get((DIGITS, "farfirst", "oblivious", 0.25, seed, d)) for d in VARIANTS[:2]] for seed in SEEDS]
    full = [(svm, ours) for svm, ours in pairs if svm and ours]
    if len(full) < len(SEEDS):
        return {}
    gains = [round(ours["robust"] - svm["robust"], 4) for svm, ours in full]
    drops = [round(svm["clean"] - ours["clean"], 4) for svm, ours in full]
    return {
        "gain": {"of_each_seed": gains, "mean": round(statistics.mean(gains), 4), "expected": f">= {GAIN}"}
        | {"holds": statistics.mean(gains) >= GAIN},
        "clean_drop": {"of_each_seed": drops, "mean": round(statistics.mean(drops), 4), "expected": f"<= {DROP}"}
        | {"holds": statistics.mean(drops) <= DROP},
    }


def draws() -> dict[str, list[float]]:
    """Accuracy in % under far flips for four seeds of the attacker inside, on the same 8 splits of digits."""
    x, y = load_digits(return_X_y=True)
    kept = np.isin(y, (1, 7))
    x, y = x[kept] / 16, (y[kept] == 7).astype(int)
    found: dict[str, list[float]] = {}
    for rounds, state in itertools.product((200, 500), range(4)):
        accuracies = []
        for seed in range(TRIALS):
            train, test, labels, truth = train_test_split(x, y, test_size=0.5, random_state=seed, stratify=y)
            distance = np.abs(LogisticRegression(max_iter=1000).fit(train, labels).decision_function(train))
            far = np.argsort(-distance)[: len(labels) // 4]
            labels[far] = 1 - labels[far]
            accuracies.append(FLORAL(C=10, rounds=rounds, random_state=state).fit(train, labels).score(test, truth))
        found.setdefault(str(rounds), []).append(round(100 * statistics.mean(accuracies), 1))
    return found


def dual_distances() -> list[float]:
    """(D(a) - D(a*)) / |D(a*)| after 1,000 rounds without attacker from zero, C = 1, at 1 / the largest eigenvalue."""
    found = []
    for seed in range(8):
        x, y = make_moons(40, noise=0.2, random_state=seed)
        gram = Dense(rbf_kernel(x, gamma=1.0))
        signs, upper, step = np.where(y == 1, 1.0, -1.0), np.ones(40), 1 / largest_eigenvalue(gram)
        game = Game(gram=gram, codes=y, classes=2, upper=upper, budget=0, step=step, rounds=1000)
        *_, last = game.play(game.start("zero"), np.random.RandomState(0))
        least = objective(gram, svm(gram, signs, upper, tol=1e-12), signs)
        found.append(float(f"{max(0.0, objective(gram, last.duals[0], signs) - least) / abs(least):.1e}"))
    return found


def main() -> None:
    """Run what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    asked = parser.parse_args()
    file = asked.out / "floral.json"
    done: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["cells"] if file.exists() else []
    end = time.monotonic() + asked.seconds
    order = cells()
    beside = {"draws": draws(), "dual_distances": dual_distances()}
    for cell in order:
        if time.monotonic() > end:
            break
        if any(all(each[key] == cell[key] for key in KEYS) for each in done):
            continue
        start = time.process_time()
        done.append(run(cell))
        print(*done[-1].values(), f"{time.process_time() - start:.1f} s", flush=True)
        save(file, done, beside, order)
    save(file, done, beside, order)


def save(file: Path, done: list[dict[str, Any]], beside: dict[str, Any], order: list[dict[str, Any]]) -> None:
    """Write the file, one cell a line."""
    done.sort(key=lambda each: order.index({key: each[key] for key in KEYS}))
    lines = ",\n".join("  " + json.dumps(each) for each in done)
    head = json.dumps({"trials": TRIALS, "acceptance": acceptance(done), **beside})
    file.write_text(head[:-1] + ',\n "cells": [\n' + lines + "\n ]}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
