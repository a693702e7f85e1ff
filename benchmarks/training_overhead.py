"""A training epoch of ours beside the bare passes that the method needs and beside ART's trainers, in one process.

python benchmarks/training_overhead.py [--root FOLDER] [--rows 2560] [--repetitions 7] [--out docs/training_overhead.json]

Sides, one epoch each on the same rows, network, batch size, optimiser and inner attack (Linf eps 0.1, random start):

    bare      the forward and backward passes of the method and the optimiser's steps, nothing else: no random start, no
              step, no shuffling. The attack's passes differentiate the input alone, with parameters frozen
    fit       `advkit.training.loop.fit` as a user calls it, its preparations included
    madry     ART's AdversarialTrainerMadryPGD with as many steps; its attack takes a batch in pieces of 32
    madry_whole    the same with an attack that takes the batch as one, which the trainer has no argument for
    fbf       ART's AdversarialTrainerFBFPyTorch (FGSM with a random start), which takes AAER's passes

ART has no AAER. Beside `aaer` stand its two trainers that take the same two forward and two backward passes: `madry`
with one step, and `fbf`. CPU seconds on one thread; the sides alternate, and a ratio is the median over the repetitions
of the ratio of neighbouring runs. Passes are counted on the network, with the same hooks on every side. Without ART its
sides are left out, without a folder the rows are random.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from advkit.benchmark import counted, environment
from advkit.benchmark.sides import one_thread
from advkit.core.files import write_whole
from advkit.core.oracle import frozen
from advkit.core.protocols import Data
from advkit.core.provenance import commit_text
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.training.loop import Recipe, fit

EPS = 0.1
STEPS = 5
BATCH = 128
SHAPE, CLASSES = (1, 14, 14), 10
RECIPE = Recipe(epochs=1, batch_size=BATCH, optimizer="sgd", lr=0.01, validation=0.0, select="last")
METHODS = {"pgd_at": f"pgd_at:eps={EPS},steps={STEPS}", "aaer": f"aaer:eps={EPS}"}


def rows_of(root: str, rows: int) -> Data:
    """Fashion-MNIST averaged to 14x14, or random rows of that shape."""
    if root:
        data: Data = TASKS.build(f"fashion-mnist:size=14,train={rows},root={root}").training()
        return data
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((rows, *SHAPE), generator=generator)
    return Data(x, torch.randint(CLASSES, (rows,), generator=generator), Box(shape=SHAPE), CLASSES, "random rows")


class Whole(nn.Module):
    """A network as one module: ART calls the layers of a Sequential one by one, and its fast trainer fails on that."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(x)
        return answer


def bare_pgd_at(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step of `pgd_at`: the inner attack's gradients in evaluation mode, and a training step."""
    module.eval()
    with frozen(module):
        for _ in range(STEPS):
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(cross_entropy(module(leaf), y, reduction="sum"), leaf)
    module.train()
    optimizer.zero_grad()
    cross_entropy(module(x), y).backward()
    optimizer.step()


def bare_aaer(module: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """One step of `aaer`: a gradient in training mode, and a training step."""
    module.train()
    with frozen(module):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(cross_entropy(module(leaf), y, reduction="sum"), leaf)
    optimizer.zero_grad()
    cross_entropy(module(x), y).backward()
    optimizer.step()


def bare(step: Callable[..., None], model: TorchModel, data: Data) -> None:
    """One epoch of bare passes."""
    module = model.copy().module
    optimizer = torch.optim.SGD(module.parameters(), lr=RECIPE.lr, momentum=RECIPE.momentum)
    for x, y in zip(data.x.split(BATCH), data.y.split(BATCH), strict=True):
        step(module, optimizer, x, y)


def ours(method: str, model: TorchModel, data: Data) -> None:
    """One epoch of `fit`."""
    defense: Any = DEFENSES.build(METHODS[method])
    fit(model, data, defense.objective(), RECIPE, RowRng.from_ids(0, ["overhead"]), progress=False)


def art(trainer: str, steps: int, model: TorchModel, data: Data) -> None:
    """One epoch of a trainer of ART's."""
    from art.defences.trainer import AdversarialTrainerFBFPyTorch, AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    module = model.copy().module
    optimizer = torch.optim.SGD(module.parameters(), lr=RECIPE.lr, momentum=RECIPE.momentum)
    network = PyTorchClassifier(
        module,
        nn.CrossEntropyLoss(),
        SHAPE,
        CLASSES,
        optimizer=optimizer,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    x, y = data.x.numpy(), nn.functional.one_hot(data.y, CLASSES).float().numpy()
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        if trainer == "fbf":
            AdversarialTrainerFBFPyTorch(network, eps=EPS).fit(x, y, batch_size=BATCH, nb_epochs=1)
            return
        made = AdversarialTrainerMadryPGD(
            network, nb_epochs=1, batch_size=BATCH, eps=EPS, eps_step=2.5 * EPS / steps, max_iter=steps
        )
        if trainer == "madry_whole":
            made.attack.set_params(batch_size=BATCH)
        made.fit(x, y)


def sides_of(method: str, with_art: bool) -> dict[str, Callable[[TorchModel, Data], None]]:
    """What is timed, by name."""
    step = {"pgd_at": bare_pgd_at, "aaer": bare_aaer}[method]
    sides: dict[str, Callable[[TorchModel, Data], None]] = {"bare": partial(bare, step), "fit": partial(ours, method)}
    if with_art:
        for trainer in ("madry", "madry_whole"):
            sides[trainer] = partial(art, trainer, STEPS if method == "pgd_at" else 1)
        if method == "aaer":
            sides["fbf"] = partial(art, "fbf", 1)
    return sides


def measured(method: str, net: str, data: Data, repetitions: int, with_art: bool) -> dict[str, Any]:
    """Passes per row and ratios of CPU time, for one method on one network."""
    built = MODELS.build(net)(SHAPE, CLASSES, RowRng.from_ids(0, ["overhead"]).at("init"))
    model = built.with_module(Whole(built.module))
    sides = sides_of(method, with_art)
    names = list(sides)
    passes = {}
    for name, side in sides.items():  # which warms up, too
        with counted(model.module) as count:
            side(model, data)
        passes[name] = {"forwards": count.forwards / len(data), "backwards": count.backwards / len(data)}
    times: list[dict[str, float]] = []
    for turn in range(repetitions):
        seconds = {}
        for position in range(len(names)):
            name = names[(position + turn) % len(names)]
            begin = time.process_time()
            sides[name](model, data)
            seconds[name] = time.process_time() - begin
        times.append(seconds)
    ratios = {"fit_over_bare": [each["fit"] / each["bare"] for each in times]}
    ratios |= {f"{name}_over_fit": [each[name] / each["fit"] for each in times] for name in names[2:]}
    return {
        "method": METHODS[method],
        "network": net,
        "passes_per_row": passes,
        "ratios": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "quartiles": {
            name: [round(cut, 3) for cut in statistics.quantiles(values, n=4)[::2]] for name, values in ratios.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="", help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--rows", type=int, default=2560)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--networks", default="cnn,resnet8")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    logging.getLogger("advkit").setLevel(logging.ERROR)
    with_art = importlib.util.find_spec("art") is not None
    if not with_art:
        print("adversarial-robustness-toolbox is not installed: its sides are left out")
    data = rows_of(given.root, given.rows)
    versions = environment()
    if with_art:
        versions["adversarial-robustness-toolbox"] = importlib.metadata.version("adversarial-robustness-toolbox")
    made: dict[str, Any] = {
        "commit": commit_text("advkit", "benchmarks"),
        "environment": versions,
        "data": "random rows" if not given.root else "fashion-mnist:size=14",
        "rows": len(data),
        "batch_size": BATCH,
        "repetitions": given.repetitions,
        "results": [],
    }
    with one_thread():
        for net in given.networks.split(","):
            for method in given.methods.split(","):
                found = measured(method, net, data, given.repetitions, with_art)
                made["results"].append(found)
                print(json.dumps(found), flush=True)
    if given.out:
        write_whole(given.out, json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
