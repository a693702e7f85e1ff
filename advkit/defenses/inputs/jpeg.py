"""JPEG compression as an input defense (Dziugaite et al., arXiv 1608.00853)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from advkit.core.checks import check, one_of
from advkit.core.errors import BadModel
from advkit.defenses.inputs.base import InputDefense
from advkit.models.isp import mirrored

# The example tables of the standard (ITU-T T.81, annex K), which libjpeg scales by the quality.
LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, *[99] * 6, *[99] * 32),
)


@dataclass(frozen=True, kw_only=True)
class JPEG(InputDefense):
    """JPEG compression: every image is written and read by Pillow before the model sees it (colour 4:2:0, or gray).

    Rounding has no derivative. The attacker's view answers what Pillow does, with the derivative of the identity (BPDA)
    or of a smooth JPEG in torch, whose rounding is x - sin(2 pi x) / (2 pi). The identity's was the stronger one where
    both were tried (docs/raw_isp.md).

    quality: as Pillow counts it, 1 to 95
    view:    "identity" or "smooth"
    """

    quality: int = 75
    view: Literal["identity", "smooth"] = "identity"

    def __post_init__(self) -> None:
        check(self, "quality", 1 <= self.quality <= 95, "a whole number from 1 to 95")
        one_of(self, "view", ("identity", "smooth"))

    def transform(self, x: Tensor) -> Tensor:
        """The images read back, values k/255."""
        from PIL import Image

        _checked(x)
        pixels = (x.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        read = []
        for each in pixels:
            file = BytesIO()
            held = Image.fromarray(each[..., 0] if each.shape[-1] == 1 else each)
            held.save(file, "JPEG", quality=self.quality, subsampling="4:2:0")
            again = np.array(Image.open(file, formats=("JPEG",)))
            read.append(torch.from_numpy(again.reshape(each.shape)))
        return (torch.stack(read).permute(0, 3, 1, 2).to(x.dtype) / 255).to(x.device)

    def backward(self, x: Tensor) -> Tensor:
        """The smooth JPEG, or x."""
        return x if self.view == "identity" else smooth_jpeg(x, self.quality)


def _checked(x: Tensor) -> None:
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise BadModel(f"jpeg takes images [B, 3, H, W] in colour or [B, 1, H, W] in gray, got {list(x.shape)}")


def soft_round(x: Tensor) -> Tensor:
    """Near `round`, with a derivative between 0 and 2 whose mean is 1."""
    return x - torch.sin(2 * torch.pi * x) / (2 * torch.pi)


def tables(quality: int) -> Tensor:
    """Quantisation tables [2, 64] of a quality, as libjpeg scales the standard's: luminance, chrominance."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    held = torch.tensor([LUMINANCE, CHROMINANCE])
    return ((held * scale + 50) // 100).clamp(1, 255).to(torch.float32)


def _cosines(like: Tensor) -> Tensor:
    """The orthonormal DCT of 8 values, [8, 8]."""
    places, waves = torch.arange(8, dtype=torch.float64), torch.arange(8, dtype=torch.float64)[:, None]
    held = torch.cos(torch.pi * (2 * places + 1) * waves / 16) / 2
    held[0] /= 2**0.5
    return held.to(like)


def smooth_jpeg(x: Tensor, quality: int, rounding: Callable[[Tensor], Tensor] = soft_round) -> Tensor:
    """JPEG in torch: YCbCr, colour at half the size, 8x8 DCT, quantised by the tables with a smooth rounding, and back.

    x: [B, 1 or 3, H, W] in [0, 1]
    """
    _checked(x)
    height, width = x.shape[2:]
    whole = mirrored(x, -(-height // 16) * 16, -(-width // 16) * 16) * 255
    luminance, chrominance = tables(quality).to(x)
    if x.shape[1] == 1:
        return (_coded(whole - 128, luminance, rounding)[..., :height, :width] + 128).clamp(0, 255) / 255
    red, green, blue = whole[:, :1], whole[:, 1:2], whole[:, 2:]
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    colours = torch.cat((blue - y, red - y), 1) / whole.new_tensor((1.772, 1.402))[:, None, None]
    y = _coded(y - 128, luminance, rounding) + 128
    coded = _coded(F.avg_pool2d(colours, 2), chrominance, rounding)
    chroma = F.interpolate(coded, scale_factor=2, mode="bilinear", align_corners=False)
    cb, cr = chroma[:, :1], chroma[:, 1:]
    again = torch.cat((y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb), 1)
    return (again[..., :height, :width]).clamp(0, 255) / 255


def _coded(planes: Tensor, table: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """Planes [B, C, H, W] after the DCT of their 8x8 blocks was quantised."""
    rows, channels, height, width = planes.shape
    cosines, steps = _cosines(planes), table.reshape(8, 8)
    blocks = planes.reshape(rows, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    quantised = rounding(cosines @ blocks @ cosines.T / steps) * steps
    found: Tensor = (cosines.T @ quantised @ cosines).transpose(3, 4).reshape(planes.shape)
    return found
