"""Paired comparison of runs: the 2x2 table by hand, refusals, the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import typer
from report_examples import B, R, W, document, records, run_folder
from scipy import stats as reference
from typer.testing import CliRunner

from advkit.cli.compare import compare as command
from advkit.core.errors import AdvkitError, ReportError, UsageError
from advkit.core.protocols import Outcome
from advkit.evaluation.report import compare as pairs
from advkit.evaluation.stats import newcombe_paired

FIRST = {"pgd": [R] * 14 + [B] * 4 + [W] * 2}
SECOND = {"pgd": [R] * 3 + [B] * 11 + [R] * 1 + [B] * 3 + [R, W]}
# both 3, only A 11, only B 2 (row 14 and row 18), neither 4


def test_table_by_hand(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", FIRST, {"defense": {"name": "pgd_at"}})
    b = run_folder(tmp_path / "b", SECOND)
    found = pairs.compare(a, b / "report.json")
    test = found.robust
    assert (test.both, test.only_a, test.only_b, test.neither) == (3, 11, 2, 4)
    assert test.p == pytest.approx(reference.binomtest(2, 13, 0.5).pvalue, abs=1e-12)
    assert test.interval == newcombe_paired(3, 11, 2, 4)
    assert test.difference == pytest.approx(0.45)
    assert (found.clean.only_a, found.clean.only_b) == (0, 1)
    assert found.sentence() == (
        "A = mlp (pgd_at) is more robust than B = mlp (none) (A = mlp (pgd_at) 70.0 % against 25.0 % on the same "
        f"20 rows: difference +45.0 points, 95 % interval [{100 * test.interval.low:+.1f}, "
        f"{100 * test.interval.high:+.1f}], McNemar p = 0.022)."
    )
    assert sum(part.n for part in found.per_class.values()) == 20
    assert sum(part.only_a for part in found.per_class.values()) == 11
    mirrored = pairs.compare(b, a)
    assert mirrored.robust.p == test.p
    assert mirrored.robust.difference == -test.difference


def test_equal_runs_do_not_differ(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", FIRST)
    found = pairs.compare(a, a)
    assert found.robust.p == 1.0
    assert found.sentence().startswith("No significant difference")


def test_worst_case_over_attacks_and_order_of_rows() -> None:
    several = {"pgd": [R, R, B, W], "square": [R, B, R, W]}
    verdicts = pairs.row_verdicts(records(several))
    assert [v.robust for v in verdicts.values()] == [True, False, False, False]
    assert [v.clean for v in verdicts.values()] == [True, True, True, False]
    # A sequential run holds no second record for a row that is broken already.
    short = [r for r in records(several) if not (r.attack == "square" and r.id == "row-2")]
    found = pairs.compare_records(records(several), list(reversed(short)))
    assert (found.robust.both, found.robust.only_a, found.robust.only_b, found.robust.neither) == (1, 0, 0, 3)


def test_rows_without_a_verdict_are_named_and_not_robust() -> None:
    odd = {"pgd": [R, Outcome.ERROR, Outcome.NON_FINITE, Outcome.INVALID, W]}
    found = pairs.compare_records(records(odd), records({"pgd": [R, R, R, R, W]}))
    # An attack that left the threat model has failed on that row.
    assert (found.robust.both, found.robust.only_b) == (2, 2)
    assert "2 rows of A have no verdict" in found.notes[0]


def test_refuses_other_rows_labels_data_and_threats(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", FIRST)
    with pytest.raises(ReportError, match=r"3 ids only in A, 3 only in B, 17 in both"):
        pairs.compare(a, run_folder(tmp_path / "shifted", SECOND, first=3))
    with pytest.raises(ReportError, match=r"dataset\.sha256"):
        pairs.compare(a, run_folder(tmp_path / "data", SECOND, {"dataset": {"sha256": "e" * 64}}))
    mine = records(FIRST)
    relabelled = [replace(r, label=(r.label or 0) + 5, clean=None) for r in mine]
    with pytest.raises(ReportError, match="20 rows carry different labels"):
        pairs.compare_records(mine, relabelled)
    other = run_folder(tmp_path / "l2", SECOND, {"threat_model": {"name": "l2", "norm": "L2", "eps": 0.5}})
    with pytest.raises(UsageError, match="--force"):
        pairs.compare(a, other)
    assert "different threat models" in pairs.compare(a, other, force=True).notes[0]
    with pytest.raises(ReportError, match="empty"):
        pairs.compare_records([], [])


def test_eps_written_in_two_ways_is_one_threat_model(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", FIRST)
    b = run_folder(tmp_path / "b", SECOND, {"threat_model": {"eps": 0.031, "eps_string": "0.031"}})
    assert pairs.compare(a, b).notes == ()
    assert not pairs.same_eps(0.0001, 0.0005)
    assert not pairs.same_eps(None, 0.1)


def test_refuses_records_of_another_run(tmp_path: Path) -> None:
    a, b = run_folder(tmp_path / "a", FIRST), run_folder(tmp_path / "b", SECOND)
    (b / "records.jsonl").write_text((a / "records.jsonl").read_text())
    with pytest.raises(ReportError, match="the records say 14 of 20"):
        pairs.compare(a, b)
    (b / "records.jsonl").unlink()
    with pytest.raises(ReportError, match="no per-row records"):
        pairs.compare(a, b)
    (b / "records.jsonl").write_text("{}\n")
    with pytest.raises(ReportError, match="not a record"):
        pairs.compare(a, b)


def test_notes_name_other_attacks_and_flags(tmp_path: Path) -> None:
    a = run_folder(tmp_path / "a", FIRST)
    flag = {"id": "zero_gradient", "severity": "unreliable", "message": "all rows"}
    b = run_folder(tmp_path / "b", {"square": SECOND["pgd"]}, {"diagnostics": {"flags": [flag]}})
    notes = " ".join(pairs.compare(a, b).notes)
    assert "the attacks differ: pgd against square" in notes
    assert "B's number is flagged as unreliable: zero_gradient" in notes


def test_per_class_rates() -> None:
    rates = pairs.per_class_rates(records({"pgd": [R, B, R, B, W, B]}))
    assert rates[0]["robust"]["numerator"] == 2
    assert rates[0]["clean"]["numerator"] == 2
    assert (rates[1]["robust"]["numerator"], rates[1]["clean"]["denominator"]) == (0, 3)


def run_command(*arguments: str) -> tuple[int, str, BaseException | None]:
    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output, result.exception


def test_command(tmp_path: Path) -> None:
    a = str(run_folder(tmp_path / "a", FIRST, {"defense": {"name": "[b]pgd_at"}}))
    b = str(run_folder(tmp_path / "b", SECOND))
    code, text, _ = run_command(a, b)
    assert code == 0
    assert "is more robust than" in text
    assert "[b]pgd_at" in text
    code, text, _ = run_command(a, b, "--json")
    found = json.loads(text)
    assert found["robust_accuracy"]["only_a"] == 11
    assert found["robust_accuracy"]["a"]["numerator"] == 14
    assert found["clean_accuracy"]["only_b"] == 1
    _, _, error = run_command(a, str(tmp_path / "none"))
    assert isinstance(error, AdvkitError)


def test_examples_are_valid() -> None:
    assert document(SECOND)["metrics"]["robust_accuracy"]["numerator"] == 5
