"""SQL over the records of a folder: the figures of other readers, and nothing that can be changed."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections import Counter
from pathlib import Path

import pytest

import advkit
from advkit.cli.main import run
from advkit.core.errors import MissingExtra, ReportError, UsageError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.report import query as queries
from advkit.evaluation.run.codec import to_line
from advkit.evaluation.run.reading import read_records

pytest.importorskip("duckdb")
OLD = Path(__file__).parent / "run_of_schema_1_0"

RECORDS = [
    Record(
        f"r{i}",
        "pgd:é",
        Outcome.BROKEN if i % 3 else Outcome.ROBUST,
        label=i % 2,
        distance=i / 4 if i else None,
        notes=("clean_wrong",) if i == 2 else (),
        measures={"l2": float(i), "odd": math.nan},
        figures={"said": bool(i % 2), "rank": float(i), "far": math.inf},
        texts={"reply": "it's"},
        scores={"after": (0.5, float(i))},
        trace=({"step": i},) if i else (),
        stage="first" if i % 2 else "",
    )
    for i in range(6)
]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, one with a companion and a last line cut short, under a name that is a pattern."""
    folder = tmp_path / "runs [a*'1]"
    lines = [to_line(record) + "\n" for record in RECORDS]
    for name, kept in (("one/records", 6), ("one/beside", 2), ("deep/er/records", 3)):
        file = folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(lines[:kept]) + ('{"id":"cut' if kept == 6 else ""))
    return folder


def test_records_of_all_runs_are_rows(runs: Path) -> None:
    found = advkit.query(runs, "SELECT run, file, outcome, count(*) AS n FROM records GROUP BY ALL")
    asked = {(row["run"], row["file"], row["outcome"]): row["n"] for row in found}
    expected: Counter[tuple[str, str, str]] = Counter()
    for place, file in (("one", "records"), ("one", "beside"), ("deep/er", "records")):
        for record in read_records(runs / place / f"{file}.jsonl"):
            expected[place, file, str(record.outcome)] += 1
    assert asked == expected
    alone = advkit.query(runs / "one", "SELECT DISTINCT run FROM records")
    assert alone == [{"run": "."}]


def values(runs: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = advkit.query(
        runs, "SELECT * FROM records WHERE run = 'one' AND file = 'records' ORDER BY id"
    )
    return found


def test_every_field_is_a_column(runs: Path) -> None:
    for row, record in zip(values(runs), RECORDS, strict=True):
        assert list(row) == list(queries.COLUMNS)
        assert [name for name in row if name not in ("run", "file")] == sorted(
            Record.__struct_fields__, key=list(queries.COLUMNS).index
        )
        for name in ("id", "attack", "stage", "source", "outcome", "label", "distance", "reached", "message", "texts"):
            assert row[name] == getattr(record, name), name
        assert row["notes"] == list(record.notes)
        assert json.loads(str(row["trace"] or "[]")) == list(record.trace)
        assert row["scores"] == {"after": [0.5, record.scores["after"][1]]}
        for name in ("measures", "figures"):
            told, held = row[name], getattr(record, name)
            assert isinstance(told, dict)
            assert list(told) == list(held)
            assert all(told[key] == each or math.isnan(each) == math.isnan(told[key]) for key, each in held.items())


def test_a_run_of_the_first_version_is_asked_alike() -> None:
    found = advkit.query(OLD, "SELECT attack, stage, source, id FROM records")
    assert [tuple(row.values()) for row in found] == [
        (r.attack, r.stage, r.source, r.id) for r in read_records(OLD / "records.jsonl")
    ]


def test_the_copy_is_read_where_it_is_of_these_records_alone(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = runs / "one" / "records.jsonl"
    file.write_text("".join(to_line(record) + "\n" for record in RECORDS))
    before = repr(values(runs))
    monkeypatch.setattr(queries, "MANY", 6)
    queries.keep_parquet(file, queries._hash_of(file), 5)
    assert not file.with_suffix(".parquet").exists()
    queries.keep_parquet(file, queries._hash_of(file), 6)
    assert file.with_suffix(".parquet").exists()
    read: list[Path] = []
    real = queries.each_record
    monkeypatch.setattr(queries, "each_record", lambda path: (read.append(path), real(path))[1])
    assert repr(values(runs)) == before
    assert file not in read
    file.write_text(to_line(RECORDS[0]) + "\n")
    assert [row["id"] for row in values(runs)] == ["r0"]
    assert file in read
    file.with_suffix(".parquet").write_bytes(b"no parquet")
    assert [row["id"] for row in values(runs)] == ["r0"]


def state(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


@pytest.mark.parametrize(
    ("sql", "told"),
    [
        ("INSERT INTO records SELECT * FROM records", "can only be read"),
        ("DELETE FROM records", "can only be read"),
        ("WITH x AS (DELETE FROM records RETURNING *) SELECT * FROM x", "the query writes"),
        ("DROP TABLE records", "can only be read"),
        ("CREATE TABLE x AS SELECT 1", "can only be read"),
        ("COPY records TO 'x.csv'", "can only be read"),
        ("ATTACH 'x.db'", "can only be read"),
        ("INSTALL httpfs", "can only be read"),
        ("SET enable_external_access = true", "can only be read"),
        ("PRAGMA database_list", "can only be read"),
        ("EXPORT DATABASE 'x'", "can only be read"),
        ("SELECT * FROM read_text('{file}')", "disabled by configuration"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("", "0 statements"),
        ("SELEC 1", "syntax error"),
        ("SELECT distanze FROM records", 'Candidate bindings: "distance"'),
        ("SELECT a.id, b.id FROM records a JOIN records b USING (label)", "several columns are called 'id'"),
        ("SELECT * FROM record", 'Did you mean "records"'),
    ],
)
def test_what_is_no_question_is_one_line_and_changes_nothing(
    sql: str, told: str, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    before = state(runs)
    with pytest.raises(UsageError) as error:
        advkit.query(runs, sql.replace("{file}", str(runs / "one" / "records.jsonl").replace("'", "''")))
    assert told in str(error.value)
    assert "\n" not in str(error.value)
    assert state(runs) == before


def test_folders_without_runs_and_damaged_records(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        advkit.query(tmp_path / "nowhere", "SELECT 1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"no run lies in .*no records.jsonl"):
        advkit.query(tmp_path / "empty", "SELECT 1")
    with (runs / "one" / "beside.jsonl").open("a") as file:
        file.write('{"id":1}\n')
    with pytest.raises(ReportError, match=r"beside.jsonl, line 3: not a record"):
        advkit.query(runs, "SELECT 1")


def test_without_duckdb_the_extra_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(MissingExtra, match=r"pip install 'advkit\[query\]'"):
        advkit.query(runs, "SELECT 1")


def test_the_command(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["query", str(runs), "SELECT id, measures, distance FROM records WHERE file = 'records' ORDER BY run, id"]
    assert not run(ask)
    assert "9 rows" in capsys.readouterr().out
    assert not run([*ask, "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert rows[3] == {"id": "r0", "measures": {"l2": 0.0, "odd": "NaN"}, "distance": None}
    out = tmp_path / "rows.csv"
    assert not run([*ask, "--out", str(out)])
    with out.open(newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["id", "measures", "distance"]
    assert [row[0] for row in table[1:]] == [row["id"] for row in rows]
    assert run(["query", str(runs), "DELETE FROM records"])
    assert capsys.readouterr().err.count("\n") == 1
    assert run([*ask, "--out", str(tmp_path / "rows.txt")])


def test_a_run_leaves_a_copy_that_the_query_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "MANY", 10)
    report = advkit.evaluate("fgsm", task="digits", model="zoo:digits-mlp", n=20, out=tmp_path / "run", device="cpu")
    assert (tmp_path / "run" / "records.parquet").exists()
    (row,) = advkit.query(tmp_path, "SELECT count(*) AS n, count(*) FILTER (outcome = 'robust') AS robust FROM records")
    assert row["n"] == 20
    assert report.metrics["robust_accuracy"]["value"] == row["robust"] / row["n"]
