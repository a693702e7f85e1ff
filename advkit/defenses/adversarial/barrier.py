"""The inner problem with a log barrier, whose solution can be differentiated (arXiv 2308.00311, 2112.12376)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle
from advkit.core.checks import at_least_one, fraction, positive
from advkit.core.protocols import Access, Ball, Rng

INSIDE = 1 - 1e-3
"""Part of every half-width that points may use, so that the logarithms stay finite in float32."""
_START = 0.99


class Walls(NamedTuple):
    """What each value may be: within `half` of `middle`, both [B, ...], up to the nearer walls of ball and box."""

    middle: Tensor
    half: Tensor

    @classmethod
    def around(cls, x: Tensor, ball: Any) -> Walls:
        """Of a Linf ball inside its box."""
        low, high = ball.box.bounds_like(x)
        below, above = torch.maximum(x - ball.eps, low), torch.minimum(x + ball.eps, high)
        return cls((above + below) / 2, ((above - below) / 2).clamp(min=0))


def central(gradient: Tensor, half: Tensor, c: float) -> Tensor:
    """The e that maximises gradient * e + c (log(half - e) + log(half + e)), elementwise: where the barrier holds it.

    gradient * half^2 / (c + sqrt(c^2 + gradient^2 half^2)), kept inside 0.999 half.
    """
    push = gradient * half
    return torch.clamp(push * half / (c + torch.sqrt(c * c + push * push)), -INSIDE * half, INSIDE * half)


def give(e: Tensor, half: Tensor, c: float) -> Tensor:
    """How far e gives way to the gradient: 1 / (c (1/(half - e)^2 + 1/(half + e)^2)), 0 where there is no room."""
    above, below = (half - e).square(), (half + e).square()
    return torch.where(half > 0, above * below / (c * (above + below)), torch.zeros_like(half))


@dataclass(frozen=True, kw_only=True)
class BarrierAttack:
    """Ascent of the attacker's loss plus c times the logarithms of the distances to the walls.

    Every step goes part of the way to where the loss, taken as linear at the present point, and the barrier balance;
    the last step goes all of it. So every point is strictly inside, and on a linear loss the end is the exact solution.
    A projection has nothing to do. The start is uniform in 0.99 of the ball. Linf alone.

    steps: gradients, >= 1
    size:  part of the way, in (0, 1]
    c:     weight of the barrier, > 0, in units of the loss; small: the corners of the ball, large: its middle
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    steps: int = 10
    size: float = 0.25
    c: float = 0.01

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        fraction(self, "size", what="part of the way")
        positive(self, "c", what="weight")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        walls = Walls.around(x, ball)
        e = (2 * rng.uniform(x) - 1) * _START * walls.half
        for step in range(1, self.steps + 1):
            _, gradient, _ = oracle.gradient(walls.middle + e, goal)
            there = central(-gradient, walls.half, self.c)
            e = there if step == self.steps else e + self.size * (there - e)
        return walls.middle + e
