"""A package of somebody else's: a scenario, a threat model, a ball in a norm of its own and a goal, by entry point."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from advkit.core.protocols import Outcome, Wording
from advkit.evaluation.scenarios.base import (
    BaseScenario,
    Case,
    Engine,
    Headline,
    Record,
    Records,
    Round,
    Section,
    accuracy_metrics,
    rate,
    settings_of,
)
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf


class Scouting(BaseScenario):
    """The attacker attacks every sample and submits the few of which it is surest."""

    name: ClassVar[str] = "scouting"

    def accepts(self, case: Case) -> str | None:
        """None, or why not."""
        return None if case.attack is not None else "scouting needs an attack: name one with --attack"

    def rounds(self, case: Case, engine: Engine, records: Records) -> Iterator[Round]:
        """Every sample once."""
        yield from engine.attack(case, records)

    def summarize(self, case: Case, records: Sequence[Record]) -> Section:
        """How many of the submitted samples are broken."""
        assert isinstance(case.threat, ScoutingLinf)
        sure = sorted(records, key=lambda r: (r.margin is None, r.margin or 0.0, r.id))[: case.threat.submissions]
        broken = sum(record.outcome == Outcome.BROKEN for record in sure)
        return Section(
            {**accuracy_metrics(case, records), "scouting_hit_rate": rate(broken, len(sure), "submitted_samples")},
            Headline("scouting_hit_rate", "Hit rate of scouting", "lower"),
            table=[("clean accuracy", "clean_accuracy"), ("hit rate", "scouting_hit_rate")],
            sentence="{scouting_hit_rate} of the submitted samples are broken.",
            settings=settings_of(case),
        )


@dataclass(frozen=True, kw_only=True)
class ScoutingLinf(Linf):
    """A Linf ball of which the attacker submits a few samples."""

    scenario: ClassVar[str] = "scouting"
    submissions: int = 10


@dataclass(frozen=True, kw_only=True)
class Weighted(Linf):
    """A ball that measures in a norm of its own."""

    def describe(self) -> dict[str, Any]:
        """What it is."""
        return {**super().describe(), "name": "weighted", "norm": "weighted_linf"}


@dataclass(frozen=True, kw_only=True)
class Unsure:
    """A wrong class, under a name of its own."""

    kind: ClassVar[str] = "unsure"
    wording: ClassVar[Wording] = Wording(robust="sure samples", success="unsure rate")

    def __call__(self, labels: Tensor, answer: Tensor, rng: Any) -> Untargeted:
        """The goal of a batch."""
        return Untargeted(labels)
