"""Augmentations drawn row by row: what a row gets depends on its own stream, not on its batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from advkit.core.errors import BadInput
from advkit.core.protocols import Rng

PADDING = 4


def crop_flip(x: Tensor, rng: Rng) -> Tensor:
    """Images [B, C, H, W] shifted by up to four pixels with zeros moving in, and mirrored with probability one half.

    The padding and random crop of the CIFAR literature; shifts are uniform on {-4, ..., 4} in both directions.
    """
    if x.dim() != 4:
        raise BadInput(
            f"crop-flip takes images [B, C, H, W], got samples of shape {list(x.shape[1:])}; use augment=none"
        )
    batch, channels, height, width = x.shape
    one = x.new_empty(batch, 1)
    top = rng.at("top").integers(2 * PADDING + 1, one)
    left = rng.at("left").integers(2 * PADDING + 1, one)
    mirrored = rng.at("flip").integers(2, one).bool()
    rows = top + torch.arange(height, device=x.device)
    forward = torch.arange(width, device=x.device).expand(batch, width)
    columns = left + torch.where(mirrored, forward.flip(1), forward)
    padded = F.pad(x, (PADDING,) * 4)
    batches = torch.arange(batch, device=x.device)
    # advanced indices on axes 0, 2 and 3 with a slice between them come out first: [B, H, W, C]
    picked = padded[batches[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous().reshape(batch, channels, height, width)


AUGMENTATIONS: dict[str, Callable[[Tensor, Rng], Tensor] | None] = {"none": None, "crop-flip": crop_flip}
"""What Recipe.augment names: a function of rows and their streams, or None."""
