"""Total variation denoising (Rudin, Osher and Fatemi 1992) as an input defense (Guo et al., arXiv 1711.00117)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.core.checks import at_least_one, positive
from advkit.core.errors import BadModel
from advkit.defenses.inputs.base import InputDefense


@dataclass(frozen=True, kw_only=True)
class TotalVariation(InputDefense):
    """Total variation denoising: the image nearest to x whose neighbouring pixels differ little.

    Minimises 1/2 |u - x|^2 + weight * TV(u), with TV the sum over pixels of the length of the differences to the right
    and lower neighbour, channel by channel, by steps of Chambolle's dual projection (2004) accelerated as by Beck and
    Teboulle (2009). The steps differentiate, so that an adaptive attacker goes through them. Guo et al. also drop
    pixels at random before; that is left out.

    weight: of the total variation, > 0, for images in [0, 1]
    steps:  of the minimisation, >= 1
    """

    weight: float = 0.05
    steps: int = 20

    def __post_init__(self) -> None:
        positive(self, "weight")
        at_least_one(self, "steps")

    def transform(self, x: Tensor) -> Tensor:
        """The denoised images."""
        if x.ndim != 4:
            raise BadModel(f"tv takes images [B, C, H, W], got {list(x.shape)}")
        dual = last = torch.zeros((2, *x.shape), dtype=x.dtype, device=x.device)
        pace = 1.0
        for _ in range(self.steps):
            ascent = dual + _differences(x - self.weight * _adjoint(dual)) / (8 * self.weight)
            # the length's derivative at 0 is not finite
            length = (ascent.square().sum(0, keepdim=True) + 1e-12).sqrt()
            new = ascent / length.clamp_min(1.0)
            faster = (1 + (1 + 4 * pace**2) ** 0.5) / 2
            dual = new + (pace - 1) / faster * (new - last)
            last, pace = new, faster
        return x - self.weight * _adjoint(last)


def _differences(u: Tensor) -> Tensor:
    """To the lower and to the right neighbour, [2, ...]; 0 at the border."""
    zero = torch.zeros_like
    down = torch.cat((u[:, :, 1:] - u[:, :, :-1], zero(u[:, :, :1])), 2)
    right = torch.cat((u[..., 1:] - u[..., :-1], zero(u[..., :1])), 3)
    return torch.stack((down, right))


def _adjoint(p: Tensor) -> Tensor:
    """The adjoint of `_differences`: minus the divergence."""
    down, right = p[0][:, :, :-1], p[1][..., :-1]
    zero = torch.zeros_like
    tall = torch.cat((zero(p[0][:, :, :1]), down), 2) - torch.cat((down, zero(p[0][:, :, :1])), 2)
    wide = torch.cat((zero(p[1][..., :1]), right), 3) - torch.cat((right, zero(p[1][..., :1])), 3)
    return tall + wide
