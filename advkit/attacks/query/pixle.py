"""Pixle: rearranges a few pixels of the image, at random, where that lowers the loss (arXiv 2202.02236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, ball_among, per_row
from advkit.attacks.query.pixels import Positions, first_of_each
from advkit.attacks.search import Search, taken
from advkit.core.checks import at_least_one
from advkit.core.protocols import Access, AsksQueries, Ball, Rng, SearchesPart
from advkit.core.rows import PerRow
from advkit.threat_models.sparse import L0

BLOCK = 64
"""Steps whose random numbers are drawn at once: a draw costs as much for one step as for many."""


@dataclass
class _State(PerRow):
    """Per row: the point that patches are put on, the best point [n, ...], a block's random numbers [n, BLOCK, m]."""

    base: Tensor
    best: Tensor
    draws: Tensor


@dataclass(frozen=True, kw_only=True)
class Pixle(AsksQueries, SearchesPart):
    """Pixle: copies a random patch of the clean image to random pixels, and keeps that where it lowers the loss.

    Every try copies the pixels of a small rectangle, one by one, to positions drawn anywhere in the image. The best of
    `tries` is what the next ones start from. No value is new: each comes from the same image. A row leaves once its
    goal is reached, where the oracle's answers are the verdict's.

    queries: answers asked of each row, the clean one included, >= 1; the threat model's budget cuts them short
    patch:   largest height and width of a rectangle in pixels, >= 1; no rectangle has more than eps pixels
    tries:   rearrangements of one point, >= 1
    loss:    surrogate loss: "ce", "margin" or "dlr", where the goal has them

    Works in L0 balls: `l0:eps=K`; what is moved are pixels or features as the ball counts them (`per`). Raises
    UsageError for values out of range and for other balls.

    The paper bounds no distance: here a point with more than eps changed positions gives back the smallest changes, and
    in every other try the older ones before the new. Rectangles have one pixel or more, where the paper has sides of 2
    to 10. Of the paper's maps from pixels to positions this is the random one. A position that is drawn twice takes
    the first.
    """

    needs: ClassVar[Access] = Access.SCORES
    least_queries: ClassVar[int] = 2  # the clean input and one try
    part: ClassVar[str] = "values that the clean sample has elsewhere"
    queries: int = 5000
    patch: int = 10
    tries: int = 10
    loss: str = "margin"

    def __post_init__(self) -> None:
        at_least_one(self, "queries", "patch", "tries")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        inner = ball_among("pixle", ball, L0, instead="square in Linf, L2 and L1")
        positions = Positions.of(x, inner)
        moved = min(int(inner.eps), len(positions))
        search = Search(oracle, x, goal.under(self.loss), rng.at("pixle"))
        if not moved or not search.affords():
            return x.clone()
        moved = min(moved, min(self.patch, positions.height) * min(self.patch, positions.width))
        draws = x.new_empty(len(x), BLOCK, 4 + moved)
        state = taken(search.score(x), _State(x, x, draws))
        for number in range(self.queries - 1):
            if not len(search) or not search.affords():
                break
            block, place = divmod(number, BLOCK)
            if not place:
                state.draws = search.rng.at("block", block).uniform(state.draws)
            if number % self.tries == 0:
                state.base = state.best
            candidate = self._rearranged(
                positions, search.x, state.base, state.draws[:, place], int(inner.eps), number % 2 == 0
            )
            wins, rows = search.trial(candidate)
            if rows is not None:
                state, candidate = state.take(rows), candidate[rows]
            state.best = torch.where(per_row(wins, candidate), candidate, state.best)
        return search.best

    def _rearranged(
        self, positions: Positions, x: Tensor, base: Tensor, draws: Tensor, eps: int, fresh: bool
    ) -> Tensor:
        """The base [n, ...] with a rectangle of the clean rows copied to random positions; draws [n, 4 + m]."""
        moved = draws.shape[1] - 4
        width = 1 + (draws[:, 0] * min(self.patch, positions.width, moved)).long()
        tallest = torch.minimum(torch.full_like(width, min(self.patch, positions.height)), moved // width)
        height = 1 + (draws[:, 1] * tallest).long()
        left = (draws[:, 2] * (positions.width - width + 1)).long()
        top = (draws[:, 3] * (positions.height - height + 1)).long()
        inside = torch.arange(moved, device=x.device).expand(len(x), -1)
        width, height, left, top = (each.unsqueeze(1) for each in (width, height, left, top))
        copied = inside < width * height
        row, column = top + inside // width, left + inside % width
        source = torch.where(copied, row * positions.width + column, 0)
        target = (draws[:, 4:] * len(positions)).long().clamp_max(len(positions) - 1)
        target = torch.where(first_of_each(target, copied), target, len(positions))
        source, target = (each.unsqueeze(1).expand(-1, positions.channels, -1) for each in (source, target))
        # What is not copied goes to a column behind the image.
        clean = positions.read(x)
        onto = torch.cat([positions.read(base), base.new_zeros(len(x), positions.channels, 1)], 2)
        onto = onto.scatter_(2, target, clean.gather(2, source))[..., :-1]
        # Beyond eps the largest changes stay, in every other try the new ones before all others.
        rank = (onto - clean).square().sum(1)
        if fresh:
            rank = torch.cat([rank, rank[:, :1]], 1).scatter_(1, target[:, 0], torch.inf)[:, :-1]
        kept = torch.zeros_like(rank, dtype=torch.bool)
        kept = kept.scatter_(1, rank.topk(min(eps, len(positions)), dim=1).indices, True).unsqueeze(1)
        return positions.written(torch.where(kept, onto, clean))
