"""Auto-PGD: gradient descent whose step size follows the loss (Croce and Hein, arXiv 2003.01690; L1: 2103.01208)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, descended, lp_ball, per_row
from advkit.attacks.search import Search, Step
from advkit.attacks.wrappers import averaged
from advkit.core.checks import at_least_one, check
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Ball, Rng, Stepped
from advkit.core.rows import PerRow
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

ALPHA = 0.75  # weight of the gradient step against the momentum
RHO = 0.75  # share of steps that must improve the loss
SHARES = (0.3, 0.3, 0.4)  # of a run's steps, in the largest ball, between, and in the ball asked for


def checkpoints(steps: int) -> tuple[int, ...]:
    """The steps after which step sizes are reviewed: ceil(p_j steps), p_1 = .22, gaps shrinking to .06.

    Counted in hundredths, where the published recurrence is exact.
    """
    reviews, last, gap = [], 0, 22
    while last + gap <= 100:
        last, gap = last + gap, max(gap - 3, 6)
        reviews.append(-(-last * steps // 100))
    return tuple(dict.fromkeys(reviews))


@dataclass
class _Run(PerRow):
    """A run per row: the current point, its gradient and loss; the point of lowest loss with its own."""

    z: Tensor
    gradient: Tensor
    loss: Tensor
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    size: Tensor  # step size in units of eps

    def scored(self, step: Step) -> Tensor:
        """Move to the point that the step scored; bool [B]: whether its loss is below that of the point before."""
        z, gradient, loss = step.z, step.gradient, step.loss
        lower, lowest = loss < self.loss, loss < self.best_loss
        mask = per_row(lowest, z)
        self.z, self.gradient, self.loss = z, gradient, loss
        self.best = torch.where(mask, z, self.best)
        self.best_gradient = torch.where(mask, gradient, self.best_gradient)
        self.best_loss = torch.where(lowest, loss, self.best_loss)
        return lower

    def back_to_best(self, rows: Tensor) -> None:
        """Go on from the point of lowest loss in these rows (bool)."""
        mask = per_row(rows, self.z)
        self.z = torch.where(mask, self.best, self.z)
        self.gradient = torch.where(mask, self.best_gradient, self.gradient)
        self.loss = torch.where(rows, self.best_loss, self.loss)


@dataclass
class _Dense(_Run):
    """Steps of the published attack: 2 eps at first, with momentum, halved where the loss stalls."""

    previous: Tensor  # the point before z
    improved: Tensor  # improving steps since the last review [B]
    seen: Tensor  # lowest loss at the last review [B]
    halved: Tensor  # whether the last review halved the step [B]
    reviews: frozenset[int]
    since: int = 0

    @classmethod
    def begin(cls, step: Step, steps: int) -> Self:
        z, gradient, loss = step.z, step.gradient, step.loss
        zero = torch.zeros_like(loss)
        size = per_row(zero + 2, z)
        reviews = frozenset(checkpoints(steps))
        return cls(z, gradient, loss, z, gradient, loss, size, z, zero, loss, zero.bool(), reviews)

    def proposed(self, x: Tensor, ball: Ball[Tensor], number: int) -> Tensor:
        """Where to ask next: the gradient step, and from the second on momentum."""
        target = descended(ball, self.z, self.gradient, x, self.size)
        if number == 0:
            return target
        # z + ALPHA (target - z) + (1 - ALPHA) (z - previous): between where the last move leads on to and the target
        onward = torch.lerp(self.previous, self.z, 2)
        return ball.project(onward.lerp_(target, ALPHA), x)

    def after(self, step: Step) -> Self:
        """The run after a step; its size halves in rows where too few steps improved, or none since it halved last."""
        self.previous = self.z
        self.improved += self.scored(step)
        if step.number in self.reviews:
            few = self.improved < RHO * (step.number - self.since)
            stalled = ~self.halved & (self.best_loss >= self.seen)
            self.halved = few | stalled
            self.size = torch.where(per_row(self.halved, self.size), self.size / 2, self.size)
            self.back_to_best(self.halved)
            self.seen, self.since = self.best_loss, step.number
            self.improved.zero_()
        return self


@dataclass
class _Sparse(_Run):
    """Steps of the L1 attack: eps long along the largest gradient entries, whose number follows the best point's."""

    share: Tensor  # share of the entries that a step moves [B]
    changed: Tensor  # entries that differ from the clean row, at the last review [B]
    every: int

    @classmethod
    def begin(cls, step: Step, steps: int) -> Self:
        z, gradient, loss = step.z, step.gradient, step.loss
        one = torch.ones_like(loss)
        every = max(int(0.04 * steps), 1)
        return cls(z, gradient, loss, z, gradient, loss, one, 0.2 * one, one * z[0].numel(), every)

    def proposed(self, x: Tensor, ball: Ball[Tensor], number: int) -> Tensor:
        """Where to ask next: along the signs of the largest entries."""
        eps: float = lp_ball(ball).eps
        flat = self.gradient.flatten(1)
        n = flat.shape[1]
        place = n - (self.share * n).round().long().clamp(1, n)
        smallest = flat.abs().sort(1)[0].gather(1, place[:, None])
        signs = flat.sign() * (flat.abs() >= smallest)
        move = signs * (self.size * eps / signs.abs().sum(1).clamp_min(1))[:, None]
        return ball.project(self.z - move.view_as(self.z), x)

    def after(self, step: Step) -> Self:
        """The run after a step; now and then its size and number of entries are set anew by the best point's."""
        self.scored(step)
        if step.number % self.every == 0:
            changed = (self.best != step.x).flatten(1).sum(1).to(self.share.dtype)
            sparser = changed < 0.95 * self.changed
            self.share = changed / (1.5 * step.x[0].numel())
            self.size = torch.where(sparser, 1.0, self.size / 1.5).clamp(0.1, 1.0)
            self.changed = changed
            self.back_to_best(sparser)
        return self


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
class APGD(Stepped):
    """Auto-PGD: projected gradient descent with momentum whose step size halves, per sample, where progress stalls.

    Costs steps + 1 answers and `steps` gradients per restart; rows that reach their goal leave at once. A run goes
    on from the point of lowest loss; returned is the lowest loss among the points that reached the goal, if any did.

    steps:    gradient steps per restart, >= 1
    restarts: independent random starts, >= 1
    loss:     surrogate loss: "ce", "margin" or "dlr", where the goal has them
    stop:     leave a row as soon as its goal is reached, where the oracle's answers are the verdict's
    eot:      gradients averaged per step, for victims whose answers vary from call to call
    wider:    a run begins in a ball so many times as large and comes back into the ball asked for by way of half the
              excess, with .3, .3 and .4 of the steps and an answer more for each of the first two; >= 1. 1 is plain
              APGD, 3 the multi-eps scheme published for L1 (arXiv 2103.01208), which leaves flat and misleading
              neighbourhoods behind in the other norms, too

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
    wider: float = 1.0

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "restarts", "eot")
        check(self, "wider", self.wider >= 1, "a factor of at least 1")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        refuse_l0("apgd", ball)
        search = Search(averaged(oracle, self.eot), x, goal.under(self.loss), rng, stop=self.stop)
        return self._restarted(search, ball)

    def _restarted(self, search: Search, ball: Ball[Tensor]) -> Tensor:
        for stream in search.restarts(self.restarts):
            self._run(search, ball, start_of(search.x, ball, stream))
        return search.best

    def _run(self, search: Search, ball: Ball[Tensor], start: Tensor) -> None:
        """One restart."""
        steps = self.steps
        if self.wider > 1 and steps >= len(SHARES):
            # What a point outside the ball reaches is no success: it has a search of its own, and only leads on.
            inner = lp_ball(ball)
            z = search.x + self.wider * (start - search.x)
            for factor, share in zip((self.wider, (1 + self.wider) / 2), SHARES, strict=False):
                here = max(1, round(share * self.steps))
                larger = replace(inner, eps=inner.eps * factor)
                outside = Search(search.oracle, search.x, search.goal, search.rng, stop=False)
                _descend(outside, larger, larger.project(z, search.x), here)
                z, steps = outside.best, steps - here
            start = ball.project(z, search.x)
        _descend(search, ball, start, steps)


def _descend(search: Search, ball: Ball[Tensor], start: Tensor, steps: int) -> None:
    """So many steps in one ball."""
    kind = _Sparse if isinstance(lp_ball(ball), L1) else _Dense
    run: _Sparse | _Dense | None = None
    search.z = start
    for step in search.steps(steps):
        run = kind.begin(step, steps) if run is None else step.kept(run).after(step)
        search.z = run.proposed(step.x, ball, step.number)
    search.finish()


def refuse_l0(name: str, ball: Ball[Tensor]) -> None:
    """UsageError for the L0 ball, for which no step-size rule is published."""
    if isinstance(lp_ball(ball), L0):
        raise UsageError(f"{name} was asked for an L0 ball; it works in Linf, L2 and L1 (use `pgd` for L0)")


@dataclass(frozen=True, kw_only=True)
class APGDCE(APGD):
    """Auto-PGD (APGD) on the cross-entropy; see APGD for the fields."""

    loss: str = field(default="ce")


@dataclass(frozen=True, kw_only=True)
class APGDMargin(APGD):
    """Auto-PGD (APGD) on the margin, which no scaling of the logits can flatten; see APGD for the fields."""

    loss: str = field(default="margin")
