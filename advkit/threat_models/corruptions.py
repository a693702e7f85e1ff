"""Common corruptions (Hendrycks and Dietterich, arXiv 1903.12261), as the library kornia computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import check, one_of
from advkit.core.errors import MissingExtra, UsageError
from advkit.core.protocols import Access, Rng
from advkit.core.spaces import Box
from advkit.threat_models.capability import UNIT
from advkit.threat_models.rendering import Rendering, images_only

Table = Literal["auto", "imagenet-c", "cifar-10-c"]
SEEDS = 1 << 24
"""Numbers that a random corruption may be drawn from: as many as float32 counts."""

CONSTANTS: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "imagenet-c": {
        "gaussian_noise": (0.08, 0.12, 0.18, 0.26, 0.38),
        "impulse_noise": (0.03, 0.06, 0.09, 0.17, 0.27),
        "gaussian_blur": (1, 2, 3, 4, 6),
        "brightness": (0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": (0.4, 0.3, 0.2, 0.1, 0.05),
        "jpeg_compression": (25, 18, 15, 10, 7),
    },
    "cifar-10-c": {
        "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
        "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),
        "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
        "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
        "jpeg_compression": (80, 65, 58, 50, 40),
    },
}
"""The constants of severities 1 to 5 in the authors' code for ImageNet-C and for CIFAR-10-C."""

KINDS = tuple(CONSTANTS["imagenet-c"])
LARGE = 64
"""Side in pixels from which images are corrupted as those of ImageNet are."""


def _kornia() -> Any:
    try:
        import kornia
    except ImportError as error:
        raise MissingExtra("corruptions are computed by kornia: pip install 'advkit[corruptions]'") from error
    return kornia


def _noise(library: Any, x: Tensor, constant: float) -> Tensor:
    return library.augmentation.RandomGaussianNoise(mean=0.0, std=constant, p=1.0)(x)  # type: ignore[no-any-return]


def _impulses(library: Any, x: Tensor, constant: float) -> Tensor:
    made = library.augmentation.RandomSaltAndPepperNoise(amount=constant, salt_vs_pepper=0.5, p=1.0)
    return made(x)  # type: ignore[no-any-return]


def _blur(library: Any, x: Tensor, constant: float) -> Tensor:
    # Cut where the paper's scipy filter cuts, at four deviations; the edges are mirrored there as well.
    side = min(2 * int(4 * constant + 0.5) + 1, *(2 * length - 1 for length in x.shape[-2:]))
    return library.filters.gaussian_blur2d(x, (side, side), (constant, constant))  # type: ignore[no-any-return]


def _brightness(library: Any, x: Tensor, constant: float) -> Tensor:
    return library.enhance.adjust_brightness(x, constant)  # type: ignore[no-any-return]


def _contrast(library: Any, x: Tensor, constant: float) -> Tensor:
    return library.enhance.adjust_contrast_with_mean_subtraction(x, constant)  # type: ignore[no-any-return]


def _jpeg(library: Any, x: Tensor, constant: float) -> Tensor:
    colour = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    quality = torch.full((len(x),), float(constant), dtype=x.dtype, device=x.device)
    made: Tensor = library.enhance.jpeg_codec_differentiable(colour, quality)
    return made.mean(1, keepdim=True) if x.shape[1] == 1 else made


_MADE: Mapping[str, tuple[Callable[[Any, Tensor, float], Tensor], bool]] = {
    "gaussian_noise": (_noise, True),
    "impulse_noise": (_impulses, True),
    "gaussian_blur": (_blur, False),
    "brightness": (_brightness, False),
    "contrast": (_contrast, False),
    "jpeg_compression": (_jpeg, False),
}
"""How each kind is computed, and whether it is drawn."""


def corrupted(x: Tensor, kind: str, constant: float, seeds: Tensor) -> Tensor:
    """Images x [B, C, H, W] in [0, 1], corrupted by kornia and clipped; seeds: long [B], for kinds that are drawn.

    kornia draws from torch's global generator, so rows are drawn one by one, each from its own seed; the generator
    comes back as it was.
    """
    library = _kornia()
    made, drawn = _MADE[kind]
    if not drawn:
        return made(library, x, constant).clamp(0, 1)
    rows = []
    with torch.random.fork_rng(devices=[]):
        for row, seed in zip(x, seeds.tolist(), strict=True):
            torch.manual_seed(seed)
            rows.append(made(library, row.unsqueeze(0).cpu(), constant))
    return torch.cat(rows).to(x).clamp(0, 1) if rows else x


@dataclass(frozen=True)
class Corruption(Rendering):
    """Common corruptions: noise, blur, brightness, contrast and JPEG at severities 1 to 5.

    severity:  the highest, 1 to 5
    constants: "imagenet-c" or "cifar-10-c", the authors' tables of what a severity is; "auto" takes the first for
               images of at least 64 pixels a side and the second below
    access:    what the attacker may query; an attacker of nature asks nothing
    queries:   how often, per sample; None for no limit
    box:       legal inputs; `bind` puts the model's own here

    Candidates are three whole numbers per sample: the kind (1 to 6 in the order of `KINDS`, 0 for none), the severity
    and the seed that kornia draws from. The harness renders them, so the image that is judged is the library's own.
    Of the paper's fifteen kinds those are there that kornia computes by the same formula: `gaussian_noise`,
    `impulse_noise`, `brightness`, `contrast` and `jpeg_compression`; and `gaussian_blur` of its four extra ones.
    Brightness is added to all channels rather than to the value in HSV, contrast is taken about the mean of the image's
    grey values, and JPEG is kornia's model of the codec. On grey images the first two equal the paper's.
    Raises UsageError for fields out of range and (in `bind`) for inputs that are no images in [0, 1], MissingExtra
    without kornia.
    """

    made: ClassVar[str] = "corruption"

    severity: int = 5
    _: KW_ONLY
    constants: Table = "auto"
    access: Access = Access.GRADIENTS
    queries: int | None = None
    box: Box = UNIT

    def __post_init__(self) -> None:
        check(self, "severity", self.severity in range(1, 6), "a severity from 1 to 5")
        one_of(self, "constants", ("auto", *CONSTANTS))
        super().__post_init__()

    def _limit(self) -> dict[str, float]:
        return {"severity": self.severity}

    @override
    def _limits(self) -> str:
        return f"severity {self.severity}"

    @override
    def _details(self) -> dict[str, Any]:
        return {**super()._details(), "constants": self.constants, "library": f"kornia {_kornia().__version__}"}

    @override
    def bind(self, space: Any) -> Any:
        bound = super().bind(space)
        if not bound.box.is_unit:
            raise UsageError(
                f"corruptions are of images in [0, 1] and this model's space is {space!r}; scale inside it"
            )
        _kornia()
        return bound

    def table(self, x: Tensor) -> Mapping[str, tuple[float, ...]]:
        """The constants for images of this size, by kind."""
        if self.constants != "auto":
            return CONSTANTS[self.constants]
        return CONSTANTS["imagenet-c" if min(x.shape[-2:]) >= LARGE else "cifar-10-c"]

    @override
    def identity(self, origin: Tensor) -> Tensor:
        images_only(origin, "corruption")
        if origin.shape[1] not in (1, 3):
            raise UsageError(f"corruptions are of images with 1 or 3 channels; these have {origin.shape[1]}")
        return torch.zeros(len(origin), 3, device=origin.device)

    @override
    def render(self, z: Tensor, origin: Tensor) -> Tensor:
        """The images, corrupted; rows with the kind 0 as they are."""
        kinds, severities, seeds = z.detach().round().long().cpu().unbind(1)
        done, table = origin.clone(), self.table(origin)
        for number, severity in {pair for pair in zip(kinds.tolist(), severities.tolist(), strict=True) if all(pair)}:
            rows = ((kinds == number) & (severities == severity)).nonzero().squeeze(1)
            kind = KINDS[number - 1]
            held = rows.to(origin.device)
            done[held] = corrupted(origin[held], kind, table[kind][severity - 1], seeds[rows])
        return done

    @override
    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """The severity, float [B]."""
        return x[:, 1].double() if x.device.type != "mps" else x[:, 1]

    @override
    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: whole numbers in range."""
        if x.shape != origin.shape:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        most = x.new_tensor([len(KINDS), self.severity, SEEDS - 1])
        return ((x == x.round()) & (x >= 0) & (x <= most)).all(1) & ((x[:, 0] > 0) == (x[:, 1] > 0))

    @override
    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """There is no walking among kinds: UsageError."""
        raise UsageError("corruptions are drawn and not searched for: use the attack corruption:kind=NAME")

    @override
    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """There is no walking among kinds: UsageError."""
        return self.project(origin, origin)

    @override
    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """There is no walking among kinds: UsageError."""
        return self.project(at, at)
