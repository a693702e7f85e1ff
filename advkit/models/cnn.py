"""A small convolutional network for images of any size."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from advkit.core.errors import BadModel
from advkit.models.torch import Architecture, image_shape


@dataclass(frozen=True, kw_only=True)
class CNN(Architecture):
    """Small CNN: two convolutions and two linear layers; 38,282 weights on 14x14 images of one channel and ten classes.

    width:  channels of the first convolution; the second has twice as many
    kernel: side of both kernels, odd
    hidden: units of the layer before the logits
    """

    width: int = 16
    kernel: int = 3
    hidden: int = 64

    def __post_init__(self) -> None:
        if self.width < 1 or self.hidden < 1:
            raise BadModel(f"width and hidden must be at least 1, got {self.width} and {self.hidden}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise BadModel(f"kernel must be odd, so that padding keeps the size; got {self.kernel}")

    def network(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        channels, height, width = image_shape(shape, "cnn")
        if min(height, width) < 2:
            raise BadModel(f"cnn halves the image once by pooling; {height}x{width} is too small, use mlp")
        padding = self.kernel // 2
        # the pool floors, the strided convolution rounds up
        features = 2 * self.width * ((height // 2 + 1) // 2) * ((width // 2 + 1) // 2)
        return nn.Sequential(
            nn.Conv2d(channels, self.width, self.kernel, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(self.width, 2 * self.width, self.kernel, stride=2, padding=padding),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(features, self.hidden),
            nn.ReLU(),
            nn.Linear(self.hidden, classes),
        )
