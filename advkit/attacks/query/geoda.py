"""GeoDA: straight to the boundary along its normal, estimated from decisions in low frequencies (arXiv 2003.06468)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import per_row
from advkit.attacks.query.base import DecisionAttack
from advkit.attacks.query.decisions import Decisions, unit
from advkit.attacks.query.lines import Points, nearest_on
from advkit.attacks.query.normals import LowFrequencies, estimated_normal, move_length
from advkit.core.checks import at_least_one, check, fraction, positive
from advkit.threat_models.lp import row_max

LAST = 20
"""Queries kept for the way to the boundary after the last estimate."""
_FAR = 1e6


@dataclass(frozen=True, kw_only=True)
class GeoDA(DecisionAttack):
    """GeoDA: a decision-based minimum-norm attack that takes the boundary for a plane.

    Every step estimates the plane's normal at a boundary point, by random points in low frequencies, and goes from the
    clean row to the nearest point of such a plane that reaches the goal.

    queries:     answers asked of each row, >= 1; the threat model's budget, where it has one, cuts them short
    directions:  random directions that the start is compared with, >= 0
    samples:     points of the first estimate, >= 1
    growth:      each estimate asks about so many times the points of the one before, > 1
    frequencies: of the cosine transform along each axis of an image [..., H, W] or a series [C, L], >= 1; rows [D]
                 are searched in all directions
    sigma:       distance of the random points, > 0, as a share of the distance to the clean row
    memory:      share of the normal so far in the next one, in [0, 1]

    Works in minimum-l1, minimum-l2 and minimum-linf. Costs from one query of a row on. Raises UsageError for values out
    of range, other threat models, and goals that need more than the class on top.

    Growth is the paper's optimum for its rate of convergence of 0.6. The way to a plane is the exact one inside the
    box, in all three norms: values at a bound stay, and in L1 the largest entries of the normal are used up in turn.
    Published is a sum of all normals; here older ones fade, since those of a start far away point elsewhere.
    """

    name: ClassVar[str] = "geoda"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l1", "minimum-l2", "minimum-linf")

    samples: int = 60
    growth: float = 1.4
    frequencies: int = 10
    sigma: float = 0.01
    memory: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "samples", "frequencies")
        positive(self, "sigma")
        fraction(self, "memory", ends="[]")
        check(self, "growth", self.growth > 1, "a number above 1")

    @override
    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        normal = torch.zeros_like(z)
        first = min(self.samples, 4 * LowFrequencies(z, self.frequencies).like[0].numel())
        for step in count():
            z, normal = asks.going(z, normal)
            if not asks.any_left():
                return
            delta = move_length(z, asks.x, self.sigma)
            number = torch.full_like(asks.left, int(first * self.growth**step))
            # An estimate that the budget would cut short joins the one before.
            number = torch.where(asks.left < (1 + self.growth) * number + LAST, asks.left - LAST, number)
            number = number.clamp_min(1).minimum(asks.left)
            draw = LowFrequencies(z, self.frequencies)
            found = estimated_normal(asks, z, delta, number, asks.search.rng.at("step", step), draw)
            normal = self.memory * normal + found * per_row(1 / delta, z)
            points, most = self._way(asks, normal, norm)
            length, reached = nearest_on(asks, points, asks.distance(z), most, asks.found, self.tolerance(z), 0.1)
            there = asks.legal(points(length, torch.arange(len(z), device=z.device)))
            z = torch.where(per_row(reached, z), there, z)

    @staticmethod
    def _way(asks: Decisions, normal: Tensor, norm: str) -> tuple[Points, Tensor]:
        """The points nearest to the clean rows on planes further and further away, and the last of them in the box."""
        x = asks.x
        low, high = asks.search.threat.box.bounds_like(x)
        room = torch.where(normal > 0, high - x, x - low).clamp(0, _FAR)
        room = torch.where(normal != 0, room, 0.0).flatten(1)
        if norm == "l1":
            order = normal.flatten(1).abs().sort(dim=1, descending=True, stable=True).indices
            sorted_ = room.gather(1, order)
            before = sorted_.cumsum(1) - sorted_

            def filled(length: Tensor, of: Tensor) -> Tensor:
                size = (length[:, None] - before[of]).clamp_min(0).minimum(sorted_[of])
                size = torch.zeros_like(size).scatter_(1, order[of], size)
                return x[of] + size.view(-1, *x.shape[1:]) * normal[of].sign()

            return filled, sorted_.sum(1)
        way = normal.sign() if norm == "linf" else unit(normal)
        most = row_max(room / way.flatten(1).abs().clamp_min(1e-9))
        return (lambda length, of: x[of] + per_row(length, x) * way[of]), most
