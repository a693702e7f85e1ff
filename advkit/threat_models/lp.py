"""Lp balls around each row, cut by the box of legal inputs: exact projections for Linf, L2 and L1.

The L2 and L1 projections solve the optimality conditions of ball and box together instead of alternating between the
two, as Croce and Hein do for L1 (arXiv 2103.01208).
"""

from __future__ import annotations

import math
import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import check, fraction
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Descends, Rng
from advkit.core.rows import elementwise
from advkit.core.spaces import SLACK, Box, spacing
from advkit.threat_models.capability import UNIT as UNIT
from advkit.threat_models.capability import InBox, checked_shape

_INSIDE = 1 + 1e-9
"""A projected point's norm may exceed eps by the round-off of a float64 sum and is still left alone the next time."""

_CACHED = 1 << 16
"""Values that a CPU core shapes at a time: a round of the solvers below takes a dozen passes over float64 copies."""


def _time_to_look(round_: int, x: Tensor) -> bool:
    """Whether to ask if all rows have arrived: always on a CPU, every fourth round where asking means waiting."""
    return x.device.type == "cpu" or round_ % 4 == 3


def wide(x: Tensor) -> torch.dtype:
    """The type that norms are summed in: float64, float32 where the device has no other."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def row_sum(values: Tensor) -> Tensor:
    """Sum over everything but the rows [B].

    A single long row would be summed in pieces by several threads and so get other last bits than it gets in a batch;
    it goes in twice.
    """
    flat = values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)
    if len(flat) == 1 and flat.shape[1] >= 1 << 14:
        return torch.cat((flat, flat)).sum(1)[:1]
    return flat.sum(1)


def row_max(values: Tensor) -> Tensor:
    """Maximum over everything but the rows [B]."""
    return values.flatten(1).amax(1) if values.ndim > 1 else values


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """A value per row [B] shaped to broadcast against `like` [B, ...]."""
    return values.reshape(-1, *(1 for _ in like.shape[1:]))


def usable(gradient: Tensor) -> Tensor:
    """The gradient with zeros for what is not finite."""
    return torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)


def beyond_spacing(x: Tensor, origin: Tensor) -> Tensor:
    """x - origin, every value shortened by what floats of its size are apart; zero where it changed by no more."""
    move = x.to(wide(x)) - origin.to(wide(origin))
    slack = torch.maximum(spacing(x.to(origin.dtype)), spacing(origin))
    return torch.where(move.abs() <= slack, torch.zeros_like(move), move - move.sign() * slack)


def eps_text(eps: float) -> str:
    """The radius as people write it: the shortest decimal, or k/255 where that is exact and the decimal is long."""
    text = f"{eps:g}" if float(f"{eps:g}") == eps else repr(eps)
    numerator = round(eps * 255)
    return f"{numerator}/255" if len(text) > 6 and 0 < eps < 1 and numerator / 255 == eps else text


Walls = tuple[Tensor, Tensor]


class _Last:
    """The walls around the rows asked for last; forgotten when the rows change or go, and left behind by copies."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: tuple[weakref.ref[Tensor], int, Walls] | None = None

    def __reduce__(self) -> tuple[type[_Last], tuple[()]]:
        return _Last, ()

    def of(self, origin: Tensor, made: Callable[[Tensor], Walls]) -> Walls:
        """Those around `origin`, made where they are not at hand."""
        if origin.is_inference():  # it has no version that would tell of changes
            return made(origin)
        kept, version = self._kept, origin._version
        if kept is not None and kept[0]() is origin and kept[1] == version:
            return kept[2]
        walls = made(origin)
        self._kept = (weakref.ref(origin, self._forget), version, walls)
        return walls

    def _forget(self, gone: weakref.ref[Tensor]) -> None:
        kept = self._kept
        if kept is not None and kept[0] is gone:
            self._kept = None


@dataclass(frozen=True)
class NormBall(InBox, Descends):
    """Everything within eps of the origin, in some norm, inside the box of legal inputs.

    eps:     radius, >= 0, in units of the norm and of the model's space
    lattice: steps across the box that a file can hold; 255 makes `finish` round to k/255, 0 leaves values as they are
    access:  what the attacker may query: nothing, labels, scores or gradients
    queries: how often, per sample; None for no limit
    box:     legal inputs; `bind` puts the model's own here

    Raises UsageError for an eps that is negative, not finite, or (in `bind`) larger than the box.
    """

    norm: ClassVar[str]

    eps: float
    _: KW_ONLY
    lattice: int = 0
    access: Access = Access.GRADIENTS
    queries: int | None = None
    box: Box = UNIT

    def __post_init__(self) -> None:
        check(self, "eps", math.isfinite(self.eps) and self.eps >= 0, "a finite radius >= 0 such as 8/255")
        super().__post_init__()

    def _budget(self) -> tuple[float | None, str | None]:
        return self.eps, eps_text(self.eps)

    def bind(self, space: Any) -> Self:
        """The same ball in a model's box."""
        space = self._suited(space, f"{type(self).__name__} balls are defined in")
        largest = self._largest(space)
        if largest is not None and self.eps > largest * (1 + 1e-6):
            hint = f"; did you mean {self.eps:g}/255?" if self._looks_like_levels(largest) else ""
            raise UsageError(
                f"eps={self.eps:g} is larger than the box: no two points of {space!r} are further apart than "
                f"{largest:g} in {self.norm}{hint}"
            )
        return replace(self, box=space)

    def _looks_like_levels(self, largest: float) -> bool:
        return False

    @abstractmethod
    def _largest(self, space: Box) -> float | None:
        """The largest distance within the box; None where the box does not say."""

    @abstractmethod
    def _length(self, move: Tensor) -> Tensor:
        """The norm of a perturbation, per row [B]."""

    @abstractmethod
    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """The nearest point of ball and box, exactly; z itself, bit for bit, where it is one."""

    @abstractmethod
    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """A random admitted start."""

    @abstractmethod
    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """The eps-long direction of steepest ascent that the box leaves open at `at`; zero where the gradient is.

        To walk down a loss, add `steepest(-gradient, at)`: what is open depends on the way one goes.
        """

    @override
    def descend(self, z: Tensor, gradient: Tensor, origin: Tensor, size: float | Tensor) -> Tensor:
        """z after a step against the gradient, `size` eps long, back in the ball; `size` broadcasts against z."""
        return self.project(z + size * self.steepest(-gradient, z), origin)

    @abstractmethod
    def _on_lattice(self, z: Tensor, origin: Tensor) -> Tensor:
        """The lattice point in ball and box next to an admitted z."""

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """The norm of x - origin, per row [B], in float64."""
        checked_shape(x, origin)
        return self._length(x.to(wide(x)) - origin.to(wide(origin)))

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: finite, in the box and no further than eps * (1 + 1e-5) + 1e-7, each up to round-off.

        Of every value's change as much as floats of its size are apart is round-off (`spacing`), in every norm: in a
        box of 0 to 255 the nearest float to origin + eps may lie 1e-5 outside the ball.
        """
        if x.shape != origin.shape:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        near = self.distance(x, origin) <= self._tolerated
        if not bool(near.all()):
            near |= self._length(beyond_spacing(x, origin)) <= self._tolerated
        return self.box.contains(x) & near

    @property
    def _tolerated(self) -> float:
        return self.eps * (1 + 1e-5) + 1e-7

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """Rows as files hold them: multiples of the box's width / lattice next to x, inside ball and box.

        A value for which the ball holds no multiple (the origin is not on the lattice itself) stays the origin's.
        """
        if not self.lattice:
            return x
        return self._on_lattice(self.project(x, origin), origin)

    def _lattice_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Low end and step of the lattice, in float64 where the device has it."""
        low, high = (bound.to(wide(x)) for bound in self.box.bounds_like(x))
        return low, (high - low) / self.lattice

    def _settle(self, value: Tensor, origin: Tensor) -> Tensor:
        """Lattice values in the origin's type; those that are the origin's up to round-off get its bits."""
        low, high = self.box.bounds_like(origin)
        settled = value.to(origin.dtype)
        return torch.where((settled - origin).abs() <= SLACK * (high - low), origin, settled)


def lattice_value(index: Tensor, low: Tensor, step: Tensor, lattice: int) -> Tensor:
    """low + index * step, written so that a unit box gives the nearest float to index / lattice."""
    return low + index * (step * lattice) / lattice


def lattice_index(value: Tensor, low: Tensor, step: Tensor) -> Tensor:
    """The real-valued index of a value; 0 for features that can't move."""
    return torch.where(step > 0, (value - low) / torch.where(step > 0, step, torch.ones_like(step)), 0.0)


def displaced(origin: Tensor, move: Tensor) -> Tensor:
    """origin + move in the origin's type, rounded towards the origin, so that no norm of the difference grows.

    Rounding to nearest would let 150,000 coordinates that all round up leave a small L1 ball.
    """
    moved = (origin.to(move.dtype) + move).to(origin.dtype)
    if origin.dtype not in (torch.float32, torch.float64) or origin.device.type == "mps":
        return moved
    beyond = (moved.to(move.dtype) - origin.to(move.dtype)).abs() > move.abs()
    return torch.where(beyond, torch.nextafter(moved, origin), moved)


@dataclass(frozen=True)
class Linf(NormBall):
    """Linf ball: every feature changes by at most eps."""

    norm: ClassVar[str] = "Linf"

    def _largest(self, space: Box) -> float | None:
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (space.low, space.high))
        return float((high - low).max())

    def _looks_like_levels(self, largest: float) -> bool:
        return largest == 1 and self.eps <= 255

    def _length(self, move: Tensor) -> Tensor:
        return row_max(move.abs())

    @cached_property
    def _last(self) -> _Last:
        return _Last()

    def _limits(self, origin: Tensor) -> Walls:
        """The box's walls, clamped to the ball: what a clamp to the box and then to the ball makes of infinity."""
        below, above = origin - self.eps, origin + self.eps
        low, high = (torch.minimum(torch.maximum(wall, below), above) for wall in self.box.bounds_like(origin))
        return low, high

    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """Clamp to the box, then to the ball. Rounding is monotone, so what is inside either is left bit for bit."""
        return torch.clamp(z, *self._last.of(origin, self._limits))

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """Uniform in the ball, then clamped to the box."""
        return self.project(origin + (2 * rng.uniform(origin) - 1) * self.eps, origin)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """eps times the sign: a coordinate without room costs the others nothing here."""
        return usable(gradient).sign() * self.eps

    @override
    def descend(self, z: Tensor, gradient: Tensor, origin: Tensor, size: float | Tensor) -> Tensor:
        """z after a step of `size` eps against the sign of the gradient, back in the ball."""
        signs = gradient.sign()
        if isinstance(size, Tensor):
            return self.project(torch.addcmul(z, signs, size, value=-self.eps), origin)
        return self.project(torch.add(z, signs, alpha=-size * self.eps), origin)

    def _on_lattice(self, z: Tensor, origin: Tensor) -> Tensor:
        low, step = self._lattice_of(origin)
        x = origin.to(low.dtype)
        # Half the tolerance of `admits`: (k + 8) / 255 - k / 255 may be 8 / 255 and a bit in floats.
        reach = self.eps * (1 + 5e-6) + 5e-8 + spacing(origin) / 2
        first = lattice_index(x - reach, low, step).ceil().clamp_min(0)
        last = lattice_index(x + reach, low, step).floor().clamp_max(self.lattice)
        index = lattice_index(z.to(low.dtype), low, step).round()
        index = torch.minimum(torch.maximum(index, first), last)
        settled = self._settle(lattice_value(index, low, step, self.lattice), origin)
        return torch.where(first > last, origin, settled)


class _SumBall(NormBall):
    """What the L2 and L1 balls share: a norm that is a sum over features, and the projection's frame."""

    power: ClassVar[int]

    def _largest(self, space: Box) -> float | None:
        low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (space.low, space.high))
        width = high - low
        if space.shape is not None:
            width = width.expand(space.shape)
        elif width.ndim == 0:
            return None
        return float((width**self.power).sum() ** (1 / self.power))

    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """The nearest point of ball and box together."""
        if origin.device.type != "cpu" or origin.numel() <= 2 * _CACHED:
            return self._project(z, origin)
        rows = max(1, _CACHED * len(origin) // origin.numel())
        parts = (slice(start, start + rows) for start in range(0, len(origin), rows))
        return torch.cat([self._project(z[part], origin[part]) for part in parts])

    def _project(self, z: Tensor, origin: Tensor) -> Tensor:
        lower, upper = self._walls(origin)
        inside = torch.clamp(z, lower, upper)
        x = origin.to(wide(origin))
        outside = self._length(inside.to(x.dtype) - x) > self.eps * _INSIDE
        if not bool(outside.any()):
            return inside
        move = z.to(x.dtype) - x
        room = torch.where(move > 0, upper.to(x.dtype) - x, x - lower.to(x.dtype))
        nearest = displaced(origin, self._shrink(move.flatten(1), room.flatten(1), outside).reshape(move.shape))
        return torch.where(per_row(outside, z), torch.clamp(nearest, lower, upper), inside)

    @abstractmethod
    def _shrink(self, move: Tensor, room: Tensor, outside: Tensor) -> Tensor:
        """The point nearest to `move` [B, D] of norm eps with |v| <= room, for the rows that lie outside."""

    def _on_lattice(self, z: Tensor, origin: Tensor) -> Tensor:
        """Round to nearest; then, where that left the ball, step the cheapest coordinates back towards the origin.

        Cheapest is the smallest growth of the squared distance to z per norm gained. For L1 around an origin on the
        lattice that is the nearest lattice point of the ball; for L2 it is the usual greedy answer to a knapsack.
        """
        low, step = self._lattice_of(origin)
        x, wanted = origin.to(low.dtype), z.to(low.dtype)
        near = lattice_value(lattice_index(wanted, low, step).round(), low, step, self.lattice)
        near = torch.where((near - x).abs() <= SLACK * step * self.lattice, x, near)
        back = near - torch.sign(near - x) * step
        back = torch.where((back - x) * (near - x) > 0, back, x)
        back = torch.where((back - x).abs() <= SLACK * step * self.lattice, x, back)
        away = (near - x).abs() > (wanted - x).abs()
        gain = torch.where(away, (near - x).abs() ** self.power - (back - x).abs() ** self.power, 0.0).flatten(1)
        cost = ((back - wanted).square() - (near - wanted).square()).flatten(1)
        excess = row_sum((near - x).abs() ** self.power) - (self.eps * (1 + 5e-6) + 5e-8) ** self.power
        price = torch.where(gain > 0, cost / gain.clamp_min(torch.finfo(gain.dtype).tiny), torch.inf)
        order = price.argsort(dim=1, stable=True)
        sorted_gain = gain.gather(1, order)
        before = sorted_gain.cumsum(1) - sorted_gain
        give = torch.zeros_like(away.flatten(1)).scatter(1, order, (before < excess.unsqueeze(1)) & (sorted_gain > 0))
        return self._settle(torch.where(give.reshape(near.shape), back, near), origin)


@dataclass(frozen=True)
class L2(_SumBall):
    """L2 ball: the Euclidean norm of the change stays within eps."""

    norm: ClassVar[str] = "L2"
    power: ClassVar[int] = 2

    def _length(self, move: Tensor) -> Tensor:
        return row_sum(move.square()).sqrt()

    def _shrink(self, move: Tensor, room: Tensor, outside: Tensor) -> Tensor:
        """v = sign(d) min(s |d|, c), with s such that its length is eps.

        As a function of t = s**2 the squared length, sum min(t d**2, c**2), is concave and piecewise linear. So
        Newton's method started at the unconstrained solution climbs to the root without overshooting and ends on it
        exactly, after no more rounds than there are breakpoints (a handful, in practice). A row that has arrived stays
        where it is.
        """
        square, limit = move.square(), room.square()
        total = self.eps**2
        t = total / row_sum(square).clamp_min(torch.finfo(move.dtype).tiny)
        for round_ in range(move.shape[1] + 1):
            capped = t.unsqueeze(1) * square >= limit
            free = row_sum(torch.where(capped, 0.0, square))
            spent = row_sum(torch.where(capped, limit, 0.0))
            further = torch.where(outside & (free > 0), (total - spent) / free, t)
            climbs = further > t
            t = torch.maximum(t, further)
            if _time_to_look(round_, t) and not bool(climbs.any()):
                break
        return torch.minimum(t.sqrt().unsqueeze(1) * move.abs(), room) * move.sign()

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """Uniform in the ball, then projected onto ball and box."""
        direction = rng.at("direction").normal(origin).to(wide(origin))
        radius = _radius(origin, rng)
        length = self._length(direction).clamp_min(torch.finfo(direction.dtype).tiny)
        return self.project((origin + direction * per_row(self.eps * radius / length, origin)).to(origin.dtype), origin)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """eps times the unit gradient."""
        gradient = usable(gradient)
        precise = gradient.to(wide(gradient))
        scale = row_max(precise.abs())  # squares of gradients around 1e-170 would vanish even in float64
        precise = precise / per_row(torch.where(scale > 0, scale, 1.0), gradient)
        length = self._length(precise)
        return (precise * per_row(self.eps / torch.where(length > 0, length, 1.0), gradient)).to(gradient.dtype)


@dataclass(frozen=True)
class L1(_SumBall):
    """L1 ball: the sum of all absolute changes stays within eps.

    sparsity: fraction of the features, at least one, that share a step of `steepest`. The steepest direction of an L1
              ball moves a single feature, which the box stops at once, so an attack of 40 steps would touch 40
              features. Sharing the step among the largest entries is the remedy of SLIDE (arXiv 1904.13000, whose
              percentile 99 is 0.01 here); 0 gives the true steepest direction.
    """

    norm: ClassVar[str] = "L1"
    power: ClassVar[int] = 1
    _: KW_ONLY
    sparsity: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction(self, "sparsity", ends="[]", what="fraction of the features")

    def _details(self) -> dict[str, Any]:
        return {**super()._details(), "sparsity": self.sparsity}

    def _length(self, move: Tensor) -> Tensor:
        return row_sum(move.abs())

    def _shrink(self, move: Tensor, room: Tensor, outside: Tensor) -> Tensor:
        """v = sign(d) clip(|d| - t, 0, c), with t such that its sum is eps.

        The sum is decreasing and piecewise linear in t, neither convex nor concave: Newton's method inside a bracket,
        and a bisection where it would leave the bracket or did not halve the error. A row that has arrived stays where
        it is.
        """
        size = move.abs()
        nothing = torch.zeros_like(size[0, 0])
        low, high = torch.zeros_like(size[:, 0]), size.amax(1)
        t, arrived, last = low, ~outside, torch.full_like(low, torch.inf)
        for round_ in range(200):
            rest = size - t.unsqueeze(1)
            error = row_sum(torch.clamp(rest, nothing, room)) - self.eps
            low, high = torch.where(error > 0, t, low), torch.where(error > 0, high, t)
            newton = t + error / row_sum((rest > 0) & (rest < room))
            good = (newton > low) & (newton <= high) & (error.abs() <= last / 2)
            further = torch.where(good, newton, (low + high) / 2)
            arrived = arrived | (error.abs() <= 1e-13 * self.eps) | (further == t)
            t, last = torch.where(arrived, t, further), error.abs()
            if _time_to_look(round_, t) and bool(arrived.all()):
                break
        return torch.minimum((size - t.unsqueeze(1)).clamp_min(0), room) * move.sign()

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """Uniform in the ball (normalised Laplace noise), then projected onto ball and box."""
        uniform = 2 * rng.at("direction").uniform(origin.to(wide(origin))) - 1
        noise = uniform.sign() * -torch.log1p(-uniform.abs().clamp_max(1 - torch.finfo(uniform.dtype).eps))
        length = self._length(noise).clamp_min(torch.finfo(noise.dtype).tiny)
        radius = _radius(origin, rng)
        return self.project((origin + noise * per_row(self.eps * radius / length, origin)).to(origin.dtype), origin)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """eps shared equally among the largest gradient entries whose feature can still move that way."""
        gradient = usable(gradient)
        low, high = self.box.bounds_like(at)
        open_ = torch.where(gradient > 0, at < high, at > low)
        size = torch.where(open_, gradient.abs(), 0.0).flatten(1)
        sharing = min(size.shape[1], max(1, math.ceil(self.sparsity * size.shape[1])))
        largest, where = size.topk(sharing, dim=1)
        moving = (largest > 0).to(size.dtype)
        share = self.eps * moving / moving.sum(1, keepdim=True).clamp_min(1)
        return torch.zeros_like(size).scatter(1, where, share).reshape(gradient.shape) * gradient.sign()


def _radius(origin: Tensor, rng: Rng) -> Tensor:
    """u ** (1 / D) per row: the distance from the centre of a uniform point of a unit ball in D dimensions."""
    features = max(1, math.prod(origin.shape[1:]))
    uniform = rng.at("radius").uniform(torch.empty(len(origin), dtype=wide(origin), device=origin.device))
    return elementwise(lambda share: share ** (1 / features), uniform)
