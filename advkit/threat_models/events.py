"""Bits flipped in binary event frames: as few as the attacker can, or no more than a budget (arXiv 2503.03272)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import check, one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Counted, InSpace, LeastChange, Levels, Measures, Rng
from advkit.core.spaces import Binary
from advkit.threat_models.capability import Capability, checked_shape
from advkit.threat_models.lp import per_row, row_sum

BITS = Binary()
LEVELS: dict[str, tuple[float, ...]] = {"l0": (200, 800), "l0_percent": (0.05, 0.1, 0.25, 0.5, 1)}
"""Budgets at which every report gives the share of rows that fell, one run for all of them."""


class NoSteps(UsageError, AttributeError):
    """An attack wants to take steps of a length, and bits have none."""

    def __init__(self) -> None:
        super().__init__(
            "in flips a bit is flipped or it is not: there is no step of a fraction of eps. Use an attack on bits "
            "(sda, topk_grad, random_flips; without n they look for the minimum), or, on a model of real-valued "
            "inputs, a ball such as linf:eps=8/255"
        )


@dataclass(frozen=True)
class Flips(Capability, Measures, LeastChange, Levels, Counted, InSpace):
    """Bit flips, L0 on binary data: at most n bits of a sample change; without n, as few as the attack finds.

    n:       most flips, >= 0; None admits any number, and what an attack is judged by is how many it needed
    allow:   "flip" both ways, "add" only turns 0 into 1 (a sensor with spurious events), "delete" only 1 into 0
    access:  what the attacker may query: nothing, labels, scores or gradients
    queries: how often, per sample; None for no limit
    space:   legal samples; `bind` puts the model's own here

    Every record carries the number of flips (`l0`) and their percentage of all bits (`l0_percent`); a report gives
    the fraction of the attacked samples broken within 200 and 800 flips, and within 0.05 to 1 per cent of the bits.
    Without n its headline is the median number of flips over all samples, 0 for those that are wrong when clean.
    Attacks that take steps of a length (`eps`, `steepest`) find none here: UsageError.
    Raises UsageError for a negative n, in `bind` for a space that is not binary, BadInput for rows of another shape.
    """

    norm: ClassVar[str] = "L0"
    unit: ClassVar[str] = "flips"

    n: int | None = None
    _: KW_ONLY
    allow: Literal["flip", "add", "delete"] = "flip"
    access: Access = Access.GRADIENTS
    queries: int | None = None
    space: Binary = BITS

    def __post_init__(self) -> None:
        whole = self.n is None or (self.n >= 0 and int(self.n) == self.n)
        check(self, "n", whole, "a whole number of flips >= 0, or none for as few as possible")
        one_of(self, "allow", ("flip", "add", "delete"))
        super().__post_init__()

    def _budget(self) -> tuple[float | None, str | None]:
        return self.n, None if self.n is None else f"{self.n} flips"

    def _details(self) -> dict[str, Any]:
        return {"allow": self.allow, "space": self.space.text()}

    def bind(self, space: Any) -> Self:
        """The same threat model in a model's space."""
        if not isinstance(space, Binary):
            raise UsageError(
                f"flips are changes of bits and this model's space is {space!r}; choose a task of binary events "
                "(fashion-mnist-dvs, digits-dvs), or a threat model for real values such as l0:eps=10"
            )
        return replace(self, space=space)

    @property
    @override
    def least(self) -> str:
        """Flips, where their number has no bound."""
        return "l0" if self.n is None else ""

    @override
    def levels(self) -> Mapping[str, tuple[float, ...]]:
        """Thresholds by measure: a report gives the share of the attacked rows broken within each."""
        if self.n is None:
            return LEVELS
        return {**LEVELS, "l0": tuple(level for level in LEVELS["l0"] if level <= self.n)}

    def allowed(self, origin: Tensor) -> Tensor:
        """Bool, shaped as the rows: the bits that may be flipped."""
        if self.allow == "flip":
            return torch.ones_like(origin, dtype=torch.bool)
        return origin == (0 if self.allow == "add" else 1)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """The number of flips, float64 [B]."""
        return self._count(x, origin).to(torch.float32 if x.device.type == "mps" else torch.float64)

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        """What a record says of a change: flips, and their share of all bits in per cent."""
        flips = self.distance(x, origin)
        return {"l0": flips, "l0_percent": 100 * flips / max(1, origin[:1].numel())}

    @staticmethod
    def _count(x: Tensor, origin: Tensor) -> Tensor:
        checked_shape(x, origin)
        return row_sum((x != origin).long())

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: zeros and ones, at most n of them not the origin's, each changed in a direction that is allowed."""
        if x.shape != origin.shape:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        legal = self.space.contains(x)
        if self.allow != "flip":
            legal &= row_sum(((x != origin) & ~self.allowed(origin)).long()) == 0
        return legal if self.n is None else legal & (self._count(x, origin) <= self.n)

    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """The nearest admitted row in L2: the allowed flips that save most of (z - x)**2, as many as there may be."""
        z = torch.nan_to_num(z.to(origin.dtype))
        # (z - x)**2 - (z - (1 - x))**2, which is positive where the flipped bit is nearer
        gain = torch.where(self.allowed(origin), (2 * z - 1) * (1 - 2 * origin), 0.0).flatten(1)
        chosen = gain > 0
        if self.n is not None and self.n < gain.shape[1]:
            # A stable sort, so that the lower index wins a tie in every batch.
            order = gain.sort(dim=1, descending=True, stable=True).indices[:, : self.n]
            chosen &= torch.zeros_like(chosen).scatter(1, order, True)
        return self.flipped(origin, chosen)

    @staticmethod
    def flipped(origin: Tensor, chosen: Tensor) -> Tensor:
        """The rows with the chosen bits flipped; chosen: bool [B, bits]."""
        return torch.where(chosen.reshape(origin.shape), 1 - origin, origin)

    def within(self, x: Tensor, origin: Tensor) -> Tensor:
        """The rows themselves where they keep to n, their origins where they do not."""
        if self.n is None:
            return x
        return torch.where(per_row(self._count(x, origin) <= self.n, x), x, origin)

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """The rows as they are: bits need no rounding."""
        return x

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # No property: it would count as a radius (`Radius`), whatever it raised.
            raise NoSteps if name == "eps" else AttributeError(f"{type(self).__name__} has no {name}")

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """Rows with n allowed bits flipped, drawn without replacement; UsageError without n: nothing to draw."""
        if self.n is None:
            raise NoSteps
        allowed = self.allowed(origin).flatten(1)
        key = torch.where(allowed, rng.uniform(origin).flatten(1), 2.0)
        order = key.sort(dim=1, stable=True).indices[:, : self.n]
        return self.flipped(origin, allowed & torch.zeros_like(allowed).scatter(1, order, True))

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """No step of a length: UsageError; `topk_grad` is the attack that flips what the gradient points at."""
        raise NoSteps
