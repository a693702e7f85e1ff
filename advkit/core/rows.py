"""What is asked of every row of a tensor, and what holds a tensor with an entry per row."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

REGISTERS = 32
"""Numbers that torch's elementwise loops take at a time: two registers of AVX-512; narrower ones divide it."""


def elementwise(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """function(values), with the same bits for a number wherever it stands; values hold one number per row [B].

    torch computes powers, sigmoids, sines and their like with other code at the end of a tensor (see `round_off`): a
    row's number would depend on the batch that it is in.
    """
    short = -len(values) % REGISTERS
    return function(torch.cat((values, values[:1].expand(short))))[: len(values)] if short else function(values)


def row_size(values: Tensor) -> Tensor:
    """The largest absolute value per row [B]; NaN or infinity where the row has one. One operation."""
    if values.ndim < 2:
        return values.abs()
    size: Tensor = torch.linalg.vector_norm(values, math.inf, dim=tuple(range(1, values.ndim)))
    return size


class _Look:
    """What is known of a tensor's values; found out when somebody asks."""

    __slots__ = ("_array", "_finite", "_sizes", "of", "version")

    def __init__(self, values: Tensor) -> None:
        self.of = weakref.ref(values)
        self.version = -1 if values.is_inference() else values._version
        self._array: np.ndarray[Any, Any] | None = None
        self._finite: bool | None = None
        self._sizes: Tensor | None = None

    def sizes(self, values: Tensor) -> Tensor:
        if self._sizes is None:
            self._sizes = row_size(values)
        return self._sizes

    def array(self, values: Tensor) -> np.ndarray[Any, Any] | None:
        known = values.device.type == "cpu" and values.dtype in _KNOWN and type(values) is Tensor
        if self._array is None and known and not values.requires_grad:
            self._array = values.numpy()
        return self._array

    def finite(self, values: Tensor) -> bool:
        if self._finite is None:
            array = self.array(values)
            self._finite = all_finite(self.sizes(values)) if array is None else bool(np.isfinite(array).all())
        return self._finite


_KNOWN = (torch.float32, torch.float64)
_last: _Look | None = None


def _look(values: Tensor) -> _Look:
    """That at the tensor which was looked at last, and else a new one.

    An answer is looked at by the oracle, then by whoever compares points, and by the goal.
    """
    global _last
    if _last is not None and _last.of() is values and _last.version == values._version:
        return _last
    look = _Look(values)
    if look.version >= 0:
        _last = look
    return look


def sizes_of(values: Tensor) -> Tensor:
    """`row_size`, which costs nothing for the tensor that was looked at last."""
    return _look(values).sizes(values)


def in_memory(values: Tensor) -> np.ndarray[Any, Any] | None:
    """The values where they lie in the CPU's memory, to read; None for tensors that NumPy does not know.

    A look at few numbers costs half of what an operation of torch's does.
    """
    return _look(values).array(values)


def plainly_finite(values: Tensor) -> bool:
    """Whether it is plain that all values are finite: on a CPU by a look at memory, elsewhere it never is."""
    return values.device.type == "cpu" and _look(values).finite(values)


def all_finite(*few: Tensor) -> bool:
    """Whether a few numbers on a CPU are finite, without a tensor operation."""
    return math.isfinite(sum(sum(each.tolist()) for each in few))


def all_moving(gradient: Tensor) -> bool:
    """Whether it is plain that every row is finite and has an entry that is not zero: never so off the CPU."""
    if gradient.device.type != "cpu" or not gradient.numel() or gradient.ndim < 2:
        return False
    lengths = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim))).tolist()
    return math.isfinite(sum(lengths)) and min(lengths) > 0


def finite_rows(values: Tensor) -> Tensor:
    """Bool [B]: rows that are finite throughout."""
    return sizes_of(values) < torch.inf


class PerRow:
    """A dataclass each of whose tensors holds rows."""

    def take(self, rows: Tensor) -> Self:
        """The same for some of the rows (long or bool index); a row may come several times."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Any) -> Self:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)  # type: ignore[type-var]
