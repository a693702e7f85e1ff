"""Doubly robust reweighting on imbalanced data: what it does for the weakest classes, seed by seed, in one JSON file.

    python benchmarks/reweighting.py --task digits --seeds 0 1 2 3 4 --out FILE.json
    python benchmarks/reweighting.py --task fashion-mnist --root FOLDER --seeds 0 1 2 3 4 --out FILE.json

Classes 1, 3, 5, 8 and 9 keep a fifth of their training samples (`imbalance=0.2`); the test set is whole. Every model of
a seed starts from the same weights and sees the same batches and random starts; weights of the last epoch. The harness
evaluates them with PGD-20 from a random start. Compared with r=inf, which is PGD adversarial training to the bit:
differences by seed, and a paired sign test over the seeds. Runs that are in FILE.json already are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

from advkit.core.files import write_whole
from advkit.core.provenance import commit_text
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.evaluation.api import evaluate
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.training.loop import fit

ATTACK = "pgd:steps=20,step_size=0.25"
FIGURES = {
    "clean": "clean_accuracy",
    "pgd": "robust_accuracy",
    "tail_30": "tail_30_accuracy",
    "worst_class": "worst_class_accuracy",
}
REFERENCE = "r=inf"
ROWS = (
    REFERENCE,
    "r=2",
    "r=1",
    "r=0.5",
    "r=0.25",
    "r=0.5,eta=0.1",
    "r=0.5,eta=0.1,barrier=0.01",
    "r=0.5,eta=0.1,barrier=0.01,implicit=true",
    "r=0.5,eta=0.1,barrier=0.001",
    "r=0.5,eta=0.1,barrier=0.001,implicit=true",
    "rho=0.3",
)


@dataclass(frozen=True)
class Protocol:
    """What differs between the tasks."""

    task: str
    model: str
    eps: float
    steps: int
    recipe: str


PROTOCOLS = {
    "digits": Protocol("digits", "mlp:hidden=128+128", 0.15, 4, "epochs=25,batch_size=64,validation=0,select=last"),
    "fashion-mnist": Protocol(
        "fashion-mnist:size=14,train=8000,test=1000,root={root}", "cnn", 0.1, 5, "epochs=10,validation=0,select=last"
    ),
}


def played(protocol: Protocol, task: Any, row: str, seed: int) -> dict[str, Any]:
    """One model, trained and evaluated."""
    settings = f"eps={protocol.eps},steps={protocol.steps},{row},recipe=[{protocol.recipe}]"
    defense: Any = DEFENSES.build(f"doubly_robust:{settings}")
    rng = RowRng.from_ids(seed, ["training"]).at("train")
    data = task.training()
    model = MODELS.build(protocol.model)(task.shape, task.classes, rng.at("init"), space=task.space)
    done = fit(model, data, defense.objective(), defense.recipe, rng, progress=False)
    report = evaluate(
        ATTACK, task=task, model=done.last, threat_model=f"linf:eps={protocol.eps}", device="cpu", beside=False
    )
    metrics = report.to_dict()["metrics"]
    last = done.log[-1].figures
    return {
        "row": row,
        "seed": seed,
        "commit": commit_text("advkit", "benchmarks"),
        **{name: metrics[key]["value"] for name, key in FIGURES.items()},
        "effective_sample_size": last["effective_sample_size"],
        "clipped_weights": last["clipped_weights"],
    }


def summary(runs: list[dict[str, Any]], row: str) -> dict[str, Any]:
    """Means over the seeds, and differences from the reference seed by seed."""
    by_seed = {each["row"]: {} for each in runs}
    for each in runs:
        by_seed[each["row"]][each["seed"]] = each
    own, base = by_seed[row], by_seed.get(REFERENCE, {})
    seeds = sorted(set(own) & set(base))
    names = (*FIGURES, "effective_sample_size")
    means = {name: sum(each[name] for each in own.values()) / len(own) for name in names}
    gains = {name: [own[seed][name] - base[seed][name] for seed in seeds] for name in FIGURES}
    found = {"row": row, "seeds": seeds, "mean": means, "minus_reference": gains}
    differing = [gain for gain in gains["tail_30"] if gain != 0]
    if row != REFERENCE and differing:
        better = sum(gain > 0 for gain in differing)
        found["sign_test_tail_30"] = binomtest(better, len(differing), alternative="greater").pvalue
    return found


def main() -> None:
    """Play what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=PROTOCOLS, default="digits")
    parser.add_argument("--root", default="", help="folder of the Fashion-MNIST files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="settings of doubly_robust")
    parser.add_argument("--imbalance", type=float, default=0.2)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    protocol = PROTOCOLS[asked.task]
    spec = protocol.task.format(root=asked.root)
    thin = f"imbalance={asked.imbalance}" if asked.imbalance < 1 else ""
    task = TASKS.build(f"{spec}{(',' if ':' in spec else ':') + thin if thin else ''}")
    settings = {
        "task": TASKS.spec(task).replace(asked.root or "\0", "FOLDER"),
        "model": protocol.model,
        "eps": protocol.eps,
        "steps": protocol.steps,
        "recipe": protocol.recipe,
        "attack": ATTACK,
        "training_samples_by_class": torch.bincount(task.training().y).tolist(),
    }
    held = json.loads(asked.out.read_text()) if asked.out.is_file() else {"settings": settings, "runs": []}
    if held["settings"] != settings:
        raise SystemExit(f"{asked.out} was made under other settings; name another file")
    runs = held["runs"]
    for seed in asked.seeds:
        for row in asked.rows:
            if not any((each["row"], each["seed"]) == (row, seed) for each in runs):
                runs.append(played(protocol, task, row, seed))
                write(asked.out, settings, runs)
    write(asked.out, settings, runs)
    print("| setting | clean | PGD-20 | tail-30 | worst class | tail-30 gain | sign test | effective sample size |")
    print("|---|---|---|---|---|---|---|---|")
    for each in json.loads(asked.out.read_text())["summary"]:
        mean, gain = each["mean"], each["minus_reference"]["tail_30"]
        test = each.get("sign_test_tail_30", math.nan)
        print(
            f"| {each['row']} | {mean['clean']:.3f} | {mean['pgd']:.3f} | {mean['tail_30']:.3f} | "
            f"{mean['worst_class']:.3f} | {100 * sum(gain) / max(1, len(gain)):+.1f} | {test:.3f} | "
            f"{mean['effective_sample_size']:.2f} |"
        )


def write(out: Path, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """The file, whole after every run."""
    rows = list(dict.fromkeys(each["row"] for each in runs))
    document = {
        "commits": list(dict.fromkeys(each["commit"] for each in runs)),
        "settings": settings,
        "summary": [summary(runs, row) for row in rows],
        "runs": runs,
    }
    write_whole(out, json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
