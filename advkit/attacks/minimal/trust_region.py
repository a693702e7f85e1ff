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
    """Trust region attack, a minimum-norm attack: steps towards the nearest boundary that are as long as they can be
    trusted.

    radius:  length of the first step, > 0, as a share of the distance to the nearest linearised boundary. Steps grow by
             a fifth where the margin fell by more than 0.9 of what the gradient promised, and shrink below 0.5
    rounds:  steps from the clean row once the boundary is crossed, >= 0; 0 is the published algorithm
    secants: answers along the line to the nearest point at the end, after two for its ends; >= 0

    steps (of all kinds), rivals and overshoot are as in `deepfool`. Costs 2 answers, `rivals` backward passes, a
    gradient per step, and secants + 2 answers. Raises UsageError for values out of range and for other threat models.

    Published radii are absolute (0.001), so that a hundred steps end before they reach the boundary of a robust model.
    Unlike the published code, no answer is asked for to measure a step: the gradient of the next one tells. What
    follows the crossing is that of `superdeepfool`. Rows that no step takes across are led down the goal's own loss, as
    in `deepfool`.
    """

    name: ClassVar[str] = "trust_region"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2", "minimum-linf")

    steps: int = 100
    radius: float = 0.1
    rounds: int = 20
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
        search.tighten(0, self.secants)
