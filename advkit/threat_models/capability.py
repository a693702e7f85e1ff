"""What threat models on a victim share: what may be queried of it, how often, and how a report says so."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.core.checks import check
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Access, Lattice
from advkit.core.spaces import Box

KNOWLEDGE = {
    Access.GRADIENTS: "white_box",
    Access.SCORES: "black_box_score",
    Access.LABELS: "black_box_decision",
    Access.NOTHING: "none",
}
UNIT = Box()


class Capability(ABC):
    """The checks and the description of a threat model with `access` and `queries`.

    A frozen dataclass below it declares the two fields where they stand in its specs, and says how far an attacker may
    go in `_budget` and what else there is to know in `_details`.
    """

    norm: ClassVar[str | None]
    scenario: ClassVar[str] = "evasion"

    access: Access
    queries: int | None

    def __post_init__(self) -> None:
        check(self, "queries", self.queries is None or self.queries >= 0, "a number >= 0, or none for no limit")
        object.__setattr__(self, "access", Access(self.access))  # a number stands for a level in Python

    def describe(self) -> dict[str, Any]:
        """The report's threat_model block, without the goal."""
        eps, text = self._budget()
        return {
            "name": self._name(),
            "phase": "test_time",
            "norm": self.norm,
            "eps": eps,
            "eps_string": text,
            "knowledge": KNOWLEDGE[self.access],
            "query_budget": self.queries,
            "details": self._details(),
        }

    def _name(self) -> str:
        return type(self).__name__.lower()

    @abstractmethod
    def _budget(self) -> tuple[float | None, str | None]:
        """The budget as a number and as people write it; None where there is none."""

    @abstractmethod
    def _details(self) -> dict[str, Any]:
        """Settings of its own, plain JSON values."""


class InBox(Capability, Lattice):
    """A threat model in a box of real values, `box`, whose samples may be submitted as files, `lattice`."""

    lattice: int
    box: Box

    def __post_init__(self) -> None:
        whole = self.lattice >= 0 and int(self.lattice) == self.lattice
        check(self, "lattice", whole, "a number of levels such as 255, or 0 for none")
        super().__post_init__()

    def _details(self) -> dict[str, Any]:
        return {"lattice": self.lattice, "box": self.box.text()}

    def _suited(self, space: Any, what: str) -> Box:
        """The space, where it is a box that has the lattice; UsageError otherwise. `what` begins the message."""
        if not isinstance(space, Box):
            raise UsageError(f"{what} a Box and this model's space is {space!r}; choose another threat model")
        if self.lattice and not space.bounded:
            raise UsageError(f"lattice={self.lattice} in {space!r}, which is unbounded; use lattice=0")
        return space

    def _walls(self, origin: Tensor) -> tuple[Tensor, Tensor]:
        """The box, widened to an origin that round-off left outside: the clean sample is always admitted."""
        low, high = self.box.bounds_like(origin)
        return torch.minimum(low, origin), torch.maximum(high, origin)


def checked_shape(x: Tensor, origin: Tensor) -> None:
    """BadInput unless the two have one shape."""
    if x.shape != origin.shape:
        raise BadInput(
            f"samples of shape {tuple(x.shape)} against origins of shape {tuple(origin.shape)}; expected equal"
        )
