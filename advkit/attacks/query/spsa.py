"""SPSA: Adam on gradients estimated by simultaneous perturbation of all features (arXiv 1802.05666)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, ball_among
from advkit.attacks.query.estimates import Estimates, estimated_steps
from advkit.attacks.search import Search
from advkit.core.protocols import Access, AsksQueries, Ball, Rng
from advkit.core.rows import PerRow
from advkit.threat_models.lp import L2, Linf

DECAYS = (0.9, 0.999)
"""Of Adam's two running means, the usual ones."""


@dataclass
class _Adam(PerRow):
    """Per row: the running means of the gradient and of its square [n, ...]."""

    mean: Tensor
    square: Tensor


@dataclass(frozen=True, kw_only=True)
class SPSA(Estimates, AsksQueries):
    """SPSA, simultaneous perturbation: Adam on a gradient that is estimated from scores along random signs.

    Scores are asked at z + sigma u and z - sigma u for random u of -1 and 1. Adam's step is projected onto the ball,
    and its end is asked about as well: a row leaves there once its goal is reached, where the oracle's answers are the
    verdict's.

    queries:   answers asked of each row, >= 1; the threat model's budget, where it has one, cuts them short
    samples:   of them for one estimate, even, >= 2; a step takes one more
    sigma:     distance of the points that are asked about in every feature, in units of the box's width, > 0
    step_size: Adam's rate, in units of the ball's eps, > 0
    loss:      surrogate loss: "ce", "margin" or "dlr", where the goal has them

    Works in Linf and L2 balls; in L2 a step of Adam is divided by the root of the number of features. Raises UsageError
    for values out of range and for other balls.

    The paper works in Linf, with thousands of queries for one estimate and a rate of 0.01 where eps is 8/255. Points
    are clamped to the box, so that every query is a legal input; a feature at its bound counts half.
    """

    needs: ClassVar[Access] = Access.SCORES
    queries: int = 5000
    samples: int = 16
    sigma: float = 0.01
    step_size: float = 0.25
    loss: str = "margin"

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        inner = ball_among("spsa", ball, Linf, L2, instead="nes or square in L1, one_pixel or pixle in L0")
        search = Search(oracle, x, goal.under(self.loss), rng.at("spsa"))
        adam = _Adam(torch.zeros_like(x), torch.zeros_like(x))
        length = self.step_size * inner.eps
        if isinstance(inner, L2):
            length /= math.sqrt(max(1, math.prod(x.shape[1:])))
        first, second = DECAYS
        for step in estimated_steps(search, inner.box, self.queries, self.samples, self.sigma, "signs"):
            adam = step.kept(adam)
            adam.mean = first * adam.mean + (1 - first) * step.gradient
            adam.square = second * adam.square + (1 - second) * step.gradient.square()
            mean = adam.mean / (1 - first ** (step.number + 1))
            deviation = (adam.square / (1 - second ** (step.number + 1))).sqrt()
            # A gradient of zero is no direction: there Adam stays where it is.
            move = torch.where(deviation > 0, mean / deviation.clamp_min(torch.finfo(x.dtype).tiny), 0.0)
            search.z = ball.project(step.z - length * move, step.x)
        return search.best
