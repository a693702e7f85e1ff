"""Boundary attack: a random walk along the decision boundary, nearer and nearer to the clean row (arXiv 1712.04248)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import per_row
from advkit.attacks.query.decisions import BLOCK, DecisionAttack, Decisions, row_length, unit
from advkit.core.checks import at_least_one, fraction
from advkit.core.noise import normal_block
from advkit.core.rows import PerRow
from advkit.threat_models.lp import row_sum

CHECKED = 10
"""Steps after which a point on the sphere is asked about, before the step towards the clean row."""


@dataclass
class _State(PerRow):
    """Per row: the point [n, ...], its distance, and the sizes of both steps, as shares of it, [n]."""

    z: Tensor
    away: Tensor
    sphere: Tensor
    source: Tensor


@dataclass(frozen=True, kw_only=True)
class Boundary(DecisionAttack):
    """Boundary attack."""

    name: ClassVar[str] = "boundary"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2",)

    sphere: float = 0.1
    source: float = 0.01
    rate: float = 1.5

    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        """See the class."""
        away = asks.distance(z)
        state = _State(z, away, torch.full_like(away, self.sphere), torch.full_like(away, self.source))
        for number in count():
            rows = asks.leave()
            state = state if rows is None else state.take(rows)
            if not len(asks) or not bool((asks.left > 0).any()):
                return
            keys = asks.search.rng.at("block", number).keys().tolist()
            drawn = [normal_block(key, 0, BLOCK, row) for key, row in zip(keys, state.z, strict=True)]
            for place, noise in enumerate(torch.stack(drawn, 1).to(z.dtype)):
                self.step(asks, state, noise, (number * BLOCK + place) % CHECKED == 0)

    def step(self, asks: Decisions, state: _State, noise: Tensor, checked: bool) -> None:
        x = asks.x
        back = state.z - x
        outward = unit(back)
        aside = noise - per_row(row_sum(noise * outward), x) * outward
        # A step aside on the tangent plane, and back onto the sphere around the clean row.
        turned = outward + per_row(state.sphere, x) * unit(aside)
        onto = x + per_row(state.away, x) * unit(turned)
        want = asks.found & (state.away > 0)
        if checked:
            held = asks.try_points(asks.legal(onto), want)
            state.sphere = state.sphere * torch.where(held, self.rate, 1 / self.rate)
            state.sphere = state.sphere.clamp(1e-6, 1.0)
        nearer = asks.legal(x + (onto - x) * per_row(1 - state.source, x))
        wins = asks.try_points(nearer, asks.found)
        state.z = torch.where(per_row(wins, x), nearer, state.z)
        state.away = torch.where(wins, asks.distance(nearer), state.away)
        state.source = (state.source * torch.where(wins, self.rate, self.rate ** (-1 / 3))).clamp(1e-7, 0.5)
