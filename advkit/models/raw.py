"""Camera RAW in torch: Bayer mosaics, demosaicing (Malvar, He and Cutler 2004) and a plain pipeline to sRGB and back.

Everything is differentiable, works on batches, and answers the same bits for an image in whatever batch it is. Images
are [B, 3, H, W] in sRGB, mosaics [B, H, W] and planes [B, 4, H/2, W/2] in linear camera space; all in [0, 1].
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from advkit.core.errors import BadInput

Pattern = Literal["RGGB", "BGGR", "GRBG", "GBRG"]
PATTERNS: tuple[Pattern, ...] = ("RGGB", "BGGR", "GRBG", "GBRG")
"""Colours of the upper left 2x2 pixels, read line by line: RGGB has red at (0, 0) and blue at (1, 1)."""
GAINS = (2.0, 1.0, 1.6)
"""White balance of the plain pipeline: red, green, blue."""
MATRIX = ((1.65, -0.55, -0.10), (-0.20, 1.45, -0.25), (0.02, -0.50, 1.48))
"""Camera colours to linear sRGB; rows sum to 1, so that gray stays gray."""
_KNEE = 0.0031308


# Mosaics


def check_pattern(pattern: str) -> None:
    """BadInput for what is no Bayer pattern."""
    if pattern not in PATTERNS:
        raise BadInput(f"the pattern is {pattern!r}; expected one of {', '.join(PATTERNS)}")


def _checked(mosaic: Tensor, pattern: str) -> None:
    check_pattern(pattern)
    if mosaic.ndim != 3 or min(mosaic.shape[1:]) < 3 or not mosaic.is_floating_point():
        raise BadInput(
            f"the mosaic is {str(mosaic.dtype).removeprefix('torch.')}{list(mosaic.shape)}; expected floating point "
            "[B, H, W] of at least 3 x 3 pixels"
        )


def places(pattern: str, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Which colour each pixel of a sensor sees: bool [3, height, width] for red, green, blue."""
    check_pattern(pattern)
    rows, columns = torch.arange(height, device=device) % 2, torch.arange(width, device=device) % 2
    cell = 2 * rows[:, None] + columns[None, :]
    seen = torch.tensor(["RGB".index(letter) for letter in pattern], device=device)[cell]
    return torch.stack([seen == colour for colour in range(3)])


def mosaic(image: Tensor, pattern: str = "RGGB") -> Tensor:
    """What a sensor sees of a linear image [B, 3, H, W]: one colour per pixel, [B, H, W]."""
    check_pattern(pattern)
    if image.ndim != 4 or image.shape[1] != 3:
        raise BadInput(f"the image is {list(image.shape)}; expected [B, 3, H, W]")
    seen = places(pattern, image.shape[2], image.shape[3], image.device)
    return torch.where(seen, image, 0.0).sum(1)


def pack(mosaic: Tensor) -> Tensor:
    """The four planes [B, 4, H/2, W/2] of a mosaic [B, H, W]: pixels (0, 0), (0, 1), (1, 0), (1, 1) of every 2x2."""
    if mosaic.ndim != 3 or mosaic.shape[1] % 2 or mosaic.shape[2] % 2:
        raise BadInput(f"the mosaic is {list(mosaic.shape)}; expected [B, H, W] with even height and width")
    return F.pixel_unshuffle(mosaic[:, None], 2)


def unpack(planes: Tensor) -> Tensor:
    """The mosaic [B, 2H, 2W] of four planes [B, 4, H, W]."""
    if planes.ndim != 4 or planes.shape[1] != 4:
        raise BadInput(f"the planes are {list(planes.shape)}; expected [B, 4, H, W]")
    return F.pixel_shuffle(planes, 2)[:, 0]


# Demosaicing. Sums of shifted images in place of conv2d, whose last bits depend on the batch.


class _Around:
    """The neighbours of every pixel, by offset; beyond the border the image is mirrored at its outermost pixels.

    That mirror keeps the colours' places, which the one that repeats the outermost pixel does not.
    """

    def __init__(self, mosaic: Tensor) -> None:
        self.padded = F.pad(mosaic[:, None], (2, 2, 2, 2), mode="reflect")[:, 0]
        self.height, self.width = mosaic.shape[1:]

    def at(self, down: int, right: int) -> Tensor:
        top, left = 2 + down, 2 + right
        return self.padded[:, top : top + self.height, left : left + self.width]

    def pair(self, down: int, right: int) -> Tensor:
        """The sum of the two neighbours at an offset and its opposite."""
        return self.at(down, right) + self.at(-down, -right)


def _chosen(mosaic: Tensor, pattern: str, green: Tensor, in_row: Tensor, in_column: Tensor, across: Tensor) -> Tensor:
    """The colour image [B, 3, H, W] from estimates of what each pixel does not see.

    green: at red and blue pixels; in_row: at green pixels, of the colour seen beside them in their row; in_column: of
    the other one; across: of red at blue pixels and of blue at red ones
    """
    red, is_green, blue = places(pattern, mosaic.shape[1], mosaic.shape[2], mosaic.device)
    red_row = red.any(1, keepdim=True)  # rows in which red is seen
    colours = []
    for own, opposite, own_row in ((red, blue, red_row), (blue, red, ~red_row)):
        beside = torch.where(own_row, in_row, in_column)
        colours.append(torch.where(own, mosaic, torch.where(opposite, across, beside)))
    return torch.stack((colours[0], torch.where(is_green, mosaic, green), colours[1]), dim=1)


def bilinear(mosaic: Tensor, pattern: str = "RGGB") -> Tensor:
    """Bilinear demosaicing: every missing colour is the mean of the nearest pixels that see it.

    mosaic: [B, H, W], at least 3 x 3 pixels, any size; answers [B, 3, H, W], linear in the mosaic. Beyond the border
    the mosaic is mirrored (whole-sample). Raises BadInput for another shape or an unknown pattern.
    """
    _checked(mosaic, pattern)
    around = _Around(mosaic)
    row, column = around.pair(0, 1), around.pair(1, 0)
    across = around.pair(1, 1) + around.pair(1, -1)
    return _chosen(mosaic, pattern, (row + column) / 4, row / 2, column / 2, across / 4)


def malvar(mosaic: Tensor, pattern: str = "RGGB") -> Tensor:
    """Malvar-He-Cutler demosaicing (ICASSP 2004): bilinear, corrected by the Laplacian of the colour that is seen.

    mosaic: [B, H, W], at least 3 x 3 pixels, any size; answers [B, 3, H, W], linear in the mosaic: values may leave
    [0, 1]. Observed values are kept and constant colours reproduced, at the border as well: beyond it the mosaic is
    mirrored (whole-sample). Raises BadInput for another shape or an unknown pattern.
    """
    _checked(mosaic, pattern)
    around = _Around(mosaic)
    row, column, row_2, column_2 = around.pair(0, 1), around.pair(1, 0), around.pair(0, 2), around.pair(2, 0)
    diagonal = around.pair(1, 1) + around.pair(1, -1)
    green = (2 * (row + column) - (row_2 + column_2) + 4 * mosaic) / 8
    in_row = (4 * row - row_2 + 0.5 * column_2 - diagonal + 5 * mosaic) / 8
    in_column = (4 * column - column_2 + 0.5 * row_2 - diagonal + 5 * mosaic) / 8
    across = (2 * diagonal - 1.5 * (row_2 + column_2) + 6 * mosaic) / 8
    return _chosen(mosaic, pattern, green, in_row, in_column, across)


DEMOSAICING = {"malvar": malvar, "bilinear": bilinear}


# The plain pipeline


def to_srgb(linear: Tensor) -> Tensor:
    """The sRGB transfer function, of values in [0, 1]."""
    # the power's derivative at 0 is infinite, also where `where` takes the other branch
    return torch.where(linear <= _KNEE, 12.92 * linear, 1.055 * linear.clamp_min(_KNEE) ** (1 / 2.4) - 0.055)


def from_srgb(image: Tensor) -> Tensor:
    """The inverse of `to_srgb`."""
    knee = 12.92 * _KNEE
    return torch.where(image <= knee, image / 12.92, ((image.clamp_min(knee) + 0.055) / 1.055) ** 2.4)


def _mixed(matrix: Tensor, image: Tensor) -> Tensor:
    """Every pixel's colour times a matrix, channel by channel."""
    red, green, blue = image.unbind(1)
    return torch.stack([line[0] * red + line[1] * green + line[2] * blue for line in matrix], dim=1)


def _gains(image: Tensor, gains: Tensor | None) -> Tensor:
    held = image.new_tensor(GAINS).expand(len(image), 3) if gains is None else gains.to(image)
    return held[:, :, None, None]


def smoothed(planes: Tensor, sigma: float) -> Tensor:
    """A 3x3 Gaussian on every plane, mirrored at the border; sigma in pixels of the planes, 0 for none."""
    if sigma == 0:
        return planes
    side = float(torch.exp(torch.tensor(-0.5 / sigma**2, dtype=torch.float64)))
    far, near = side / (1 + 2 * side), 1 / (1 + 2 * side)
    padded = F.pad(planes, (1, 1, 1, 1), mode="reflect")
    tall = far * (padded[:, :, :-2] + padded[:, :, 2:]) + near * padded[:, :, 1:-1]
    return far * (tall[..., :-2] + tall[..., 2:]) + near * tall[..., 1:-1]


def develop(planes: Tensor, sigma: float = 0.0, demosaicing: str = "malvar", gains: Tensor | None = None) -> Tensor:
    """A conventional image pipeline: planes [B, 4, H, W] in order RGGB to sRGB [B, 3, H, W] in [0, 1].

    Denoise, demosaic, white balance, colour matrix, sRGB transfer, then the mean of every 2x2 pixels: the mosaic has
    twice the image's height and width.

    sigma:       of `smoothed`
    demosaicing: "malvar" or "bilinear"
    gains:       white balance [B, 3]; None for GAINS
    """
    linear = DEMOSAICING[demosaicing](unpack(smoothed(planes, sigma)), "RGGB")
    balanced = (linear * _gains(linear, gains)).clamp(0, 1)
    seen = to_srgb(_mixed(balanced.new_tensor(MATRIX), balanced).clamp(0, 1))
    return F.avg_pool2d(seen, 2)


def unprocess(image: Tensor, gains: Tensor | None = None) -> Tensor:
    """The inverse for an sRGB image [B, 3, 2H, 2W]: planes [B, 4, H, W] of the mosaic that a camera would have seen.

    Colours that no camera of this pipeline sees are clipped. gains: as in `develop`
    """
    inverse = torch.linalg.inv(torch.tensor(MATRIX, dtype=torch.float64)).to(image)
    camera = _mixed(inverse, from_srgb(image)).clamp(0, 1) / _gains(image, gains)
    return pack(mosaic(camera, "RGGB"))


def doubled(image: Tensor) -> Tensor:
    """An image at twice its height and width, bilinear."""
    return F.interpolate(image, scale_factor=2, mode="bilinear", align_corners=False)


def analytic(image: Tensor) -> Tensor:
    """Planes [B, 4, H, W] of an sRGB image [B, 3, H, W] by `unprocess` alone, nothing learned."""
    return unprocess(doubled(image))


def shot_noise(planes: Tensor, k_s: Tensor, k_r: Tensor, normal: Tensor) -> Tensor:
    """Planes with a sensor's noise, in [0, 1]: variance planes * k_s + k_r**2.

    k_s, k_r: [B]; normal: standard normal draws, like planes
    """
    variance = planes * k_s[:, None, None, None] + k_r[:, None, None, None] ** 2
    return (planes + variance.sqrt() * normal).clamp(0, 1)


def psnr(image: Tensor, other: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB of images in [0, 1]."""
    return -10 * (image - other).square().flatten(1).mean(1).log10()
