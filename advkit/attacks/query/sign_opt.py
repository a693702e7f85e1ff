"""Sign-OPT: descent on the distance to the boundary, of whose slope only the sign is asked (arXiv 1909.10773)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.query.decisions import DecisionAttack, Decisions, Points, smallest_move, unit
from advkit.core.checks import at_least_one, positive
from advkit.threat_models.lp import row_max


@dataclass(frozen=True, kw_only=True)
class SignOPT(DecisionAttack):
    """Sign-OPT."""

    name: ClassVar[str] = "sign_opt"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2", "minimum-linf")

    samples: int = 200
    directions: int = 10
    step_size: float = 0.2
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "samples")
        positive(self, "step_size", "gamma")

    def tolerance(self, x: Tensor) -> float:
        """The share of the distance by which a boundary point may be off."""
        return self.gamma / x[0].numel() ** 1.5

    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        """See the class."""
        numbers = z[0].numel()
        samples = min(self.samples, 4 * numbers)
        tolerance = self.tolerance(z)
        theta, away = self.read(z - asks.x, norm)
        for number in range(self.directions):
            noise = asks.search.rng.at("direction", number).normal(z)
            theta, away, _ = self.compared(asks, theta, away, self.read(noise, norm)[0], tolerance)
        step = torch.full_like(away, self.step_size)
        for turn in count():
            rows = asks.leave()
            if rows is not None:
                theta, away, step = kept(rows, theta, away, step)
            if not len(asks) or not bool((asks.left > 0).any()):
                return
            x = asks.x
            every = torch.arange(len(x), device=x.device)
            z = asks.legal(x + per_row(away, x) * theta)
            size = self.length(z - x, "l2")
            delta = torch.maximum(self.gamma / numbers * size, smallest_move(z))
            sphere: Points = lambda points, of: x[of] + per_row(away[of], x) * self.read(points - x[of], norm)[0]
            number = (asks.left - 10).clamp(1, samples).minimum(asks.left)
            slope = unit(asks.normal(z, delta, number, asks.search.rng.at("step", turn), place=sphere))
            slope = slope * per_row(self.length(theta, "l2"), z)
            theta, away, step = self.descended(asks, theta, away, slope, step, norm, tolerance)

    @staticmethod
    def length(move: Tensor, norm: str) -> Tensor:
        return row_max(move.abs()) if norm == "linf" else move.flatten(1).square().sum(1).sqrt()

    def read(self, move: Tensor, norm: str) -> tuple[Tensor, Tensor]:
        size = self.length(move, norm)
        return move * per_row(1 / size.clamp_min(1e-30), move), size

    def compared(self, asks, theta, away, other, tolerance, want=None):
        """The better of two directions: one question, and a search where the other is better."""
        x = asks.x
        want = asks.found if want is None else want
        way: Points = lambda length, of: x[of] + per_row(length, x) * other[of]
        wins = asks.try_points(asks.legal(x + per_row(away, x) * other), want)
        length, _ = asks.nearest_on(way, 0.99 * away, away, wins, tolerance)
        length = torch.where(wins, torch.minimum(length, away), away)
        return torch.where(per_row(wins, x), other, theta), length, wins

    def descended(self, asks, theta, away, slope, step, norm, tolerance):
        start, first = theta, away
        going = asks.found
        for _ in range(15):
            if not bool((going & (asks.left > 0)).any()):
                break
            other = self.read(start + per_row(step, start) * slope, norm)[0]
            theta, away, wins = self.compared(asks, theta, away, other, tolerance, going)
            step = torch.where(wins, 2 * step, step)
            going = going & wins
        going = asks.found & (away >= first)
        for _ in range(15):
            if not bool((going & (asks.left > 0)).any()):
                break
            step = torch.where(going, step / 4, step)
            other = self.read(start + per_row(step, start) * slope, norm)[0]
            theta, away, wins = self.compared(asks, theta, away, other, tolerance, going)
            going = going & ~wins & (step > 1e-4)
        return theta, away, torch.where(step < 1e-4, self.step_size, step)
