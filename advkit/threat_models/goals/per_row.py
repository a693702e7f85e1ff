"""What goals share that hold a tensor with an entry per row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor


class PerRow:
    """A frozen dataclass each of whose tensors holds rows."""

    def take(self, rows: Tensor) -> Self:
        """The goal of some of the rows (long or bool index); a row may come several times."""
        return self._each(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same goal on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def _each(self, change: Any) -> Self:
        changed = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)  # type: ignore[type-var]
