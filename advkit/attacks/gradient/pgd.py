"""Projected gradient descent on the attacker's loss (Madry et al., arXiv 1706.06083)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advkit.attacks.base import Best, Live, TensorGoal, TensorOracle, descended, kept, lp_ball
from advkit.attacks.wrappers import averaged
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Ball, Rng
from advkit.threat_models.sparse import L0

Start = Literal["random", "origin", "gaussian"]
Keep = Literal["best", "last"]


def starting_point(start: Start, x: Tensor, ball: Ball[Tensor], rng: Rng) -> Tensor:
    """Where a walk begins: a random point of the ball, the origin, or the origin plus noise of deviation 0.001."""
    if start == "origin":
        return x.clone()
    if start == "random":
        return ball.sample(x, rng)
    return ball.project(x + 0.001 * rng.normal(x), x)


def walk(
    oracle: TensorOracle,
    x: Tensor,
    goal: TensorGoal,
    ball: Ball[Tensor],
    rng: Rng,
    *,
    steps: int,
    step_size: float,
    restarts: int = 1,
    start: Start = "random",
    keep: Keep = "best",
    stop: bool = True,
    through: Callable[[TensorOracle], TensorOracle] = lambda oracle: oracle,
) -> Tensor:
    """The loop of FGSM, PGD and MI-FGSM: `steps` projected steps per restart along the gradients of `through(oracle)`.

    A restart's starting point is drawn from rng.at("start", restart), so that more restarts repeat the fewer and go on.
    Where the threat model counts queries, the walk ends when they do.
    """
    best = Best(x, goal)
    everyone = Live(oracle, x, goal, rng)
    stopping = stop and oracle.decides
    # In L0 a fraction of a step never outweighs a position that has changed already: the walk would stay with its first
    # positions. It chooses them anew at every step, by what the gradient promises from the origin; the others go back.
    exchange = isinstance(lp_ball(ball), L0)
    for restart in range(restarts):
        if restart and stopping:
            survivors = everyone.left(best.reached[everyone.index] if everyone.index is not None else best.reached)
            everyone = everyone if survivors is None else everyone.take(survivors)
        if not len(everyone):
            break
        live = everyone.through(through(everyone.oracle))
        z = starting_point(start, live.x, ball, live.rng.at("start", restart))
        for _ in range(steps):
            if not live.affords():
                break
            loss, gradient, answer = live.oracle.gradient(z, live.goal)
            if keep == "best" or stopping:
                reached = best.offer(z, answer, loss, live.index)
                if stopping and not best.quiet and (stay := live.left(reached)) is not None:
                    live = live.take(stay)
                    z, gradient = kept(stay, z, gradient)
                    if not len(live):
                        break
            if exchange:
                move = ball.steepest(-gradient, live.x)
                z = ball.project(torch.where(move != 0, z + step_size * move, live.x), live.x)
            else:
                z = descended(ball, z, gradient, live.x, step_size)
        if not len(live):
            continue
        if keep == "last":
            best.put(z, live.index)
        elif live.affords():
            best.offer(z, live.oracle(z), rows=live.index)
    return best.x


@dataclass(frozen=True, kw_only=True)
class PGD:
    """Walk down the attacker's loss inside the ball and keep the best point seen.

    The point after the last step counts too, so a full run costs `steps` gradients and one answer per restart; rows
    that reach their goal leave at once. Works in every ball that can project and with every goal.

    steps:     gradient steps per restart, >= 1
    step_size: length of one step in units of the ball's eps, > 0; in L0 a fraction of the way from the origin to the
               edge of the box, for the positions that promise most
    restarts:  independent starts, >= 1; more than one needs a start that is drawn
    start:     "random" in the ball, "origin", or "gaussian": the origin plus 0.001 N(0, 1), as TRADES starts
    keep:      "best" returns the point of lowest loss, one that reached the goal first; "last" the end of the walk, as
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
        if not self.step_size > 0:
            raise UsageError(f"step_size is {self.step_size}; give a positive length in units of eps, e.g. 0.1")
        one_of(self, "start", ("random", "origin", "gaussian"))
        one_of(self, "keep", ("best", "last"))
        if self.restarts > 1 and (self.start == "origin" or self.keep == "last"):
            raise UsageError(
                f"{self.restarts} restarts with start={self.start}, keep={self.keep} repeat or discard one another; "
                "use start=random (or gaussian) and keep=best, or restarts=1"
            )

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        return walk(
            averaged(oracle, self.eot),
            x,
            goal.under(self.loss),
            ball,
            rng,
            steps=self.steps,
            step_size=self.step_size,
            restarts=self.restarts,
            start=self.start,
            keep=self.keep,
            stop=self.stop,
        )


def at_least_one(settings: object, *names: str) -> None:
    """Raise UsageError where one of these fields is below 1."""
    for name in names:
        if getattr(settings, name) < 1:
            raise UsageError(f"{name} is {getattr(settings, name)}; give a whole number of at least 1")


def one_of(settings: object, name: str, choices: tuple[str, ...]) -> None:
    """Raise UsageError where a field is none of the choices."""
    if getattr(settings, name) not in choices:
        raise UsageError(f"{name} is {getattr(settings, name)!r}; choose one of {', '.join(choices)}")
