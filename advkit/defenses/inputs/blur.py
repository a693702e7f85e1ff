"""Blur, the plainest purifier: what any other must beat at the same loss of detail (Xu et al., arXiv 1704.01155)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from advkit.core.checks import at_least, one_of, positive
from advkit.core.errors import BadModel
from advkit.defenses.inputs.base import InputDefense


@dataclass(frozen=True, kw_only=True)
class Blur(InputDefense):
    """Blur: a box or Gaussian average of every pixel's neighbourhood before the model sees the image.

    Images are mirrored at the border. Differentiates, so that an adaptive attacker goes through it.

    kind:   "box", all neighbours alike, or "gaussian"
    radius: of the neighbourhood, in pixels: 2 * radius + 1 on a side; 0 for 1 of a box, 3 sigma of a Gaussian
    sigma:  standard deviation of the Gaussian, in pixels
    """

    kind: Literal["box", "gaussian"] = "box"
    radius: int = 0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        one_of(self, "kind", ("box", "gaussian"))
        at_least(self, 0, "radius")
        positive(self, "sigma", what="standard deviation")

    def transform(self, x: Tensor) -> Tensor:
        """The blurred images."""
        if x.ndim != 4:
            raise BadModel(f"blur takes images [B, C, H, W], got {list(x.shape)}")
        if self.kind == "box":
            weights = [1.0] * (2 * (self.radius or 1) + 1)
        else:
            reach = self.radius or max(1, round(3 * self.sigma))
            places = torch.arange(-reach, reach + 1, dtype=torch.float64)
            weights = torch.exp(-0.5 * (places / self.sigma) ** 2).tolist()
        total = sum(weights)
        for axis in (2, 3):
            x = _averaged(x, axis, [weight / total for weight in weights])
        return x


def _averaged(x: Tensor, axis: int, weights: list[float]) -> Tensor:
    """The weighted sum of a pixel's neighbours along an axis, mirrored at the outermost pixels."""
    reach, size = len(weights) // 2, x.shape[axis]
    period = max(2 * size - 2, 1)
    places = torch.arange(-reach, size + reach, device=x.device) % period
    padded = x.index_select(axis, torch.minimum(places, period - places).clamp_max(size - 1))
    parts = (weight * padded.narrow(axis, start, size) for start, weight in enumerate(weights))
    return torch.stack(tuple(parts)).sum(0)
