"""One change for all samples: universal perturbations (Moosavi-Dezfooli et al., arXiv 1610.08401), and what they share
with universal patches.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import check, one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Evidence, Examines, Figure, Measures, OneChange
from advkit.core.spaces import Box, spacing
from advkit.threat_models.capability import UNIT, Capability, checked_shape
from advkit.threat_models.lp import eps_text, row_max, row_sum, usable, wide


class Shared(OneChange, Examines):
    """A threat model that may want one change for all samples, which an attack learns on data of its own.

    The change is a tensor without rows. Only where `one_change` says so do the methods below mean anything.
    """

    @abstractmethod
    def blank(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """What a search for the change starts from; x gives the shape of a row."""

    @abstractmethod
    def applied(self, change: Tensor, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Rows x [B, ...] with the change, differentiable in it.

        generator: draws where the change goes, for rows to learn on; without it the rows get it where it belongs
        """

    @abstractmethod
    def within(self, change: Tensor) -> Tensor:
        """The nearest change that is admitted."""

    @abstractmethod
    def direction(self, gradient: Tensor) -> Tensor:
        """The longest step up the gradient: `eps` long, or as long as values may move."""

    @override
    def examine(self, evidence: Evidence) -> dict[str, list[Figure]]:
        """`fooling_rate`: whether the decision differs from the one on the clean sample, over all samples."""
        if not self.one_change:
            return {}
        clean, answer = (each.argmax(1) if each.ndim == 2 else each for each in (evidence.clean, evidence.answer))
        if clean.ndim > 1:
            return {}
        return {"fooling_rate": [bool(different) for different in (clean != answer).tolist()]}


class NoSingleChange(UsageError, AttributeError):
    """An attack wants to change a sample by itself, and all have to change alike."""

    def __init__(self, attack: str) -> None:
        super().__init__(
            "all samples have to be changed alike here, and this attack changes each by itself: use the attack "
            f"{attack}, or a threat model for single samples such as linf:eps=0.1"
        )


@dataclass(frozen=True)
class Universal(Capability, Shared, Measures):
    """Universal perturbation: one vector within a ball, added to every sample, then clipped to legal values.

    eps:     radius, >= 0
    ball:    "linf" or "l2": what the radius bounds
    access:  what the attacker may query: nothing, labels, scores or gradients
    queries: how often, per sample; None for no limit
    box:     legal inputs; `bind` puts the model's own here

    The harness takes all samples of the evaluation together and asks whether one vector explains them: each changed
    value leaves an interval for its entry (a point, up to round-off; a half-line where it was clipped), and the
    shortest vector in the intersection of all samples' intervals must exist and lie in the ball. Where it does not,
    every changed sample is invalid, since nobody can tell which ones are at fault. Samples that came back
    unchanged were not attacked. Where the victim raises on a sample, halves of the samples are checked apart.
    Raises UsageError for fields out of range.
    """

    norm: ClassVar[str | None] = None

    eps: float = 0.1
    _: KW_ONLY
    ball: Literal["linf", "l2"] = "linf"
    access: Access = Access.GRADIENTS
    queries: int | None = None
    box: Box = UNIT

    def __post_init__(self) -> None:
        check(self, "eps", 0 <= self.eps < math.inf, "a finite radius >= 0 such as 8/255")
        one_of(self, "ball", ("linf", "l2"))
        super().__post_init__()

    @property
    @override
    def one_change(self) -> bool:
        return True

    def _budget(self) -> tuple[float | None, str | None]:
        return self.eps, eps_text(self.eps)

    def _details(self) -> dict[str, Any]:
        return {"ball": self.ball, "box": self.box.text()}

    def bind(self, space: Any) -> Self:
        """The same threat model in a model's box."""
        if not isinstance(space, Box):
            raise UsageError(f"universal adds to real values and this model's space is {space!r}; choose another one")
        return replace(self, box=space)

    def _length(self, move: Tensor) -> Tensor:
        return row_max(move.abs()) if self.ball == "linf" else row_sum(move.square()).sqrt()

    @property
    def _tolerated(self) -> float:
        return self.eps * (1 + 1e-5) + 1e-7

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """The norm of x - origin, per row [B]; clipping makes it shorter than the vector's."""
        checked_shape(x, origin)
        return self._length(x.to(wide(x)) - origin.to(wide(origin)))

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        """The energies of the change, L2 and Linf, float [B]."""
        move = x.to(wide(x)) - origin.to(wide(origin))
        return {"l2": row_sum(move.square()).sqrt(), "linf": row_max(move.abs())}

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: legal values, and one vector within the ball that explains all rows that were changed."""
        if x.shape != origin.shape:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        legal, changed = self.box.contains(x), (x != origin).flatten(1).any(1)
        rows = changed & legal
        explained = torch.ones_like(legal) if not bool(rows.any()) else self._explains(x[rows], origin[rows])
        return legal & (explained | ~changed)

    def _explains(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [1]: whether one vector of the ball gives all these rows."""
        move = x.to(wide(x)) - origin.to(wide(origin))
        slack = torch.maximum(spacing(x), spacing(origin))
        low, high = (bound.to(move.dtype) for bound in self.box.bounds_like(x))
        endless = torch.full_like(move, torch.inf)
        least = torch.where(x <= low, -endless, move - slack).amax(0)
        most = torch.where(x >= high, endless, move + slack).amin(0)
        shortest = torch.minimum(torch.maximum(torch.zeros_like(least), least), most).unsqueeze(0)
        return (least <= most).all().reshape(1) & (self._length(shortest) <= self._tolerated)

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """Rows are handed in as they are."""
        return x

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in ("project", "sample", "steepest", "descend"):
                raise NoSingleChange("universal")
            raise AttributeError(f"{type(self).__name__} has no {name}")

    @override
    def blank(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x.new_zeros(x.shape[1:])

    @override
    def applied(self, change: Tensor, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.clamp(x + change, *self.box.bounds_like(x))

    @override
    def within(self, change: Tensor) -> Tensor:
        if self.ball == "linf":
            return change.clamp(-self.eps, self.eps)
        length = self._length(change.unsqueeze(0).to(wide(change)))
        shrunk = (self.eps / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)
        return (change.to(shrunk.dtype) * shrunk).to(change.dtype)

    @override
    def direction(self, gradient: Tensor) -> Tensor:
        gradient = usable(gradient)
        if self.ball == "linf":
            return gradient.sign() * self.eps
        length = self._length(gradient.unsqueeze(0).to(wide(gradient)))
        return (gradient.to(length.dtype) * self.eps / torch.where(length > 0, length, 1.0)).to(gradient.dtype)
