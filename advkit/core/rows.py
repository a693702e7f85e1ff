"""What is asked of every row of a tensor."""

from __future__ import annotations

import math

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
