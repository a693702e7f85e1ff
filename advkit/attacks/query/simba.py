"""SimBA: one step at a time along directions of an orthonormal basis, kept where it helps (arXiv 1905.07121)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, ball_among, per_row
from advkit.attacks.query.square import Layout
from advkit.attacks.search import Search, taken
from advkit.core.checks import at_least_one, fraction, one_of, positive
from advkit.core.protocols import Access, AsksQueries, Ball, Rng
from advkit.core.rows import PerRow
from advkit.threat_models.lp import L2, Linf

USUAL = {("pixel", True): 2.0, ("dct", True): 0.5, ("pixel", False): 0.2, ("dct", False): 0.2}
"""Lengths of a step in units of eps, by basis, and whether the ball is Linf."""


@dataclass
class _State(PerRow):
    """Per row: the best point [n, ...], the walls around it [n, D], the order of its directions [n, D], the place in
    that order and the sign of the next step [n, 1].
    """

    z: Tensor
    low: Tensor
    high: Tensor
    order: Tensor
    place: Tensor
    up: Tensor

    def directions(self) -> Tensor:
        """Which direction each row is at, long [n, 1]."""
        return self.order.gather(1, self.place % self.order.shape[1])

    def turned(self, rows: Tensor) -> None:
        """What comes after the next step, for some rows (bool [n, 1]): the way back, or the next direction's first."""
        self.place = self.place + (rows & ~self.up)
        self.up = self.up ^ rows


@dataclass(frozen=True, kw_only=True)
class SimBA(AsksQueries):
    """SimBA, the simple black-box attack: a step along a random direction, or back, is kept where it lowers the loss.

    Directions come without replacement from an orthonormal basis; a second pass repeats the row's order. Every query
    is one step of every row that is still active: where the step up did not help the next query is the step down, where
    one helped it is the next direction. A row leaves once its goal is reached, where the oracle's answers are the
    verdict's. No step raises the loss.

    queries:     answers asked of each row, the clean one included, >= 1; the threat model's budget cuts them short
    basis:       "pixel", single features, or "dct", cosines of an image's channels, low frequencies first
    frequencies: share of the frequencies along height and width that come first, in random order, in (0, 1]; then the
                 next ones, in shells of this width ("dct")
    step_size:   length of a step in units of eps, > 0; by default in Linf 2 for features, from one wall of the ball to
                 the other, and 0.5 for cosines, and in L2 0.2
    loss:        surrogate loss: "ce", "margin" or "dlr", where the goal has them

    Works in Linf and L2 balls. Raises UsageError for values out of range and for other balls.

    The paper works in L2 and lowers a probability; where the model is sure its differences vanish in float32, so that
    the margin is the default here. A step beyond the ball is led back into it: in Linf to the nearest point, in L2
    straight towards the clean input. A single feature that already lies at a wall is not asked to go further.
    """

    needs: ClassVar[Access] = Access.SCORES
    least_queries: ClassVar[int] = 3  # the clean input, a step and the way back
    queries: int = 5000
    basis: Literal["pixel", "dct"] = "pixel"
    frequencies: float = 0.125
    step_size: float | None = None
    loss: str = "margin"

    def __post_init__(self) -> None:
        at_least_one(self, "queries")
        one_of(self, "basis", ("pixel", "dct"))
        fraction(self, "frequencies", what="share of the frequencies")
        positive(self, "step_size", what="length in units of eps")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        inner = ball_among("simba", ball, Linf, L2, instead="square in L1, one_pixel or pixle in L0")
        search = Search(oracle, x, goal.under(self.loss), rng.at("simba"))
        if not x.numel() or not search.affords():
            return x.clone()
        layout, bounded = Layout.of(x), isinstance(inner, Linf)
        usual = USUAL[self.basis, bounded]
        length = (usual if self.step_size is None else self.step_size) * inner.eps
        step = _Steps(layout, self.basis, length, bounded, x)
        if bounded:
            low, high = ball.project(x - inner.eps, x), ball.project(x + inner.eps, x)
        else:
            low, high = (bound.expand_as(x) for bound in inner.box.bounds_like(x))
        first = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        order = step.order(search.rng, self.frequencies)
        state = _State(x, low.flatten(1), high.flatten(1), order, first, first == 0)
        state = taken(search.score(x), state)
        for _ in range(self.queries - 1):
            if not len(search) or not search.affords():
                break
            directions = state.directions()
            if self.basis == "pixel":
                directions = _open(state)
            candidate = self._inside(state.z + step(directions, state.up), search.x, ball, inner)
            wins, rows = search.trial(candidate)
            if rows is not None:
                state, candidate = state.take(rows), candidate[rows]
            state.z = torch.where(per_row(wins, candidate), candidate, state.z)
            won = wins.unsqueeze(1)
            state.turned(~won)
            state.place, state.up = state.place + won, state.up | won
        return search.best

    @staticmethod
    def _inside(z: Tensor, x: Tensor, ball: Ball[Tensor], inner: Any) -> Tensor:
        """In Linf the nearest point of ball and box; in L2 into the box, then straight towards the clean row."""
        if isinstance(inner, Linf):
            return ball.project(z, x)
        low, high = inner.box.bounds_like(x)
        move = torch.clamp(z, low, high) - x
        length: Tensor = torch.linalg.vector_norm(move.flatten(1), dim=1)
        # A hair inside the ball, so that no round-off leads out of it.
        size = inner.eps * (1 - 1e-6) / length.clamp_min(torch.finfo(x.dtype).tiny)
        return x + move * per_row(size.clamp_max(1.0), move)


def _open(state: _State) -> Tensor:
    """The features that rows step along, long [n, 1], once they turned from walls that leave a step no room."""
    for _ in range(3):
        directions = state.directions()
        at = state.z.flatten(1).gather(1, directions)
        wall = torch.where(state.up, state.high.gather(1, directions), state.low.gather(1, directions))
        state.turned(at == wall)
    return state.directions()


class _Steps:
    """Steps along a basis: moves [n, ...] by direction and sign."""

    def __init__(self, layout: Layout, basis: str, length: float, bounded: bool, x: Tensor) -> None:
        self.layout, self.basis, self.length, self.bounded = layout, basis, length, bounded
        self.shape = x.shape[1:]
        self.rows, self.columns = (_cosines(size).to(x) for size in (layout.height, layout.width))
        self.like = x

    def order(self, rng: Rng, frequencies: float) -> Tensor:
        """The order of every row's directions, long [B, D]."""
        keys = rng.at("order").uniform(self.like.flatten(1))
        if self.basis == "dct":
            layout = self.layout
            shells = [
                torch.arange(size, device=keys.device) // max(1, round(frequencies * size))
                for size in (layout.height, layout.width)
            ]
            shell = torch.maximum(shells[0][:, None], shells[1])
            keys = keys + shell.expand(layout.channels, -1, -1).flatten()
        return keys.argsort(dim=1, stable=True)

    def __call__(self, directions: Tensor, up: Tensor) -> Tensor:
        size = torch.where(up, self.length, -self.length).to(self.like.dtype)
        if self.basis == "pixel":
            move = self.like.new_zeros(len(directions), math.prod(self.shape)).scatter_(1, directions, size)
            return move.view(-1, *self.shape)
        pixels = self.layout.height * self.layout.width
        channel, place = directions // pixels, (directions % pixels).squeeze(1)
        row, column = self.rows[place // self.layout.width], self.columns[place % self.layout.width]
        wave = row.unsqueeze(2) * column.unsqueeze(1)
        if self.bounded:
            wave = wave / wave.abs().amax((1, 2), keepdim=True)
        move = self.like.new_zeros(len(directions), self.layout.channels, pixels)
        index = channel.unsqueeze(2).expand(-1, -1, pixels)
        return move.scatter_(1, index, (size.unsqueeze(2) * wave).flatten(1).unsqueeze(1)).view(-1, *self.shape)


def _cosines(size: int) -> Tensor:
    """The orthonormal cosines (DCT-II) of a length, one per row [size, size], float64."""
    at = torch.arange(size, dtype=torch.float64)
    waves = torch.cos(math.pi / size * (at[:, None] * (at[None] + 0.5)))
    waves = waves * math.sqrt(2 / size)
    waves[0] = math.sqrt(1 / size)
    return waves
