"""A square patch: only the pixels of one small square change (Brown et al., arXiv 1712.09665; Karmon et al., arXiv
1801.02608).
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import at_least, at_least_one, check, one_of
from advkit.core.errors import UsageError
from advkit.core.noise import mixed
from advkit.core.protocols import Access, Descends, Rng
from advkit.core.spaces import Box
from advkit.threat_models.capability import UNIT, Capability, checked_shape
from advkit.threat_models.lp import usable, wide
from advkit.threat_models.rendering import NoRadius, image_box, images_only
from advkit.threat_models.shared import NoSingleChange, Shared

Place = Literal["chosen", "fixed", "random"]
PLACES = ("chosen", "fixed", "random")
Corners = tuple[Tensor, Tensor]
"""Row and column of the upper left corner of each row's square, long [B] each."""


@dataclass(frozen=True)
class Patch(Capability, Shared, Descends):
    """Square patch: the pixels of one square change to any legal values; every other pixel keeps its bits.

    size:      side of the square in pixels, >= 1
    place:     "chosen" by the attacker, for every image; "fixed", the same in all images (`at`); "random", drawn for
               every image from a hash of its clean pixels and `seed`: neither the attacker nor the batch decides
    at:        row+column of the upper left corner for place=fixed; the lower right corner of the image where it is left
               out
    universal: the same content in every image (not with place=chosen)
    seed:      of the random places
    access:    what the attacker may query: nothing, labels, scores or gradients
    queries:   how often, per sample; None for no limit
    box:       legal inputs; `bind` puts the model's own here

    Distances are numbers of changed pixels. What lies outside is compared bit by bit, and so are the contents of a
    universal patch. Projections are exact: the square is the one whose undoing would cost most.
    Raises UsageError for fields out of range or that do not fit one another, and in `bind` for inputs that are no
    images, unbounded, or smaller than the patch.
    """

    norm: ClassVar[str | None] = None

    size: int = 5
    _: KW_ONLY
    place: Place = "chosen"
    at: tuple[int, ...] = ()
    universal: bool = False
    seed: int = 0
    access: Access = Access.GRADIENTS
    queries: int | None = None
    box: Box = UNIT

    def __post_init__(self) -> None:
        at_least_one(self, "size")
        at_least(self, 0, "seed")
        one_of(self, "place", PLACES)
        check(self, "at", len(self.at) in (0, 2) and min(self.at, default=0) >= 0, "row+column, such as 0+0")
        if self.at and self.place != "fixed":
            raise UsageError(f"at={self.at[0]}+{self.at[1]} with place={self.place}; at=... goes with place=fixed only")
        if self.universal and self.place == "chosen":
            raise UsageError("a universal patch has place=fixed or place=random: no attacker places it in every image")
        super().__post_init__()

    @property
    @override
    def one_change(self) -> bool:
        return self.universal

    def _budget(self) -> tuple[float | None, str | None]:
        return None, f"{self.size} x {self.size} pixels"

    def _details(self) -> dict[str, Any]:
        said = {"size": self.size, "place": self.place, "at": list(self.at), "universal": self.universal}
        return {**said, "seed": self.seed, "box": self.box.text()}

    def bind(self, space: Any) -> Self:
        """The same threat model in a model's box."""
        box = image_box(space, "patch")
        if not box.bounded:
            raise UsageError(f"{space!r} is unbounded and a patch changes values at will; declare bounds")
        if box.shape is not None:
            self._fits(*box.shape[-2:])
        return replace(self, box=box)

    def _fits(self, height: int, width: int) -> None:
        row, column = self.at or (0, 0)
        if row + self.size > height or column + self.size > width:
            where = f" at {row}+{column}" if self.at else ""
            raise UsageError(
                f"a patch of {self.size} x {self.size} pixels{where} in images of {height} x {width}: choose a smaller "
                "size, or another place"
            )

    # Where the square is

    def corners(self, origin: Tensor) -> Corners:
        """Where the square of each image is; not for place=chosen."""
        images_only(origin, "patch")
        height, width = origin.shape[-2:]
        self._fits(height, width)
        free = height - self.size, width - self.size
        if self.place == "random":
            key = mixed(_hashed(origin), self.seed)
            row, column = (mixed(key, axis) & ((1 << 62) - 1) for axis in (0, 1))
            return (row % (free[0] + 1)).to(origin.device), (column % (free[1] + 1)).to(origin.device)
        down, right = self.at or free
        every = torch.zeros(len(origin), dtype=torch.long, device=origin.device)
        return every + down, every + right

    def inside(self, corners: Corners, like: Tensor) -> Tensor:
        """Bool [B, 1, H, W]: the pixels of the squares."""
        row, column = (corner[:, None, None, None] for corner in corners)
        down = torch.arange(like.shape[-2], device=like.device)[:, None]
        right = torch.arange(like.shape[-1], device=like.device)[None, :]
        return (down >= row) & (down < row + self.size) & (right >= column) & (right < column + self.size)

    def _largest(self, value: Tensor) -> Corners:
        """The square with the largest sum of values [B, H, W] >= 0."""
        sums = F.avg_pool2d(value.unsqueeze(1), self.size, stride=1).squeeze(1)
        best = sums.flatten(1).argmax(1)
        return best // sums.shape[-1], best % sums.shape[-1]

    def _around(self, changed: Tensor) -> tuple[Corners, Tensor]:
        """The square around the changed pixels [B, H, W], and whether it holds them, bool [B]."""
        starts, fits = [], torch.ones(len(changed), dtype=torch.bool, device=changed.device)
        for axis in (2, 1):
            line = changed.any(axis)
            length = line.shape[1]
            first = line.int().argmax(1)
            last = length - 1 - line.flip(1).int().argmax(1)
            fits = fits & (~line.any(1) | (last - first < self.size))
            starts.append(torch.minimum(first, torch.full_like(first, length - self.size)))
        return (starts[0], starts[1]), fits

    # What a threat model owes

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """Pixels that changed, float64 [B]."""
        checked_shape(x, origin)
        return (x != origin).any(1).flatten(1).sum(1).to(wide(origin))

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: legal values, bits as they were outside one square and, where it is universal, one content."""
        if x.shape != origin.shape:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        images_only(origin, "patch")
        different = (x != origin).any(1)
        if self.place == "chosen":
            fits = self._around(different)[1]
        else:
            fits = ~(different.unsqueeze(1) & ~self.inside(self.corners(origin), origin)).flatten(1).any(1)
        legal = self.box.contains(x) & fits
        changed = different.flatten(1).any(1)
        if self.universal and bool((rows := changed & legal).any()):
            content = self.content(x[rows], self.corners(origin[rows]))
            legal = legal & (~changed | (content == content[:1]).all())
        return legal

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """Rows are handed in as they are."""
        return x

    # Walking

    def _by_itself(self) -> None:
        """UsageError where no sample may be changed by itself."""
        if self.universal:
            raise NoSingleChange("patch")

    def _walls(self, origin: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.box.bounds_like(origin)
        return torch.minimum(low, origin), torch.maximum(high, origin)

    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """The nearest admitted image in L2: legal values in the one square whose undoing would cost most."""
        self._by_itself()
        images_only(origin, "patch")
        self._fits(*origin.shape[-2:])
        legal = torch.clamp(z, *self._walls(origin))
        if self.place != "chosen":
            return torch.where(self.inside(self.corners(origin), origin), legal, origin)
        fits = self._around((legal != origin).any(1))[1]
        precise, x = z.to(wide(z)), origin.to(wide(origin))
        gain = ((precise - x).square() - (precise - legal.to(x.dtype)).square()).sum(1).clamp_min(0)
        kept = self.inside(self._largest(gain), origin)
        return torch.where(kept | fits[:, None, None, None], legal, origin)

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """Values uniform in the box, in a square that is drawn where the attacker chooses it."""
        self._by_itself()
        images_only(origin, "patch")
        low, high = self.box.bounds_like(origin)
        values = torch.clamp(low + (high - low) * rng.at("values").uniform(origin), low, high)
        if self.place == "chosen":
            self._fits(*origin.shape[-2:])
            one = torch.zeros(len(origin), dtype=torch.long, device=origin.device)
            row, column = (
                rng.at(name).integers(length - self.size + 1, one)
                for name, length in zip(("row", "column"), origin.shape[-2:], strict=True)
            )
            return torch.where(self.inside((row, column), origin), values, origin)
        return torch.where(self.inside(self.corners(origin), origin), values, origin)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """The sign of the gradient times the box's width, in the square that promises most.

        A place that hangs on the clean image is not known here: with place=random every pixel has its direction, and
        projection or `descend` leaves those of the square.
        """
        self._by_itself()
        images_only(at, "patch")
        low, high = self.box.bounds_like(at)
        way = usable(gradient).sign() * (high - low)
        if self.place == "random":
            return way
        chosen = self.corners(at) if self.place == "fixed" else self._promising(gradient, at)
        return torch.where(self.inside(chosen, at), way, 0.0)

    def _promising(self, gradient: Tensor, at: Tensor) -> Corners:
        gradient = usable(gradient)
        low, high = self.box.bounds_like(at)
        room = torch.where(gradient > 0, high - at, at - low)
        return self._largest((gradient.abs() * room).sum(1).to(wide(at)))

    @override
    def descend(self, z: Tensor, gradient: Tensor, origin: Tensor, size: float | Tensor) -> Tensor:
        """z after a step of `size` box widths against the sign of the gradient, in the square that z has changed.

        A row without one takes the square that promises most.
        """
        self._by_itself()
        low, high = self.box.bounds_like(origin)
        if self.place == "chosen":
            changed = (z != origin).any(1)
            around, _ = self._around(changed)
            first = self._promising(-gradient, origin)
            begun = changed.flatten(1).any(1)
            corners = torch.where(begun, around[0], first[0]), torch.where(begun, around[1], first[1])
        else:
            corners = self.corners(origin)
        moved = torch.clamp(z - size * usable(gradient).sign() * (high - low), *self._walls(origin))
        return torch.where(self.inside(corners, origin), moved, origin)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # No property: it would count as a radius (`Radius`), whatever it raised.
            if name == "eps":
                raise NoRadius("patch", "patch")
            raise AttributeError(f"{type(self).__name__} has no {name}")

    # One content for all

    def content(self, x: Tensor, corners: Corners) -> Tensor:
        """What stands in the squares, [B, C, size, size]."""
        index = self._index(corners, x)
        return x.flatten(2).gather(2, index).reshape(len(x), x.shape[1], self.size, self.size)

    def _index(self, corners: Corners, like: Tensor) -> Tensor:
        """Flat positions of the squares' pixels, long [B, C, size * size]."""
        step = torch.arange(self.size, device=like.device)
        rows, columns = corners[0][:, None] + step, corners[1][:, None] + step
        flat = (rows[:, :, None] * like.shape[-1] + columns[:, None, :]).flatten(1)
        return flat.unsqueeze(1).expand(-1, like.shape[1], -1)

    @override
    def blank(self, x: Tensor, generator: torch.Generator) -> Tensor:
        images_only(x, "patch")
        self._fits(*x.shape[-2:])
        low, high = self._scalars(x)
        drawn = torch.rand((x.shape[1], self.size, self.size), generator=generator).to(x)
        return low + (high - low) * drawn

    @override
    def applied(self, change: Tensor, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        corners = self.corners(x)
        if generator is not None and self.place == "random":
            row, column = (
                torch.randint(length - self.size + 1, (len(x),), generator=generator).to(x.device)
                for length in x.shape[-2:]
            )
            corners = row, column
        source = change.flatten(1).unsqueeze(0).expand(len(x), -1, -1)
        return x.flatten(2).scatter(2, self._index(corners, x), source).reshape(x.shape)

    @override
    def within(self, change: Tensor) -> Tensor:
        return change.clamp(*self._scalars(change))

    @override
    def direction(self, gradient: Tensor) -> Tensor:
        low, high = self._scalars(gradient)
        return usable(gradient).sign() * (high - low)

    def _scalars(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """The values that are legal at every place."""
        low, high = self.box.bounds_like(like)
        return low.amax(), high.amin()


def _hashed(x: Tensor) -> Tensor:
    """A 64-bit number of each row's bits, int64 [B] on the CPU: a sum of its values' bits under random odd weights."""
    bits = x.detach().to("cpu", torch.float32).contiguous().flatten(1).view(torch.int32).long()
    weights = mixed(torch.arange(bits.shape[1]), 0) | 1
    return (bits * weights).sum(1)
