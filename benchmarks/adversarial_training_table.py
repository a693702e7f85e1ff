"""Every training defense under the same protocol: accuracy, cost, seed by seed, in one JSON file and one table.

    python benchmarks/adversarial_training_table.py --root FOLDER --seeds 31 32 33 --out FILE.json
    python benchmarks/adversarial_training_table.py --task digits --seeds 31 32 33 --out FILE.json

Fashion-MNIST averaged to 14x14: the first 8,000 training images, all of them trained on, and the first 1,000 test
images; a small CNN, Adam at 2e-3, batches of 128, 10 epochs, weights of the last epoch, Linf 0.1. Every model of a seed
starts from the same weights and sees the same batches. The harness evaluates all test images: PGD-40 and the suite
`thorough` in white box, which is the adaptive attacker (a trained model is differentiated as it is), and PGD-40 made on
the undefended model of the same seed, which is the attacker who does not know the defense.

Passes are counted by a module around the network: rows that went forward, and rows whose logits got a gradient.
`--task digits` repeats it on the embedded 8x8 digits with an MLP, without a download. Runs that are in FILE.json are
not repeated; `--cost N` measures N rounds of processor time, one epoch of every method in turn.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any, Self

import torch
from torch import Tensor, nn

from advkit.core.files import write_whole
from advkit.core.protocols import Data
from advkit.core.provenance import commit_text
from advkit.defenses import DEFENSES
from advkit.evaluation.api import evaluate
from advkit.evaluation.victims import blank, training_rng
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.threat_models.transfer import Transfer
from advkit.training.loop import Fit, fit

PGD = "pgd:steps=40,step_size=0.1"
METHODS = {
    "none": "none",
    "fgsm_at": "fgsm_at",
    "fgsm_rs": "fgsm_rs",
    "n_fgsm": "n_fgsm",
    "grad_align": "grad_align:weight=0.2",
    "free_at": "free_at:replays=4",
    "aaer on fgsm_rs": "aaer:base=fgsm_rs,lambda2=2.5,lambda3=1.5",
    "aaer on n_fgsm": "aaer:base=n_fgsm,lambda2=1.5,lambda3=0.15",
    "pgd_at": "pgd_at:{steps}",
    "trades": "trades:beta=6,{steps}",
    "mart": "mart:beta=5,{steps}",
    "awp on pgd_at": "awp:base=[pgd_at:eps={eps},{steps}],gamma=0.01",
    "awp on trades": "awp:base=[trades:beta=6,eps={eps},{steps}],gamma=0.005",
    "doubly_robust": "doubly_robust:r=1,{steps}",
    "conadv": "conadv:tau=1",
}
ACCURACIES = {
    "clean": "clean",
    "pgd": "PGD-40",
    "thorough": "`thorough`",
    "tail_30": "tail-30",
    "worst_class": "worst class",
    "transfer": "transfer",
}


@dataclass(frozen=True)
class Protocol:
    """What differs between the tasks."""

    task: str
    model: str
    eps: float
    steps: int
    epochs: int
    batch_size: int


PROTOCOLS = {
    "fashion-mnist": Protocol("fashion-mnist:size=14,train=8000,test=1000,root={root}", "cnn", 0.1, 5, 10, 128),
    "digits": Protocol("digits", "mlp:hidden=128+128", 0.15, 4, 25, 64),
}


class Passes:
    """Rows that went forward through a network, and rows whose logits got a gradient; copies count here, too."""

    def __init__(self) -> None:
        self.forward = self.backward = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def differentiated(self, gradient: Tensor) -> None:
        self.backward += len(gradient)


class Counted(nn.Module):
    """A network that counts its passes."""

    def __init__(self, network: nn.Module, passes: Passes) -> None:
        super().__init__()
        self.network, self.passes = network, passes

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.network(x)
        self.passes.forward += len(x)
        if answer.requires_grad:
            answer.register_hook(self.passes.differentiated)
        return answer


@dataclass(frozen=True)
class Setting:
    """A protocol with its task loaded.

    epochs:     of training; the protocol's, or fewer
    surrogates: undefended models made so far, by seed
    """

    protocol: Protocol
    task: Any
    epochs: int
    surrogates: dict[int, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, root: str = "", epochs: int = 0) -> Self:
        """epochs: 0 for the protocol's."""
        protocol = PROTOCOLS[name]
        task = TASKS.build(protocol.task.format(root=root))
        if task.training() is None:
            raise SystemExit("the training images are not inside the package: say --root FOLDER")
        return cls(protocol, task, epochs or protocol.epochs)

    def defense(self, method: str, epochs: int = 0) -> Any:
        """The training defense of a row of the table."""
        protocol = self.protocol
        spec = METHODS[method].format(eps=protocol.eps, steps=f"steps={protocol.steps}")
        spec += f"{',' if ':' in spec else ':'}recipe=[epochs={epochs or self.epochs},"
        spec += f"batch_size={protocol.batch_size},validation=0,select=last]"
        return DEFENSES.build(spec if method.startswith(("none", "awp")) else f"{spec},eps={protocol.eps}")

    def fitted(self, method: str, seed: int, data: Data, epochs: int = 0, passes: Passes | None = None) -> Fit:
        """A training run from the seed's initial weights."""
        defense, model = self.defense(method, epochs), blank(self.protocol.model, self.task, seed)
        if passes is not None:
            model = TorchModel(Counted(model.module, passes), model.space, model.classes)
        return fit(model, data, defense.objective(), defense.recipe, training_rng(seed), progress=False)

    def undefended(self, seed: int) -> Any:
        """The model that the attacker without knowledge of the defense attacks."""
        if seed not in self.surrogates:
            self.surrogates[seed] = self.fitted("none", seed, self.task.training()).last
        return self.surrogates[seed]

    def evaluated(self, attack: str, model: Any, threat_model: Any) -> Any:
        """The harness's report on all test samples."""
        return evaluate(
            attack, task=self.task, model=model, threat_model=threat_model, device="cpu", beside=False
        ).to_dict()

    def played(self, method: str, seed: int) -> dict[str, Any]:
        """One run: trained, and evaluated under the three attackers."""
        started = time.process_time()
        done = self.fitted(method, seed, self.task.training())
        trained = time.process_time() - started
        eps, model = self.protocol.eps, done.last
        white = f"linf:eps={eps}"
        pgd, suite = (self.evaluated(attack, model, white) for attack in (PGD, "thorough"))
        transfer = None
        if method != "none":
            owned = Transfer(eps=eps, lattice=0, sources=(self.undefended(seed),))
            transfer = _value(self.evaluated(PGD, model, owned), "robust_accuracy")
        return {
            "method": method,
            "seed": seed,
            "commit": commit_text("advkit", "benchmarks"),
            "defense": DEFENSES.spec(self.defense(method)),
            "n": suite["metrics"]["robust_accuracy"]["denominator"],
            "clean": _value(suite, "clean_accuracy"),
            "pgd": _value(pgd, "robust_accuracy"),
            "thorough": _value(suite, "robust_accuracy"),
            "tail_30": _value(suite, "tail_30_accuracy"),
            "worst_class": _value(suite, "worst_class_accuracy"),
            "transfer": transfer,
            "effective_sample_size": done.log[-1].figures.get("effective_sample_size"),
            "flags": sorted({each["id"] for each in suite["diagnostics"]["flags"]}),
            "training_cpu_seconds": round(trained, 2),
        }

    def counted(self, method: str) -> dict[str, float]:
        """Passes per image and optimiser step, over one epoch of four batches."""
        data: Any = self.task.training()
        rows = 4 * self.protocol.batch_size
        few = Data(data.x[:rows], data.y[:rows], data.space, data.classes, data.name)
        passes = Passes()
        self.fitted(method, 0, few, epochs=1, passes=passes)
        images = rows * self.defense(method).objective().replays
        return {"forward": passes.forward / images, "backward": passes.backward / images}

    def timed(self, method: str) -> float:
        """Processor seconds of as many optimiser steps as an epoch has batches."""
        data = self.task.training()
        started = time.process_time()
        self.fitted(method, 0, data, epochs=1)
        return (time.process_time() - started) / self.defense(method).objective().replays


def _value(report: dict[str, Any], metric: str) -> float:
    return float(report["metrics"][metric]["value"])


def cost(setting: Setting, methods: list[str], rounds: int) -> dict[str, Any]:
    """Passes and processor time of every method; the rounds go through all methods in turn."""
    passes = {method: setting.counted(method) for method in methods}  # first: what is slow but once is over then
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(rounds):
        for method in methods:
            seconds[method].append(setting.timed(method))
    plain = seconds["none"]
    return {
        "commit": commit_text("advkit", "benchmarks"),
        "rounds": rounds,
        "methods": {
            method: {
                **passes[method],
                "cpu_seconds_per_epoch": [round(each, 3) for each in own],
                "relative_cpu": median(one / other for one, other in zip(own, plain, strict=True)),
            }
            for method, own in seconds.items()
        },
    }


def figure(value: float) -> str:
    """An accuracy without its leading zero."""
    return f"{value:.3f}".removeprefix("0") if value < 1 else f"{value:.3f}"


def spread(values: list[float]) -> str:
    """The mean over the seeds, and the least and the greatest."""
    return f"{figure(fmean(values))} ({figure(min(values))}-{figure(max(values))})"


def table(made: dict[str, Any]) -> str:
    """The table as the docs have it."""
    names = ["method", *ACCURACIES.values(), "forward / backward passes", "processor time", "effective sample size"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for method in dict.fromkeys(run["method"] for run in made["runs"]):
        own = [run for run in made["runs"] if run["method"] == method]
        cells = [f"`{method}`"]
        for key in ACCURACIES:
            values = [run[key] for run in own]
            cells.append("" if None in values else spread(values))
        spent = made.get("cost", {}).get("methods", {}).get(method)
        passes = (
            [f"{spent['forward']:g} / {spent['backward']:g}", f"{spent['relative_cpu']:.1f}"] if spent else ["", ""]
        )
        cells += passes
        sizes = [run["effective_sample_size"] for run in own]
        cells.append("" if None in sizes else f"{fmean(sizes):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Play what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=PROTOCOLS, default="fashion-mnist")
    parser.add_argument("--root", default="", help="folder of the Fashion-MNIST files")
    parser.add_argument("--seeds", type=int, nargs="*", default=[31, 32, 33])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--epochs", type=int, default=0, help="0 for the protocol's")
    parser.add_argument("--cost", type=int, default=0, help="rounds of measuring processor time")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("advkit").setLevel(logging.ERROR)
    setting = Setting.of(asked.task, asked.root, asked.epochs)
    settings = {
        **asdict(setting.protocol),
        "task": setting.protocol.task.format(root="FOLDER"),
        "epochs": setting.epochs,
    }
    made = json.loads(asked.out.read_text()) if asked.out.is_file() else {"settings": settings, "runs": []}
    if made["settings"] != settings:
        raise SystemExit(f"{asked.out} was made under other settings; name another file")
    for seed in asked.seeds:
        for method in asked.methods:
            if not any((run["method"], run["seed"]) == (method, seed) for run in made["runs"]):
                made["runs"].append(setting.played(method, seed))
                order = {name: place for place, name in enumerate(METHODS)}
                made["runs"].sort(key=lambda run: (order[run["method"]], run["seed"]))
                write_whole(asked.out, json.dumps(made, indent=1) + "\n")
    if asked.cost:
        made["cost"] = cost(setting, asked.methods, asked.cost)
        write_whole(asked.out, json.dumps(made, indent=1) + "\n")
    print(table(made))


if __name__ == "__main__":
    main()
