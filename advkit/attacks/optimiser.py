"""Adam on tensors of rows: what happens to a row is its own affair (arXiv 1412.6980; AdamW arXiv 1711.05101).

With it what attacks share that weigh loss against distance and search the weight: their budget, and the bracket.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from advkit.attacks.base import per_row
from advkit.core.checks import check
from advkit.core.rows import PerRow, elementwise

BETAS = (0.9, 0.999)
TINY = 1e-8
CHECKS = 10  # times per run that a row is asked whether its loss still falls
STALLED = 1e-4  # by this much of itself it has to have fallen since the last time
CLOSED = 2.0  # a bracket is closed where its ends are no further apart than this factor
GROWTH = 10.0  # of weights that fail, before one succeeds


class AdamW:
    """AdamW on a tensor of rows that move together, with torch's constants and order of operations.

    Elementwise throughout, so that no row feels another.
    """

    def __init__(self, like: Tensor, rate: float, weight_decay: float) -> None:
        self.rate, self.weight_decay = rate, weight_decay
        self.mean, self.square = torch.zeros_like(like), torch.zeros_like(like)
        self.steps = 0

    def step(self, value: Tensor, gradient: Tensor) -> Tensor:
        """The value after one step."""
        self.steps += 1
        self.mean = self.mean.lerp(gradient, 1 - BETAS[0])
        self.square = (self.square * BETAS[1]).addcmul(gradient, gradient, value=1 - BETAS[1])
        first, second = (1 - beta**self.steps for beta in BETAS)
        slowed = self.square.sqrt() / second**0.5 + TINY
        return (value * (1 - self.rate * self.weight_decay)).addcdiv(self.mean, slowed, value=-self.rate / first)


@dataclass
class RowAdam(PerRow):
    """Adam whose rows start afresh one by one.

    mean, square: moving averages of the gradients and of their squares [n, ...]
    steps:        steps of every row since it started [n]
    """

    mean: Tensor
    square: Tensor
    steps: Tensor

    @classmethod
    def of(cls, like: Tensor) -> RowAdam:
        """For rows shaped like these [n, ...]."""
        return cls(torch.zeros_like(like), torch.zeros_like(like), like.new_zeros(len(like)))

    def move(self, gradient: Tensor, rate: Tensor) -> Tensor:
        """The next move [n, ...] down a gradient, for rates [n] in units of the values.

        A feature whose gradient has always been zero does not move, however small the other gradients are.
        """
        self.steps = self.steps + 1
        self.mean = self.mean.lerp(gradient, 1 - BETAS[0])
        self.square = (self.square * BETAS[1]).addcmul(gradient, gradient, value=1 - BETAS[1])
        decays = [elementwise(partial(torch.pow, beta), self.steps) for beta in BETAS]
        first, second = (per_row(1 - decay, gradient) for decay in decays)
        slowed = (self.square / second).sqrt()
        unit = torch.where(slowed > 0, self.mean / first / slowed, 0.0)
        return unit * per_row(-rate, gradient)

    def restart(self, rows: Tensor) -> None:
        """Forget the gradients of some of the rows, bool [n]."""
        fresh = per_row(rows, self.mean)
        self.mean, self.square = self.mean.masked_fill(fresh, 0.0), self.square.masked_fill(fresh, 0.0)
        self.steps = self.steps.masked_fill(rows, 0.0)


def check_budget(part: Any) -> None:
    """UsageError unless the part's `budget` is weights x steps."""
    check(part, "budget", re.fullmatch(r"[1-9]\d*x[1-9]\d*", part.budget) is not None, "coefficients x steps: 1x60")


def effort_of(budget: str) -> tuple[int, int]:
    """Weights tried, and steps for each, of a budget such as 9x60."""
    searches, steps = budget.split("x")
    return int(searches), int(steps)


@dataclass
class Bracket(PerRow):
    """Weights of the loss against the distance, searched by every row at its own pace.

    weight:    of the present run [n]
    low, high: the largest weight that failed and the smallest that reached the goal [n]; 0 and +inf before there is one
    step:      steps of the present run [n]
    runs:      runs that have ended [n]
    hit:       whether the present run has reached the goal, bool [n]
    least:     the lowest loss of the present run [n]
    before:    what that was when it was looked at last [n]
    """

    weight: Tensor
    low: Tensor
    high: Tensor
    step: Tensor
    runs: Tensor
    hit: Tensor
    least: Tensor
    before: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Bracket:
        """The first run, with these weights [n]."""
        none, inf = torch.zeros_like(weight), torch.full_like(weight, torch.inf)
        return cls(weight, none, inf, none.clone(), none.clone(), none.bool(), inf.clone(), inf.clone())

    def after(self, loss: Tensor, reached: Tensor, steps: int) -> Tensor:
        """Take a step's losses and which points reach the goal; bool [n]: whose run ends with it, and begins anew.

        A run ends after `steps` steps, or in its second half where a tenth of them did not lower its loss by a ten
        thousandth. In the first half the steps are long, and a loss that rests says little.
        """
        self.step, self.hit = self.step + 1, self.hit | reached
        self.least = torch.minimum(self.least, loss)
        looks = self.step % max(1, steps // CHECKS) == 0
        late = 2 * self.step > steps
        stalled = looks & late & (self.least > self.before * (1 - STALLED))
        self.before = torch.where(looks, self.least, self.before)
        ended = stalled | (self.step >= steps)
        self.high = torch.where(ended & self.hit, torch.minimum(self.high, self.weight), self.high)
        self.low = torch.where(ended & ~self.hit, torch.maximum(self.low, self.weight), self.low)
        inside = torch.where(self.low > 0, (self.low * self.high).sqrt(), self.high / CLOSED**2)
        following = torch.where(self.high < torch.inf, inside, self.weight * GROWTH)
        self.weight = torch.where(ended, following, self.weight)
        self.runs = self.runs + ended
        self.step, self.hit = self.step.masked_fill(ended, 0.0), self.hit & ~ended
        self.least = self.least.masked_fill(ended, torch.inf)
        self.before = self.before.masked_fill(ended, torch.inf)
        return ended

    def finished(self, searches: int) -> Tensor:
        """Which rows have tried their weights, or have a bracket that is closed, bool [n]."""
        return (self.runs >= searches) | ((self.low > 0) & (self.high <= CLOSED * self.low))
