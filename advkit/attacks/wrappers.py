"""Oracles around an oracle: what changes the gradient that an attack follows without changing its loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, per_row
from advkit.core.errors import UsageError
from advkit.core.protocols import Access


def momentum(oracle: TensorOracle, decay: float = 1.0) -> TensorOracle:
    """Gradients accumulate with `decay` after being divided by their mean absolute value per row (arXiv 1710.06081).

    The published text divides by the L1 norm, a constant times that mean; with the mean, look-ahead probes built on the
    accumulated gradient keep a size that does not depend on the number of features. A fresh wrapper starts at zero.
    """
    return oracle if decay == 0 else _Momentum(oracle, decay, None)


def normalised(gradient: Tensor) -> Tensor:
    """Every row divided by its mean absolute value; a row of zeros stays as it is."""
    size = gradient.abs().flatten(1).mean(1)
    return gradient / per_row(torch.where(size > 0, size, 1.0), gradient)


def accumulated(velocity: Tensor | None, gradient: Tensor, decay: float) -> Tensor:
    """What `momentum` follows: `decay` of what was accumulated so far, plus a gradient."""
    return gradient if velocity is None else velocity * decay + gradient


def averaged(oracle: TensorOracle, draws: int) -> TensorOracle:
    """Losses, gradients and answers averaged over `draws` calls (expectation over transformation, arXiv 1802.00420)."""
    return oracle if draws == 1 else _Averaged(oracle, draws)


class _Momentum:
    """See `momentum`; one accumulated gradient per row, taken along by `take`."""

    def __init__(self, oracle: TensorOracle, decay: float, velocity: Tensor | None) -> None:
        self.oracle = oracle
        self.decay = decay
        self.velocity = velocity
        self.access: Access = oracle.access
        self.decides: bool = oracle.decides
        self.data = oracle.data

    def __call__(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        return self.oracle(x, of)

    def gradient(self, x: Tensor, goal: TensorGoal, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if of is not None:
            raise UsageError("momentum is kept per row: it can't follow several candidates of one row (leave `of` out)")
        loss, gradient, answer = self.oracle.gradient(x, goal)
        self.velocity = accumulated(self.velocity, normalised(gradient), self.decay)
        return loss, self.velocity, answer

    def note(self, row: int, figures: Mapping[str, Any]) -> None:
        self.oracle.note(row, figures)

    def take(self, rows: Tensor) -> TensorOracle:
        return _Momentum(self.oracle.take(rows), self.decay, None if self.velocity is None else self.velocity[rows])

    def seen_as(self, view: Callable[[Any], Any], decides: bool = False) -> TensorOracle:
        return _Momentum(self.oracle.seen_as(view, decides), self.decay, self.velocity)

    def head(self) -> Tensor | None:
        return self.oracle.head()

    @property
    def left(self) -> int | None:
        return self.oracle.left


class _Averaged:
    """See `averaged`."""

    def __init__(self, oracle: TensorOracle, draws: int) -> None:
        self.oracle = oracle
        self.draws = draws
        self.access: Access = oracle.access
        self.decides: bool = oracle.decides
        self.data = oracle.data

    def __call__(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        answer = self.oracle(x, of)
        for _ in range(self.draws - 1):
            answer = answer + self.oracle(x, of)
        return answer / self.draws

    def gradient(self, x: Tensor, goal: TensorGoal, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        loss, gradient, answer = self.oracle.gradient(x, goal, of)
        for _ in range(self.draws - 1):
            more_loss, more_gradient, more_answer = self.oracle.gradient(x, goal, of)
            loss, gradient, answer = loss + more_loss, gradient + more_gradient, answer + more_answer
        return loss / self.draws, gradient / self.draws, answer / self.draws

    def note(self, row: int, figures: Mapping[str, Any]) -> None:
        self.oracle.note(row, figures)

    def take(self, rows: Tensor) -> TensorOracle:
        return _Averaged(self.oracle.take(rows), self.draws)

    def seen_as(self, view: Callable[[Any], Any], decides: bool = False) -> TensorOracle:
        return _Averaged(self.oracle.seen_as(view, decides), self.draws)

    def head(self) -> Tensor | None:
        return self.oracle.head()

    @property
    def left(self) -> int | None:
        left = self.oracle.left
        return None if left is None else left // self.draws
