"""Fast minimum-norm attack (Pintor et al., arXiv 2102.12827)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import NEWTON, NORMS, PATIENCE, PUSH, Look, MinimalAttack, NearestSearch, lengthened
from advkit.attacks.minimal.faces import Either
from advkit.attacks.minimal.hyperplane import close_gap
from advkit.attacks.minimal.radius import within
from advkit.core.checks import at_least, at_least_one, fraction, positive

ONTO = 10  # steps onto the linearised boundary; rows that it does not take across go on as published
FURTHER = 0.02  # how far beyond the linearised boundary the first steps go


@dataclass(frozen=True, kw_only=True)
class FMN(MinimalAttack):
    """FMN: fast minimum norm, in L0, L1, L2 and Linf.

    Every step goes down the margin and is cut to a radius of the row's own, which shrinks where the goal is reached and
    grows where it is not.

    steps:     gradient steps, >= 1
    step_size: L2 length of the first step, > 0, in units of the space; it falls along a cosine to a hundredth
    gamma:     by how much of itself the radius changes per step at first, in (0, 1); falls to a fiftieth. In L0 by one
               position at the least
    bisections: answers at the end, after a look, that bisect how many of the changed positions are needed (L0 alone)

    Costs a gradient per step and one answer. Raises UsageError for values out of range and for other threat models.

    Unlike the published code, features at the edge of the box take no part in the length of a step that would lead
    outside (on black ground they are half of a gradient, and rows are lost); before its first success a row steps onto
    the linearised boundary within the box, as DeepFool does (in L0 only in the second half of the steps).
    """

    name: ClassVar[str] = "fmn"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l0", "minimum-l1", "minimum-l2", "minimum-linf")

    steps: int = 100
    step_size: float = 1.0
    gamma: float = 0.05
    bisections: int = 5

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        at_least(self, 0, "bisections")
        positive(self, "step_size")
        fraction(self, "gamma", ends="()")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        self._walk(search, norm)
        if norm == "l0":
            search.tighten(0, self.bisections)

    def _walk(self, search: NearestSearch, norm: str) -> None:
        aim = search.goal.under("margin")
        look = search.look(search.x, aim)
        value, gradient, ever = look.loss, look.gradient, look.reached
        radius = torch.ones_like(value)
        rows = search.leave(look.reached)
        if rows is not None:
            aim = aim.take(rows)
            value, gradient, radius, ever = kept(rows, value, gradient, radius, ever)
        z = search.x
        for step in range(1, self.steps + 1):
            if not len(search) or not search.affords():
                return
            wave = (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2
            ahead = _cut(search, z, gradient, radius, self.step_size * (0.01 + 0.99 * wave))
            if (step > self.steps / 2 if norm == "l0" else step <= ONTO) and not bool(ever.all()):
                ahead = torch.where(per_row(ever, z), ahead, _onto(search, z, value, gradient, step))
            z = ahead
            if step == self.steps:
                search.ask(z)
                return
            # Where several boundaries meet, the margin's gradient zigzags: rows that it takes nowhere descend the loss.
            lost = ~ever if step >= ONTO else torch.zeros_like(ever)
            look = search.look(z, Either(search.goal, aim, lost) if step >= ONTO else aim)
            radius = self._radius(search, look, radius, ever, self.gamma * (0.02 + 0.98 * wave))
            value, gradient, ever = look.loss, look.gradient, ever | look.reached

    def _radius(self, search: NearestSearch, look: Look, radius: Tensor, ever: Tensor, gamma: float) -> Tensor:
        """The length of the next perturbation: less after a success, more after a failure."""
        if search.threat.least == "l0":
            less = torch.minimum(torch.minimum(radius - 1, (radius * (1 - gamma)).floor()), search.away - 1)
            less = less.clamp_min(1)
            more = torch.maximum(radius + 1, (radius * (1 + gamma)).floor())
        else:
            less = torch.where(ever, torch.minimum(radius * (1 - gamma), search.away), search.away * (1 - gamma))
            more = torch.where(ever, radius, look.distance) * (1 + gamma)
        return torch.where(look.reached, less, more)


def _cut(search: NearestSearch, z: Tensor, gradient: Tensor, radius: Tensor, rate: float) -> Tensor:
    """A step of length `rate` down the gradient, and the perturbation cut to the radius [n]."""
    low, high = search.threat.box.bounds_like(z)
    # What would leave the box takes no part in the step's length: on black ground it is half of a gradient.
    free = torch.where(gradient > 0, z > low, z < high)
    move = z - search.x - lengthened(gradient * free, torch.full_like(radius, rate))
    return search.legal(search.x + within(move, radius, search.threat))


def _onto(search: NearestSearch, z: Tensor, value: Tensor, gradient: Tensor, step: int) -> Tensor:
    """A step onto the linearised boundary, and further the longer it takes to get across."""
    low, high = search.threat.box.bounds_like(z)
    further = 1 + min(1.0, FURTHER * PUSH ** max(0, step - PATIENCE))
    move = close_gap(z, gradient, value, low, high, NORMS.get(search.threat.least, "L1"), NEWTON)
    return search.legal(z + further * move)
