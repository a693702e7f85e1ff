"""Purification through camera RAW ("All You Need is RAW", Zhang, Dong and Heide, arXiv 2112.09219): the networks.

An image becomes RAW planes (F) and an image again, by a network (G) and by a conventional pipeline (S), and the two
results are mixed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advkit.core.checks import at_least_one, fraction, not_negative, one_of
from advkit.core.errors import BadModel, CheckpointError
from advkit.models import raw
from advkit.models.checkpoint import canonical_json, pack, read_checked, unpack, write_atomically
from advkit.models.pynet import MULTIPLE as PYNET_MULTIPLE
from advkit.models.pynet import PyNET
from advkit.models.torch import tensors_sha256

FORMAT = "advkit-raw-isp-1"

ToRaw = Literal["residual", "plain"]
ToRGB = Literal["residual", "unet", "pynet"]
_DARK = 1e-6
"""Least RAW value whose square root is taken: the root's derivative at 0 is infinite."""


def _convolutions(*channels: int) -> nn.Sequential:
    """3x3 convolutions with a ReLU between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(channels):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _zeroed(net: nn.Sequential) -> nn.Sequential:
    """The network, its last layer set to zero."""
    last = net[-1]
    assert isinstance(last, nn.Conv2d)
    assert last.bias is not None
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net


def _roots(planes: Tensor) -> Tensor:
    return planes.clamp(_DARK, 1).sqrt()


class PlainToRaw(nn.Module):
    """F as in the released code: five 3x3 convolutions from the image to its planes, without their last ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = _convolutions(3, width, width, width, width, 4)

    def forward(self, image: Tensor) -> Tensor:
        planes: Tensor = self.net(image)
        return planes


class ResidualToRaw(nn.Module):
    """F as the analytic planes and a learned change of their square roots, which is zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = _zeroed(_convolutions(7, width, width, 4))

    def forward(self, image: Tensor) -> Tensor:
        start = raw.analytic(image)
        root = _roots(start)
        moved = (root + self.net(torch.cat((image, root), 1))).clamp(0, 1)
        # (root + change)**2, written so that no change gives the analytic planes to the bit
        planes: Tensor = start + (moved - root) * (moved + root)
        return planes


class ResidualToRGB(nn.Module):
    """G as the conventional pipeline and a learned change of its image, which is zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = _zeroed(_convolutions(7, width, width, 3))

    def forward(self, planes: Tensor) -> Tensor:
        image = raw.develop(planes)
        change: Tensor = self.net(torch.cat((image, _roots(planes)), 1))
        return image + change


class UNetToRGB(nn.Module):
    """G as a U-Net of three levels with 16, 32 and 32 channels, from the planes' square roots."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_convolutions(4, 16, 16), _convolutions(16, 32, 32), _convolutions(32, 32, 32)])
        self.up = nn.ModuleList([_convolutions(64, 32, 32), _convolutions(48, 16, 16)])
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, planes: Tensor) -> Tensor:
        kept: list[Tensor] = []
        x = _roots(planes)
        for level, each in enumerate(self.down):
            x = torch.relu(each(nn.functional.max_pool2d(x, 2) if level else x))
            kept.append(x)
        for each, beside in zip(self.up, (kept[1], kept[0]), strict=True):
            wide = nn.functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = torch.relu(each(torch.cat((wide, beside), 1)))
        image: Tensor = self.out(x)
        return image


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What F and G are.

    f:     "residual" (a change of the analytic planes) or "plain" (the released code's)
    g:     "residual" (a change of the conventional image), "unet" or "pynet" (47.6 million weights)
    width: channels of F and of the residual G, >= 1; the released F has 64
    """

    f: ToRaw = "residual"
    g: ToRGB = "residual"
    width: int = 24

    def __post_init__(self) -> None:
        one_of(self, "f", ("residual", "plain"))
        one_of(self, "g", ("residual", "unet", "pynet"))
        at_least_one(self, "width")

    def build(self) -> tuple[nn.Module, nn.Module]:
        """F and G, their weights drawn from torch's global generator."""
        f = ResidualToRaw(self.width) if self.f == "residual" else PlainToRaw(self.width)
        if self.g == "pynet":
            return f, PyNET()
        return f, UNetToRGB() if self.g == "unet" else ResidualToRGB(self.width)

    @property
    def multiple(self) -> int:
        """What heights and widths are padded to multiples of."""
        return {"residual": 1, "unet": 4, "pynet": PYNET_MULTIPLE}[self.g]

    @property
    def least(self) -> int:
        """Smallest height and width."""
        return 2 * PYNET_MULTIPLE if self.g == "pynet" else 4


def mirrored(image: Tensor, height: int, width: int) -> Tensor:
    """An image [..., H, W] continued below and to the right to height x width, mirrored at its outermost pixels.

    As often as it takes, so that images of any size can be padded to any other.
    """
    for axis, length in ((-2, height), (-1, width)):
        size = image.shape[axis]
        if size < length:
            period = max(2 * size - 2, 1)
            place = torch.arange(length, device=image.device) % period
            image = image.index_select(axis, torch.minimum(place, period - place).clamp_max(size - 1))
    return image


@dataclass(frozen=True, kw_only=True)
class Mix:
    """How the image is made of the planes.

    w:           share of G in w G(F(x)) + (1 - w) S(F(x)), in [0, 1]; the released code is w = 1
    sigma:       of the 3x3 Gaussian on the planes before S, in pixels of the planes; 0 for none
    demosaicing: of S: "malvar" or "bilinear"
    """

    w: float = 0.7
    sigma: float = 0.0
    demosaicing: Literal["malvar", "bilinear"] = "malvar"

    def __post_init__(self) -> None:
        fraction(self, "w", ends="[]")
        not_negative(self, "sigma", what="standard deviation")
        one_of(self, "demosaicing", tuple(raw.DEMOSAICING))


class Purifier(nn.Module):
    """Images to images through RAW: clamp(w G(F(x)) + (1 - w) S(F(x)), 0, 1).

    Takes [B, C, H, W] of any size in [0, 1]; every image by itself. One-channel images go through as gray colour
    images, and the mean of the three channels comes back. Stands before a model of images of any kind:
    `nn.Sequential(purifier, segmenter)`, or `detector(list(purifier(batch)))`.

    Raises BadModel for other numbers of channels.
    """

    def __init__(self, f: nn.Module, g: nn.Module, networks: Networks, mix: Mix | None = None) -> None:
        super().__init__()
        self.f, self.g = f, g
        self.networks = networks
        self.mix = Mix() if mix is None else mix

    def forward(self, image: Tensor) -> Tensor:
        if image.ndim != 4 or image.shape[1] not in (1, 3):
            raise BadModel(
                f"purification through RAW takes images [B, 3, H, W] in colour or [B, 1, H, W] in gray, got "
                f"{list(image.shape)}: a Bayer mosaic has red, green and blue"
            )
        height, width = image.shape[2:]
        seen = self.develop(self.to_raw(image))[..., :height, :width]
        return seen if image.shape[1] == 3 else seen.mean(1, keepdim=True)

    def padded(self, image: Tensor) -> Tensor:
        """The colour image at a size that the networks take."""
        multiple, least = self.networks.multiple, self.networks.least
        height, width = (max(least, -(-size // multiple) * multiple) for size in image.shape[2:])
        return mirrored(image.expand(-1, 3, -1, -1), height, width)

    def to_raw(self, image: Tensor) -> Tensor:
        """The planes of an image, F: [B, 4, H, W] in [0, 1], order RGGB."""
        planes: Tensor = self.f(self.padded(image))
        return planes.clamp(0, 1)

    def learned(self, planes: Tensor) -> Tensor:
        """G: the image that the network makes of planes, in [0, 1]."""
        image: Tensor = self.g(planes)
        return image.clamp(0, 1)

    def conventional(self, planes: Tensor) -> Tensor:
        """S: the image that the plain pipeline makes of planes, in [0, 1]."""
        return raw.develop(planes, self.mix.sigma, self.mix.demosaicing)

    def develop(self, planes: Tensor) -> Tensor:
        """The mixed image of planes."""
        w = self.mix.w
        if w == 1:
            return self.learned(planes)
        if w == 0:
            return self.conventional(planes)
        return (w * self.learned(planes) + (1 - w) * self.conventional(planes)).clamp(0, 1)

    def with_mix(self, mix: Mix) -> Purifier:
        """The same networks, mixed in another way."""
        return Purifier(self.f, self.g, self.networks, mix)


def blank(networks: Networks) -> Purifier:
    """A purifier that is not trained, in evaluation mode, its weights drawn from torch's global generator."""
    return Purifier(*networks.build(), networks).eval()


def save_purifier(purifier: Purifier, path: str | Path, extra: Mapping[str, Any]) -> str:
    """Write F and G to a safetensors file, atomically; returns the file's sha256. How they are mixed is not stored.

    extra: anything JSON can say
    """
    metadata = {
        "format": FORMAT,
        "networks": canonical_json(asdict(purifier.networks)),
        "extra": canonical_json(dict(extra)),
    }
    tensors = {name: tensor.detach().cpu() for name, tensor in purifier.state_dict().items()}
    metadata["seal"] = _seal(tensors, metadata)
    content = pack(tensors, metadata)
    write_atomically(Path(path), content)
    return hashlib.sha256(content).hexdigest()


def load_purifier(path: str | Path, networks: Networks | None = None) -> Purifier:
    """F and G of a file, in evaluation mode, mixed as `Mix()` says.

    networks: what they must be; None takes what the file says

    Raises CheckpointError where the file is missing, damaged, of another kind or holds other networks.
    """
    tensors, metadata = unpack(read_checked(path), path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} holds no networks of raw_isp (format {metadata.get('format')!r}); expected a file that "
            "`advkit train --defense raw_isp` wrote"
        )
    if metadata.get("seal") != _seal(tensors, {key: value for key, value in metadata.items() if key != "seal"}):
        raise CheckpointError(f"{path} is damaged: its content does not match its seal; train it again")
    try:
        held = Networks(**json.loads(metadata["networks"]))
        with torch.device("meta"):
            wanted = {name: (each.shape, each.dtype) for name, each in blank(held).state_dict().items()}
    except (LookupError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise CheckpointError(f"{path} does not say what networks it holds; train it again") from error
    if networks is not None and held != networks:
        raise CheckpointError(
            f"{path} holds f={held.f},g={held.g},width={held.width}; the defense asks for "
            f"f={networks.f},g={networks.g},width={networks.width}"
        )
    if wanted != {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}:
        raise CheckpointError(f"{path} does not hold the weights of {held}")
    with torch.random.fork_rng(devices=[]):
        purifier = blank(held)
    purifier.load_state_dict(tensors)
    return purifier


def extra_of(path: str | Path) -> dict[str, Any]:
    """What was said beside the networks when a file was written."""
    _, metadata = unpack(read_checked(path), path)
    told: dict[str, Any] = json.loads(metadata.get("extra", "{}"))
    return told


def _seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    word = f"{tensors_sha256(tensors.items())}|{canonical_json(dict(metadata))}"
    return hashlib.sha256(word.encode()).hexdigest()
