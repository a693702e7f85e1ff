"""Poisonings counted from records: what scenario, verification and figures say of the same trials."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from advkit.core.protocols import Record
from advkit.evaluation.counts import count
from advkit.evaluation.stats import rate, student_t_over_seeds

TRAINED, FLIPPED, SUSPECTED, RECOVERED = "trained_on", "flips", "suspects", "recovered_flips"
BY_ATTACKER, BY_HARNESS = "trainings_of_attacker", "trainings_of_harness"
"""Figures of a record, equal in all records of a trial: training samples, labels flipped, labels with which the final
model disagrees, those of them that were flipped, and how often something was trained for whom."""


def trial_of(row: str) -> int:
    """The number of the trial that a row `trial-3/ID` belongs to."""
    return int(row.partition("/")[0].removeprefix("trial-"))


@dataclass(frozen=True)
class Trial:
    """What the records of one trial come to.

    number:  of the trial
    clean:   accuracy of the model trained on clean labels
    robust:  accuracy of the model trained on flipped labels; of the clean one where the labels were refused
    figures: of the trial, by name
    """

    number: int
    clean: float
    robust: float
    figures: dict[str, float]


def trials_of(records: Iterable[Record]) -> list[Trial]:
    """The trials of one attack's records, in the order of their numbers."""
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(trial_of(record.id), []).append(record)
    return [_trial(number, groups[number]) for number in sorted(groups)]


def _trial(number: int, rows: Sequence[Record]) -> Trial:
    clean = sum(row.clean is not None and row.clean == row.label for row in rows)
    robust = sum(row.adversarial is not None and row.adversarial == row.label for row in rows)
    told = next((row.figures for row in rows if row.figures), {})
    return Trial(number, clean / len(rows), robust / len(rows), {name: float(each) for name, each in told.items()})


def figures(records: Sequence[Record]) -> dict[str, Any]:
    """The metrics of a poisoning: accuracies and success with intervals over trials, recovered flips, trainings.

    Accuracies count test samples over all trials; their intervals are Student's over the trials' accuracies, because
    the samples of a trial share one training. `attack_success` is clean less robust accuracy, `attack_success_rate` the
    share of the samples that the clean model gets right and the poisoned one does not.
    """
    c, found = count(records), trials_of(records)
    clean, robust = [each.clean for each in found], [each.robust for each in found]
    drops = [one - other for one, other in zip(clean, robust, strict=True)]
    sums = {
        name: sum(int(each.figures.get(name, 0)) for each in found)
        for name in (TRAINED, FLIPPED, SUSPECTED, RECOVERED, BY_ATTACKER, BY_HARNESS)
    }

    def trainings(n: int) -> dict[str, Any]:
        return {"value": float(n), "unit": "trainings", "n": len(found)}

    return {
        "clean_accuracy": {**rate(c.correct, c.n, "all_samples"), "ci": _over_trials(clean)},
        "robust_accuracy": {**rate(c.right_after, c.n, "all_samples"), "ci": _over_trials(robust)},
        **(
            {"robust_accuracy_upper": rate(c.right_after + c.right_unknown, c.n, "all_samples")}
            if c.right_unknown
            else {}
        ),
        "attack_success": {**student_t_over_seeds(drops).to_dict(), "unit": "fraction"},
        "attack_success_rate": rate(c.broken, c.attackable, "clean_correct"),
        "flip_recovery_precision": rate(sums[RECOVERED], sums[SUSPECTED], "suspected_labels"),
        "flip_recovery_recall": rate(sums[RECOVERED], sums[FLIPPED], "flipped_labels"),
        "flipped_labels": rate(sums[FLIPPED], sums[TRAINED], "training_labels"),
        "retrainings": trainings(sums[BY_ATTACKER] + sums[BY_HARNESS]),
        "retrainings_attacker": trainings(sums[BY_ATTACKER]),
        "retrainings_final": trainings(sums[BY_HARNESS]),
    }


def _over_trials(values: Sequence[float]) -> dict[str, Any] | None:
    interval = student_t_over_seeds(values).interval
    if interval is None:
        return None
    return replace(interval, low=max(0.0, interval.low), high=min(1.0, interval.high)).to_dict()


def hurts_more(one: Iterable[Record], other: Iterable[Record]) -> tuple[float, float]:
    """By how much the other records' robust accuracy is lower, on the mean over trials, and the p-value of a paired t
    test for that side; 1 where there are fewer than two trials."""
    first, second = ({each.number: each.robust for each in trials_of(records)} for records in (one, other))
    drops = np.array([first[number] - second[number] for number in sorted(first.keys() & second.keys())])
    if len(drops) < 2 or not drops.any():
        return (float(drops.mean()) if len(drops) else 0.0), 1.0
    if drops.std() == 0:
        return float(drops.mean()), 0.0 if drops[0] > 0 else 1.0
    from scipy.special import stdtr

    t = drops.mean() / (drops.std(ddof=1) / np.sqrt(len(drops)))
    return float(drops.mean()), float(stdtr(len(drops) - 1, -t))
