"""Random search in a ball: what uniform and outermost random points break, no gradient should miss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.core.protocols import Access, Ball, Rng

BLOCK = 512  # random points queried at once


@dataclass(frozen=True, kw_only=True)
class RandomSearch:
    """Random search: the first random point of the ball that reaches the goal; every other one lies as far out as the
    ball goes.

    draws: points per row
    """

    needs: ClassVar[Access] = Access.LABELS
    draws: int = 1000

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Rng, /) -> Tensor:
        best = x.clone()
        left = torch.arange(len(x), device=x.device)
        draw = 0
        while draw < self.draws and len(left):
            block = range(draw, min(self.draws, draw + max(1, BLOCK // len(left))))
            draw = block.stop
            points = torch.stack([_point(i, x[left], ball, rng.take(left)) for i in block])
            of = left.repeat(len(block))
            reached = goal.take(of).reached(oracle(points.flatten(0, 1), of)).view(len(block), -1)
            # The first point in the order of the draws, so that the block's length changes nothing.
            first = reached.long().argmax(0)
            rows = reached.any(0)
            best[left[rows]] = points[first[rows], rows.nonzero().squeeze(1)]
            left = left[~rows]
        return best


def _point(draw: int, origin: Tensor, ball: Ball[Tensor], rng: Rng) -> Tensor:
    stream = rng.at("draw", draw)
    if draw % 2:
        return ball.project(origin + ball.steepest(stream.normal(origin), origin), origin)
    return ball.sample(origin, stream)
