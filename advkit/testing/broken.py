"""Broken defenses: modules around a sound one that hide its weakness from gradients.

Each takes rows [B, C, H, W] in [0, 1] and answers logits [B, classes] (or probabilities, where it says so). All of them
are as easy to fool as the module inside, or nearly so; an evaluation that reports more is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Around(nn.Module):
    """A module around another one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


class Quantised(Around):
    """Rounds its input to nine levels: the gradient is zero everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner((x * 8).round() / 8)
        return answer


class Scaled(Around):
    """Multiplies its logits by a thousand: cross-entropy saturates, and its gradient underflows."""

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = 1000 * self.inner(x)
        return answer


class Saturated(Around):
    """Answers probabilities of logits a hundred times too large, so that most are exactly 0 or 1."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.softmax(100 * self.inner(x), dim=1)


class Stopped(Around):
    """Cuts the graph in front of the model: there is no gradient at all."""

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(x.detach())
        return answer + 0 * x.flatten(1).sum(1, keepdim=True)


class RandomResize(Around):
    """Resizes and pads its input at random in every call: single gradients point past each other."""

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        size = int(torch.randint(side - 4, side + 1, ()))
        left, top = (int(torch.randint(0, side - size + 1, ())) for _ in range(2))
        small = functional.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
        padded = functional.pad(small, (left, side - size - left, top, side - size - top))
        answer: Tensor = self.inner(padded)
        return answer


class NaNOffData(Around):
    """Answers NaN for inputs that are no 8-bit images."""

    def forward(self, x: Tensor) -> Tensor:
        off = ((x * 255 - (x * 255).round()).abs() > 1e-3).flatten(1).any(1)
        return torch.where(off[:, None], torch.nan, self.inner(x))


class WinnersTakeAll(Around):
    """Keeps the largest fifth of its input's local contrasts only: piecewise constant choices break the gradient up."""

    def forward(self, x: Tensor) -> Tensor:
        smooth = functional.avg_pool2d(x, 3, stride=1, padding=1)
        contrast = (x - smooth).flatten(1)
        k = max(1, contrast.shape[1] // 5)
        edge = contrast.abs().topk(k, dim=1).values[:, -1:]
        kept = torch.where(contrast.abs() >= edge, contrast, 0.0).view_as(x)
        answer: Tensor = self.inner(smooth + kept)
        return answer


class Purified(Around):
    """Moves its input toward what it already believes before answering, in every forward.

    steps: of the inner optimisation, each a forward and a backward
    """

    def __init__(self, inner: nn.Module, steps: int = 2) -> None:
        super().__init__(inner)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().clone()
            for _ in range(self.steps):
                z.requires_grad_()
                answer = self.inner(z)
                loss = functional.cross_entropy(answer, answer.argmax(1), reduction="sum")
                z = (z - 0.01 * torch.autograd.grad(loss, z)[0].sign()).detach().clamp(0, 1)
        # The shift is a constant to autograd, as in the defenses that did this.
        final: Tensor = self.inner(x + (z - x).detach())
        return final


BROKEN: dict[str, Callable[[nn.Module], nn.Module]] = {
    "quantised": Quantised,
    "logits-x-1000": Scaled,
    "softmax-saturated": Saturated,
    "gradient-stopping": Stopped,
    "random-resize": RandomResize,
    "nan-off-the-data": NaNOffData,
    "winners-take-all": WinnersTakeAll,
    "input-time-optimisation": Purified,
}
"""name -> module around a module"""
