"""What is asked of every row of a tensor, and what holds a tensor with an entry per row."""

from __future__ import annotations

import math
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


def finite_rows(values: Tensor) -> Tensor:
    """Bool [B]: rows that are finite throughout."""
    return row_size(values) < torch.inf


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
