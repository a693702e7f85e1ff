"""Fast minimum-norm attack (Pintor et al., arXiv 2102.12827)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import NORMS, Look, MinimalAttack, NearestSearch, lengthened
from advkit.attacks.minimal.hyperplane import close_gap
from advkit.attacks.minimal.radius import within
from advkit.core.checks import at_least_one, fraction, positive

NEWTON = 4
FURTHER = 1.02  # how far beyond the linearised boundary the first steps go


@dataclass(frozen=True, kw_only=True)
class FMN(MinimalAttack):
    name: ClassVar[str] = "fmn"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l0", "minimum-l1", "minimum-l2", "minimum-linf")

    steps: int = 100
    step_size: float = 1.0
    gamma: float = 0.05

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        positive(self, "step_size")
        fraction(self, "gamma", ends="()")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        aim = search.goal.under("margin")
        look = search.look(search.x, aim)
        value, gradient, ever, away = look.loss, look.gradient, look.reached, search.linear_distance(look)
        radius = torch.zeros_like(away)
        rows = search.leave(look.reached)
        if rows is not None:
            aim = aim.take(rows)
            value, gradient, radius, ever = kept(rows, value, gradient, radius, ever)
        z = search.x
        for step in range(1, self.steps + 1):
            if not len(search) or not search.affords():
                return
            wave = (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2
            z = self._next(search, z, value, gradient, radius, ever, self.step_size * (0.01 + 0.99 * wave))
            if step == self.steps:
                search.ask(z)
                return
            look = search.look(z, aim)
            radius = self._radius(search, look, radius, ever, self.gamma * (0.02 + 0.98 * wave))
            value, gradient, ever = look.loss, look.gradient, ever | look.reached

    def _next(
        self,
        search: NearestSearch,
        z: Tensor,
        value: Tensor,
        gradient: Tensor,
        radius: Tensor,
        ever: Tensor,
        rate: float,
    ) -> Tensor:
        """A step down and onto the radius; before the first success, onto the linearised boundary."""
        low, high = search.threat.box.bounds_like(z)
        move = z - search.x
        onto = move + FURTHER * close_gap(z, gradient, value, low, high, NORMS.get(search.threat.least, "L1"), NEWTON)
        # What would leave the box takes no part in the step's length: on black ground it is half of a gradient.
        free = torch.where(gradient > 0, z > low, z < high)
        move = move - lengthened(gradient * free, torch.full_like(radius, rate))
        move = torch.where(per_row(ever, z), within(move, radius, search.threat), onto)
        return search.legal(search.x + move)

    def _radius(self, search: NearestSearch, look: Look, radius: Tensor, ever: Tensor, gamma: float) -> Tensor:
        """The length of the next perturbation: less after a success, more after a failure."""
        if search.threat.least == "l0":
            less = torch.minimum(torch.minimum(radius - 1, (radius * (1 - gamma)).floor()), search.away - 1)
            less = torch.where(ever, less, search.away - 1).clamp_min(1)
            more = torch.maximum(radius + 1, (radius * (1 + gamma)).floor())
        else:
            less = torch.where(ever, torch.minimum(radius * (1 - gamma), search.away), search.away * (1 - gamma))
            more = radius * (1 + gamma)
        return torch.where(look.reached, less, more)
