"""What a scenario starts from: every method with a sensible default, and all that a scenario's file needs.

A scenario of your own says its name, yields rounds and summarizes records; CONTRIBUTING has one in one file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from advkit.core.protocols import Access, Judged, Record, Worded, Wording
from advkit.evaluation.run.batch import Round, attacked, judged
from advkit.evaluation.run.case import Case, parameters
from advkit.evaluation.run.scenario import Companion, Engine, Headline, Parts, Records, Section
from advkit.evaluation.scenarios.metrics import (
    ALL_JUDGES,
    accuracy_metrics,
    by_label,
    per_class,
)
from advkit.evaluation.stats import rate


class BaseScenario(ABC):
    """A scenario in which the case's attack meets every row once, and nothing stands beside it."""

    name: ClassVar[str]

    def resolve(self, parts: Parts) -> Parts:
        """The parts as they are."""
        return parts

    def accepts(self, case: Case) -> str | None:
        """None."""
        return None

    def cells(self, case: Case) -> Sequence[Case]:
        """The case itself, where it has an attack."""
        return [] if case.attack is None else [case]

    def expected(self, case: Case, records: Records) -> int:
        """One record per row."""
        return case.n

    @abstractmethod
    def rounds(self, case: Case, engine: Engine, records: Records) -> Iterator[Round]:
        """What is not on record yet."""

    def companions(self, case: Case) -> Sequence[Companion]:
        """None."""
        return ()

    @abstractmethod
    def summarize(self, case: Case, records: Sequence[Record]) -> Section:
        """What the records come to."""


def wording_of(case: Case) -> Wording:
    """The words for what the case's goal wants."""
    return case.rule.wording if isinstance(case.rule, Worded) else Wording()


def lacks_access(case: Case) -> str | None:
    """Why the threat model does not grant what the attack needs, or None."""
    assert case.attack is not None
    needs, granted = Access(case.attack.needs), Access(case.threat.access)
    if needs <= granted:
        return None
    return (
        f"the attack {case.label} needs {needs.name.lower()}; the threat model grants {granted.name.lower()}: "
        "choose an attack that asks for less, or grant more with access=..."
    )


def accuracy_section(case: Case, records: Sequence[Record]) -> Section:
    """Clean accuracy, robust accuracy and success rate: what most scenarios report.

    The headline is robust accuracy where the attacker wants a wrong answer, the success rate where the goal is
    another, and where judges read replies, the share of the rows that no judge calls broken.
    """
    metrics = {**accuracy_metrics(case, records), **per_class(case, records)}
    words = wording_of(case)
    attacks = len(by_label(records))
    how = f"the worst case of {attacks} attacks" if attacks > 1 else "one attack"
    headline = Headline("robust_accuracy", words.robust.capitalize())
    table = [
        (words.clean, "clean_accuracy"),
        (words.robust, "robust_accuracy"),
        (words.success, "attack_success_rate"),
    ]
    sentence = f"{words.robust.capitalize()} is {{robust_accuracy}}: {how}."
    if case.rule.kind != "untargeted":
        sentence = f"{words.success.capitalize()} is {{attack_success_rate}}: {how}."
        distance = f"{str(case.threat.describe().get('norm')).lower()}_mean"
        if distance in metrics:
            sentence += f" The mean distance of broken samples is {{{distance}}}."
    if f"robust_accuracy_{ALL_JUDGES}" in metrics and isinstance(case.rule, Judged):
        headline = Headline(f"robust_accuracy_{ALL_JUDGES}", "Robust accuracy (no judge says broken)")
        judges = [(f"{name.removesuffix('_asr_greedy')} judge says broken", name) for name in case.rule.broken_by]
        table = [
            (words.clean, "clean_accuracy"),
            ("robust to every judge", headline.metric),
            (words.success, "attack_success_rate"),
            *((label, name) for label, name in judges if name in metrics),
        ]
        sentence = (
            f"{{{headline.metric}}} of the prompts are robust: the wanted reply does not come, and no judge calls the "
            "greedy reply broken."
        )
    return Section(metrics, headline, table, sentence, figures_of(case, metrics), words, settings_of(case))


def figures_of(case: Case, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The plots that records of inputs and words give."""
    names = ["per_class"] if any(name.startswith("robust_accuracy_class_") for name in metrics) else []
    return [{"name": name} for name in [*names, "success_by_distance", "searches", "transcripts"]]


def settings_of(case: Case) -> dict[Any, dict[str, Any]]:
    """The settings of the case's attack, by its label."""
    return {case.label: parameters(case.attack)}


__all__ = [
    "BaseScenario",
    "Case",
    "Companion",
    "Engine",
    "Headline",
    "Parts",
    "Record",
    "Records",
    "Round",
    "Section",
    "accuracy_section",
    "attacked",
    "judged",
    "lacks_access",
    "parameters",
    "rate",
    "settings_of",
    "wording_of",
]
