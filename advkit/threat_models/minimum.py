"""Minimum-norm threat models: any legal input is admitted, and the distance to the origin is what counts."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, LeastChange, Measures, Rng
from advkit.core.spaces import Box
from advkit.threat_models.capability import UNIT, InBox
from advkit.threat_models.lp import beyond_spacing, lattice_index, lattice_value, row_max, row_sum, wide
from advkit.threat_models.sparse import changed_positions, everywhere, positions

_EXAMPLE = {"l0": "l0:eps=10", "l1": "l1:eps=12", "l2": "l2:eps=0.5", "linf": "linf:eps=8/255"}


class _NoRadius(UsageError, AttributeError):
    """An attack wants to know how far it may go, and it may go anywhere."""

    def __init__(self, least: str) -> None:
        super().__init__(
            f"minimum-{least} has no radius to take steps of; use a minimum-norm attack (`advkit list attacks minimum` "
            f"shows them), or give this attack a budget: {_EXAMPLE[least]}"
        )


@dataclass(frozen=True)
class Minimum(InBox, Measures, LeastChange):
    """What the minimum-norm threat models share: any legal input is admitted, and the distance counts.

    lattice: steps across the box that a file can hold; 255 makes `finish` round to k/255, 0 leaves values as they are
    access:  what the attacker may query: nothing, labels, scores or gradients
    queries: how often, per sample; None for no limit
    box:     legal inputs; `bind` puts the model's own here

    An attack without a budget should return the nearest point that reaches its goal, and the clean sample where it
    found none. Attacks within a given radius (`eps`, `steepest`, `sample`) have none here: UsageError.
    """

    norm: ClassVar[str]
    least: ClassVar[str]
    unit: ClassVar[str]

    _: KW_ONLY
    lattice: int = 0
    access: Access = Access.GRADIENTS
    queries: int | None = None
    box: Box = UNIT

    def _name(self) -> str:
        return f"minimum-{self.least}"

    def _budget(self) -> tuple[float | None, str | None]:
        return None, None

    def bind(self, space: Any) -> Self:
        """The same threat model in a model's box."""
        return replace(self, box=self._suited(space, f"minimum-{self.least} measures distances in"))

    @abstractmethod
    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """The norm of x - origin, float [B]."""

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        """What a report says of a success beside its distance: the energies L1, L2 and Linf, float [B] each."""
        move = self._move(x, origin)
        size = move.abs()
        return {"l1": row_sum(size), "l2": row_sum(move.square()).sqrt(), "linf": row_max(size)}

    @staticmethod
    def _move(x: Tensor, origin: Tensor) -> Tensor:
        return x.to(wide(x)) - origin.to(wide(origin))

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: finite and in the box."""
        if x.shape != origin.shape:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        return self.box.contains(x)

    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """The nearest point of the box."""
        return torch.clamp(z, *self._walls(origin))

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """Rows as files hold them: the nearest multiples of the box's width / lattice; values left alone stay."""
        if not self.lattice:
            return x
        low, high = (bound.to(wide(x)) for bound in self.box.bounds_like(x))
        step = (high - low) / self.lattice
        rounded = lattice_value(lattice_index(x.to(low.dtype), low, step).round(), low, step, self.lattice).to(x.dtype)
        return torch.where(x == origin, origin, self.project(rounded, origin))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # No property: it would count as a radius (`Radius`), whatever it raised.
            raise _NoRadius(self.least) if name == "eps" else AttributeError(f"{type(self).__name__} has no {name}")

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """No radius, no ball to draw from: UsageError."""
        raise _NoRadius(self.least)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """No radius, no eps-long step: UsageError."""
        raise _NoRadius(self.least)


@dataclass(frozen=True)
class MinimumL2(Minimum):
    """Minimum-norm attack in L2: any legal input is admitted, and the distance to the clean sample counts; there is
    no eps. Settings as in `Minimum`.
    """

    norm: ClassVar[str] = "L2"
    least: ClassVar[str] = "l2"
    unit: ClassVar[str] = "L2"

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """L2 distance, float [B]."""
        return row_sum(self._move(x, origin).square()).sqrt()


@dataclass(frozen=True)
class MinimumLinf(Minimum):
    """Minimum-norm attack in Linf: any legal input is admitted, and the largest change of a value counts; there is
    no eps. Settings as in `Minimum`.
    """

    norm: ClassVar[str] = "Linf"
    least: ClassVar[str] = "linf"
    unit: ClassVar[str] = "Linf"

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """Linf distance, float [B]."""
        return row_max(self._move(x, origin).abs())


@dataclass(frozen=True)
class MinimumL1(Minimum):
    """Minimum-norm attack in L1: any legal input is admitted, and the sum of the changes counts; there is no eps.
    Settings as in `Minimum`.
    """

    norm: ClassVar[str] = "L1"
    least: ClassVar[str] = "l1"
    unit: ClassVar[str] = "L1"

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """L1 distance, float [B]."""
        return row_sum(self._move(x, origin).abs())


@dataclass(frozen=True)
class MinimumL0(Minimum):
    """Minimum-norm attack in L0: any legal input is admitted, and the number of changed positions counts; there is
    no eps. Other settings as in `Minimum`.

    per: "pixel" counts a spatial position of an image [B, ..., C, H, W] once, whatever happens to its channels;
         "feature" counts every value. Samples of fewer than three dimensions have no channels: the two agree.
    """

    norm: ClassVar[str] = "L0"
    least: ClassVar[str] = "l0"
    unit: ClassVar[str] = "positions"

    _: KW_ONLY
    per: Literal["pixel", "feature"] = "pixel"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "per", ("pixel", "feature"))

    def _details(self) -> dict[str, Any]:
        return {**super()._details(), "per": self.per}

    def positions(self, values: Tensor) -> Tensor:
        """Values [B, ...] summed over what counts as one position, [B, positions]."""
        return positions(values, self.per)

    def everywhere(self, chosen: Tensor, like: Tensor) -> Tensor:
        """A mask over positions [B, positions] as one that broadcasts against rows `like` [B, ...]."""
        return everywhere(chosen, like, self.per)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """Positions that changed by more than the round-off of their values, float [B]."""
        return changed_positions(beyond_spacing(x, origin), self.per)

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        """As in `Minimum`, with the number of changed positions."""
        return {"l0": self.distance(x, origin), **super().measures(x, origin)}
