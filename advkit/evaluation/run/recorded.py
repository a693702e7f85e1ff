"""The records of a batch, made of what its attack returned and its judge says."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, TypeVar

from advkit.core.protocols import Graded, Outcome, Record
from advkit.evaluation.counts import UNKNOWN, clean_notes

if TYPE_CHECKING:
    from torch import Tensor

    from advkit.evaluation.run.attempts import Attempts, Clean
    from advkit.evaluation.run.judge import Judge, Said, Verdict

T = TypeVar("T")

TIMED_OUT = "timed_out"
"""Note of a record whose row was given up because somebody's code was not back in time."""

ASKED_NON_FINITE = "the attack asked the victim about an input with NaN or infinity"
"""The message of a row on which the attack failed by that."""


def _outcomes(attempts: Attempts, clean: Clean, verdict: Verdict) -> list[Outcome]:
    """How every row ended."""
    unheard: list[bool] = (attempts.met_non_finite & (not attempts.case.surrogates)).tolist()
    found = verdict.outcomes(clean.contested.tolist(), unheard)
    # What comes later outweighs what comes before. An attack that lost itself in NaN has not tried: its failure says
    # nothing of the victim.
    for row in _rows(attempts.asked_non_finite):
        if found[row] in (Outcome.ROBUST, Outcome.INVALID):
            found[row] = Outcome.ERROR
    for row in _rows(clean.contested & attempts.outside):
        found[row] = Outcome.INVALID
    for row in _rows(~clean.finite):
        found[row] = Outcome.NON_FINITE
    for row in attempts.errors:
        found[row] = Outcome.ERROR
    return found


def records_of(
    attempts: Attempts,
    clean: Clean,
    judge: Judge,
    verdict: Verdict,
    said: Sequence[Said],
) -> list[Record]:
    """One record per row of the batch.

    Made of columns, of which most rows have nothing to say but what tensors say: row by row their numbers would cost
    more than the passes of a small model.
    """
    case, batch = attempts.case, attempts.batch
    n = len(batch.ids)
    labels = [None] * n if batch.labels is None else batch.labels.tolist()
    before, outcomes = judge.decisions(clean.answer), _outcomes(attempts, clean, verdict)
    for row in (row for row, outcome in enumerate(outcomes) if outcome == Outcome.ERROR):
        attempts.errors.setdefault(row, ASKED_NON_FINITE)
    forwards, backwards, queries = attempts.cost.tolist()
    columns: dict[str, Iterable[Any]] = {
        "id": batch.ids,
        "attack": repeat(case.label.attack),
        "outcome": outcomes,
        "label": labels,
        "clean": before,
        "adversarial": judge.decisions(verdict.answer),
        "reached": verdict.reached.tolist(),
        "distance": _numbers(verdict.distance),
        "margin": _numbers(verdict.margin),
        "closeness": _numbers(verdict.closeness),
        "eight_bit": repeat(None) if verdict.eight_bit is None else verdict.eight_bit.tolist(),
        "forwards": forwards,
        "backwards": backwards,
        "queries": queries,
        "notes": _notes(attempts, clean, verdict, outcomes, labels, before),
        "message": _filled(n, "", attempts.errors),
        "measures": _measured(verdict, n),
        "figures": _figures(attempts, outcomes, said),
        "trace": _filled(n, (), attempts.trace),
        "texts": [each.texts for each in said],
        "scores": [each.scores for each in said],
        "stage": repeat(case.label.stage),
        "source": repeat(case.label.source),
    }
    return list(map(Record, *(columns[name] for name in Record.__struct_fields__)))


def _rows(holds: Tensor) -> list[int]:
    """The rows of which something holds."""
    found: list[int] = holds.nonzero().flatten().tolist()
    return found


def _filled(n: int, nothing: T, known: Mapping[int, T]) -> list[T]:
    """A column of so many rows of which a few are known."""
    column = [nothing] * n
    for row, value in known.items():
        column[row] = value
    return column


def _measured(verdict: Verdict, n: int) -> list[dict[str, float]]:
    """What the threat model measured of every row."""
    if not verdict.measures:
        return [{} for _ in range(n)]
    names, columns = tuple(verdict.measures), (values.double().tolist() for values in verdict.measures.values())
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _figures(attempts: Attempts, outcomes: Sequence[Outcome], said: Sequence[Said]) -> list[dict[str, float | bool]]:
    """What was said of every row in numbers."""
    column = [each.figures for each in said]
    if any(column) and isinstance(attempts.case.rule, Graded):
        # The error of a sample without a verdict is that of its clean self: no error under attack.
        lost: list[bool] = attempts.asked_non_finite.tolist()
        for row, outcome in enumerate(outcomes):
            if outcome in UNKNOWN or (outcome == Outcome.WRONG and lost[row]):
                column[row] = {}
    return column


def _notes(
    attempts: Attempts,
    clean: Clean,
    verdict: Verdict,
    outcomes: Sequence[Outcome],
    labels: Sequence[int | None],
    before: Sequence[int | None],
) -> list[tuple[str, ...]]:
    """What the notes of every row say: how it was when clean, where that is not plain, then of the attack on it."""
    notes = _filled(len(outcomes), (), _flags(attempts, verdict))
    states = states_of(clean)
    for row in _rows(~(clean.finite & clean.correct & clean.contested)):
        notes[row] = (*state_of(states[row], outcomes[row], labels[row], before[row]), *notes[row])
    return notes


def _flags(attempts: Attempts, verdict: Verdict) -> dict[int, tuple[str, ...]]:
    """What the notes of a row must say of the attack on it, for the rows of which there is something to say."""
    switches = attempts.case.speed.switches
    found: dict[int, tuple[str, ...]] = {i: (f"{who}_raised",) for i, who in sorted(attempts.raised_by.items())}
    for name, holds in (
        ("met_non_finite", attempts.met_non_finite),
        ("zero_gradient", attempts.no_gradient),
        ("asked_non_finite", attempts.asked_non_finite),
        ("outside_threat_model", attempts.outside | ~verdict.admitted.cpu()),
        (f"refuted_{switches[0] if switches else ''}", attempts.refuted),
        ("again_in_fp32", attempts.unsure & ~attempts.refuted),
        (TIMED_OUT, attempts.late),
    ):
        for i in _rows(holds):
            found[i] = (*found.get(i, ()), name)
    return found


def states_of(clean: Clean) -> list[tuple[bool, bool, bool]]:
    """Of every row when it was clean: whether its answer was finite, whether it was right, whether it was contested."""
    return list(zip(clean.finite.tolist(), clean.correct.tolist(), clean.contested.tolist(), strict=True))


def state_of(
    state: tuple[bool, bool, bool], outcome: Outcome, label: int | None, before: int | None
) -> tuple[str, ...]:
    """What a record's notes must say of how its row was when clean."""
    finite_then, right, in_contest = state
    if not finite_then:
        return ("clean_non_finite",)
    return clean_notes(outcome, label, before, right=right, in_contest=in_contest)


def _numbers(values: Tensor) -> list[float | None]:
    """JSON numbers; NaN and infinity have none."""
    numbers: list[float] = values.double().tolist()
    if bool(values.isfinite().all()):
        return list(numbers)
    return [number if math.isfinite(number) else None for number in numbers]
