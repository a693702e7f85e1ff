"""Attacks that are put around a gradient attack and change what it sees of the model: what they pass on of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from advkit.attacks import ATTACKS
from advkit.core import protocols
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, MadeForGoal, MadeForThreatModel, Stepped, WantsData

PASSED_ON = frozenset({"restarts", "targets", "eot", "queries", "serves", "complaint"})
"""What the attack inside is planned with or says of itself besides its abilities."""


@dataclass(frozen=True, kw_only=True)
class Around(Stepped, MadeForGoal, MadeForThreatModel, WantsData):
    """An attack around another one, which it names by a spec: plans, goals and threat models are that one's.

    attack: a spec, in brackets where it has commas; it needs gradients

    Raises UsageError for suites, for attacks on streams and for attacks without gradients.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    pointless: ClassVar[str]
    """Why an attack without gradients has no place inside: ends the sentence that refuses it."""

    attack: str = "pgd"

    def __post_init__(self) -> None:
        if protocols.on_streams(self.inner) or isinstance(self.inner, protocols.Suite):
            raise UsageError(f"attack={self.attack}: name one attack on inputs, not a suite or an attack on streams")
        if Access(self.inner.needs) < Access.GRADIENTS:
            raise UsageError(f"attack={self.attack} needs no gradient, so {self.pointless}")

    @cached_property
    def inner(self) -> Any:
        """The attack that descends the gradients."""
        return ATTACKS.build(self.attack)

    @property
    def default_goal(self) -> str:
        """That of the attack inside."""
        return self.inner.default_goal if isinstance(self.inner, MadeForGoal) else ""

    @property
    def default_threat_model(self) -> str:
        """That of the attack inside."""
        return self.inner.default_threat_model if isinstance(self.inner, MadeForThreatModel) else ""

    @property
    def wants_data(self) -> bool:
        """Whether the attack inside does."""
        return isinstance(self.inner, WantsData) and self.inner.wants_data

    @property
    def steps(self) -> int:
        """Those of the attack inside; 1 where it has no number of its own."""
        return self.inner.steps if isinstance(self.inner, Stepped) else 1

    def __getattr__(self, name: str) -> Any:
        if name in PASSED_ON:
            return getattr(self.inner, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
