"""Adam on tensors of rows: what happens to a row is its own affair (arXiv 1412.6980; AdamW arXiv 1711.05101)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.attacks.base import per_row
from advkit.core.rows import PerRow

BETAS = (0.9, 0.999)
TINY = 1e-8


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
        first, second = (per_row(1 - beta**self.steps, gradient) for beta in BETAS)
        slowed = (self.square / second).sqrt()
        unit = torch.where(slowed > 0, self.mean / first / slowed, 0.0)
        return unit * per_row(-rate, gradient)

    def restart(self, rows: Tensor) -> None:
        """Forget the gradients of some of the rows, bool [n]."""
        fresh = per_row(rows, self.mean)
        self.mean, self.square = self.mean.masked_fill(fresh, 0.0), self.square.masked_fill(fresh, 0.0)
        self.steps = self.steps.masked_fill(rows, 0.0)
