"""Oracles around an oracle: what changes the gradient that an attack follows without changing its loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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


class WrappedOracle(ABC):
    """An oracle around another one, of the same rows and on the same meter; passes on whatever it does not change."""

    def __init__(self, oracle: TensorOracle) -> None:
        self.oracle = oracle
        self.access: Access = oracle.access
        self.decides: bool = oracle.decides
        self.data = oracle.data

    @abstractmethod
    def _around(self, oracle: TensorOracle, rows: Tensor | None = None) -> TensorOracle:
        """The same wrapper around another oracle, of these rows (long or bool index), or of the same ones for None."""

    def __call__(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        return self.oracle(x, of)

    def gradient(self, x: Tensor, goal: TensorGoal, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return self.oracle.gradient(x, goal, of)

    def gradients(self, x: Tensor, goals: Sequence[TensorGoal]) -> tuple[Tensor, Tensor, Tensor]:
        """A call per goal: what a wrapper changes, it changes of every gradient."""
        found = [self.gradient(x, goal) for goal in goals]
        return torch.stack([loss for loss, _, _ in found]), torch.stack([each for _, each, _ in found]), found[0][2]

    def note(self, row: int, figures: Mapping[str, Any]) -> None:
        self.oracle.note(row, figures)

    def take(self, rows: Tensor) -> TensorOracle:
        return self._around(self.oracle.take(rows), rows)

    def seen_as(self, view: Callable[[Any], Any], decides: bool = False) -> TensorOracle:
        return self._around(self.oracle.seen_as(view, decides))

    def head(self) -> Tensor | None:
        return self.oracle.head()

    @property
    def left(self) -> int | None:
        return self.oracle.left


class _Momentum(WrappedOracle):
    """See `momentum`; one accumulated gradient per row, taken along by `take`."""

    def __init__(self, oracle: TensorOracle, decay: float, velocity: Tensor | None) -> None:
        super().__init__(oracle)
        self.decay = decay
        self.velocity = velocity

    def _around(self, oracle: TensorOracle, rows: Tensor | None = None) -> TensorOracle:
        velocity = self.velocity if self.velocity is None or rows is None else self.velocity[rows]
        return _Momentum(oracle, self.decay, velocity)

    def gradient(self, x: Tensor, goal: TensorGoal, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if of is not None:
            raise UsageError("momentum is kept per row: it can't follow several candidates of one row (leave `of` out)")
        loss, gradient, answer = self.oracle.gradient(x, goal)
        self.velocity = accumulated(self.velocity, normalised(gradient), self.decay)
        return loss, self.velocity, answer


class _Averaged(WrappedOracle):
    """See `averaged`."""

    def __init__(self, oracle: TensorOracle, draws: int) -> None:
        super().__init__(oracle)
        self.draws = draws

    def _around(self, oracle: TensorOracle, rows: Tensor | None = None) -> TensorOracle:
        return _Averaged(oracle, self.draws)

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

    @property
    def left(self) -> int | None:
        left = self.oracle.left
        return None if left is None else left // self.draws
