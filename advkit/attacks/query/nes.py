"""NES: descent along gradients that natural evolution strategies estimate from scores (arXiv 1804.08598)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, ball_among, descended, per_row
from advkit.attacks.query.estimates import Estimates, estimated_steps
from advkit.attacks.search import Search
from advkit.core.checks import fraction
from advkit.core.protocols import Access, AsksQueries, Ball, Rng
from advkit.core.rows import PerRow
from advkit.threat_models.lp import L1, L2, Linf

PATIENCE = 5
"""Steps without a lower loss after which a row's steps are halved."""


@dataclass
class _State(PerRow):
    """Per row: the running gradient [n, ...], the size of steps, the lowest loss, and steps since it was met, [n]."""

    gradient: Tensor
    size: Tensor
    lowest: Tensor
    since: Tensor


@dataclass(frozen=True, kw_only=True)
class NES(Estimates, AsksQueries):
    """NES, natural evolution strategies: projected gradient descent along a gradient that is estimated from scores.

    Scores are asked at z + sigma u and z - sigma u for random normal u. A step goes along the ball's steepest
    direction, and its end is asked about as well: a row leaves there once its goal is reached, where the oracle's
    answers are the verdict's. A row whose loss has not fallen for five steps halves its own.

    queries:   answers asked of each row, >= 1; the threat model's budget, where it has one, cuts them short
    samples:   of them for one estimate, even, >= 2; a step takes one more
    sigma:     deviation of the points that are asked about, in units of the box's width, > 0
    step_size: length of the first steps, in units of the ball's eps, > 0
    momentum:  share of the gradient so far in the next one, in [0, 1)
    loss:      surrogate loss: "ce", "margin" or "dlr", where the goal has them

    Works in Linf, L2 and L1 balls. Raises UsageError for values out of range and for other balls.

    The paper steps in Linf; in other balls the step is PGD's. It descends the cross-entropy, whose differences vanish
    in float32 where the model is sure: the margin is the default here. Points are clamped to the box, so that every
    query is a legal input; a coordinate at its bound counts half. The last step makes do with the queries that are
    left.
    """

    needs: ClassVar[Access] = Access.SCORES
    queries: int = 5000
    samples: int = 50
    sigma: float = 0.001
    step_size: float = 0.25
    momentum: float = 0.9
    loss: str = "margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(self, "momentum", ends="[)")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        inner = ball_among("nes", ball, Linf, L2, L1, instead="one_pixel or pixle in L0")
        search = Search(oracle, x, goal.under(self.loss), rng.at("nes"))
        known = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        state = _State(torch.zeros_like(x), torch.full_like(known, self.step_size), known, torch.zeros_like(known))
        for step in estimated_steps(search, inner.box, self.queries, self.samples, self.sigma, "normal"):
            state = step.kept(state)
            state.since = torch.where(step.loss < state.lowest, 0.0, state.since + (step.number > 0))
            state.lowest = torch.minimum(state.lowest, step.loss)
            tired = state.since >= PATIENCE
            state.size, state.since = torch.where(tired, state.size / 2, state.size), state.since * ~tired
            state.gradient = self.momentum * state.gradient + (1 - self.momentum) * step.gradient
            search.z = descended(ball, step.z, state.gradient, step.x, per_row(state.size, step.z))
        return search.best
