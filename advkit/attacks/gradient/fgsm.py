"""The fast gradient sign method (Goodfellow et al., arXiv 1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, descended
from advkit.attacks.search import Search
from advkit.attacks.wrappers import averaged
from advkit.core.checks import at_least_one
from advkit.core.protocols import Access, Ball, Rng


@dataclass(frozen=True, kw_only=True)
class FGSM:
    """Fast gradient sign method: one step of length eps along the ball's steepest descent of the goal's loss.

    Returns the end of the step as published, also where it raised the loss; only a row whose goal holds already stays
    where it is. Costs one gradient.

    loss: surrogate loss: "ce", "margin" or "dlr", where the goal has them
    eot:  gradients averaged, for victims whose answers vary from call to call

    Raises UsageError for values out of range.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    loss: str = "ce"
    eot: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "eot")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        search = Search(averaged(oracle, self.eot), x, goal.under(self.loss), rng, keep="last")
        for step in search.steps(1):
            search.z = descended(ball, step.z, step.gradient, step.x, 1.0)
        search.finish()
        return search.best
