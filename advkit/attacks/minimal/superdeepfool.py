"""SuperDeepFool: DeepFool, and back along the boundary's normal (Abdollahpourrostam et al., arXiv 2303.12481)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from advkit.attacks.minimal.base import NearestSearch
from advkit.attacks.minimal.deepfool import OntoFaces
from advkit.core.checks import at_least, at_least_one, not_negative

LEAST = 0.1  # share of a step from the clean row below which another is not worth a question


@dataclass(frozen=True, kw_only=True)
class SuperDeepFool(OntoFaces):
    """SuperDeepFool, a minimum-norm attack in L2: DeepFool, and steps from the clean row along the boundary's normal.

    rounds:  steps from the clean row at most, >= 1
    least:   share of the distance below which a step that shortens it is the last one, >= 0
    secants: answers along the line to the nearest point at the end, after two for its ends; >= 0

    steps (of all kinds), rivals and overshoot are as in `deepfool`. Costs 2 answers, `rivals` backward passes, a
    gradient per step, and secants + 2 answers. Raises UsageError for values out of range and for other threat models.

    As published, DeepFool runs until the boundary is crossed, and a step from the clean row follows. Unlike the
    published code, the nearest point of all is kept and it goes on until these steps gain nothing; one that leads
    further away is taken back and halved; each is the shortest within the box. Rows that no step takes across are led
    down the goal's own loss, as in `deepfool`.
    """

    name: ClassVar[str] = "superdeepfool"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2",)

    steps: int = 50
    rounds: int = 20
    least: float = 0.002
    secants: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "rounds")
        at_least(self, 0, "secants")
        not_negative(self, "least")

    def finished(self, turns: Tensor, gained: Tensor, share: Tensor) -> Tensor:
        """After `rounds` steps from the clean row, or where these lead nowhere any more."""
        settled = (turns > 0) & (gained > 0) & (gained < self.least)
        return (turns >= self.rounds) | settled | (share < LEAST)

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        super().search(search, norm)
        search.tighten(0, self.secants)
