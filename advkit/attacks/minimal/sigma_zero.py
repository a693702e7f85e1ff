"""Sigma-zero (Cina et al., arXiv 2402.01879)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import MinimalAttack, NearestSearch
from advkit.attacks.minimal.faces import Margin
from advkit.attacks.optimiser import RowAdam
from advkit.core.checks import at_least_one, not_negative, positive
from advkit.threat_models.lp import row_max
from advkit.threat_models.minimum import MinimumL0

SLOWEST = 0.1  # of the learning rate, at the last step


def sparsity_gradient(move: Tensor, size: Tensor, sigma: float) -> Tensor:
    """The gradient of sum size / (size + sigma) by `move`, where `size` holds each position's square, as wide."""
    return 2 * sigma * move / (size + sigma).square()


@dataclass(frozen=True, kw_only=True)
class SigmaZero(MinimalAttack):
    """Sigma-zero, a minimum-norm attack in L0: descends margin plus a smooth count of the changed positions.

    The count is sum s / (s + sigma) over the positions, s the squared change of each. After every step changes smaller
    than a threshold are undone; the threshold rises where the goal is reached and falls where it is not.

    steps:     gradient steps, >= 1
    lr:        first learning rate of Adam, > 0, in widths of the box; it falls along a cosine to a tenth
    sigma:     how smooth the count is, > 0, in squared widths of the box
    threshold: the first one, >= 0, in widths of the box
    gain:      by how much the threshold moves per step, >= 0, in units of the present learning rate

    Costs a gradient per step and one more. A row leaves with a single position changed: there is nothing nearer.
    Raises UsageError for values out of range and for other threat models.

    The margin counts while it is not negative. A position is a pixel with its channels where the threat model counts
    pixels; published are values.
    """

    name: ClassVar[str] = "sigma_zero"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l0",)
    default_threat_model: ClassVar[str] = "minimum-l0"

    steps: int = 1000
    lr: float = 1.0
    sigma: float = 1e-3
    threshold: float = 0.3
    gain: float = 0.01

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        positive(self, "lr", "sigma")
        not_negative(self, "threshold", "gain")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        threat = search.threat
        assert isinstance(threat, MinimumL0)
        width = box_width(search)
        z, adam = search.x, RowAdam.of(search.x)
        least = torch.full_like(search.away, self.threshold)
        for step in range(self.steps + 1):
            if not len(search) or not search.affords():
                return
            look = search.look(z, Margin(search.goal))
            move = (z - search.x) / width
            size = self._spread(threat, move.square(), z)
            positions = threat.positions(torch.ones_like(z[:1])).shape[1]
            wants = torch.where(per_row(look.loss >= 0, z), look.gradient * width, 0.0)
            gradient = wants + sparsity_gradient(move, size, self.sigma) / positions
            largest = row_max(gradient.abs())
            gradient = gradient / per_row(torch.where(largest > 0, largest, 1.0), z)
            rate = self.lr * (SLOWEST + (1 - SLOWEST) * (1 + math.cos(math.pi * step / self.steps)) / 2)
            z = search.legal(z + width * adam.move(gradient, torch.full_like(least, rate)))
            least = (least + self.gain * rate * (2 * look.reached.to(least.dtype) - 1)).clamp(0, 1)
            square = self._spread(threat, ((z - search.x) / width).square(), z)
            z = torch.where(square < per_row(least.square(), z), search.x, z)
            rows = search.leave(search.away <= 1)
            if rows is not None:
                adam, z, least = adam.take(rows), *kept(rows, z, least)

    @staticmethod
    def _spread(threat: MinimumL0, square: Tensor, like: Tensor) -> Tensor:
        """Each position's sum of squares, at all its values."""
        return threat.everywhere(threat.positions(square), like)


def box_width(search: NearestSearch) -> Tensor:
    """The width of the box for every value; 1 where it is unbounded."""
    low, high = search.threat.box.bounds_like(search.x)
    return torch.where(torch.isfinite(high - low), high - low, 1.0)
