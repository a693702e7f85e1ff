"""Random resizing and padding (Xie et al., arXiv 1711.01991)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from advkit.core.checks import at_least_one, fraction, one_of
from advkit.core.errors import BadModel
from advkit.defenses.inputs.base import Draws, InputDefense


@dataclass(frozen=True, kw_only=True)
class RandomResize(InputDefense, Draws):
    """Random resizing and padding: every image gets a random size and random zero padding.

    The authors enlarge 299 pixels to at most 331 and hand the larger image on, which needs a network for any size; here
    images shrink by the same ratio and keep their own size with the padding, so that any network fits. They draw once
    per batch; here every image draws for itself. The attacker's view averages draws (EOT); resizing differentiates.

    smallest: smallest side, as a fraction of the image's, in (0, 1]; sizes up to the whole side are equally likely
    how:      "nearest", as the authors resize, or "bilinear"
    draws:    that the attacker's view averages
    """

    randomized: ClassVar[bool] = True

    smallest: float = 0.9
    how: Literal["nearest", "bilinear"] = "nearest"
    draws: int = 10

    def __post_init__(self) -> None:
        fraction(self, "smallest")
        one_of(self, "how", ("nearest", "bilinear"))
        at_least_one(self, "draws")

    def transform(self, x: Tensor) -> Tensor:
        """Draws from torch's global generator of the device: a size, then a place, for every row."""
        if x.ndim != 4:
            raise BadModel(f"random-resize takes images [B, C, H, W], got {list(x.shape)}")
        height, width = x.shape[2:]
        draw = torch.rand(3, len(x), dtype=torch.float32, device=x.device)
        fewest = max(1, min(round(self.smallest * height), height))
        tall = fewest + (draw[0] * (height - fewest + 1)).floor().clamp(max=height - fewest)
        wide = (tall * width / height).round().clamp(1, width)
        top = (draw[1] * (height - tall + 1)).floor().minimum(height - tall)
        left = (draw[2] * (width - wide + 1)).floor().minimum(width - wide)
        return placed(x, tall, wide, top, left, self.how)


def placed(x: Tensor, tall: Tensor, wide: Tensor, top: Tensor, left: Tensor, how: str = "bilinear") -> Tensor:
    """Every image [C, H, W] resized to its own tall x wide and put at its own (top, left) on zeros [C, H, W].

    tall, wide, top, left: whole numbers, float [B]. The same as `interpolate` and `pad` on each image by itself, in one
    operation over the batch and with its derivative.
    """
    height, width = x.shape[2:]
    rows, in_rows = _source(height, tall, top, how, x)
    columns, in_columns = _source(width, wide, left, how, x)
    # grid_sample counts x first
    grid = torch.stack((columns[:, None].expand(-1, height, -1), rows[:, :, None].expand(-1, -1, width)), dim=-1)
    shown = functional.grid_sample(x, grid, mode=how, padding_mode="border", align_corners=False)
    return torch.where((in_rows[:, :, None] & in_columns[:, None, :])[:, None], shown, 0.0)


def _source(length: int, size: Tensor, start: Tensor, how: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of `length` pixels looks in the image, in [-1, 1], and whether it shows the image at all."""
    place = torch.arange(length, device=x.device, dtype=torch.float64) - start[:, None].double()
    size = size[:, None].double()
    shown = (place >= 0) & (place < size)
    # interpolate's nearest takes the pixel below (no half-pixel offset); its middle is what grid_sample hits safely
    pixel = (place * length / size + 1e-9).floor() if how == "nearest" else (place + 0.5) * length / size - 0.5
    return ((2 * pixel + 1) / length - 1).to(x.dtype), shown
