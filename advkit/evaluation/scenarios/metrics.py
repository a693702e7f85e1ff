"""The figures of a case from its per-row records alone: accuracies, success rates, costs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from advkit.core.protocols import (
    Access,
    CountsOver,
    CountsPart,
    Graded,
    Judged,
    Label,
    Lattice,
    LeastChange,
    Levels,
    OfKind,
    Outcome,
    Record,
    SeeksNearest,
)
from advkit.evaluation.counts import (
    QUERIES_TO_BREAK,
    RECALL_AT,
    REFUSED_WHEN_CLEAN,
    Counts,
    JudgeCounts,
    by_class,
    by_judges,
    by_label,
    count,
    judge_rates,
    least_change,
    least_name,
    measured,
    queries_to_break,
    recalls,
    tail_accuracy,
    weakest_classes,
    worst_figures,
)
from advkit.evaluation.replies import reply_figures
from advkit.evaluation.run.attempts import attacked_model
from advkit.evaluation.run.case import Case
from advkit.evaluation.stats import DenominatorKind, graded_entry, rate

MOST_CLASSES_LISTED = 20


def success_kind(case: Case) -> DenominatorKind:
    """What the attack success rate of the case counts over.

    Of an untargeted goal, the samples that are right when clean. Of another, the samples of which neither the label nor
    the clean answer is what the attacker wants: those wrong when clean are attacked and counted, too.
    """
    return "clean_correct" if case.rule.kind == "untargeted" or isinstance(case.rule, Graded) else "clean_not_target"


def accuracy_metrics(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """Clean accuracy, robust accuracy and attack success rate, and what goal and threat model measured beside them."""
    c = count(records)
    metrics: dict[str, Any] = {
        "clean_accuracy": rate(c.correct, c.n, "all_samples"),
        "robust_accuracy": rate(c.right_after, c.n, "all_samples"),
        "attack_success_rate": rate(c.broken, c.attackable, success_kind(case)),
    }
    if c.right_unknown:
        metrics["robust_accuracy_upper"] = rate(c.right_after + c.right_unknown, c.n, "all_samples")
    if c.eight_bit is not None and not (isinstance(case.threat, Lattice) and case.threat.lattice):
        metrics["robust_accuracy_8bit"] = rate(c.eight_bit, c.n, "all_samples")
    metrics |= judged_by_all(case, records) | least_metrics(case, records)
    at = [k for k in RECALL_AT if k < case.task.classes]  # among as many captions every one is found
    metrics |= {name: rate(each.found, each.queries, each.what) for name, each in recalls(records, at).items()}
    if len(by_label(records)) == 1:
        metrics |= figured(case, records)
    if isinstance(case.rule, Judged) and case.rule.broken_by:
        metrics |= reply_figures(records, case.rule.cards())
    metrics |= graded(case, records) | by_queries(case, records)
    if len(by_label(records)) == 1:
        for name, values in measured(records).items():
            for kind in ("mean", "median"):
                metrics[f"{name}_{kind}"] = {"value": values[kind], "n": int(values["n"])}
    return metrics | within_levels(case, records)


def judged_by_all(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """Where judges read the replies: what the strictest of them calls broken, what any does, what all call robust.

    All over the prompts that the model refuses when they are clean.
    """
    counted = judge_counts(case, records)
    rates = {} if counted is None else judge_rates(counted)
    return {name: rate(k, n, REFUSED_WHEN_CLEAN) for name, (k, n) in rates.items()}


def judge_counts(case: Case, records: Sequence[Record]) -> JudgeCounts | None:
    """How the judges of the case's rule count its prompts; None where there are none."""
    return by_judges(records, case.rule.broken_by) if isinstance(case.rule, Judged) and case.rule.broken_by else None


def least_metrics(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """Where nothing bounds the attacker: the median over all samples of the least change that broke one.

    `unbounded` where that is infinite: more samples withstand everything than not.
    """
    threat: Any = case.threat
    if not isinstance(threat, LeastChange) or not threat.least or case.rule.kind != "untargeted":
        return {}
    median = least_change(records, threat.least)
    entry: dict[str, Any] = {"value": median, "unit": threat.unit, "n": count(records).n}
    if median is not None and math.isinf(median):
        entry |= {"value": None, "unbounded": True}
    return {least_name(threat.least): entry}


def figured(case: Case, records: Iterable[Record]) -> dict[str, Any]:
    """What goal and threat model said of the rows, those included on which the attack failed.

    Truth values become rates over the rows of which they were said, numbers their mean.
    """
    values: dict[str, list[float | bool]] = defaultdict(list)
    for figures in filter(None, map(attrgetter("figures"), records)):
        for name, value in figures.items():
            values[name].append(value)
    kind = case.rule.denominator if isinstance(case.rule, CountsOver) else "all_samples"
    part = case.rule.counts_over if isinstance(case.rule, CountsPart) else lambda name: kind
    return {
        name: rate(sum(map(bool, found)), len(found), part(name))
        if all(isinstance(value, bool) for value in found)
        else {"value": float(np.mean(found)), "n": len(found)}
        for name, found in values.items()
    }


def graded(case: Case, records: Iterable[Record]) -> dict[str, Any]:
    """Means with bootstrap intervals of the figures by which the case's rule grades every sample.

    Of several attacks the worst for each sample. A sample that nobody could grade, because the attack or the victim
    raised, took too long or answered no number, is in none of them: `n` says how many are.
    """
    if not isinstance(case.rule, Graded):
        return {}
    found: dict[str, Any] = {}
    records = list(records)
    for name in case.rule.grades:
        if values := worst_figures(records, name):
            found[name] = graded_entry(values)
    return found


def within_levels(case: Case, records: Iterable[Record]) -> dict[str, Any]:
    """The share of the attacked rows broken within each threshold of a measure that the threat model names (`levels`).

    One run gives them all: `attack_success_rate_l0_200` is the share broken by at most 200 flips. The denominator holds
    every row on which the attacker had something to win, those included on which the attack failed.
    """
    if not isinstance(case.threat, Levels):
        return {}
    records = list(records)
    attackable = count(records).attackable
    least: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        if record.outcome == Outcome.BROKEN:
            for name, value in record.measures.items():
                least[name][record.id] = min(value, least[name].get(record.id, value))
    return {
        f"attack_success_rate_{name}_{level:g}": rate(
            sum(value <= level for value in least[name].values()), attackable, success_kind(case)
        )
        for name, thresholds in case.threat.levels().items()
        for level in thresholds
    }


def by_queries(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """The median of the queries that broke a sample, of one attack by scores or labels that leaves what it broke.

    None where samples do not stop at success: the oracle's answers are not the verdict (files of few levels, random
    victims, transfer), or the rule grades every sample.
    """
    if not stops_at_success(case) or len(by_label(records)) != 1:
        return {}
    found = queries_to_break(records)
    return {QUERIES_TO_BREAK: {"value": float(np.median(found)), "unit": "queries", "n": len(found)}} if found else {}


def stops_at_success(case: Case) -> bool:
    """Whether the attack of a case may leave a sample with the query that broke it, and takes no gradient."""
    return _without_gradients(case) and not _nears(case) and attacked_model(case)[1]


def nears_by_queries(case: Case) -> bool:
    """Whether the attack of a case asks by scores or labels for a nearer point as long as it may."""
    return _without_gradients(case) and _nears(case) and attacked_model(case)[1]


def _without_gradients(case: Case) -> bool:
    return case.attack is not None and Access(case.attack.needs) in (Access.LABELS, Access.SCORES)


def _nears(case: Case) -> bool:
    attack: Any = case.attack
    return isinstance(attack, SeeksNearest) and attack.seeks_nearest


def task_kind(case: Case) -> str:
    """The report's word for the task."""
    return case.task.kind if isinstance(case.task, OfKind) else "classification"


def per_class(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """Robust accuracy of the weakest classes, and of every class for tasks with few of them.

    `worst_class_accuracy` has no interval: the class was chosen by its result.
    """
    if task_kind(case) != "classification":
        return {}
    classes = by_class(records)
    if not classes:
        return {}
    worst = classes[weakest_classes(classes)[0]]
    metrics: dict[str, Any] = {
        "tail_30_accuracy": {
            "value": tail_accuracy(classes),
            "unit": "fraction",
            "n": sum(classes[label].n for label in weakest_classes(classes)),
        },
        "worst_class_accuracy": {**rate(worst.right_after, worst.n, "samples_of_class"), "ci": None},
    }
    if case.task.classes > MOST_CLASSES_LISTED:
        return metrics
    names = case.task.class_names()
    for label, c in classes.items():
        word = names[label].lower().replace(" ", "_").replace("/", "_")
        metrics[f"robust_accuracy_class_{word}"] = rate(c.right_after, c.n, "all_samples")
    return metrics


def attack_entries(
    case: Case,
    records: Sequence[Record],
    settings: Mapping[Label, Mapping[str, Any]],
    seconds: Mapping[str, float],
    tokens: Mapping[str, int],
) -> list[dict[str, Any]]:
    """The report's attack list of a case: one entry per label, in the order of the run."""
    entries = []
    for order, (label, own) in enumerate(by_label(records).items()):
        entry = _attack_entry(case, label, own)
        params = dict(settings.get(label, {}))
        made_of = params.pop("made_of", "")  # no setting: reports are compared by those
        entry |= {"params": params, "order": order} | ({"made_of": made_of} if made_of else {})
        entry["cost"] = {"seconds": round(seconds.get(str(label), 0.0), 3), **entry["cost"]}
        if counted := tokens.get(str(label), 0):
            entry["cost"]["tokens"] = counted
        entries.append(entry)
    return entries


def cumulative(entries: Sequence[dict[str, Any]], records: Sequence[Record]) -> None:
    """Add what is still robust after each attack of a list."""
    met: list[Record] = []
    for entry, own in zip(entries, by_label(records).values(), strict=True):
        met += own
        c = count(met)
        entry["cumulative_robust_accuracy"] = rate(c.right_after, c.n, "all_samples")


def _attack_entry(case: Case, label: Label, records: Sequence[Record]) -> dict[str, Any]:
    c = count(records)
    # Rows never handed to the attack cost nothing and moved nowhere.
    attacked = [r for r in records if r.forwards or r.outcome in (Outcome.BROKEN, Outcome.INVALID, Outcome.ERROR)]
    entry: dict[str, Any] = {
        "name": str(label),
        "attack": label.attack,
        "stage": label.stage,
        "source": label.source,
        "n_attacked": len(attacked),
        "robust_accuracy": rate(c.right_after, c.n, "all_samples"),
        "attack_success_rate": rate(c.broken, c.attackable, success_kind(case)),
        "cost": _cost(records, attacked),
    }
    if c.unknown:
        entry["undecided"] = c.unknown
    distances = np.array([r.distance for r in attacked if r.distance is not None])
    if len(distances):
        entry["perturbation"] = {
            "norm": str(case.threat.describe().get("norm")),
            "max": float(distances.max()),
            "mean": float(distances.mean()),
            "median": float(np.median(distances)),
            "n_outside_budget": sum(r.outcome == Outcome.INVALID for r in records),
        }
    for name, values in (
        ("measures", measured(records)),
        ("figures", figured(case, records)),
        ("within", within_levels(case, records)),
    ):
        if values:
            entry[name] = values
    return entry


def _cost(records: Sequence[Record], attacked: Sequence[Record]) -> dict[str, Any]:
    cost: dict[str, Any] = {
        "forward": sum(map(attrgetter("forwards"), records)),
        "backward": sum(map(attrgetter("backwards"), records)),
    }
    if attacked:
        queries = np.array([r.queries for r in attacked])
        cost |= {"queries_median": float(np.median(queries)), "queries_max": float(queries.max())}
    if broke := queries_to_break(records):
        cost["queries_median_broken"] = float(np.median(broke))
    return cost


__all__ = [
    "Counts",
    "accuracy_metrics",
    "attack_entries",
    "by_label",
    "count",
    "cumulative",
    "figured",
    "graded",
    "judge_counts",
    "judged_by_all",
    "least_metrics",
    "nears_by_queries",
    "per_class",
    "rate",
    "stops_at_success",
    "success_kind",
    "task_kind",
    "within_levels",
]
