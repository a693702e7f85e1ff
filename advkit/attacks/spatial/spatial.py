"""Rotations and translations (Engstrom et al., arXiv 1712.02779)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import TensorGoal, TensorOracle, only_in
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.search import Search
from advkit.core.checks import at_least_one, one_of, positive
from advkit.core.protocols import Access, Ball, MadeForThreatModel, Planned, Rng
from advkit.threat_models.warps import Transform

How = Literal["grid", "random", "gradient"]


@dataclass(frozen=True, kw_only=True)
class Spatial(MadeForThreatModel, Planned):
    """Spatial attack: the rotation and translation of each image that serves the goal best.

    search:       "grid" all combinations of evenly spaced angles and shifts; "random" so many drawn ones (the paper's
                  worst of k); "gradient" projected gradient descent on angle and shifts
    rotations:    angles of the grid, >= 1
    translations: shifts of the grid in each direction, >= 1
    draws:        transformations drawn by random, >= 1
    steps:        of gradient, >= 1
    step_size:    length of its steps in units of the limits, > 0
    restarts:     of gradient, from drawn transformations, >= 1
    loss:         surrogate loss of gradient: "ce", "margin" or "dlr", where the goal has them

    The grid begins with the smallest transformations, so a sample that falls early falls to a small one. An odd
    number of angles or shifts includes none. `grid` and `random` ask for answers alone, labels or scores. The default
    grid is the paper's, 31 angles and 5 x 5 shifts; it found the grid to be far stronger than gradients, which end in
    local optima.
    Raises UsageError for values out of range and outside the threat model transform.
    """

    default_threat_model: ClassVar[str] = "transform:rotation=30,translation=3"
    search: How = "grid"
    rotations: int = 31
    translations: int = 5
    draws: int = 10
    steps: int = 40
    step_size: float = 0.1
    restarts: int = 1
    loss: str = "margin"

    def __post_init__(self) -> None:
        at_least_one(self, "rotations", "translations", "draws", "steps", "restarts")
        positive(self, "step_size", what="length in units of the limits")
        one_of(self, "search", ("grid", "random", "gradient"))

    @property
    def needs(self) -> Access:
        """What the search asks for."""
        return Access.GRADIENTS if self.search == "gradient" else Access.LABELS

    @property
    @override
    def planned(self) -> float:
        """Passes per sample at most."""
        if self.search == "grid":
            return float(self.rotations * self.translations**2)
        return float(self.draws if self.search == "random" else self.restarts * (2 * self.steps + 1))

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        only_in(ball, Transform, "spatial", self.default_threat_model)
        if self.search == "gradient":
            pgd = PGD(steps=self.steps, step_size=self.step_size, restarts=self.restarts, loss=self.loss)
            return pgd(oracle, x, goal, ball, rng)
        search = Search(oracle, x, goal, rng)
        tried = self._grid(search) if self.search == "grid" else self._drawn(search, ball)
        for z in tried:
            search.score(z)
            if not len(search) or not search.affords():
                break
        return search.best

    def _grid(self, search: Search) -> Iterator[Tensor]:
        for point in self.grid().to(search.x):
            yield point.expand_as(search.x)

    def grid(self) -> Tensor:
        """The points of the grid in the order in which they are tried, [points, 3] in units of the limits."""
        angles, shifts = _spaced(self.rotations), _spaced(self.translations)
        points = torch.cartesian_prod(angles, shifts, shifts)
        return points[points.abs().amax(1).argsort(stable=True)]

    def _drawn(self, search: Search, ball: Ball[Tensor]) -> Iterator[Tensor]:
        for draw in range(self.draws):
            yield ball.sample(search.x, search.rng.at("draw", draw))


def _spaced(count: int) -> Tensor:
    """So many numbers from -1 to 1, symmetric to the bit, so that an odd number of them includes 0 itself."""
    return (2 * torch.arange(count, dtype=torch.float64) - (count - 1)) / max(1, count - 1)
