"""Catastrophic overfitting of single-step training, and AAER against it: the small protocol, every seed in one JSON.

Fashion-MNIST averaged to 14x14: the first 4,000 training images, the next 512 held out for the detector, the first
1,000 test images for clean accuracy and the first 500 for FGSM (every image moved, the papers' count) and PGD-20 (step
eps/4, by the harness). A network of three convolutions with batch normalisation, SGD with momentum 0.9 and weight decay
5e-4, batches of 128, 20 epochs, a learning rate that rises to 0.2 at half time and falls to zero. Weights of the last
epoch, no early stop: the collapse has to be seen.

python benchmarks/catastrophic_overfitting.py --root FOLDER [--seeds 11,12,13] [--methods fgsm_rs,aaer] [--out FILE]

`--task digits` repeats it on the embedded 8x8 digits, which needs no download. A file that is there is continued:
what it holds is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advkit.core.files import write_whole
from advkit.core.protocols import Data
from advkit.core.provenance import commit_text
from advkit.core.rng import RowRng
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.one_step import correct_after
from advkit.evaluation.api import evaluate
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.training.loop import Recipe, correct, fit, log_entries

HELD = 512
TRAINED = 4_000
METHODS = {
    "fgsm_at": "fgsm_at",
    "fgsm_rs": "fgsm_rs",
    "n_fgsm": "n_fgsm",
    "grad_align": "grad_align:weight=2.0",
    "free_at": "free_at:replays=4",
    "aaer": "aaer:base=fgsm_rs,lambda1=1.0,lambda2=4.0,lambda3=4.0,ce_grad=true",
    "aaer-n_fgsm": "aaer:base=n_fgsm,lambda1=1.0,lambda2=4.0,lambda3=4.0,ce_grad=true",
    "pgd_at": "pgd_at:steps=5",
}


def network(shape: tuple[int, ...], classes: int, seed: int) -> TorchModel:
    """Three convolutions with batch normalisation and a linear layer; weights drawn from the seed."""
    channels, height, width = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for into, out, stride in ((channels, 16, 1), (16, 32, 2), (32, 64, 2)):
            layers += [nn.Conv2d(into, out, 3, stride=stride, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        sides = [(side + 3) // 4 for side in (height, width)]  # two strides of 2, rounded up
        module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * math.prod(sides), classes))
    return TorchModel(module, None, classes)


class Passes:
    """Rows that went forward through a module."""

    def __init__(self, module: nn.Module) -> None:
        self.rows = 0
        module.register_forward_hook(self.count)

    def count(self, module: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> None:
        self.rows += len(given[0])


def robust_accuracy(model: TorchModel, task: Any, eps: float, n: int) -> float:
    """Under PGD-20, by the harness."""
    threat = f"linf:eps={eps!r}"
    report = evaluate("pgd:steps=20,step_size=0.25", "none", task, model, threat, n=n, device="cpu", progress=False)
    return float(report.robust_accuracy)


def played(name: str, seed: int, data: Data, task: Any, eps: float, epochs: int) -> dict[str, Any]:
    """One run: train to the last epoch and evaluate its weights."""
    test: Any = next(iter(task.batches(1_000)))
    held = HELD / (HELD + TRAINED) if len(data) >= HELD + TRAINED else 0.15
    recipe = Recipe(
        epochs=epochs,
        batch_size=128,
        optimizer="sgd",
        lr=0.2,
        weight_decay=5e-4,
        schedule="onecycle",
        validation=held,
        select="last",
    )
    defense = DEFENSES.build(f"{METHODS[name]}{',' if ':' in METHODS[name] else ':'}eps={eps!r}")
    model = network(tuple(data.x.shape[1:]), data.classes, seed)
    done = fit(model, data, defense.objective(), recipe, RowRng.from_ids(seed, ["overfitting"]), progress=False)
    few, ball = min(500, len(test.x)), defense.ball(model.space)
    x, y, rng = test.x[:few], test.labels[:few], RowRng.from_ids(0, list(test.ids[:few]))
    figures = {
        "clean": float(correct(done.last, test.x, test.labels).mean()),
        "fgsm": float(correct_after(done.last, x, y, ball, rng).float().mean()),
        "pgd20": robust_accuracy(done.last, task, eps, few),
    }
    log = log_entries(done.log)
    for entry in log:
        entry.pop("seconds")
    return {
        "method": name,
        "defense": DEFENSES.spec(defense),
        "seed": seed,
        **{key: round(value, 4) for key, value in figures.items()},
        "abnormal_share": done.log[-1].figures.get("abnormal_share"),
        "fired_in_epochs": [e.epoch for e in done.log if e.figures.get("overfitting")],
        "fires_at_the_end": bool(done.log[-1].figures.get("overfitting")),
        "log": log,
    }


def forwards(name: str, data: Data, eps: float) -> float:
    """Forward passes per image and step, counted; each has its backward pass, GradAlign's second one has two."""
    defense = DEFENSES.build(f"{METHODS[name]}{',' if ':' in METHODS[name] else ':'}eps={eps!r}")
    objective = defense.objective()
    model = network(tuple(data.x.shape[1:]), data.classes, 0)
    counted = Passes(model.module)
    rows = torch.arange(min(128, len(data)))
    loss = objective.loss(model, data.x[rows], data.y[rows], rows, RowRng.from_ids(0, [str(int(row)) for row in rows]))
    loss.backward()
    return counted.rows / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="", help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--task", default="fashion-mnist", choices=["fashion-mnist", "digits"])
    parser.add_argument("--seeds", default="11,12,13")
    parser.add_argument("--methods", default="fgsm_rs,aaer,pgd_at")
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    logging.getLogger("advkit").setLevel(logging.ERROR)
    spec = f"fashion-mnist:size=14,train={HELD + TRAINED},root={given.root}" if given.task != "digits" else "digits"
    task = TASKS.build(spec)
    data = task.training()
    if data is None:
        raise SystemExit("the training images are not inside the package: say --root FOLDER")
    if len(data) >= HELD + TRAINED:  # the loop scores on the first rows
        order = torch.cat((torch.arange(TRAINED, TRAINED + HELD), torch.arange(TRAINED)))
        data = Data(data.x[order], data.y[order], data.space, data.classes, data.name)
    names = given.methods.split(",")
    made: dict[str, Any] = {"task": given.task, "eps": given.eps, "epochs": given.epochs, "runs": []}
    if given.out and given.out.exists():
        held = json.loads(given.out.read_text())
        if any(held[key] != made[key] for key in ("task", "eps", "epochs")):
            raise SystemExit(f"{given.out} holds other settings: name another file")
        made["runs"] = held["runs"]
    done = {(run["method"], run["seed"]) for run in made["runs"]}
    now = commit_text("advkit", "benchmarks")
    for name in names:
        for seed in map(int, given.seeds.split(",")):
            if (name, seed) in done:
                continue
            run = {"commit": now, **played(name, seed, data, task, given.eps, given.epochs)}
            run["forwards_per_image"] = forwards(name, data, given.eps)
            made["runs"].append(run)
            shown = {key: value for key, value in run.items() if key not in ("log", "defense")}
            print(json.dumps(shown), flush=True)
            if given.out:
                write_whole(given.out, json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
