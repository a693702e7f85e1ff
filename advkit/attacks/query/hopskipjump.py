"""HopSkipJump: gradient directions at the boundary from decisions alone (arXiv 1904.02144)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import per_row
from advkit.attacks.query.decisions import DecisionAttack, Decisions, row_length, smallest_move, unit
from advkit.core.checks import at_least_one, positive


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(DecisionAttack):
    """HopSkipJump."""

    name: ClassVar[str] = "hopskipjump"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2", "minimum-linf")

    samples: int = 100
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "samples")
        positive(self, "gamma")

    def tolerance(self, x: Tensor) -> float:
        """The share of the distance by which a boundary point may be off."""
        return self.gamma / x[0].numel() ** 1.5

    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        """See the class."""
        numbers = z[0].numel()
        first = min(self.samples, 4 * numbers)
        tolerance = self.tolerance(z)
        reserve = math.ceil(-math.log2(tolerance)) + 5
        for step in count(1):
            rows = asks.leave()
            z = z if rows is None else z[rows]
            if not len(asks) or not bool((asks.left > 0).any()):
                return
            away = asks.distance(z)
            delta = torch.maximum(self.gamma / numbers * row_length(z - asks.x), smallest_move(z))
            number = (asks.left - reserve).clamp(1, int(first * math.sqrt(step))).minimum(asks.left)
            gradient = asks.normal(z, delta, number, asks.search.rng.at("step", step))
            way = gradient.sign() if norm == "linf" else unit(gradient)
            z = self.jump(asks, z, way, away / math.sqrt(step), norm, tolerance)

    def jump(self, asks: Decisions, z: Tensor, way: Tensor, length: Tensor, norm: str, tolerance: float) -> Tensor:
        out = z
        missing = asks.found
        for _ in range(25):
            if not bool((missing & (asks.left > 0)).any()):
                break
            further = asks.legal(z + per_row(length, z) * way)
            reached = asks.try_points(further, missing)
            out = torch.where(per_row(reached, z), further, out)
            missing = missing & ~reached
            length = torch.where(missing, length / 2, length)
        return asks.to_boundary(out, asks.found, norm, tolerance)
