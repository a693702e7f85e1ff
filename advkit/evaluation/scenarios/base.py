"""What a scenario starts from: every method with a sensible default, and all that a scenario's file needs.

A scenario of your own says its name, yields rounds and summarizes records; CONTRIBUTING has one in one file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from advkit.core.protocols import Access, AsksQueries, Graded, LeastChange, Record, Worded, Wording
from advkit.evaluation.counts import (
    ANY_JUDGE,
    QUERIES_TO_BREAK,
    RECALL_AT,
    REFUSED,
    SAYS,
    STRICTEST_JUDGE,
    TARGET,
    JudgeCounts,
    unranked,
)
from advkit.evaluation.replies import ALPHA, CORRECTED, HIT
from advkit.evaluation.run.batch import Round, attacked, judged
from advkit.evaluation.run.case import Case, parameters
from advkit.evaluation.run.scenario import Companion, Engine, Headline, Parts, Records, Section
from advkit.evaluation.scenarios.metrics import (
    accuracy_metrics,
    by_label,
    judge_counts,
    least_metrics,
    nears_by_queries,
    per_class,
    stops_at_success,
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
        return case.size

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
    """Why the threat model does not grant what the attack needs, access or queries for a step, or None."""
    assert case.attack is not None
    needs, granted = Access(case.attack.needs), Access(case.threat.access)
    if needs <= granted:
        return _lacks_queries(case)
    return (
        f"the attack {case.label} needs {needs.name.lower()}; the threat model grants {granted.name.lower()}: "
        "choose an attack that asks for less, or grant more with access=..."
    )


def _lacks_queries(case: Case) -> str | None:
    """Why there are fewer queries than one step of the attack takes, or None."""
    attack: Any = case.attack
    if not isinstance(attack, AsksQueries):
        return None
    least, own = attack.least_queries, getattr(attack, "queries", None)
    for granted, what in ((case.threat.queries, "queries"), (case.propagations, "propagations")):
        if granted is not None and granted < least:
            who = "the threat model grants" if what == "queries" else "the budget is"
            return (
                f"one step of the attack {case.label} takes {least} {what} of a sample; {who} {granted}: raise {what} "
                f"to {least} or more, or choose settings or an attack that take fewer"
            )
    if isinstance(own, int) and own < least:
        return f"one step of the attack {case.label} takes {least} queries of a sample; it has queries={own}"
    return None


def accuracy_section(case: Case, records: Sequence[Record]) -> Section:
    """Clean accuracy, robust accuracy and success rate: what most scenarios report.

    The headline is robust accuracy where the attacker wants a wrong answer within a budget, the median of the least
    change where he has none, the success rate where the goal is another, and where judges read replies, the success
    rate by the strictest of them.
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
    table += [("fooling rate", "fooling_rate")] if "fooling_rate" in metrics else []
    table += [
        (f"recall@{k}, {way.replace('_', ' ')}{', clean' * bool(prefix)}", name)
        for way in ("image_to_text", "text_to_image")
        for k in RECALL_AT
        for prefix in ("clean_", "")
        if (name := f"{prefix}recall_at_{k}_{way}") in metrics
    ]
    if case.rule.kind != "untargeted":
        headline = Headline("attack_success_rate", words.success.capitalize(), "lower")
        sentence = f"{words.success.capitalize()} is {{attack_success_rate}}: {how}."
        distance = f"{str(case.threat.describe().get('norm')).lower()}_mean"
        if distance in metrics:
            sentence += f" The mean distance of broken samples is {{{distance}}}."
    if least := least_metrics(case, records):
        ((name, entry),) = least.items()
        headline = Headline(name, f"Median {entry['unit']} to break")
        table = [(words.clean, "clean_accuracy"), (headline.name.lower(), name), *table[1:]]
        median = f"It takes {{{name}}} in the median to break a sample, 0 for samples that are wrong when clean"
        if entry.get("unbounded"):
            median = f"Half of the samples or more withstood: there is no median of the {entry['unit']} to break one"
        sentence = f"{median}: {how}. {words.success.capitalize()} is {{attack_success_rate}}."
    if isinstance(case.rule, Graded) and case.rule.grades[0] in metrics:
        name, *others = (each for each in case.rule.grades if each in metrics)
        headline = Headline(name, f"Mean {spoken(name)} under attack", "lower")
        table = [*((spoken(each), each) for each in others), (f"{spoken(name)} under attack", name), *table]
        sentence = (
            f"The mean {spoken(name)} under attack is {{{name}}}, over the samples with a verdict: {how}. "
            f"{words.robust.capitalize()} are {{robust_accuracy}} of the samples."
        )
    if isinstance(case.threat, LeastChange) and case.threat.least and case.threat.describe().get("norm"):
        sentence += " How near to the least distances known it came: `advkit compare --optimality` with other runs."
    if QUERIES_TO_BREAK in metrics:
        table = [*table, ("queries to break a sample, median", QUERIES_TO_BREAK)]
    lacking, answers = unranked(records)
    if lacking:
        sentence += f" Recalls are left out: {lacking:,} of {answers:,} answers have no rank in the records."
    section = Section(metrics, headline, table, sentence, figures_of(case, metrics), words, settings_of(case))
    counted = judge_counts(case, records)
    return section if counted is None else _judged_section(section, counted)


def spoken(figure: str) -> str:
    """A figure's name as it stands in a table."""
    return figure.replace("_", " ").replace("rmse", "RMSE")


def _judged_section(section: Section, counted: JudgeCounts) -> Section:
    """The same where judges read the replies: the strictest of them decides, each stands beside."""
    metrics, words = section.metrics, section.wording
    judges = {name: name.removesuffix(SAYS) for name in counted.broken} | {TARGET: "exact target"}
    strictest = judges[counted.strictest]
    sampled = [name for name in metrics if name.startswith(f"{strictest}{HIT}") and name[-1].isdecimal()]
    lines = [
        (words.clean, "clean_accuracy"),
        (f"strictest judge ({strictest})", STRICTEST_JUDGE),
        *((f"{label} judge says broken", name) for name, label in judges.items()),
        (words.success, "attack_success_rate"),
        ("refused when clean", REFUSED),
        ("benign prompts answered", "benign_accuracy"),
        ("some judge says broken", ANY_JUDGE),
        *(
            (f"hit@{name.rpartition('_')[2]}, {strictest} judge", name)
            for name in dict.fromkeys(sampled[:1] + sampled[-1:])
        ),
        (f"{strictest} judge, corrected", f"{strictest}{SAYS}{CORRECTED}"),
        ("agreement of judges (alpha)", ALPHA),
    ]
    sentence = (
        f"{{{STRICTEST_JUDGE}}} of the prompts that are refused when clean are broken by the strictest judge "
        f"({strictest}); the exact target comes in {{attack_success_rate}}."
    )
    if not counted.refused:
        sentence = "No prompt is refused when clean: there is nothing that an attack could break by these judges."
    return replace(
        section,
        headline=Headline(STRICTEST_JUDGE, "Success rate by the strictest judge", "lower"),
        table=[(label, name) for label, name in lines if name in metrics],
        sentence=sentence,
    )


def figures_of(case: Case, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The plots that records of inputs and words give."""
    names = ["per_class"] if any(name.startswith("robust_accuracy_class_") for name in metrics) else []
    names += ["success_by_queries"] if stops_at_success(case) else []
    names += ["distance_by_queries"] if nears_by_queries(case) else []
    names += ["success_by_distance", "accuracy_by_distance", "searches", "transcripts"]
    return [{"name": name} for name in names]


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
