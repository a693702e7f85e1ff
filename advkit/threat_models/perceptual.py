"""Balls of perceptual distances: SSIM (Wang et al., 2004) and LPIPS (Zhang et al., arXiv 1801.03924)."""

from __future__ import annotations

import hashlib
import math
import warnings
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.checks import check, one_of
from advkit.core.errors import BadInput, MissingExtra, UsageError
from advkit.core.protocols import Access, Measures, Rng, WrapsBall
from advkit.core.spaces import Box
from advkit.threat_models.capability import UNIT, Capability, checked_shape
from advkit.threat_models.lp import Linf, eps_text, row_max, wide
from advkit.threat_models.rendering import image_box, images_only

HALVINGS = 12
"""How often the way back to the clean image is halved: a 4000th of it is given away."""


class Perceptual(Capability, WrapsBall, Measures):
    """A ball of a distance that has no projection in closed form, within an Linf ball that gives steps their length.

    An image that is too far is pulled back on the straight line to the clean one, by halving, until it is admitted.
    That is not the nearest admitted image: attacks that walk by gradients work here, and none that counts on exact
    projections.
    """

    eps: float
    linf: float
    box: Box

    def __post_init__(self) -> None:
        check(self, "eps", 0 <= self.eps < math.inf, "a finite distance >= 0")
        check(self, "linf", 0 <= self.linf < math.inf, "a finite radius >= 0 such as 0.3")
        super().__post_init__()

    @abstractmethod
    def apart(self, x: Tensor, origin: Tensor) -> Tensor:
        """The distance, float64 [B]; nothing is checked."""

    @cached_property
    @override
    def ball(self) -> Linf:
        """The Linf ball around it."""
        return Linf(self.linf, box=self.box, access=self.access, queries=self.queries)

    def _budget(self) -> tuple[float | None, str | None]:
        return self.eps, eps_text(self.eps)

    def _details(self) -> dict[str, Any]:
        return {"linf": self.linf, "box": self.box.text()}

    def bind(self, space: Any) -> Self:
        """The same threat model in a model's box."""
        box = image_box(space, self._name())
        if not box.bounded:
            raise UsageError(f"{space!r} is unbounded and {self._name()} compares images; declare bounds")
        Linf(self.linf).bind(space)
        return replace(self, box=box)  # type: ignore[type-var]

    @property
    def _range(self) -> tuple[float, float]:
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (self.box.low, self.box.high))
        return float(low.min()), float(high.max())

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """The perceptual distance, float64 [B]; 0 where no bit changed."""
        checked_shape(x, origin)
        images_only(origin, self._name())
        apart = self.apart(x, origin)
        return torch.where((x == origin).flatten(1).all(1), torch.zeros_like(apart), apart)

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        """The largest change of a value, float [B]."""
        return {"linf": row_max((x.to(wide(x)) - origin.to(wide(origin))).abs())}

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: legal values within both distances."""
        if x.shape != origin.shape:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        legal = self.ball.admits(x, origin)
        return legal & self._near(torch.where(legal[:, None, None, None], x, origin), origin)

    def _near(self, x: Tensor, origin: Tensor) -> Tensor:
        return self.distance(x, origin) <= self.eps * (1 + 1e-5) + 1e-9

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """Rows are handed in as they are."""
        return x

    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """An admitted image on the way from z to the origin, the last that halving finds; z itself where it is one."""
        images_only(origin, self._name())
        z = self.ball.project(z, origin)
        far = (~(self.distance(z, origin) <= self.eps)).nonzero().squeeze(1)
        if not len(far):
            return z
        end, start = z[far], origin[far]
        found, low, high = start, torch.zeros(len(far), dtype=z.dtype, device=z.device), None
        high = torch.ones_like(low)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            tried = start + middle[:, None, None, None] * (end - start)
            inside = self.distance(tried, start) <= self.eps
            found = torch.where(inside[:, None, None, None], tried, found)
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        done = z.clone()
        done[far] = found
        return done

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """Uniform in the Linf ball, pulled back."""
        return self.project(self.ball.sample(origin, rng), origin)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """That of the Linf ball."""
        return self.ball.steepest(gradient, at)


@dataclass(frozen=True)
class SSIM(Perceptual):
    """Structural similarity: 1 - SSIM of image and clean image is at most eps, and no value changes by more than linf.

    eps:     largest 1 - SSIM, the mean over pixels and channels, in [0, 2]
    linf:    radius of the Linf ball around it, which gives steps their length
    window:  side of the Gaussian window in pixels, odd
    access:  what the attacker may query: nothing, labels, scores or gradients
    queries: how often, per sample; None for no limit
    box:     legal inputs; `bind` puts the model's own here

    kornia measures, with the constants of the paper and images mirrored at their edges.
    Raises UsageError for fields out of range, MissingExtra without kornia.
    """

    norm: ClassVar[str | None] = None

    eps: float = 0.1
    _: KW_ONLY
    linf: float = 0.3
    window: int = 11
    access: Access = Access.GRADIENTS
    queries: int | None = None
    box: Box = UNIT

    def __post_init__(self) -> None:
        check(self, "window", self.window >= 1 and self.window % 2 == 1, "an odd number of pixels")
        super().__post_init__()

    @override
    def _details(self) -> dict[str, Any]:
        return {**super()._details(), "window": self.window}

    @override
    def bind(self, space: Any) -> Self:
        bound = super().bind(space)
        shape = bound.box.shape
        if shape is not None and min(shape[-2:]) <= self.window // 2:
            raise UsageError(
                f"a window of {self.window} pixels in images of {shape[-2]} x {shape[-1]}: choose a smaller window"
            )
        _ssim()
        return bound

    @override
    def apart(self, x: Tensor, origin: Tensor) -> Tensor:
        low, high = self._range
        one, other = (each.to(wide(each)) - low for each in (x, origin))
        similar: Tensor = _ssim()(one, other, self.window, max_val=high - low, eps=0.0)
        return (1 - similar.flatten(1).mean(1)).clamp_min(0)


def _ssim() -> Any:
    try:
        from kornia.metrics import ssim
    except ImportError as error:
        raise MissingExtra("SSIM is measured by kornia: pip install 'advkit[perceptual]'") from error
    return ssim


Network = Literal["squeeze", "alex", "vgg"]
_BUILT: dict[Network, str] = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}


@dataclass(frozen=True)
class LPIPS(Perceptual):
    """Learned perceptual distance: LPIPS of image and clean image is at most eps, and no value changes more than linf.

    eps:     largest distance, >= 0
    weights: file with the backbone's weights, as torchvision publishes them (.pth, or .safetensors of the same names)
    net:     the backbone: "squeeze" (squeezenet1_1), "alex" (alexnet) or "vgg" (vgg16)
    linf:    radius of the Linf ball around it, which gives steps their length
    side:    images are enlarged to so many pixels a side before they are compared, bilinearly; 0 leaves them. Backbones
             need about 32 pixels (squeeze, vgg) or 64 (alex)
    access:  what the attacker may query: nothing, labels, scores or gradients
    queries: how often, per sample; None for no limit
    box:     legal inputs; `bind` puts the model's own here

    The package lpips computes, with the linear weights (0.1) that it contains; the backbone's weights are yours to
    fetch, since the package would download them while an evaluation runs. Grey images are repeated in three channels.
    Raises UsageError for fields out of range, BadInput for a file that does not fit, MissingExtra without lpips.
    """

    norm: ClassVar[str | None] = None

    eps: float = 0.1
    _: KW_ONLY
    weights: str = ""
    net: Network = "squeeze"
    linf: float = 0.3
    side: int = 64
    access: Access = Access.GRADIENTS
    queries: int | None = None
    box: Box = UNIT

    def __post_init__(self) -> None:
        one_of(self, "net", tuple(_BUILT))
        check(self, "side", self.side >= 0, "pixels of at least 0")
        super().__post_init__()

    @override
    def _details(self) -> dict[str, Any]:
        said = {**super()._details(), "net": self.net, "side": self.side}
        return {**said, "weights_sha256": hashlib.sha256(self._file().read_bytes()).hexdigest()}

    def _file(self) -> Path:
        if not self.weights:
            raise UsageError(
                f"lpips needs the weights of its backbone: fetch {_BUILT[self.net]} of torchvision and say "
                "lpips:weights=FILE"
            )
        path = Path(self.weights)
        if not path.is_file():
            raise BadInput(f"there is no file {path}; expected weights of {_BUILT[self.net]}")
        return path

    @override
    def bind(self, space: Any) -> Self:
        bound = super().bind(space)
        bound._network(torch.device("cpu"))
        return bound

    def _network(self, device: torch.device) -> nn.Module:
        key = (str(self._file().resolve()), self._file().stat().st_mtime_ns, self.net, str(device))
        if key not in _networks:
            _networks.clear()
            _networks[key] = _loaded(self._file(), self.net).to(device)
        return _networks[key]

    @override
    def apart(self, x: Tensor, origin: Tensor) -> Tensor:
        low, high = self._range
        one, other = (2 * (each.float() - low) / (high - low) - 1 for each in (x, origin))
        if x.shape[1] == 1:
            one, other = (each.expand(-1, 3, -1, -1) for each in (one, other))
        if self.side:
            one, other = (
                nn.functional.interpolate(each, size=(self.side, self.side), mode="bilinear") for each in (one, other)
            )
        with torch.no_grad():
            apart: Tensor = self._network(x.device)(one, other)
        return apart.flatten(1).mean(1).to(wide(x)).clamp_min(0)


_networks: dict[tuple[Any, ...], nn.Module] = {}


def _loaded(path: Path, net: Network) -> nn.Module:
    """The network of the package lpips, its backbone filled from the file; nothing is fetched."""
    try:
        import lpips
    except ImportError as error:
        raise MissingExtra("LPIPS is computed by the package lpips: pip install 'advkit[perceptual]'") from error
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lpips speaks to torchvision as of old
        made: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # whatever an unpickler raises on a file of others
            raise BadInput(
                f"{path} does not read as weights ({type(error).__name__}); expected a state dict"
            ) from error
    backbone: Any = made.net
    wanted = backbone.state_dict()
    named = {name: "features." + name.partition(".")[2] for name in wanted}
    for name, source in named.items():
        if source not in state or state[source].shape != wanted[name].shape:
            raise BadInput(
                f"{path} has no {source} of shape {tuple(wanted[name].shape)}; expected torchvision's {_BUILT[net]}"
            )
    backbone.load_state_dict({name: state[source] for name, source in named.items()})
    return made.eval().requires_grad_(False)
