"""A training by `fit` beside the bare passes of the same steps, and beside trainers of ART's."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from dataclasses import dataclass, replace
from importlib.metadata import distributions
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from advkit.benchmark.sides import one_thread
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.core.state import frozen
from advkit.defenses import DEFENSES
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.training.loop import Recipe, fit

ART = "adversarial-robustness-toolbox"
EPS = 0.1
BATCH = 128
SHAPE, CLASSES = (1, 14, 14), 10
RECIPE = Recipe(batch_size=BATCH, optimizer="sgd", lr=0.01, validation=0.0, select="last")
RNG = RowRng.from_ids(0, ["overhead"])


def random_rows(rows: int) -> Data:
    """Images of noise with labels drawn alike."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand((rows, *SHAPE), generator=generator)
    return Data(x, torch.randint(CLASSES, (rows,), generator=generator), Box(shape=SHAPE), CLASSES, "random rows")


def network(name: str) -> TorchModel:
    """An architecture with random weights, as one module."""
    built = MODELS.build(name)(SHAPE, CLASSES, RNG.at("init"))
    whole: TorchModel = built.with_module(Whole(built.module))
    return whole


class Whole(nn.Module):
    """A network as one module: ART calls the layers of a Sequential one by one, and its fast trainer fails on that."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(x)
        return answer


@dataclass(frozen=True)
class Step:
    """What a training step sent through the network: rows to differentiate, rows to train on, and their labels."""

    attacked: tuple[Tensor, ...]
    trained: Tensor
    labels: Tensor


def recorded(spec: str, recipe: Recipe, model: TorchModel, data: Data) -> list[Step]:
    """The inputs of the network in a training by `fit`, step by step: how long a pass takes depends on the values."""
    defense: Any = DEFENSES.build(spec)
    objective = defense.objective()
    plain, steps = objective.loss, []

    def loss(now: TorchModel, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
        seen: list[Tensor] = []
        handle = now.module.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))
        answer: Tensor = plain(now, x, y, rows, rng)
        handle.remove()
        steps.append(Step(tuple(seen[:-1]), seen[-1], y))
        return answer

    objective.loss = loss
    fit(model, data, objective, recipe, RNG, progress=False)
    return steps


def bare(mode: bool, module: nn.Module, optimizer: torch.optim.Optimizer, step: Step) -> None:
    """A step's passes and the optimiser's; `mode` is the network's training mode while the input is differentiated."""
    module.train(mode)
    with frozen(module):
        for z in step.attacked:
            leaf = z.clone().requires_grad_()
            torch.autograd.grad(cross_entropy(module(leaf), step.labels, reduction="sum"), leaf)
    module.train()
    optimizer.zero_grad()
    cross_entropy(module(step.trained), step.labels).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def ours(
    spec: str, recipe: Recipe, model: TorchModel, data: Data, module: nn.Module, steps: list[Step]
) -> tuple[float, float]:
    """CPU seconds of a training by `fit`, and of the bare passes of the same steps, which alternate with its own."""
    defense: Any = DEFENSES.build(spec)
    optimizer, left = sgd(module), iter(steps)
    objective = defense.objective()
    plain, seconds = objective.stepped, 0.0

    def stepped(now: TorchModel) -> None:
        nonlocal seconds
        plain(now)
        begin = time.process_time()
        bare(defense.mode == "train", module, optimizer, next(left))
        seconds += time.process_time() - begin

    objective.stepped = stepped
    begin = time.process_time()
    fit(model, data, objective, recipe, RNG, progress=False)
    return time.process_time() - begin - seconds, seconds


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=RECIPE.lr, momentum=RECIPE.momentum)


def art(trainer: str, steps: int, epochs: int, model: TorchModel, data: Data) -> None:
    """A training by a trainer of ART's."""
    from art.defences.trainer import AdversarialTrainerFBFPyTorch, AdversarialTrainerMadryPGD
    from art.estimators.classification import PyTorchClassifier

    module = model.copy().module
    network = PyTorchClassifier(
        module,
        nn.CrossEntropyLoss(),
        SHAPE,
        CLASSES,
        optimizer=sgd(module),
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    x, y = data.x.numpy(), nn.functional.one_hot(data.y, CLASSES).float().numpy()
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        if trainer == "fbf":
            AdversarialTrainerFBFPyTorch(network, eps=EPS).fit(x, y, batch_size=BATCH, nb_epochs=epochs)
            return
        made = AdversarialTrainerMadryPGD(
            network, nb_epochs=epochs, batch_size=BATCH, eps=EPS, eps_step=2.5 * EPS / steps, max_iter=steps
        )
        if trainer == "madry_whole":
            made.attack.set_params(batch_size=BATCH)
        made.fit(x, y)


def epoch_ratios(steps: int, *, net: str = "cnn", rows: int = 512, repetitions: int = 3) -> dict[str, float]:
    """CPU time of PGD training by `fit` over its bare passes, and of ART's Madry trainer over it where installed.

    Medians; ART's attack takes a batch in pieces of 32, as its trainer makes it.
    """
    model, data, recipe = network(net), random_rows(rows), replace(RECIPE, epochs=1)
    spec = f"pgd_at:eps={EPS},steps={steps}"
    found: dict[str, list[float]] = {}
    installed = {each.name for each in distributions()}  # several packages are called art
    with one_thread():
        inputs = recorded(spec, recipe, model, data)
        for turn in range(repetitions + 1):
            own, alone = ours(spec, recipe, model, data, model.copy().module, inputs)
            ratios = {"fit_over_bare": own / alone}
            if ART in installed:
                begin = time.process_time()
                art("madry", steps, recipe.epochs, model, data)
                ratios["madry_over_fit"] = (time.process_time() - begin) / own
            for name, ratio in ratios.items() if turn else ():  # the first turn warms up
                found.setdefault(name, []).append(ratio)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}
