"""GeoDA: straight to the boundary along its normal, which decisions in low frequencies estimate (arXiv 2003.06468)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import per_row
from advkit.attacks.query.decisions import DecisionAttack, Decisions, LowFrequencies, Points, row_length, smallest_move, unit
from advkit.core.checks import at_least_one, fraction, positive
from advkit.threat_models.lp import row_max, row_sum


@dataclass(frozen=True, kw_only=True)
class GeoDA(DecisionAttack):
    """GeoDA."""

    name: ClassVar[str] = "geoda"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2", "minimum-l1", "minimum-linf")

    samples: int = 60
    frequencies: int = 10
    rate: float = 0.6
    sigma: float = 0.01
    kept: float = 1.0
    pick: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "samples", "frequencies")
        fraction(self, "rate", ends="()")
        positive(self, "sigma")

    def tolerance(self, x):
        return 1e-3

    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        """See the class."""
        draw = LowFrequencies(z, self.frequencies)
        first = min(self.samples, 4 * draw.like[0].numel())
        normal = torch.zeros_like(z)
        for step in count():
            rows = asks.leave()
            if rows is not None:
                z, normal = z[rows], normal[rows]
            if not len(asks) or not bool((asks.left > 0).any()):
                return
            draw = LowFrequencies(z, self.frequencies)
            delta = torch.maximum(self.sigma * row_length(z - asks.x), smallest_move(z))
            number = int(first * self.rate ** (-2 * step / 3))
            last = asks.left < number + number / self.rate ** (2 / 3)
            number = torch.where(last, asks.left - 20, number).clamp_min(1).minimum(asks.left)
            found = asks.normal(z, delta, number, asks.search.rng.at("step", step), draw)
            normal = self.kept * normal + found * per_row(torch.where(delta > 0, 1 / delta, 0.0), z)
            way, most = self.ray(asks, normal, norm)
            guess = asks.distance(z)
            length, reached = asks.nearest_on(way, guess, most, asks.found, self.tolerance(z), 0.1)
            there = asks.legal(way(length, torch.arange(len(z), device=z.device)))
            better = reached & ((self.pick == "all") | (asks.distance(there) < asks.distance(z)))
            z = torch.where(per_row(better, z), there, z)

    def ray(self, asks: Decisions, normal: Tensor, norm: str) -> tuple[Points, Tensor]:
        """The nearest points of hyperplanes with this normal ever further away, and how far the box reaches."""
        x = asks.x
        if norm == "l1":
            low, high = asks.search.threat.box.bounds_like(x)
            room = torch.where(normal > 0, high - x, x - low).clamp_max(1e6).flatten(1)
            order = normal.flatten(1).abs().argsort(1, descending=True, stable=True)
            room = torch.where(normal.flatten(1) != 0, room, 0.0).gather(1, order)
            before = room.cumsum(1) - room

            def filled(length: Tensor, of: Tensor) -> Tensor:
                size = torch.minimum((length[:, None] - before[of]).clamp_min(0), room[of])
                size = torch.zeros_like(size).scatter_(1, order[of], size)
                return x[of] + size.view(-1, *x.shape[1:]) * normal[of].sign()

            return filled, room.sum(1)
        way = normal.sign() if norm == "linf" else unit(normal)
        low, high = asks.search.threat.box.bounds_like(x)
        far = torch.where(way > 0, high - x, x - low).clamp_max(1e6)
        least = torch.where(way != 0, far / way.abs().clamp_min(1e-12), 0.0)
        return (lambda length, of: x[of] + per_row(length, x) * way[of]), row_max(least)
