"""Rows counted by how they ended: what every accuracy is made of."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from advkit.core.protocols import Label, Outcome, Record
from advkit.core.tail import weakest

UNKNOWN = frozenset({Outcome.NON_FINITE, Outcome.ERROR})


@dataclass(frozen=True)
class Counts:
    """Rows by how they ended, worst case over the attacks that met them.

    n:          rows evaluated
    correct:    rows that the victim gets right when clean
    attackable: of those, rows on which the attacker had something to win (all, unless a target is the row's own class)
    broken:     attackable rows that some attack broke
    unknown:    attackable rows not broken whose answer was not finite or whose attack raised
    robust:     the rest of the attackable rows; an attack that left the threat model has failed there
    eight_bit:  attackable rows not broken by the returned input rounded to 8 bits; None where that has no meaning
    """

    n: int
    correct: int
    attackable: int
    broken: int
    unknown: int
    robust: int
    eight_bit: int | None

    @property
    def right_after(self) -> int:
        """Rows right before and after: the robust ones, and those on which there was nothing to win."""
        return self.robust + self.correct - self.attackable


def clean_state(record: Record) -> str:
    """How the row was before any attack: "attackable", "wrong", or "met": right, with the goal met already."""
    if not {"clean_non_finite", "clean_raised"}.isdisjoint(record.notes):
        return "wrong"
    if record.outcome != Outcome.WRONG:
        return "attackable"
    return "met" if record.label is not None and record.clean == record.label else "wrong"


def count(records: Iterable[Record]) -> Counts:
    """Worst case per row id over all records given."""
    rows: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        rows[record.id].append(record)
    correct = broken = unknown = robust = attackable = eight = 0
    rounded = True
    for found in rows.values():
        state = clean_state(found[0])
        correct += state in ("attackable", "met")
        if state != "attackable":
            continue
        attackable += 1
        outcomes = {r.outcome for r in found}
        if Outcome.BROKEN in outcomes:
            broken += 1
        elif outcomes & UNKNOWN:
            unknown += 1
        else:
            robust += 1
        rounded = rounded and all(r.eight_bit is not None for r in found)
        eight += not any(r.eight_bit for r in found) and not outcomes & UNKNOWN
    eight_bit = eight if rounded and attackable else None
    return Counts(len(rows), correct, attackable, broken, unknown, robust, eight_bit)


def by_label(records: Iterable[Record]) -> dict[Label, list[Record]]:
    """Records per attack, in order of first appearance."""
    groups: dict[Label, list[Record]] = {}
    for record in records:
        groups.setdefault(record.made_by, []).append(record)
    return groups


def by_class(records: Iterable[Record]) -> dict[int, Counts]:
    """Counts of every class that occurs, by its number, in their order; rows without a label belong to none."""
    groups: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record.label is not None:
            groups[record.label].append(record)
    return {label: count(groups[label]) for label in sorted(groups)}


def weakest_classes(classes: Mapping[int, Counts]) -> list[int]:
    """The 30 % of the classes, rounded up, of lowest robust accuracy, the lowest first."""
    return weakest({label: c.right_after / c.n for label, c in classes.items()})


def tail_accuracy(classes: Mapping[int, Counts]) -> float:
    """Mean over the weakest 30 % of the classes of their robust accuracies, every class with the same weight."""
    return float(np.mean([classes[label].right_after / classes[label].n for label in weakest_classes(classes)]))


def measured(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """What the threat model measured of the changes that broke their row: mean, median and range by name."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.outcome == Outcome.BROKEN:
            for name, value in record.measures.items():
                values[name].append(value)
    return {
        name: {
            "mean": float(np.mean(found)),
            "median": float(np.median(found)),
            "min": min(found),
            "max": max(found),
            "n": len(found),
        }
        for name, found in values.items()
    }


def tally(records: Iterable[Record]) -> Counter[Outcome]:
    """How many records ended how."""
    return Counter(r.outcome for r in records)
