"""Projected gradient descent on the attacker's loss (Madry et al., arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, descended
from advkit.attacks.search import Keep, Search
from advkit.attacks.wrappers import averaged
from advkit.core.checks import at_least_one, one_of, positive
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Ball, Rng, Stepped

Start = Literal["random", "origin", "gaussian"]


def starting_point(start: Start, x: Tensor, ball: Ball[Tensor], rng: Rng) -> Tensor:
    """Where a run begins: a random point of the ball, the clean row, or the clean row plus noise of deviation 0.001."""
    if start == "origin":
        return x.clone()
    if start == "random":
        return ball.sample(x, rng)
    return ball.project(x + 0.001 * rng.normal(x), x)


@dataclass(frozen=True, kw_only=True)
class PGD(Stepped):
    """Projected gradient descent on the goal's loss; returns each sample's best iterate.

    The point after the last step counts too, so a full run costs `steps` gradients and one answer per restart; rows
    that reach their goal leave at once. Works in every ball that can project and with every goal.

    steps:     gradient steps per restart, >= 1
    step_size: length of one step in units of the ball's eps, > 0; in L0 a fraction of the way from the origin to the
               edge of the box, for the positions that promise most
    restarts:  independent starts, >= 1; more than one needs a start that is drawn
    start:     "random" in the ball, "origin", or "gaussian": the origin plus 0.001 N(0, 1), as TRADES starts
    keep:      "best" returns the point of lowest loss, one that reached the goal first; "last" the end of the run, as
               adversarial training wants it, for one answer less
    stop:      leave a row as soon as its goal is reached, where the oracle's answers are the verdict's
    loss:      surrogate loss: "ce", "margin" or "dlr", where the goal has them
    eot:       gradients averaged per step, for victims whose answers vary from call to call

    Raises UsageError for values out of range.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    steps: int = 40
    step_size: float = 0.1
    restarts: int = 1
    start: Start = "random"
    keep: Keep = "best"
    stop: bool = True
    loss: str = "ce"
    eot: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "restarts", "eot")
        positive(self, "step_size", what="length in units of eps")
        one_of(self, "start", ("random", "origin", "gaussian"))
        one_of(self, "keep", ("best", "last"))
        if self.restarts > 1 and (self.start == "origin" or self.keep == "last"):
            raise UsageError(
                f"{self.restarts} restarts with start={self.start}, keep={self.keep} repeat or discard one another; "
                "use start=random (or gaussian) and keep=best, or restarts=1"
            )

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        search = Search(averaged(oracle, self.eot), x, goal.under(self.loss), rng, stop=self.stop, keep=self.keep)
        for stream in search.restarts(self.restarts):
            search.z = starting_point(self.start, search.x, ball, stream)
            for step in search.steps(self.steps):
                search.z = descended(ball, step.z, step.gradient, step.x, self.step_size)
            search.finish()
        return search.best
