"""Images whose pixels move: rotated and shifted (Engstrom et al., arXiv 1712.02779), or along a flow (Xiao et al.,
arXiv 1801.02612).
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import check
from advkit.core.protocols import Access
from advkit.core.spaces import Box
from advkit.threat_models.capability import UNIT
from advkit.threat_models.lp import row_max, row_sum, wide
from advkit.threat_models.rendering import Rendering, images_only


def resampled(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Images x [B, C, H, W] read at places in pixels, [B, H, W] each, between pixels bilinearly; 0 outside the image.

    Places are pixels rather than fractions of the image, so that a whole number reads the pixel to the bit.
    """
    height, width = x.shape[-2:]
    top, left = rows.detach().floor(), columns.detach().floor()
    down, right = rows - top, columns - left
    flat, read = x.flatten(2), torch.zeros_like(x)
    for row, by_row in ((top, 1 - down), (top + 1, down)):
        for column, by_column in ((left, 1 - right), (left + 1, right)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            place = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
            index = place.long().flatten(1).unsqueeze(1).expand(-1, x.shape[1], -1)
            weight = torch.where(inside, by_row * by_column, 0.0).unsqueeze(1)
            read = read + weight * flat.gather(2, index).reshape(x.shape)
    return read


def pixels(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [H, 1] and columns [1, W] of an image's pixels."""
    height, width = x.shape[-2:]
    rows = torch.arange(height, dtype=x.dtype, device=x.device).unsqueeze(1)
    return rows, torch.arange(width, dtype=x.dtype, device=x.device).unsqueeze(0)


@dataclass(frozen=True)
class Transform(Rendering):
    """Rotation and translation: the attacker turns the image about its centre and shifts it.

    rotation:    largest angle, degrees either way, in [0, 180]
    translation: largest shift, pixels in each direction, >= 0; fractions of a pixel are allowed
    access:      what the attacker may query: nothing, labels, scores or gradients
    queries:     how often, per sample; None for no limit
    box:         legal inputs; `bind` puts the model's own here

    Candidates are three parameters in [-1, 1] per sample: the angle (counter-clockwise), the shift to the right and the
    shift down, in units of their limits. The harness renders them, bilinearly, with 0 (or the nearest legal value)
    for what comes in from outside; so what is admitted is a comparison of three numbers, and not a question about an
    image. Zeros give back the image to the bit.
    Raises UsageError for limits out of range and (in `bind`) for inputs that are no images.
    """

    made: ClassVar[str] = "spatial"

    rotation: float = 30.0
    translation: float = 3.0
    _: KW_ONLY
    access: Access = Access.GRADIENTS
    queries: int | None = None
    box: Box = UNIT

    def __post_init__(self) -> None:
        check(self, "rotation", 0 <= self.rotation <= 180, "degrees in [0, 180]")
        check(self, "translation", 0 <= self.translation < math.inf, "pixels of at least 0")
        super().__post_init__()

    def _limit(self) -> dict[str, float]:
        return {"rotation": self.rotation, "translation": self.translation}

    @override
    def identity(self, origin: Tensor) -> Tensor:
        images_only(origin, "transform")
        return origin.new_zeros(len(origin), 3)

    @override
    def render(self, z: Tensor, origin: Tensor) -> Tensor:
        """The images, turned and then shifted."""
        angle = (z[:, 0] * math.radians(self.rotation))[:, None, None]
        right, down = (z[:, 1:] * self.translation).unbind(1)
        rows, columns = pixels(origin)
        middle_row, middle_column = (origin.shape[-2] - 1) / 2, (origin.shape[-1] - 1) / 2
        y = rows - middle_row - down[:, None, None]
        x = columns - middle_column - right[:, None, None]
        cos, sin = angle.cos(), angle.sin()
        read = resampled(origin, cos * y + sin * x + middle_row, cos * x - sin * y + middle_column)
        return torch.clamp(read, *self.box.bounds_like(origin))

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        """Size of the angle in degrees and of the larger shift in pixels, float [B]."""
        size = x.to(wide(x)).abs()
        return {"rotation": size[:, 0] * self.rotation, "translation": size[:, 1:].amax(1) * self.translation}


@dataclass(frozen=True)
class Flow(Rendering):
    """Flow field: every pixel of the image is read from a place nearby.

    tau:     how far from a pixel that place may be, in pixels along each axis, >= 0
    access:  what the attacker may query: nothing, labels, scores or gradients
    queries: how often, per sample; None for no limit
    box:     legal inputs; `bind` puts the model's own here

    Candidates are flows [B, 2, H, W] in [-1, 1]: the way down and the way to the right, in units of tau. The harness
    renders them, bilinearly; a place outside the image is the image's edge. Zeros give back the image to the bit.
    The paper bounds nothing and keeps flows smooth by a penalty. Here tau bounds them, as published numbers without a
    bound compare with nothing; how smooth a flow is stands in `flow_roughness` of every record.
    Raises UsageError for a tau below 0 and (in `bind`) for inputs that are no images.
    """

    made: ClassVar[str] = "stadv"

    tau: float = 1.0
    _: KW_ONLY
    access: Access = Access.GRADIENTS
    queries: int | None = None
    box: Box = UNIT

    def __post_init__(self) -> None:
        check(self, "tau", 0 <= self.tau < math.inf, "pixels of at least 0")
        super().__post_init__()

    def _limit(self) -> dict[str, float]:
        return {"tau": self.tau}

    @override
    def _limits(self) -> str:
        return f"{self.tau:g} pixels"

    @override
    def identity(self, origin: Tensor) -> Tensor:
        images_only(origin, "flow")
        return origin.new_zeros(len(origin), 2, *origin.shape[-2:])

    @override
    def render(self, z: Tensor, origin: Tensor) -> Tensor:
        """The images, read along the flow."""
        rows, columns = pixels(origin)
        height, width = origin.shape[-2:]
        down = (rows + self.tau * z[:, 0]).clamp(0, height - 1)
        right = (columns + self.tau * z[:, 1]).clamp(0, width - 1)
        return torch.clamp(resampled(origin, down, right), *self.box.bounds_like(origin))

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        """The longest and the mean way of a pixel, in pixels, and the roughness of the flow; float [B]."""
        flow = self.tau * x.to(wide(x))
        way = flow.square().sum(1).sqrt()
        mean = row_sum(way) / max(1, way[0].numel() if len(way) else 1)
        return {"flow_longest": row_max(way), "flow_mean": mean, "flow_roughness": roughness(flow)}


def roughness(flow: Tensor) -> Tensor:
    """The sum over neighbouring pixels of the distance between their ways (the paper's L_flow), [B].

    flow: [B, 2, H, W]

    Each pair counts once; the paper's sum over four neighbours counts it twice.
    """
    total = flow.new_zeros(len(flow))
    for apart in (flow[:, :, 1:] - flow[:, :, :-1], flow[..., 1:] - flow[..., :-1]):
        total = total + (apart.square().sum(1) + _TINY).sqrt().sub(math.sqrt(_TINY)).flatten(1).sum(1)
    return total


_TINY = 1e-12
"""Under the root, whose slope at 0 has no bound; taken off again, so that a constant flow has no roughness."""
