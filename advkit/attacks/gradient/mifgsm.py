"""The momentum iterative method (Dong et al., arXiv 1710.06081)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, descended
from advkit.attacks.search import Keep, Search
from advkit.attacks.wrappers import averaged, momentum
from advkit.core.checks import at_least_one, not_negative, one_of, positive
from advkit.core.protocols import Access, Ball, Rng, Stepped


@dataclass(frozen=True, kw_only=True)
class MIFGSM(Stepped):
    """Momentum iterative FGSM: projected steps from the clean input along gradients accumulated with momentum.

    steps:     gradient steps, >= 1
    step_size: length of one step in units of eps, > 0; None is 1 / steps, as published
    decay:     how much of the accumulated gradient the next step keeps, >= 0; 0 is PGD from the origin
    keep:      "best" returns the point of lowest loss, one that reached the goal first; "last" the end of the run, as
               published, for one answer less
    stop:      leave a row as soon as its goal is reached, where the oracle's answers are the verdict's
    loss:      surrogate loss: "ce", "margin" or "dlr", where the goal has them
    eot:       gradients averaged per step, for victims whose answers vary from call to call

    Raises UsageError for values out of range.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    keep: Keep = "best"
    stop: bool = True
    loss: str = "ce"
    eot: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "eot")
        positive(self, "step_size", what="length in units of eps")
        not_negative(self, "decay")
        one_of(self, "keep", ("best", "last"))

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        size = 1 / self.steps if self.step_size is None else self.step_size
        accumulating = momentum(averaged(oracle, self.eot), self.decay)
        search = Search(accumulating, x, goal.under(self.loss), rng, stop=self.stop, keep=self.keep)
        for step in search.steps(self.steps):
            search.z = descended(ball, step.z, step.gradient, step.x, size)
        search.finish()
        return search.best
