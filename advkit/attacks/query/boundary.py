"""Boundary attack: a random walk along the decision boundary, nearer and nearer to the clean row (arXiv 1712.04248)."""

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
from advkit.attacks.query.normals import BLOCK, numbers_of
from advkit.core.checks import check, positive
from advkit.core.rows import PerRow
from advkit.threat_models.lp import row_sum

CHECKED = 10
"""Every so many steps a point on the sphere is asked about as well, to set the length of steps along it."""
WITHIN = 1e-4, 0.5
"""Bounds of the step towards the clean row: points nearer to the boundary than that are a matter of round-off."""


@dataclass
class _State(PerRow):
    """Per row: the point [n, ...], its distance, and both steps as shares of that, [n]."""

    z: Tensor
    away: Tensor
    sphere: Tensor
    source: Tensor


@dataclass(frozen=True, kw_only=True)
class Boundary(DecisionAttack):
    """Boundary attack: a decision-based minimum-norm attack in L2, by a random walk along the boundary.

    Every step goes aside on the sphere around the clean row and then a little towards that, and counts where it still
    reaches the goal. Steps grow while they succeed and shrink while they fail.

    queries:    answers asked of each row, >= 1; the threat model's budget, where it has one, cuts them short
    directions: random directions that the start is compared with, >= 0
    sphere:     first step on the sphere, > 0, in units of the distance; half of them are to succeed
    source:     first step towards the clean row, > 0, in units of the distance; a quarter of them are to succeed
    adaptation: factor by which steps grow, > 1

    Works in minimum-l2. Costs from one query of a row on. Raises UsageError for values out of range, other threat
    models, and goals that need more than the class on top.

    The published code sets the lengths by success rates over the last steps. Here every success and every failure
    changes them, by factors under which the same rates hold the balance. The walk starts on the boundary.
    """

    name: ClassVar[str] = "boundary"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2",)

    sphere: float = 0.1
    source: float = 0.01
    adaptation: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "sphere", "source")
        check(self, "adaptation", self.adaptation > 1, "a number above 1")

    @override
    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        away = asks.distance(z)
        state = _State(z, away, torch.full_like(away, self.sphere), torch.full_like(away, self.source))
        for block in count():
            rows = asks.leave()
            state = state if rows is None else state.take(rows)
            if not asks.any_left():
                return
            drawn = numbers_of(asks.search.rng.at("block", block), 0, BLOCK, state.z)
            for place, noise in enumerate(drawn.unbind(1)):
                self._step(asks, state, noise, (block * BLOCK + place) % CHECKED == 0)

    def _step(self, asks: Decisions, state: _State, noise: Tensor, checked: bool) -> None:
        """One step of every row, for better or not at all."""
        x = asks.x
        outward = unit(state.z - x)
        aside = unit(noise - per_row(row_sum(noise * outward), x) * outward)
        move = per_row(state.away, x) * unit(outward + per_row(state.sphere, x) * aside)
        if checked:
            held = asks.try_points(asks.legal(x + move), asks.found)
            state.sphere = state.sphere * torch.where(held, self.adaptation, 1 / self.adaptation)
            state.sphere = state.sphere.clamp(WITHIN[0], 1.0)
        nearer = asks.legal(x + per_row(1 - state.source, x) * move)
        wins = asks.try_points(nearer, asks.found)
        state.z = torch.where(per_row(wins, x), nearer, state.z)
        state.away = torch.where(wins, asks.distance(nearer), state.away)
        share = torch.where(wins, self.adaptation, self.adaptation ** (-1 / 3))
        state.source = (state.source * share).clamp(*WITHIN)
