"""`advkit query`: SQL over the records of all runs in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

SHOWN = 40


def query(
    runs: Annotated[Path, typer.Argument(help="Run folder, or a folder that holds runs at any depth.")],
    sql: Annotated[str, typer.Argument(help="One SELECT of DuckDB; its table is called records.")],
    json: Annotated[bool, typer.Option("--json", help="Print all rows as JSON.")] = False,
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads this annotation at run time
        typer.Option("--out", help="Write all rows to this CSV file, and print none."),
    ] = None,
) -> None:
    """Ask all records of a folder in SQL, such as "SELECT outcome, count(*) FROM records GROUP BY outcome".

    Nothing can be changed by it. The columns are run, file, and the fields of a record: id, attack, stage, source,
    outcome, label, clean, adversarial, reached, distance, margin, closeness, eight_bit, forwards, backwards, queries,
    notes, message, measures, figures, texts, scores, trace. Needs DuckDB: pip install 'advkit[query]'.
    """
    from advkit.core.errors import UsageError
    from advkit.evaluation.report.query import query as ask
    from advkit.evaluation.report.query import rows_as_json

    if out is not None and out.suffix.lower() != ".csv":
        raise UsageError(f"--out {out} is no .csv file; expected a name that ends in .csv")
    rows = ask(runs, sql)
    if out is not None:
        _write(out, rows)
    elif json:
        from json import dumps

        typer.echo(dumps(list(rows_as_json(rows)), indent=2, allow_nan=False))
    else:
        _show(rows)


def _write(out: Path, rows: list[dict[str, Any]]) -> None:
    import csv
    import io

    from advkit.core.errors import UsageError
    from advkit.core.files import why, write_whole

    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerows([list(rows[0]), *(list(row.values()) for row in rows)] if rows else [])
    try:
        write_whole(out, text.getvalue())
    except OSError as error:
        raise UsageError(f"{out} can't be written ({why(error)}): name another file with --out") from error
    typer.echo(f"{len(rows)} rows in {out}")


def _show(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from advkit.core.text import printable

    if rows:
        table = Table()
        for name in rows[0]:
            table.add_column(Text(printable(name)))
        for row in rows[:SHOWN]:
            table.add_row(*(Text(printable("" if value is None else str(value))) for value in row.values()))
        Console().print(table)
    more = f", the first {SHOWN} of them shown: --out FILE.csv or --json gives all" if len(rows) > SHOWN else ""
    typer.echo(f"{len(rows)} row{'' if len(rows) == 1 else 's'}{more}")
