"""Legal inputs: what a model accepts and what an attacker may hand in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Boxed, Sized

SLACK = 1e-6
"""Fraction of a box's width that float round-off may leave it by and still be called inside."""


def spacing(values: Tensor) -> Tensor:
    """Round-off of floats of this size: twice the type's relative precision of each value, float64 where there is one.

    A value goes into another scale and back (a pixel in 0..255 through an attack that works in 0..1), and comes back
    that far from itself.
    """
    wide = values.abs().to(torch.float32 if values.device.type == "mps" else torch.float64)
    return wide * (2 * torch.finfo(values.dtype).eps) if values.is_floating_point() else torch.zeros_like(wide)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _interval(low: float, high: float) -> str:
    return f"[{_number(low)}, {_number(high)}]"


def _not_a_tensor(x: object, expected: str) -> str | None:
    if not isinstance(x, Tensor):
        return f"got {type(x).__name__}; expected a tensor, {expected}"
    if x.ndim == 0:
        return f"got a scalar; expected a tensor with rows first, {expected}"
    return None


def _wrong_shape(x: Tensor, shape: tuple[int, ...] | None) -> str | None:
    if shape is None or tuple(x.shape[1:]) == shape:
        return None
    seen = tuple(x.shape[1:])
    if tuple(x.shape) == shape:
        hint = "the batch dimension is missing: pass x[None]"
    elif len(seen) == 3 and len(shape) == 3 and (seen[2], seen[0], seen[1]) == shape:
        hint = "channels come last: permute to [B, C, H, W]"
    elif math.prod(seen) == math.prod(shape):
        hint = "same number of values: reshape the samples"
    else:
        hint = "check the data set against the model"
    return f"samples of shape {seen}; this model wants samples of shape {shape}; {hint}"


def _finite(values: Tensor) -> Tensor:
    """The values with zero for infinity."""
    return torch.where(torch.isfinite(values), values, torch.zeros_like(values))


def _per_row(x: Tensor) -> Tensor:
    return x.flatten(1) if x.ndim > 1 else x.unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Box(Boxed, Sized):
    """Real values between two bounds, per feature where the bounds are tensors.

    low, high: a number, or a tensor broadcastable to one row; low <= high, infinite bounds are allowed and a feature
               with low == high can't be moved
    shape:     the shape of one row; None accepts any
    levels:    steps between low and high that a file holds (255 for 8-bit images); None where values are continuous

    Rows that leave the box by at most 1e-6 of its width, or by the spacing of floats as large as its bounds, are
    inside: that is float32 round-off, not a threat.
    Raises UsageError for empty or NaN bounds.
    """

    low: float | Tensor = 0.0
    high: float | Tensor = 1.0
    shape: tuple[int, ...] | None = None
    levels: int | None = None
    _bounds: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            kept: float | Tensor
            if isinstance(value, Tensor):
                # the box keeps its own copy: a caller who writes to the tensor must not move the walls
                kept = float(value) if value.ndim == 0 else value.detach().clone()
            else:
                kept = float(value)
            object.__setattr__(self, name, kept)
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(int(n) for n in self.shape))
        low, high = torch.as_tensor(self.low).double().cpu(), torch.as_tensor(self.high).double().cpu()
        try:
            fits = bool((low <= high).all())
            if self.shape is not None:
                low.expand(self.shape), high.expand(self.shape)
        except RuntimeError:
            raise UsageError(
                f"Box bounds of shapes {tuple(low.shape)} and {tuple(high.shape)} do not broadcast to one sample"
                + (f" of shape {self.shape}" if self.shape is not None else "")
            ) from None
        if not fits:
            raise UsageError(f"Box(low={self.low}, high={self.high}) is empty; expected low <= high and no NaN")
        if self.levels is not None and self.levels < 1:
            raise UsageError(f"Box(levels={self.levels}); expected a positive number such as 255, or None")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Box):
            return NotImplemented
        return self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Box({self.text()}{f', shape={self.shape}' if self.shape is not None else ''})"

    def _key(self) -> tuple[Any, ...]:
        def plain(value: float | Tensor) -> Any:
            if isinstance(value, Tensor):
                return tuple(value.shape), tuple(value.double().cpu().flatten().tolist())
            return value

        return plain(self.low), plain(self.high), self.shape, self.levels

    def text(self) -> str:
        """The bounds in words: "0, 1", or the ranges of per-feature bounds."""

        def plain(value: float | Tensor) -> str:
            if isinstance(value, Tensor):
                return f"{_interval(float(value.min()), float(value.max()))} per feature"
            return _number(value)

        return f"{plain(self.low)}, {plain(self.high)}"

    @property
    def extent(self) -> tuple[float, float]:
        """The smallest low and the largest high over the features."""
        low = float(self.low.min()) if isinstance(self.low, Tensor) else self.low
        high = float(self.high.max()) if isinstance(self.high, Tensor) else self.high
        return low, high

    @property
    def bounded(self) -> bool:
        """Whether every bound is finite."""
        return all(
            bool(torch.isfinite(value).all()) if isinstance(value, Tensor) else math.isfinite(value)
            for value in (self.low, self.high)
        )

    @property
    def is_unit(self) -> bool:
        """Whether every value lies in [0, 1]."""
        return bool((torch.as_tensor(self.low) == 0).all()) and bool((torch.as_tensor(self.high) == 1).all())

    def bounds_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """low and high as tensors of x's device and floating dtype that broadcast against x."""
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        key = (x.device, dtype)
        if key not in self._bounds:
            self._bounds[key] = (
                torch.as_tensor(self.low, dtype=dtype, device=x.device),
                torch.as_tensor(self.high, dtype=dtype, device=x.device),
            )
        return self._bounds[key]

    def clamp(self, x: Tensor) -> Tensor:
        """The nearest point of the box."""
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            low, high = self.bounds_like(x)
            return torch.clamp(x, low, high)
        return torch.clamp(x, self.low, self.high)

    def contains(self, x: Tensor) -> Tensor:
        """Bool [B]: finite, of the right shape and within the bounds, up to round-off."""
        if _not_a_tensor(x, "") is not None:
            raise BadInput(self.complaint(x) or "")
        if _wrong_shape(x, self.shape) is not None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        low, high = self.bounds_like(x)
        width = high - low
        slack = _finite(width) * SLACK
        below, above = (torch.maximum(slack, _finite(spacing(bound)).to(slack.dtype)) for bound in (low, high))
        inside = (x >= low - below) & (x <= high + above)
        if not self.bounded:
            inside = inside & torch.isfinite(x)
        return _per_row(inside).all(1)

    def complaint(self, x: Any) -> str | None:
        """None when every row is legal; else the range seen, the range expected and the likely cause."""
        problem = _not_a_tensor(x, f"values in Box({self.text()})")
        if problem is not None:
            return problem
        problem = _wrong_shape(x, self.shape)
        if problem is not None:
            return problem
        if len(x) == 0 or bool(self.contains(x).all()):
            return None
        wants = f"this model wants Box({self.text()})"
        finite = torch.isfinite(x)
        if not bool(finite.all()):
            nan = int(torch.isnan(x).sum())
            infinite = int((~finite).sum()) - nan
            seen = " and ".join(f"{n} {word}" for n, word in ((nan, "NaN"), (infinite, "infinite")) if n)
            rows = int((~_per_row(finite)).any(1).sum())
            return f"{seen} values in {rows} of {len(x)} samples; {wants}; look for a division by zero upstream"
        low, high = float(x.min()), float(x.max())
        outside = int((~self.contains(x)).sum())
        return f"values in {_interval(low, high)}; {wants}; {self._cause(x, low, high)} ({outside} of {len(x)} samples)"

    def _cause(self, x: Tensor, low: float, high: float) -> str:
        floor, ceiling = self.extent
        width = ceiling - floor
        if isinstance(self.low, Tensor) or isinstance(self.high, Tensor):
            if low >= floor and high <= ceiling:
                return "each feature has its own bounds: look for shuffled columns"
        elif math.isfinite(width):
            if floor == 0 and low >= 0 and ceiling < high <= 255 and (high > 16 or not x.is_floating_point()):
                return f"values up to {_number(high)}: looks like 8-bit images, divide by {_number(255 / width)}"
            if floor == 0 and -1.001 <= low < 0 and high <= 1.001 and ceiling == 1:
                return "looks scaled to [-1, 1]: use x / 2 + 0.5, or declare Box(-1, 1)"
            if low < floor and high - low <= 12 * width and low > floor - 6 * width and high < ceiling + 6 * width:
                return "it looks already normalised: undo it, preprocessing lives inside the model"
        return "rescale the data, or declare the box that the model was trained on"


@dataclass(frozen=True)
class Binary(Boxed, Sized):
    """Zeros and ones: spikes, events, bag-of-words.

    shape: the shape of one row; None accepts any

    Values stay floating, so that a gradient with respect to them exists; a file holds them exactly (`levels` is None).
    """

    low: ClassVar[float] = 0.0
    high: ClassVar[float] = 1.0
    levels: ClassVar[None] = None
    bounded: ClassVar[bool] = True
    extent: ClassVar[tuple[float, float]] = (0.0, 1.0)

    shape: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.shape is not None:
            shape = tuple(int(length) for length in self.shape)
            if any(length < 1 for length in shape):
                raise UsageError(f"Binary of shape {shape}; expected positive lengths")
            object.__setattr__(self, "shape", shape)

    def text(self) -> str:
        """For messages and reports."""
        return "{0, 1}"

    def bounds_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """0 and 1 as tensors of x's device and floating type."""
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return torch.zeros((), dtype=dtype, device=x.device), torch.ones((), dtype=dtype, device=x.device)

    def clamp(self, x: Tensor) -> Tensor:
        """The nearest row of zeros and ones; a half, and what is no number, becomes zero."""
        return (x > 0.5).to(x.dtype)

    def contains(self, x: Tensor) -> Tensor:
        """Bool [B]: every value is exactly 0 or 1."""
        if _not_a_tensor(x, "") is not None:
            raise BadInput(self.complaint(x) or "")
        if _wrong_shape(x, self.shape) is not None:
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return _per_row((x == 0) | (x == 1)).all(1)

    def complaint(self, x: Any) -> str | None:
        """None when every row is legal; else what was seen and the likely cause."""
        problem = _not_a_tensor(x, "zeros and ones")
        if problem is not None:
            return problem
        problem = _wrong_shape(x, self.shape)
        if problem is not None:
            return problem
        legal = self.contains(x)
        if bool(legal.all()):
            return None
        rows = f"in {int((~legal).sum())} of {len(x)} samples"
        if not bool(torch.isfinite(x).all()):
            return f"values that are not finite {rows}; this model wants 0 and 1; look for a division by zero upstream"
        low, high = float(x.min()), float(x.max())
        counts = low >= 0 and bool((x == x.round()).all())
        cause = "these look like event counts: pass (x >= 1)" if counts else "threshold them first"
        return f"values in {_interval(low, high)}, not all 0 or 1, {rows}; {cause}"


@dataclass(frozen=True)
class Tokens:
    """Token ids (or class labels) below a vocabulary's size.

    vocabulary: how many ids there are; legal ids are 0 .. vocabulary - 1
    length:     ids per row; None accepts any, also one id per row [B]
    """

    vocabulary: int
    length: int | None = None

    def __post_init__(self) -> None:
        if self.vocabulary < 1 or (self.length is not None and self.length < 1):
            raise UsageError(f"{self!r}; expected a positive vocabulary and length")

    def contains(self, x: Tensor) -> Tensor:
        """Bool [B]: integer ids in range, rows of the right length."""
        if x.is_floating_point() or x.is_complex() or self._wrong_length(x):
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return _per_row((x >= 0) & (x < self.vocabulary)).all(1)

    def _wrong_length(self, x: Tensor) -> bool:
        return self.length is not None and tuple(x.shape[1:]) != (self.length,)

    def complaint(self, x: Any) -> str | None:
        """None when every row is legal; else what was seen."""
        problem = _not_a_tensor(x, f"ids in [0, {self.vocabulary - 1}]")
        if problem is not None:
            return problem
        if x.is_floating_point() or x.is_complex():
            return f"values of type {x.dtype}; expected integer ids in [0, {self.vocabulary - 1}]"
        if self._wrong_length(x):
            return f"samples of shape {tuple(x.shape[1:])}; expected {self.length} ids a sample: pad or cut them"
        if bool(self.contains(x).all()):
            return None
        return (
            f"ids from {int(x.min())} to {int(x.max())}; expected [0, {self.vocabulary - 1}]: "
            "the data and the model use different vocabularies"
        )


NOTHING, USER, SLOT, REPLY, REREAD = 0, 1, 2, 3, 4
"""Roles of a transcript's positions: room, the user's own words, the attacker's tokens, the wanted reply, and words and
attacker's tokens as they read once the whole chat was written down as text and read anew."""


@dataclass(frozen=True, eq=False)
class Transcripts:
    """Chats as tensors, long [B, 2, W]: token ids, and below them the role of each position.

    tokenizer: says which ids there are, `vocabulary`, and who it is, `digest`
    width:     W; None accepts any

    Roles are 0 (nothing: room for an attacker, its id is -1), 1 (the user's words), 2 (an attacker's tokens), 3 (the
    reply that is wanted) and 4 (words and attacker's tokens read anew from text). Tokens are read from left to right,
    the reply comes last, and every row has one.
    """

    levels: ClassVar[None] = None

    tokenizer: Any
    width: int | None = None

    def __post_init__(self) -> None:
        if self.width is not None and self.width < 1:
            raise UsageError(f"transcripts of width {self.width}; expected at least 1, or none for any")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Transcripts) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Transcripts(vocabulary={self.vocabulary}, width={self.width}, tokenizer {self.tokenizer.digest[:12]})"

    def _key(self) -> tuple[str, int | None]:
        return str(self.tokenizer.digest), self.width

    @property
    def vocabulary(self) -> int:
        """Number of ids; legal ones are 0 .. vocabulary - 1."""
        return int(self.tokenizer.vocabulary)

    def text(self) -> str:
        """For messages and reports."""
        return f"transcripts of {self.vocabulary} token ids"

    def _shaped(self, x: Tensor) -> bool:
        integers = not (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool)
        return integers and x.ndim == 3 and x.shape[1] == 2 and self.width in (None, x.shape[2])

    def contains(self, x: Tensor) -> Tensor:
        """Bool [B]: known roles and ids, a reply at the end."""
        if _not_a_tensor(x, "") is not None:
            raise BadInput(self.complaint(x) or "")
        if not self._shaped(x):
            return torch.zeros(len(x), dtype=torch.bool, device=x.device)
        ids, roles = x[:, 0], x[:, 1]
        known = (roles >= NOTHING) & (roles <= REREAD)
        held = torch.where(roles == NOTHING, ids == -1, (ids >= 0) & (ids < self.vocabulary))
        reply = roles == REPLY
        # Nothing but room may stand after the first token of the reply.
        behind = (reply.cumsum(1) > 0) & ~reply & (roles != NOTHING)
        return (known & held & ~behind).all(1) & reply.any(1)

    def complaint(self, x: Any) -> str | None:
        """None when every row is legal; else what was seen and the likely cause."""
        wanted = f"transcripts, long [B, 2, {'W' if self.width is None else self.width}]"
        problem = _not_a_tensor(x, wanted)
        if problem is not None:
            return problem
        if not self._shaped(x):
            return (
                f"samples of shape {tuple(x.shape[1:])}, type {x.dtype}; this model wants {wanted}: it is a language "
                "model, give it a task such as prompts"
            )
        legal = self.contains(x)
        if bool(legal.all()):
            return None
        seen = f"{int((~legal).sum())} of {len(x)} samples are no transcripts"
        ids = x[:, 0][x[:, 1] != NOTHING]
        if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= self.vocabulary):
            return (
                f"{seen}: ids from {int(ids.min())} to {int(ids.max())}; expected [0, {self.vocabulary - 1}]: the task "
                "is bound to another model's tokenizer"
            )
        return f"{seen}; expected roles 0 to 4, ids of -1 where there is nothing, and a reply after all the rest"


@dataclass(frozen=True)
class Rows:
    """A whole data set shaped at once (poisoning): exactly n rows, each legal in `item`.

    n:    how many rows
    item: the space of one row
    """

    n: int
    item: Any

    def contains(self, x: Any) -> Tensor:
        """Bool [n]: which rows are legal; all False when the number of rows is not n."""
        legal: Tensor = self.item.contains(x)
        return legal if len(legal) == self.n else torch.zeros_like(legal)

    def complaint(self, x: Any) -> str | None:
        """None when all is legal; else what was seen."""
        problem: str | None = self.item.complaint(x)
        if problem is not None:
            return problem
        seen = len(self.item.contains(x))
        return None if seen == self.n else f"{seen} samples; expected exactly {self.n}"


@dataclass(frozen=True, eq=False)
class Product:
    """Several parts side by side, such as an image and a text: a mapping of names to spaces.

    parts: name -> space; an input is a mapping with the same names
    """

    parts: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not self.parts:
            raise UsageError("Product({}) has no parts; expected at least one name -> space")
        object.__setattr__(self, "parts", dict(self.parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Product) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash(tuple(sorted((name, hash(space)) for name, space in self.parts.items())))

    def contains(self, x: Mapping[str, Any]) -> Tensor:
        """Bool [B]: legal in every part."""
        if set(x) != set(self.parts):
            raise BadInput(self.complaint(x) or "")
        legal = [space.contains(x[name]) for name, space in self.parts.items()]
        if len({len(part) for part in legal}) > 1:
            raise BadInput(self.complaint(x) or "")
        return torch.stack(legal).all(0)

    def complaint(self, x: Any) -> str | None:
        """None when every row is legal; else the first part that is not, by name."""
        wanted = ", ".join(sorted(self.parts))
        if not isinstance(x, Mapping):
            return f"got {type(x).__name__}; expected a mapping with the parts {wanted}"
        if set(x) != set(self.parts):
            return f"parts {', '.join(sorted(map(str, x))) or 'none'}; expected {wanted}"
        counts = {}
        for name, space in self.parts.items():
            problem = space.complaint(x[name])
            if problem is not None:
                return f"{name}: {problem}"
            counts[name] = len(space.contains(x[name]))
        if len(set(counts.values())) > 1:
            return f"parts of {counts} samples; expected the same number of samples in each"
        return None
