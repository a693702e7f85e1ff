"""Trust region attack: short steps whose length follows how well they were predicted (Yao et al., arXiv 1812.06371)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.minimal.base import NearestSearch
from advkit.attacks.minimal.deepfool import OntoFaces
from advkit.core.checks import at_least, positive

LEAST = 0.1  # share of a step from the clean row below which another is not worth a question


@dataclass(frozen=True, kw_only=True)
class TrustRegion(OntoFaces):
    name: ClassVar[str] = "trust_region"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2", "minimum-linf")

    steps: int = 100
    radius: float = 0.1
    rounds: int = 10
    secants: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "rounds", "secants")
        positive(self, "radius")

    @property
    def cap(self) -> float:
        """See `radius`."""
        return self.radius

    def finished(self, turns: Tensor, gained: Tensor, share: Tensor) -> Tensor:
        """Once across, after `rounds` steps from the clean row."""
        return ((turns >= self.rounds) & (gained > -torch.inf)) | (share < LEAST)

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        super().search(search, norm)
        if self.secants:
            search.tighten(self.secants)
