"""Rows counted by definition, for every mixture of outcomes and notes."""

from __future__ import annotations

import json
import random
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy import special

from advkit.core.protocols import Label, Outcome, Record
from advkit.evaluation import counts
from advkit.evaluation.counts import (
    CLEAN_CORRECT,
    CLEAN_WRONG,
    GAINED,
    NOT_CONTESTED,
    UNKNOWN,
    by_label,
    contested,
    count,
    was_right,
)
from advkit.evaluation.run.batch import own_randomness
from advkit.evaluation.run.store import to_line
from advkit.evaluation.stats import wilson

NOTES = ((), (CLEAN_CORRECT,), (CLEAN_WRONG,), (NOT_CONTESTED,), (GAINED,), ("clean_non_finite",), ("zero_gradient",))


def drawn(seed: int) -> list[Record]:
    draw = random.Random(seed)
    records = []
    for row in range(40):
        notes, label = draw.choice(NOTES), draw.choice((None, 0, 1))
        wrong = draw.random() < 0.3
        for stage in range(draw.choice((1, 1, 3))):
            outcome = Outcome.WRONG if wrong else draw.choice([o for o in Outcome if o != Outcome.WRONG])
            eight = draw.choice((None, True, False)) if seed % 2 else draw.choice((True, False))
            records.append(
                Record(f"r{row}", "a", outcome, label, clean=0, eight_bit=eight, notes=notes, stage=f"s{stage}")
            )
    return records


@pytest.mark.parametrize("seed", range(8))
def test_counts_are_what_they_are_called(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_BLOCK", 7 if seed < 4 else 4096)  # looked at in several parts, or at once
    records = drawn(seed)
    rows = {record.id: [each for each in records if each.id == record.id] for record in records}
    right = {row for row, own in rows.items() if was_right(own[0])}
    open_ = {row for row, own in rows.items() if contested(own[0])}
    broken = {row for row in open_ if any(each.outcome == Outcome.BROKEN for each in rows[row])}
    unknown = {row for row in open_ - broken if any(each.outcome in UNKNOWN for each in rows[row])}
    never = {row for row, own in rows.items() if all(GAINED in each.notes for each in own)}
    found = count(records)
    assert (found.n, found.correct, found.attackable) == (len(rows), len(right), len(open_))
    assert (found.broken, found.unknown, found.robust) == (
        len(broken), len(unknown), len(open_ - broken - unknown),
    )  # fmt: skip
    assert found.right_after == len(((right | never) - open_) | (right & open_ - broken - unknown))
    assert found.right_unknown == len(right & unknown)
    rounded = open_ and all(each.eight_bit is not None for row in open_ for each in rows[row])
    kept = {row for row in right & open_ if not any(each.eight_bit or each.outcome in UNKNOWN for each in rows[row])}
    assert found.eight_bit == (len(kept | (right - open_)) if rounded else None)


def test_records_are_grouped_by_label_in_order_of_appearance() -> None:
    records = drawn(1)[::-1]
    groups = by_label(records)
    assert [*groups] == [*dict.fromkeys(record.made_by for record in records)]
    assert all(isinstance(label, Label) for label in groups)
    assert sorted(id(each) for own in groups.values() for each in own) == sorted(map(id, records))


def test_a_label_is_made_once() -> None:
    first, second = Record("a", "pgd", Outcome.ROBUST), Record("b", "pgd", Outcome.BROKEN)
    assert first.made_by is second.made_by
    assert first.made_by == Label("pgd")


def test_a_line_has_the_fields_in_their_order() -> None:
    line = to_line(Record("a", "pgd", Outcome.ROBUST, measures={"l0": 1.0}, figures={"x": True}, stage="s"))
    names = [each.name for each in fields(Record)]
    empty = {"trace", "texts", "scores", "source"}
    assert [*json.loads(line)] == [name for name in names if name not in empty]


def test_the_usual_quantile_is_scipys_to_the_bit() -> None:
    z = float(-special.ndtri((1 - 0.95) / 2))
    found = wilson(1, 2, 0.95)
    half = z * np.sqrt(0.25 / 2 + z * z / 16) / (1 + z * z / 2)
    assert found.high - found.low == pytest.approx(2 * half, abs=1e-15)
    from advkit.evaluation import stats

    assert z == stats._USUAL_Z


def test_seeding_leaves_nothing_behind() -> None:
    """Torch keeps every seed, with a traceback, for a device that may come; there may be thousands of batches."""
    if torch.accelerator.is_available():
        pytest.skip("there is a device: it is seeded at once")
    state, kept = torch.get_rng_state(), len(torch.cuda._queued_calls)
    drawn_twice = []
    for _ in range(2):
        with own_randomness("cpu", "a name"):
            drawn_twice.append(torch.rand(3))
    assert torch.equal(*drawn_twice)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(torch.cuda._queued_calls) == kept
