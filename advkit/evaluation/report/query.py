"""SQL over the records of all runs in a folder, by DuckDB: `advkit query` and `advkit.query`.

A query sees one table, `records`, and can change nothing: it runs in a read-only transaction of a database in memory,
which by then may open no file. Of runs with many records a copy in Parquet is kept beside them (`records.parquet`); it
names the hash of the records that it was made of, is not read where that is not theirs, and may be deleted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from advkit.core.errors import MissingExtra, ReportError, UsageError
from advkit.core.text import first_line
from advkit.evaluation.run.codec import to_lines
from advkit.evaluation.run.reading import RECORDS_NAME, beside_files, each_record

log = logging.getLogger("advkit")

COLUMNS = {
    "run": "VARCHAR",
    "file": "VARCHAR",
    "id": "VARCHAR",
    "attack": "VARCHAR",
    "stage": "VARCHAR",
    "source": "VARCHAR",
    "outcome": "VARCHAR",
    "label": "BIGINT",
    "clean": "BIGINT",
    "adversarial": "BIGINT",
    "reached": "BOOLEAN",
    "distance": "DOUBLE",
    "margin": "DOUBLE",
    "closeness": "DOUBLE",
    "eight_bit": "BOOLEAN",
    "forwards": "BIGINT",
    "backwards": "BIGINT",
    "queries": "BIGINT",
    "notes": "VARCHAR[]",
    "message": "VARCHAR",
    "measures": "MAP(VARCHAR, DOUBLE)",
    "figures": "MAP(VARCHAR, DOUBLE)",
    "texts": "MAP(VARCHAR, VARCHAR)",
    "scores": "MAP(VARCHAR, DOUBLE[])",
    "trace": "JSON",
}
"""Of the table `records`: where a record lies (`run`, `file`), and the fields of `Record`."""
MANY = 1_000
"""Records from which a copy in Parquet is kept: DuckDB takes longer to load than fewer take to read."""
_READS_ONLY = "records can only be read: expected one SELECT"
_KEY = "records_sha256"
_BLOCK = 4096
_STORED = {name: kind for name, kind in COLUMNS.items() if name not in ("run", "file")}
_READ = {**_STORED, "figures": "MAP(VARCHAR, JSON)"}
_FIGURES = (
    "map_from_entries([(e.key, CASE json_type(e.value) WHEN 'BOOLEAN' THEN (e.value::VARCHAR = 'true')::INT::DOUBLE "
    "ELSE (e.value->>'$')::DOUBLE END) FOR e IN map_entries(figures)])"
)
_VALUES = {"figures": _FIGURES, "stage": "coalesce(stage, '')", "source": "coalesce(source, '')"}


def query(runs: str | Path, sql: str, *, frame: bool = False) -> Any:
    """What one SELECT finds in the records of a run, or of all runs in a folder, at any depth.

    runs:  folder
    sql:   of DuckDB; its table is `records`, whose columns are `COLUMNS`. `run` is the run's folder below `runs`,
           `file` is "records", or "beside" and "beside-NAME" for companions
    frame: a pandas DataFrame; else a list of dictionaries, one per row

    Raises UsageError where there are no records, or the SQL is wrong, is several statements, or writes; ReportError on
    a damaged record; MissingExtra without DuckDB: pip install 'advkit[query]'.
    """
    duckdb = _duckdb()
    with closing(duckdb.connect()) as connection:
        found = _found(connection, Path(runs), sql)
        if frame:
            return found.df()
        names = [column[0] for column in found.description]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def keep_parquet(records: Path, sha256: str, number: int) -> None:
    """Keep a copy of so many records, with this hash, beside them where DuckDB is installed; a failure is a warning."""
    if number < MANY or importlib.util.find_spec("duckdb") is None:
        return
    import duckdb

    made = records.with_name(f".{records.stem}.{os.getpid()}.parquet")
    try:
        with closing(duckdb.connect()) as connection:
            connection.execute("SET threads = 1")
            options = f"FORMAT parquet, KV_METADATA {{{_KEY}: {_text(sha256)}}}"
            connection.execute(f"COPY ({_lines(records)}) TO {_text(str(made))} ({options})")
        os.replace(made, records.with_suffix(".parquet"))
    except (duckdb.Error, OSError) as error:
        log.warning("no copy in Parquet is kept of %s (%s)", records, first_line(error))
        with suppress(OSError):
            made.unlink()


def _duckdb() -> Any:
    try:
        import duckdb
    except ImportError as error:
        raise MissingExtra("queries need the package duckdb: pip install 'advkit[query]'") from error
    return duckdb


def _found(connection: Any, runs: Path, sql: str) -> Any:
    """The result of the query on the records of these runs."""
    duckdb = _duckdb()
    statement = _only_statement(connection, sql)
    _fill(connection, runs)
    for setting in ("enable_external_access = false", "lock_configuration = true"):
        connection.execute(f"SET {setting}")
    connection.execute("BEGIN TRANSACTION READ ONLY")  # a SELECT may hold a DELETE
    try:
        found = connection.execute(statement)
    except duckdb.Error as error:
        raise UsageError(_one_line(error)) from None
    twice = [name for name, number in Counter(column[0] for column in found.description).items() if number > 1]
    if twice:
        raise UsageError(f"several columns are called {twice[0]!r}, of which a row holds one: name them with AS")
    return found


def _only_statement(connection: Any, sql: str) -> Any:
    duckdb = _duckdb()
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise UsageError(_one_line(error)) from None
    if len(statements) != 1:
        raise UsageError(f"the query holds {len(statements)} statements; expected one SELECT")
    kind = statements[0].type.name
    if kind not in ("SELECT", "EXPLAIN"):
        raise UsageError(f"the query is of kind {kind}; {_READS_ONLY}")
    return statements[0]


def _fill(connection: Any, runs: Path) -> None:
    """Make the table of records."""
    if not runs.is_dir():
        raise UsageError(f"{runs} is no folder; expected one that holds runs")
    columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
    connection.execute(f"CREATE TABLE records ({columns})")
    files = sorted(runs.rglob(RECORDS_NAME))
    if not files:
        raise UsageError(f"no run lies in {runs}: no {RECORDS_NAME} at any depth")
    for main in files:
        for file in (main, *beside_files(main)):
            place = f"{_text(main.parent.relative_to(runs).as_posix())}, {_text(file.stem)}"
            try:
                _read(file, partial(_insert, connection, place))
            except _duckdb().Error as error:
                raise ReportError(f"{file} can't be read by DuckDB ({first_line(error)})") from None


def _insert(connection: Any, place: str, rows: str) -> None:
    connection.execute(f"INSERT INTO records SELECT {place}, * FROM ({rows})")


def _read(file: Path, take: Callable[[str], Any]) -> None:
    """Hand over a query whose rows are the records of a file: from its copy, or from its lines, each one checked."""
    import duckdb

    copy = file.with_suffix(".parquet")
    if copy.is_file():
        with suppress(duckdb.Error):
            if _hash_of_copy(copy) == _hash_of(file):
                take(f"SELECT {', '.join(_STORED)} FROM read_parquet({_pattern(copy)})")
                return
    with tempfile.TemporaryDirectory(prefix="advkit-") as folder:
        lines = Path(folder) / RECORDS_NAME
        records = each_record(file)
        with lines.open("wb") as checked:
            while block := list(islice(records, _BLOCK)):
                checked.write(b"\n".join([*to_lines(block), b""]))
        take(_lines(lines))


def _lines(file: Path) -> str:
    """A query whose rows are the records of a file of whole lines."""
    kinds = ", ".join(f"{name}: {_text(kind)}" for name, kind in _READ.items())
    values = ", ".join(f"{_VALUES[name]} AS {name}" if name in _VALUES else name for name in _STORED)
    options = f"format = 'newline_delimited', maximum_object_size = {1 << 28}, columns = {{{kinds}}}"
    return f"SELECT {values} FROM read_json({_pattern(file)}, {options})"


def _hash_of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _hash_of_copy(copy: Path) -> str:
    import duckdb

    with closing(duckdb.connect()) as connection:
        found = connection.execute(
            f"SELECT decode(value) FROM parquet_kv_metadata({_pattern(copy)}) WHERE decode(key) = {_text(_KEY)}"
        ).fetchone()
    return str(found[0]) if found else ""


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _pattern(path: Path) -> str:
    """A path where DuckDB takes patterns."""
    return _text("".join(f"[{mark}]" if mark in "*?[" else mark for mark in str(path)))


def _one_line(error: Exception) -> str:
    """What DuckDB says, the nearest names among it, without its picture of the query."""
    if "read-only mode" in str(error):
        return f"the query writes; {_READS_ONLY}"
    return "the query fails: " + " ".join(str(error).partition("\n\n")[0].split())


def rows_as_json(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows with values that JSON has: numbers that it lacks, and kinds of its own, become texts."""
    for row in rows:
        yield {name: _as_json(value) for name, value in row.items()}


def _as_json(value: Any) -> Any:
    from decimal import Decimal

    if isinstance(value, dict):
        return {str(name): _as_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(each) for each in value]
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
