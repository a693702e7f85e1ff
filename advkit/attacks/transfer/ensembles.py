"""Parts for several sources at once, given as an ensemble: any model whose `models` are its members."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from advkit.attacks.base import TensorOracle, descended
from advkit.attacks.transfer.engine import Ask, GradientRule, Objective, Run
from advkit.attacks.transfer.features import unit
from advkit.attacks.wrappers import accumulated, normalised
from advkit.core.checks import at_least_one, not_negative, positive
from advkit.core.errors import UsageError
from advkit.core.protocols import Composite, Data, Rng


def members(oracle: TensorOracle, part: str) -> list[TensorOracle]:
    """An oracle of every member of the source; UsageError where it is a single model."""
    found: list[int] = []

    def count(model: Any) -> Any:
        found.append(len(model.models) if isinstance(model, Composite) else 0)
        return model

    oracle.seen_as(count)
    if not found[0]:
        raise UsageError(f"{part} works on several sources, and there is one; name more (sources=a+b+c)")
    return [oracle.seen_as(_Member(k)) for k in range(found[0])]


@dataclass(frozen=True)
class _Member:
    number: int

    def __call__(self, model: Any) -> Any:
        return model.models[self.number]


@dataclass(frozen=True, kw_only=True)
class Ens(Objective):
    """Attack the mean of the sources' logits (arXiv 1710.06081): what an ensemble of sources answers anyway.

    Refuses a single source, that is all.
    """

    def begin(self, run: Run) -> Ask:
        members(run.oracle, "ens")
        return run.ask


@dataclass(frozen=True, kw_only=True)
class SVRE(GradientRule):
    """Inner steps on one source at a time, their variance taken out by the ensemble's (arXiv 2111.10752).

    rounds: inner steps per source and step, >= 1
    inner:  decay of the momentum of the inner steps, >= 0

    Sources are drawn, the same ones for all rows. The sources' gradients at the point itself are asked once per step,
    not anew in every inner step.
    """

    momentum: ClassVar[float | None] = 1.0
    rounds: int = 4
    inner: float = 1.0

    def __post_init__(self) -> None:
        at_least_one(self, "rounds")
        not_negative(self, "inner")

    def __call__(self, p: Tensor, run: Run) -> Tensor:
        asks = [run.asking(oracle, run.goal) for oracle in members(run.oracle, "svre")]
        together = run.gradient(p)
        single = [run.gradient(p, ask) for ask in asks]
        generator = run.rng.at("svre", run.step).generator("cpu")
        z, velocity = p, None
        for k in torch.randint(len(asks), (self.rounds * len(asks),), generator=generator).tolist():
            gradient = run.gradient(z, asks[k]) - single[k] + together
            velocity = accumulated(velocity, normalised(gradient), self.inner)
            z = descended(run.ball, z, velocity, run.x, run.step_size)
        assert velocity is not None
        return velocity


@dataclass(frozen=True, kw_only=True)
class CWA(GradientRule):
    """A step back along the ensemble's gradient, then one forward per source; the way made is the gradient
    (common weakness, arXiv 2303.09105).

    back:   length of the step back, in units of eps, >= 0
    ahead:  length of a source's step, in L2, on a 3 x 224 x 224 image; scaled to the size at hand, > 0
    inner:  decay of the momentum of the sources' steps, which goes on from step to step, >= 0
    """

    momentum: ClassVar[float | None] = 1.0
    back: float = 1 / 15
    ahead: float = 250.0
    inner: float = 1.0

    def __post_init__(self) -> None:
        not_negative(self, "back", "inner")
        positive(self, "ahead", what="length")

    def __call__(self, p: Tensor, run: Run) -> Tensor:
        asks = [run.asking(oracle, run.goal) for oracle in members(run.oracle, "cwa")]
        ahead = self.ahead * (p[0].numel() / (3 * 224 * 224)) ** 0.5
        z = run.ball.project(p + self.back * run.reach * run.gradient(p).sign(), run.x)
        velocity: Tensor | None = run.memory.get("cwa")
        for ask in asks:
            velocity = accumulated(velocity, unit(run.gradient(z, ask)), self.inner)
            z = run.ball.project(z - ahead * velocity, run.x)
            run.memory["cwa"] = velocity
        return torch.sub(p, z)


@dataclass(frozen=True, kw_only=True)
class LGV(Objective):
    """Ask another snapshot of the source at every step, in shuffled order (large geometric vicinity, arXiv 2207.13129).

    The snapshots are the members of the ensemble that the source is: `snapshots` makes them.
    """

    def begin(self, run: Run) -> Ask:
        asks = [run.asking(oracle, run.goal) for oracle in members(run.oracle, "lgv")]
        order = torch.randperm(len(asks), generator=run.rng.at("lgv").generator("cpu")).tolist()

        def ask(points: Tensor, copies: int = 1) -> Tensor:
            place: int = order[run.step % len(order)]
            return asks[place](points, copies)

        return ask


def snapshots(
    model: Any, data: Data, rng: Rng, *, epochs: int = 10, each: int = 4, lr: float = 0.05, batch_size: int = 128
) -> tuple[Any, ...]:
    """Models on the way that `model` takes when it is trained on at a high constant learning rate, for `lgv`.

    SGD with momentum 0.9 and weight decay 1e-4 as published; the model itself is left alone. Put them into an Ensemble.

    each: snapshots per epoch, >= 1
    """
    if epochs < 1 or each < 1 or not lr > 0:
        raise UsageError(f"epochs={epochs}, each={each}, lr={lr}; expected numbers of at least 1 and a positive rate")
    trained = model.copy()
    module: nn.Module = trained.module.train()
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    found = []
    for epoch in range(epochs):
        order = torch.randperm(len(data), generator=rng.at("lgv epoch", epoch).generator("cpu"))
        batches = torch.split(order, batch_size)
        ends = {round((i + 1) * len(batches) / each) for i in range(each)}
        for number, rows in enumerate(batches, 1):
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(nn.functional.cross_entropy(trained(data.x[rows]), data.y[rows]))
            optimizer.step()
            if number in ends:
                still = copy.deepcopy(module).eval()
                for parameter in still.parameters():
                    parameter.grad = None
                found.append(model.with_module(still))
    return tuple(found)
