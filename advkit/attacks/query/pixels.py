"""What attacks on a few positions share: rows read as positions with channels, as the L0 ball counts them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.threat_models.sparse import L0


@dataclass(frozen=True)
class Positions:
    """Rows [B, ...] read as [B, channels, height * width]: the positions that an L0 ball counts, with their values.

    With per="pixel" an image [..., C, H, W] has C values at each position, films stacked by height. All else has one
    value at each position.
    """

    shape: tuple[int, ...]
    channels: int
    height: int
    width: int

    @classmethod
    def of(cls, x: Tensor, ball: L0) -> Positions:
        shape = tuple(x.shape[1:])
        width = shape[-1] if shape else 1
        channels = shape[-3] if ball.per == "pixel" and len(shape) >= 3 else 1
        values = math.prod(shape)
        return cls(shape, channels, values // max(1, channels * width), width)

    def __len__(self) -> int:
        """How many positions there are."""
        return self.height * self.width

    def read(self, x: Tensor) -> Tensor:
        """[B, channels, positions]"""
        if self.channels > 1:
            x = x.movedim(-3, 1)
        return x.reshape(len(x), self.channels, len(self))

    def written(self, values: Tensor) -> Tensor:
        """The same as rows."""
        if self.channels == 1:
            return values.reshape(-1, *self.shape)
        lead, (channels, height, width) = self.shape[:-3], self.shape[-3:]
        return values.reshape(-1, channels, *lead, height, width).movedim(1, -3).contiguous()


def first_of_each(places: Tensor, counted: Tensor) -> Tensor:
    """Bool [n, m]: the places [n, m] that are counted (bool [n, m]) and come for the first time in their row."""
    earlier = torch.ones(places.shape[1], places.shape[1], dtype=torch.bool, device=places.device).tril(-1)
    same = (places.unsqueeze(2) == places.unsqueeze(1)) & counted.unsqueeze(1) & earlier
    return counted & ~same.any(2)
