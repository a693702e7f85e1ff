"""What is asked of every row of a tensor, and what holds a tensor with an entry per row."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor


def row_size(values: Tensor) -> Tensor:
    """The largest absolute value per row [B]; NaN or infinity where the row has one. One operation."""
    if values.ndim < 2:
        return values.abs()
    size: Tensor = torch.linalg.vector_norm(values, math.inf, dim=tuple(range(1, values.ndim)))
    return size


class _Last:
    """What was looked at last: an answer is looked at by the oracle, and then by whoever compares points."""

    values: weakref.ref[Tensor] | None = None
    version: int = -1
    sizes: Tensor | None = None
    finite: bool | None = None


_last = _Last()


def sizes_of(values: Tensor) -> Tensor:
    """`row_size`, which costs nothing for the tensor that was looked at last."""
    if _last.values is not None and _last.values() is values and _last.version == values._version:
        assert _last.sizes is not None
        return _last.sizes
    sizes = row_size(values)
    if not values.is_inference():
        _last.values, _last.version, _last.sizes, _last.finite = weakref.ref(values), values._version, sizes, None
    return sizes


def plainly_finite(values: Tensor) -> bool:
    """Whether it is plain that all values are finite: on a CPU by a look at memory, elsewhere it never is."""
    if values.device.type != "cpu":
        return False
    sizes = sizes_of(values)
    if sizes is not _last.sizes:
        return all_finite(sizes)
    if _last.finite is None:
        _last.finite = all_finite(sizes)
    return _last.finite


def all_finite(*few: Tensor) -> bool:
    """Whether a few numbers on a CPU are finite, without a tensor operation."""
    return math.isfinite(sum(sum(each.tolist()) for each in few))


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
