"""HopSkipJump: steps along boundary normals that are estimated from decisions (arXiv 1904.02144)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import per_row
from advkit.attacks.query.base import DecisionAttack
from advkit.attacks.query.decisions import Decisions, unit
from advkit.attacks.query.lines import HALVINGS, to_boundary
from advkit.attacks.query.normals import estimated_normal, move_length, resolution
from advkit.core.checks import at_least_one, positive

RESERVE = 5
"""Queries kept for a step away from the boundary, beside those for the way back."""


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(DecisionAttack):
    """HopSkipJump: a decision-based minimum-norm attack that estimates the boundary's normal by Monte Carlo.

    Every step asks about random points around a boundary point, moves along the normal that their decisions show, and
    goes back to the boundary on the way to the clean row, by halving.

    queries:    answers asked of each row, >= 1; the threat model's budget, where it has one, cuts them short
    directions: random directions that the start is compared with, >= 0
    samples:    points of the first estimate, >= 1; step t asks about sqrt(t) times as many
    sigma:      distance of these points, > 0, as a share of the distance to the clean row

    Works in minimum-l2 and minimum-linf; in Linf it follows the sign of the normal. Costs from one query of a row on.
    Raises UsageError for values out of range, other threat models, and goals that need more than the class on top.

    Published is a sigma of 1 over the number of values d, which is less for images: boundaries are even over more than
    that, and coarser points cost fewer queries. The first estimate asks 4 d points at most. Random points are normal
    in every norm, and a boundary is searched near where it was last.
    """

    name: ClassVar[str] = "hopskipjump"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2", "minimum-linf")

    samples: int = 100
    sigma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "samples")
        positive(self, "sigma")

    @override
    def tolerance(self, x: Tensor) -> float:
        return resolution(x, self.sigma)

    @override
    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        first = min(self.samples, 4 * z[0].numel())
        tolerance = self.tolerance(z)
        back = math.ceil(-math.log2(tolerance)) + RESERVE
        for step in count(1):
            (z,) = asks.going(z)
            if not asks.any_left():
                return
            away = asks.distance(z)
            number = (asks.left - back).clamp(1, int(first * math.sqrt(step))).minimum(asks.left)
            normal = estimated_normal(
                asks, z, move_length(z, asks.x, self.sigma), number, asks.search.rng.at("step", step)
            )
            way = normal.sign() if norm == "linf" else unit(normal)
            further = self._stepped(asks, z, way, away / math.sqrt(step))
            guess = away / asks.distance(further).clamp_min(torch.finfo(away.dtype).tiny)
            z = to_boundary(asks, further, asks.found, norm, tolerance, guess)

    @staticmethod
    def _stepped(asks: Decisions, z: Tensor, way: Tensor, length: Tensor) -> Tensor:
        """Points on the far side of the boundary, at the longest of length, length / 2, ... that is there."""
        out, missing = z, asks.found
        for _ in range(HALVINGS):
            if not bool((missing & (asks.left > 0)).any()):
                break
            further = asks.legal(z + per_row(length, z) * way)
            reached = asks.try_points(further, missing)
            out = torch.where(per_row(reached, z), further, out)
            missing, length = missing & ~reached, length / 2
        return out
