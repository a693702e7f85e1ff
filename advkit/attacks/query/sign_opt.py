"""Sign-OPT: descent on the distance to the boundary, of whose slope only signs are asked (arXiv 1909.10773)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import per_row
from advkit.attacks.query.base import DecisionAttack
from advkit.attacks.query.decisions import Decisions, row_length, unit
from advkit.attacks.query.lines import compared
from advkit.attacks.query.normals import estimated_normal, move_length, resolution
from advkit.core.checks import at_least_one, positive
from advkit.threat_models.lp import row_max

TRIES = 15
"""Most doublings of a step, and most cuts of one that fails."""
LAST = 10
"""Queries kept for the search along the slope after the last estimate."""
LEAST = 1e-4


@dataclass(frozen=True, kw_only=True)
class SignOPT(DecisionAttack):
    """Sign-OPT: a decision-based minimum-norm attack that descends on the distance to the boundary in a direction.

    One question says whether the boundary is nearer in a direction close by. The mean of many directions with these
    signs is the slope, and a search along it doubles the step while the boundary comes nearer.

    queries:    answers asked of each row, >= 1; the threat model's budget, where it has one, cuts them short
    directions: random directions that the start is compared with, >= 0
    samples:    questions of one estimate, >= 1
    step_size:  of the first search, > 0, in units of the distance
    sigma:      how far these directions are turned, > 0, as a share of the distance

    Works in minimum-l2 and minimum-linf; in Linf steps follow the sign of the slope. Costs from one query of a row on.
    Raises UsageError for values out of range, other threat models, and goals that need more than the class on top.

    A step is asked about at the least distance so far, and a boundary is searched only where that is met. Published are
    200 questions for an estimate and 100 directions to start with; a row of d values asks 4 d at the most.
    """

    name: ClassVar[str] = "sign_opt"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2", "minimum-linf")

    samples: int = 100
    step_size: float = 0.2
    sigma: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "samples")
        positive(self, "step_size", "sigma")

    @override
    def tolerance(self, x: Tensor) -> float:
        return resolution(x, self.sigma)

    @override
    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        samples = min(self.samples, 4 * z[0].numel())
        step = torch.full_like(asks.search.away, self.step_size)
        for turn in count():
            z, step = asks.going(z, step)
            if not asks.any_left():
                return
            x, away = asks.x, row_length(z - asks.x)

            def sphere(points: Tensor, of: Tensor, x: Tensor = x, away: Tensor = away) -> Tensor:
                return x[of] + per_row(away[of], x) * unit(points - x[of])

            number = (asks.left - LAST).clamp(1, samples).minimum(asks.left)
            rng = asks.search.rng.at("step", turn)
            slope = estimated_normal(asks, z, move_length(z, x, self.sigma), number, rng, place=sphere)
            z, step = self._descended(asks, z, slope, step, norm)

    def _descended(self, asks: Decisions, z: Tensor, slope: Tensor, step: Tensor, norm: str) -> tuple[Tensor, Tensor]:
        """The nearest points in directions down the slope, and the steps of the next search."""
        origin, tolerance = z - asks.x, self.tolerance(z)
        if norm == "linf":
            slope = slope.sign() * per_row(row_max(origin.abs()), z)
        else:
            slope = unit(slope) * per_row(row_length(origin), z)
        going, moved = asks.found, torch.zeros_like(asks.found)
        for number in range(2 * TRIES):
            if number == TRIES:  # nothing was nearer at the first step: shorter ones
                going = asks.found & ~moved
            if number >= TRIES:
                step = torch.where(going, step / 4, step)
            if not bool((going & (asks.left > 0)).any()):
                if number >= TRIES:
                    break
                continue
            z, wins = compared(asks, z, origin + per_row(step, z) * slope, norm, going, tolerance)
            if number < TRIES:
                step = torch.where(wins, 2 * step, step)
                going, moved = going & wins, moved | wins
            else:
                going = going & ~wins & (step > LEAST)
        return z, torch.where(step < LEAST, self.step_size, step)
