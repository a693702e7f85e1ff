"""Steps along gradients that are estimated from scores: what NES and SPSA share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from advkit.attacks.base import finite_rows, kept
from advkit.attacks.search import Search, T, taken
from advkit.core.checks import at_least_one, check, positive
from advkit.core.spaces import Box
from advkit.core.zeroth_order import Directions, pair_gradient, pair_queries


@dataclass(frozen=True, slots=True)
class EstimatedStep:
    """A step of a search, for the rows that are still active.

    number:   0, 1, ...
    z:        the points at which the gradient was estimated [n, ...]
    x:        the clean rows [n, ...]
    gradient: the estimate at z [n, ...]
    loss:     at z [n]; +inf before the first step, which starts at a point that nobody has asked about
    rows:     which of the rows before this step these are, long [n]; None where none left
    """

    number: int
    z: Tensor
    x: Tensor
    gradient: Tensor
    loss: Tensor
    rows: Tensor | None

    def kept(self, state: T) -> T:
        """What an attack knew of the rows before this step, for those that are still active."""
        return taken(self.rows, state)


def estimated_steps(
    search: Search, box: Box, queries: int, samples: int, sigma: float, directions: Directions
) -> Iterator[EstimatedStep]:
    """Steps with an estimate of the gradient, each of `samples` queries and one more about where the step led.

    The attack sets `search.z` to where it steps; that point is scored before the next estimate, and rows that it breaks
    leave. The last step makes do with the queries that are left.

    box:     legal inputs: nothing else is asked about
    queries: of each row, the threat model's budget may cut them short
    samples: queries of one estimate, even, >= 2
    sigma:   distance of the points asked about, in every coordinate, in units of the box's width (1 where it is
             infinite)
    """
    low, high = box.bounds_like(search.x)
    width = float((high - low).max())
    mu = sigma * (width if 0 < width < math.inf else 1.0)
    z = search.z
    loss = torch.full((len(z),), torch.inf, dtype=z.dtype, device=z.device)
    rows: Tensor | None = None
    left = queries
    for number in count():
        granted = search.oracle.left
        pairs = min(samples, (left if granted is None else min(left, granted)) - 1) // 2
        if not len(search) or pairs < 1:
            return
        oracle, goal = search.oracle, search.goal

        def value(points: Tensor, of: Tensor, oracle=oracle, goal=goal) -> Tensor:  # type: ignore[no-untyped-def]
            answer = oracle(points, of)
            found: Tensor = torch.where(finite_rows(answer), goal.take(of).loss(answer), torch.nan)
            return found

        found = pair_gradient(
            value, z, search.rng.at("step", number), pairs=pairs, mu=mu, directions=directions, low=low, high=high
        )
        yield EstimatedStep(number, z, search.x, found.gradient, loss, rows)
        left -= pair_queries(pairs) + 1
        z = search.z
        answer = oracle(z)
        search.offer(z, answer)
        loss = torch.where(finite_rows(answer), goal.loss(answer).to(z.dtype), torch.inf)
        rows = search.drop_broken()
        if rows is not None:
            z, loss = kept(rows, z, loss)


class Estimates:
    """Settings that attacks with estimated gradients share; a frozen dataclass below it declares them in its order.

    queries:   answers asked of each row, >= 1
    samples:   of them for one estimate, even, >= 2; a step takes one more
    sigma:     distance of the points that are asked about, in units of the box's width, > 0
    step_size: in units of the ball's eps, > 0
    """

    queries: int
    samples: int
    sigma: float
    step_size: float

    def __post_init__(self) -> None:
        at_least_one(self, "queries")
        check(self, "samples", self.samples >= 2 and self.samples % 2 == 0, "an even number of at least 2")
        positive(self, "sigma", what="length in units of the box's width")
        positive(self, "step_size", what="length in units of eps")

    @property
    def least_queries(self) -> int:
        """An estimate, and where the step led."""
        return self.samples + 1
