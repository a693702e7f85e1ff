"""Spiking networks to train: a small convolutional one, ResNet-18, VGG-11 and VGGSNN (arXiv 2503.03272, section 4).

Rows are images [C, H, W], repeated or drawn at every time step, or frames of events [T, C, H, W]. Every spiking layer
follows a convolution and a batch normalisation or a linear layer; the logits are a linear layer's, averaged over time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from advkit.core.errors import BadModel
from advkit.core.protocols import Rng
from advkit.core.spaces import Binary
from advkit.models.spiking.encoders import encoder
from advkit.models.spiking.model import SpikingModel
from advkit.models.spiking.neurons import IF, LIF, PLIF, Neuron
from advkit.models.torch import Architecture

NeuronMaker = Callable[[], Neuron]
POOL = "pool"


def over_time(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer that knows no time on [T, B, ...]."""
    if len(x) > 1 and x.stride(0) == 0:  # the same at every step, as direct coding makes it: once is enough
        once: Tensor = layer(x[0])
        return once.unsqueeze(0).expand(len(x), *once.shape)
    answer: Tensor = layer(x.flatten(0, 1))
    return answer.view(*x.shape[:2], *answer.shape[1:])


class Temporal(nn.Sequential):
    """Layers one after the other on [T, B, ...]: neurons see the time axis, other layers every step by itself."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x) if isinstance(layer, Neuron | Temporal | Block) else over_time(layer, x)
        return x


class Block(nn.Module):
    """Two convolutions and a shortcut, spiking after the first convolution and after the sum."""

    def __init__(self, width_in: int, width_out: int, stride: int, neuron: NeuronMaker) -> None:
        super().__init__()
        self.conv1 = convolution(width_in, width_out, stride)
        self.neuron1 = neuron()
        self.conv2 = convolution(width_out, width_out)
        changes = stride != 1 or width_in != width_out
        self.shortcut = convolution(width_in, width_out, stride, kernel=1) if changes else nn.Identity()
        self.neuron2 = neuron()

    def forward(self, x: Tensor) -> Tensor:
        branch = over_time(self.conv2, self.neuron1(over_time(self.conv1, x)))
        answer: Tensor = self.neuron2(branch + over_time(self.shortcut, x))
        return answer


class SpikingNet(nn.Module):
    """Encoder, spiking layers, and a linear layer whose answers are averaged over time.

    The mean is taken before the linear layer, which changes nothing but round-off and costs a T-th.
    """

    def __init__(self, encode: nn.Module, layers: Temporal, features: int, classes: int) -> None:
        super().__init__()
        self.encode = encode
        self.layers = layers
        self.logits = nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of rows [B, C, H, W] or [B, T, C, H, W]."""
        answer: Tensor = self.logits(self.layers(self.encode(x)).mean(0))
        return answer


def convolution(width_in: int, width_out: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    """A convolution without bias that keeps the size at stride 1, and its batch normalisation."""
    return nn.Sequential(
        nn.Conv2d(width_in, width_out, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width_out),
    )


def _halved(size: int) -> int:
    return (size + 1) // 2


@dataclass(frozen=True, kw_only=True)
class SpikingArchitecture(Architecture):
    """What the spiking architectures share.

    time:         time steps T of coded images; frames of events bring their own
    encoder:      "auto": binary for frames [T, C, H, W], direct for images; "direct", "poisson", "binary" or
                  "integer"
    neuron:       "lif", "if", or "plif", which learns its time constant
    tau:          time constant of the leak, > 1
    threshold:    a potential this high fires
    reset:        where a spike puts the potential; none lowers it by the threshold
    decay_input:  whether the input leaks as the potential does
    detach_reset: whether gradients leave out the spike inside the reset
    surrogate:    backward rule in training, a spec such as atan or [atan:alpha=4]
    """

    time: int = 4
    encoder: Literal["auto", "direct", "poisson", "binary", "integer"] = "auto"
    neuron: Literal["lif", "if", "plif"] = "lif"
    tau: float = 2.0
    threshold: float = 1.0
    reset: float | None = 0.0
    decay_input: bool = False
    detach_reset: bool = False
    surrogate: str = "atan"

    def __post_init__(self) -> None:
        if self.time < 1:
            raise BadModel(f"time is {self.time}; a spiking network needs at least one time step")
        self.neurons()()

    def neurons(self) -> NeuronMaker:
        """What makes a neuron."""
        common: dict[str, Any] = {
            "threshold": self.threshold,
            "reset": self.reset,
            "decay_input": self.decay_input,
            "detach_reset": self.detach_reset,
            "surrogate": self.surrogate,
        }
        if self.neuron == "if":
            return lambda: IF(**common)
        if self.neuron not in ("lif", "plif"):
            raise BadModel(f"neuron {self.neuron!r}; expected lif, if or plif")
        kind = LIF if self.neuron == "lif" else PLIF
        return lambda: kind(tau=self.tau, **common)

    @abstractmethod
    def layers(self, shape: tuple[int, int, int], neuron: NeuronMaker) -> tuple[Temporal, int]:
        """The spiking layers for frames [C, H, W], and how many features come out."""

    def network(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        made = encoder(self.encoder, self.time, shape)
        frames = shape[1:] if len(shape) == 4 else shape
        wanted = 4 if self.encoder in ("binary", "integer") else 3 if self.encoder in ("direct", "poisson") else None
        if len(frames) != 3 or wanted not in (None, len(shape)):
            raise BadModel(
                f"{type(self).__name__} with encoder={self.encoder} takes samples of shape "
                f"{'[T, C, H, W]' if wanted == 4 else '[C, H, W]'}, got {list(shape)}"
            )
        channels, height, width = frames
        layers, features = self.layers((channels, height, width), self.neurons())
        return SpikingNet(made, layers, features, classes)

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> SpikingModel:
        """An untrained model in evaluation mode; rows of frames are binary unless the space says otherwise."""
        frames = len(shape) == 4 and self.encoder in ("auto", "binary")
        space = Binary(tuple(shape)) if space is None and frames else space
        return SpikingModel.of(super().__call__(shape, classes, rng, space=space))


@dataclass(frozen=True, kw_only=True)
class SmallSNN(SpikingArchitecture):
    """Small spiking network (SNN): convolutions that halve the map, a linear layer, all spiking; 4,474 weights on
    digits.

    widths: channels of the convolutions
    down:   how each halves the map: "pool" (2x2 means after the spikes) or "stride"
    hidden: units of the spiking layer before the logits; 0 for none
    kernel: side of the kernels, odd
    """

    widths: tuple[int, ...] = (8, 16)
    down: Literal["pool", "stride"] = "pool"
    hidden: int = 48
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(width < 1 for width in self.widths) or self.hidden < 0:
            raise BadModel(f"widths {self.widths} must be positive and hidden {self.hidden} 0 or more")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise BadModel(f"kernel must be odd, so that padding keeps the size; got {self.kernel}")
        if self.down not in ("pool", "stride"):
            raise BadModel(f"down {self.down!r}; expected pool or stride")
        if not self.widths and not self.hidden:
            raise BadModel("a network without convolution and hidden layer has no neuron; give widths or hidden")

    def layers(self, shape: tuple[int, int, int], neuron: NeuronMaker) -> tuple[Temporal, int]:
        channels, height, width = shape
        made: list[nn.Module] = []
        for each in self.widths:
            made += [convolution(channels, each, 2 if self.down == "stride" else 1, self.kernel), neuron()]
            if self.down == POOL:
                made.append(nn.AvgPool2d(2, ceil_mode=True))
            channels, height, width = each, _halved(height), _halved(width)
        features = channels * height * width
        made.append(nn.Flatten())
        if self.hidden:
            made += [nn.Linear(features, self.hidden), neuron()]
            features = self.hidden
        return Temporal(*made), features


@dataclass(frozen=True, kw_only=True)
class SpikingResNet18(SpikingArchitecture):
    """Spiking ResNet-18: 17 spiking layers, 11.17 million weights at width 64 on 32x32 colour images of ten classes.

    width: channels of the first of four stages; each later one has twice as many
    """

    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise BadModel(f"width must be at least 1, got {self.width}")

    def layers(self, shape: tuple[int, int, int], neuron: NeuronMaker) -> tuple[Temporal, int]:
        made: list[nn.Module] = [convolution(shape[0], self.width), neuron()]
        width_in = self.width
        for stage in range(4):
            width_out = self.width * 2**stage
            for block in range(2):
                made.append(Block(width_in, width_out, 2 if stage and not block else 1, neuron))
                width_in = width_out
        return Temporal(*made, nn.AdaptiveAvgPool2d(1), nn.Flatten()), width_in


def _vgg(
    plan: tuple[int | str, ...], shape: tuple[int, int, int], neuron: NeuronMaker
) -> tuple[list[nn.Module], tuple[int, int, int]]:
    channels, height, width = shape
    made: list[nn.Module] = []
    for each in plan:
        if isinstance(each, str):
            made.append(nn.AvgPool2d(2, ceil_mode=True))
            height, width = _halved(height), _halved(width)
        else:
            made += [convolution(channels, each), neuron()]
            channels = each
    return made, (channels, height, width)


@dataclass(frozen=True, kw_only=True)
class SpikingVGG11(SpikingArchitecture):
    """Spiking VGG-11: eight convolutions and two wide linear layers, 61.4 million weights on 32x32 colour images.

    width:  channels of the first convolution; the later ones have 2, 4 and 8 times as many
    hidden: units of the two linear spiking layers
    """

    width: int = 64
    hidden: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1 or self.hidden < 1:
            raise BadModel(f"width and hidden must be at least 1, got {self.width} and {self.hidden}")

    def layers(self, shape: tuple[int, int, int], neuron: NeuronMaker) -> tuple[Temporal, int]:
        w = self.width
        plan = (w, POOL, 2 * w, 4 * w, POOL, 8 * w, 8 * w, 8 * w, POOL, 8 * w, 8 * w)
        made, (channels, height, width) = _vgg(plan, shape, neuron)
        features = channels * height * width
        wide = [nn.Linear(features, self.hidden), neuron(), nn.Linear(self.hidden, self.hidden), neuron()]
        return Temporal(*made, nn.Flatten(), *wide), self.hidden


@dataclass(frozen=True, kw_only=True)
class VGGSNN(SpikingArchitecture):
    """VGGSNN, the VGG of event data: eight convolutions, mean pooling and logits; 9.23 million weights on two
    polarities.

    width: channels of the first convolution; the later ones have 2, 4 and 8 times as many
    """

    width: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width < 1:
            raise BadModel(f"width must be at least 1, got {self.width}")

    def layers(self, shape: tuple[int, int, int], neuron: NeuronMaker) -> tuple[Temporal, int]:
        w = self.width
        plan = (w, 2 * w, POOL, 4 * w, 4 * w, POOL, 8 * w, 8 * w, POOL, 8 * w, 8 * w)
        made, (channels, _, _) = _vgg(plan, shape, neuron)
        return Temporal(*made, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels
