"""From rows to time steps: direct, Poisson and frame coding (arXiv 2503.03272, section 4).

Rows come first outside, time first inside: an encoder makes [T, B, ...] of a batch of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from advkit.core.errors import BadModel


class Direct(nn.Module):
    """Every time step sees the row as it is.

    time: number of steps T, >= 1
    """

    randomized = False

    def __init__(self, time: int) -> None:
        super().__init__()
        if time < 1:
            raise BadModel(f"time is {time}; a spiking network needs at least one time step")
        self.time = int(time)
        # What changes the answers belongs to the hash of a model.
        self.register_buffer("constants", torch.tensor([float(time)]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, ...] -> [T, B, ...], a view: layers see that the steps are the same and compute one."""
        return x.unsqueeze(0).expand(self.time, *x.shape)

    def extra_repr(self) -> str:
        return f"time={self.time}"


class _Drawn(torch.autograd.Function):
    """Spikes with the given probabilities; gradients pass unchanged."""

    @staticmethod
    def forward(ctx: object, probability: Tensor) -> Tensor:
        return (torch.rand_like(probability, memory_format=torch.contiguous_format) <= probability).to(
            probability.dtype
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: object, upstream: Tensor) -> Tensor:
        return upstream


class Poisson(Direct):
    """Every value is the probability of a spike, drawn anew at every step of every call.

    Draws come from torch's global generator of the device, as dropout's do; gradients pass straight through. The
    released code stretches every batch to [0, 1] first, which makes a row's answer depend on its company; here values
    are probabilities as they are.
    """

    randomized = True

    def forward(self, x: Tensor) -> Tensor:
        drawn: Tensor = _Drawn.apply(super().forward(x))
        return drawn


class _Thresholded(torch.autograd.Function):
    """1 where there is an event at least; gradients pass unchanged."""

    @staticmethod
    def forward(ctx: object, counts: Tensor) -> Tensor:
        # Compared into floats: a mask and its conversion take a CPU five times as long.
        return torch.ge(counts, 1, out=torch.empty_like(counts, memory_format=torch.contiguous_format))

    @staticmethod
    @once_differentiable
    def backward(ctx: object, upstream: Tensor) -> Tensor:
        return upstream


class Integer(nn.Module):
    """Rows are frames already, [B, T, ...]: counts of events per time step, passed on as they are."""

    randomized = False

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [T, B, ...]."""
        return x.transpose(0, 1).contiguous()


class Frames(Integer):
    """Rows are frames already, [B, T, ...]: a count of one or more is a spike; gradients pass straight through."""

    def forward(self, x: Tensor) -> Tensor:
        spikes: Tensor = _Thresholded.apply(x.transpose(0, 1))
        return spikes


def encoder(name: str, time: int, shape: tuple[int, ...]) -> nn.Module:
    """The encoder of a name; "auto" is "binary" for rows of frames [T, C, H, W] and "direct" for the rest."""
    if name == "auto":
        name = "binary" if len(shape) == 4 else "direct"
    if name == "direct":
        return Direct(time)
    if name == "poisson":
        return Poisson(time)
    if name == "binary":
        return Frames()
    if name == "integer":
        return Integer()
    raise BadModel(f"encoder {name!r}; expected auto, direct, poisson, binary or integer")
