"""Auto-PGD: gradient descent whose step size follows the loss (Croce and Hein, arXiv 2003.01690; L1: 2103.01208)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import Best, Live, TensorGoal, TensorOracle, descended, kept, lp_ball, per_row
from advkit.attacks.gradient.pgd import at_least_one
from advkit.attacks.wrappers import averaged
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Ball, Rng
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

ALPHA = 0.75  # weight of the gradient step against the momentum
RHO = 0.75  # share of steps that must improve the loss


def checkpoints(steps: int) -> tuple[int, ...]:
    """The steps after which step sizes are reviewed: ceil(p_j steps), p_1 = .22, gaps shrinking to .06.

    Counted in hundredths, where the published recurrence is exact.
    """
    found, last, gap = [], 0, 22
    while last + gap <= 100:
        last, gap = last + gap, max(gap - 3, 6)
        found.append(-(-last * steps // 100))
    return tuple(dict.fromkeys(found))


@dataclass
class _Walk:
    """The walk per row: current and previous point, gradient and loss; the point of lowest loss with its own."""

    z: Tensor
    previous: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor

    def take(self, rows: Tensor) -> _Walk:
        return _Walk(
            *kept(rows, self.z, self.previous, self.gradient, self.loss, self.best, self.best_gradient, self.best_loss)
        )

    def back_to_best(self, rows: Tensor) -> None:
        """Go on from the point of lowest loss in these rows (bool)."""
        mask = per_row(rows, self.z)
        self.z = torch.where(mask, self.best, self.z)
        self.gradient = torch.where(mask, self.best_gradient, self.gradient)
        self.loss = torch.where(rows, self.best_loss, self.loss)


@dataclass
class _Dense:
    """Steps of the published attack: 2 eps at first, with momentum, halved where the loss stalls."""

    reviews: frozenset[int]
    size: Tensor  # step size in units of eps [B, 1...]
    improved: Tensor  # improving steps since the last review [B]
    seen: Tensor  # lowest loss at the last review [B]
    halved: Tensor  # whether the last review halved the step [B]
    since: int = 0

    @classmethod
    def begin(cls, state: _Walk, steps: int) -> _Dense:
        zero = torch.zeros_like(state.loss)
        size = per_row(zero + 2, state.z)
        return cls(frozenset(checkpoints(steps)), size, zero.clone(), state.best_loss.clone(), zero.bool())

    def take(self, rows: Tensor) -> _Dense:
        size, improved, seen, halved = kept(rows, self.size, self.improved, self.seen, self.halved)
        return _Dense(self.reviews, size, improved, seen, halved, self.since)

    def propose(self, state: _Walk, x: Tensor, ball: Ball[Tensor], step: int) -> Tensor:
        target = descended(ball, state.z, state.gradient, x, self.size)
        if step == 1:
            return target
        # z + ALPHA (target - z) + (1 - ALPHA) (z - previous): between where the last move leads on to and the target
        onward = torch.lerp(state.previous, state.z, 2)
        return ball.project(onward.lerp_(target, ALPHA), x)

    def review(self, state: _Walk, lower: Tensor, x: Tensor, step: int) -> None:
        """`lower`: whether this step's loss is below the step's before, bool [B]."""
        self.improved += lower
        if step not in self.reviews:
            return
        few = self.improved < RHO * (step - self.since)
        stalled = ~self.halved & (state.best_loss >= self.seen)
        self.halved = few | stalled
        self.size = torch.where(per_row(self.halved, self.size), self.size / 2, self.size)
        state.back_to_best(self.halved)
        self.seen, self.since = state.best_loss.clone(), step
        self.improved.zero_()


@dataclass
class _Sparse:
    """Steps of the L1 attack: eps long along the largest gradient entries, whose number follows the best point's."""

    every: int
    size: Tensor  # step size in units of eps [B]
    share: Tensor  # share of the entries that a step moves [B]
    changed: Tensor  # entries that differ from the origin, at the last review [B]

    @classmethod
    def begin(cls, state: _Walk, steps: int) -> _Sparse:
        one = torch.ones_like(state.loss)
        return cls(max(int(0.04 * steps), 1), one, 0.2 * one, one * state.z[0].numel())

    def take(self, rows: Tensor) -> _Sparse:
        return _Sparse(self.every, *kept(rows, self.size, self.share, self.changed))

    def propose(self, state: _Walk, x: Tensor, ball: Ball[Tensor], step: int) -> Tensor:
        eps: float = lp_ball(ball).eps
        flat = state.gradient.flatten(1)
        n = flat.shape[1]
        place = n - (self.share * n).round().long().clamp(1, n)
        smallest = flat.abs().sort(1)[0].gather(1, place[:, None])
        signs = flat.sign() * (flat.abs() >= smallest)
        move = signs * (self.size * eps / signs.abs().sum(1).clamp_min(1))[:, None]
        return ball.project(state.z - move.view_as(state.z), x)

    def review(self, state: _Walk, lower: Tensor, x: Tensor, step: int) -> None:
        if step % self.every:
            return
        changed = (state.best != x).flatten(1).sum(1).to(self.share.dtype)
        sparser = changed < 0.95 * self.changed
        self.share = changed / (1.5 * x[0].numel())
        self.size = torch.where(sparser, 1.0, self.size / 1.5).clamp(0.1, 1.0)
        self.changed = changed
        state.back_to_best(sparser)


def start_of(x: Tensor, ball: Ball[Tensor], rng: Rng) -> Tensor:
    """The published starts: noise scaled to the ball's surface (Linf, L2) or projected onto the ball (L1)."""
    inner = lp_ball(ball)
    if isinstance(inner, Linf):
        noise = 2 * rng.uniform(x) - 1
        largest = noise.flatten(1).abs().amax(1)
        return ball.project(x + inner.eps * noise / per_row(largest.clamp_min(1e-12), x), x)
    if isinstance(inner, L2):
        noise = rng.normal(x)
        length = torch.linalg.vector_norm(noise.flatten(1), dim=1)
        return ball.project(x + inner.eps * noise / per_row(length.clamp_min(1e-12), x), x)
    if isinstance(inner, L1):
        return ball.project(x + rng.normal(x), x)
    return ball.sample(x, rng)


@dataclass(frozen=True, kw_only=True)
class APGD:
    """Walk down the attacker's loss with a step size that halves, row by row, where progress stalls.

    Costs steps + 1 answers and `steps` gradients per restart; rows that reach their goal leave at once. The walk goes
    on from the point of lowest loss; returned is the lowest loss among the points that reached the goal, if any did.

    steps:    gradient steps per restart, >= 1
    restarts: independent random starts, >= 1
    loss:     surrogate loss: "ce", "margin" or "dlr", where the goal has them
    stop:     leave a row as soon as its goal is reached, where the oracle's answers are the verdict's
    eot:      gradients averaged per step, for victims whose answers vary from call to call

    Raises UsageError for values out of range and for the L0 ball, for which no step-size rule is published.

    We follow the papers where their released code differs: the first step's improvement is counted against the start's
    loss (there against an entry not yet filled), steps tied with the required share are enough, and the step after a
    return to the best point is compared with that point.
    In L1 the number of entries a step moves is rounded to nearest, not up, so that two can become one.
    Projections onto ball and box together are exact, where the code clips after projecting onto the L2 ball.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    steps: int = 100
    restarts: int = 1
    loss: str = "ce"
    stop: bool = True
    eot: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "restarts", "eot")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        if isinstance(lp_ball(ball), L0):
            raise UsageError("APGD was asked for an L0 ball; it works in Linf, L2 and L1 (use `pgd` for L0)")
        goal = goal.under(self.loss)
        oracle = averaged(oracle, self.eot)
        best = Best(x, goal)
        live = Live(oracle, x, goal, rng)
        stopping = self.stop and oracle.decides
        for restart in range(self.restarts):
            if restart and stopping:
                survivors = live.left(best.reached if live.index is None else best.reached[live.index])
                live = live if survivors is None else live.take(survivors)
            if not len(live):
                break
            self._run(live, ball, best, start_of(live.x, ball, live.rng.at("start", restart)), stopping)
        return best.x

    def _run(self, live: Live, ball: Ball[Tensor], best: Best, z: Tensor, stopping: bool) -> None:
        if not live.affords():
            return
        loss, gradient, answer = live.oracle.gradient(z, live.goal)
        state = _Walk(z, z, gradient, loss, z, gradient, loss)
        pace = (_Sparse if isinstance(lp_ball(ball), L1) else _Dense).begin(state, self.steps)
        reached = best.offer(z, answer, loss, live.index)
        for step in range(1, self.steps + 1):
            if stopping and not best.quiet and (stay := live.left(reached)) is not None:
                live, state, pace = live.take(stay), state.take(stay), pace.take(stay)
            if not len(live) or not live.affords():
                return
            z = pace.propose(state, live.x, ball, step)
            if step < self.steps:
                loss, gradient, answer = live.oracle.gradient(z, live.goal)
                reached = best.offer(z, answer, loss, live.index)
            else:
                best.offer(z, live.oracle(z), rows=live.index)
                return
            lower, lowest = loss < state.loss, loss < state.best_loss
            mask = per_row(lowest, z)
            state = _Walk(
                z,
                state.z,
                gradient,
                loss,
                torch.where(mask, z, state.best),
                torch.where(mask, gradient, state.best_gradient),
                torch.where(lowest, loss, state.best_loss),
            )
            pace.review(state, lower, live.x, step)


@dataclass(frozen=True, kw_only=True)
class APGDCE(APGD):
    """APGD on the cross-entropy; see APGD for the fields."""

    loss: str = field(default="ce")


@dataclass(frozen=True, kw_only=True)
class APGDMargin(APGD):
    """APGD on the plain difference of logits, which no scaling of the logits can flatten; see APGD for the fields."""

    loss: str = field(default="margin")
