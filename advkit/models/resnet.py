"""Pre-activation residual networks (He et al., 2016, arXiv:1603.05027) and wide ones (Zagoruyko & Komodakis, 2016,
arXiv:1605.07146), in their versions for small images: a 3x3 stem with stride 1 and no pooling before the stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from advkit.core.errors import BadModel
from advkit.models.torch import Architecture, image_shape

MOST_LAYERS = 10_000
"""A deeper network is a slip of the hand, or a file that wants to exhaust its reader."""


class PreActivationBlock(nn.Module):
    """Normalise, rectify, convolve, twice, added to the shortcut.

    Where the shape changes the shortcut is a 1x1 convolution of the activated input, as in both papers' code.
    """

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1, bias=False)
        changes = stride != 1 or width_in != width_out
        self.shortcut = nn.Conv2d(width_in, width_out, 1, stride=stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        skipped = x if self.shortcut is None else self.shortcut(active)
        answer: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active)))) + skipped
        return answer


class PreActivationResNet(nn.Module):
    """A stem, stages of blocks that halve the image from the second on, a last normalisation, mean pooling, logits."""

    def __init__(self, channels: int, stem: int, widths: tuple[int, ...], blocks: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        stages: list[nn.Module] = []
        width_in = stem
        for stage, width_out in enumerate(widths):
            for block in range(blocks):
                stages.append(PreActivationBlock(width_in, width_out, 2 if stage > 0 and block == 0 else 1))
                width_in = width_out
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(width_in)
        self.logits = nn.Linear(width_in, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.logits.bias)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.norm(self.stages(self.stem(x))))
        answer: Tensor = self.logits(features.mean(dim=(2, 3)))
        return answer


@dataclass(frozen=True, kw_only=True)
class ResNet8(Architecture):
    """ResNet-8: three stages of one pre-activation block; a small residual network with batch normalisation.

    width: channels of the first stage; each later one has twice as many
    """

    width: int = 16

    def __post_init__(self) -> None:
        _check_width(self.width)

    def network(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        channels, _, _ = image_shape(shape, "resnet8")
        widths = (self.width, 2 * self.width, 4 * self.width)
        return PreActivationResNet(channels, self.width, widths, 1, classes)


@dataclass(frozen=True, kw_only=True)
class ResNet18(Architecture):
    """ResNet-18, pre-activation: four stages of two blocks, as in the adversarial-training literature.

    width: channels of the first stage; each later one has twice as many
    """

    width: int = 64

    def __post_init__(self) -> None:
        _check_width(self.width)

    def network(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        channels, _, _ = image_shape(shape, "resnet18")
        widths = (self.width, 2 * self.width, 4 * self.width, 8 * self.width)
        return PreActivationResNet(channels, self.width, widths, 2, classes)


@dataclass(frozen=True, kw_only=True)
class WRN28x10(Architecture):
    """Wide ResNet: three stages of (depth - 4) / 6 blocks, widen times as wide as 16, 32, 64.

    depth: layers, 6 n + 4
    widen: factor on the channels of every stage
    """

    depth: int = 28
    widen: int = 10

    def __post_init__(self) -> None:
        _check_width(self.widen)
        if not 10 <= self.depth <= MOST_LAYERS or (self.depth - 4) % 6:
            raise BadModel(f"depth must be 6 n + 4 (10, 16, 22, 28...), at most {MOST_LAYERS}, got {self.depth}")

    def network(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        channels, _, _ = image_shape(shape, "wrn-28-10")
        widths = (16 * self.widen, 32 * self.widen, 64 * self.widen)
        return PreActivationResNet(channels, 16, widths, (self.depth - 4) // 6, classes)


def _check_width(width: int) -> None:
    if width < 1:
        raise BadModel(f"the width must be at least 1, got {width}")
