"""What every attack by decisions alone is: a budget of questions, a start on the boundary, a walk from there."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from advkit.attacks.minimal.base import MinimalAttack, NearestSearch
from advkit.attacks.query.decisions import Decisions
from advkit.attacks.query.starts import start
from advkit.core.checks import at_least_one, not_negative
from advkit.core.protocols import Access, AsksQueries, Serves, WantsData


@dataclass(frozen=True, kw_only=True)
class DecisionAttack(MinimalAttack, AsksQueries, WantsData, Serves):
    """An attack that sees decisions alone and looks for the nearest point that reaches the goal.

    A row for which no point that reaches the goal was found comes back unchanged, and its record says so. A subclass
    walks from boundary points on.

    queries:    answers asked of each row, >= 1; the threat model's budget, where it has one, cuts them short
    directions: random directions that the start is compared with, >= 0
    """

    needs: ClassVar[Access] = Access.LABELS
    wants_data: ClassVar[bool] = True
    serves: ClassVar[tuple[str, ...]] = ("untargeted", "targeted")

    queries: int = 5000
    directions: int = 10

    def __post_init__(self) -> None:
        at_least_one(self, "queries")
        not_negative(self, "directions")

    @property
    @override
    def least_queries(self) -> int:
        """The clean row, a start, and a step."""
        return 3

    @override
    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        asks = Decisions(search, self.queries)
        if (z := start(asks, norm, self.tolerance(search.x), self.directions)) is not None:
            self.walk(asks, z, norm)

    def tolerance(self, x: Tensor) -> float:
        """How near to the boundary a start has to be, as a share of its distance."""
        return 1e-3

    @abstractmethod
    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        """From boundary points z [n, ...] on, until no row has a query left."""
