"""`advkit report RUN`: a run's report as one self-contained page, for somebody who decides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def report(
    run: Annotated[Path, typer.Argument(help="A run folder, or its report.json.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads this annotation at run time
        typer.Option("--out", help="The page; report.html beside the report by default."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the path and the verdict as JSON.")] = False,
) -> None:
    """Write a run's report as one page: what was tested, verdict, three figures, five examples, limits.

    The page loads nothing, runs no script, and prints on A4. `Report.load(RUN).to_html()` makes the same in Python.
    """
    import json

    from advkit.core.errors import ReportError
    from advkit.evaluation.report import Report, write_atomic

    found = Report.load(run)
    path = out or (found.path or run).with_name("report.html")
    write_atomic(path, found.to_html())
    try:
        found.adversarial()
    except ReportError as error:
        typer.echo(f"the page has no examples: {error}", err=True)
    if as_json:
        typer.echo(json.dumps({"page": str(path), "title": found.title, "verdict": found.verdict()}))
    else:
        typer.echo(f"{path}\n{found.verdict()}")
