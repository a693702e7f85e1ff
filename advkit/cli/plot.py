"""`advkit plot RUN`: the figures of a finished run, drawn again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from advkit.cli.options import Format, Json


def plot(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    kinds: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads this annotation at run time
        typer.Argument(help="Which figures, e.g. per_class examples.", show_default="all that the run has"),
    ] = None,
    form: Format = "png",
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads this annotation at run time
        typer.Option("--out", help="Folder for the files.", show_default="RUN/plots"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Draw the figures of a run as PNG, SVG or PDF; of a kind that it does not have it says those it has.

    `report.plot(kind)` gives the same in Python.
    """
    import json

    from advkit.core.errors import ReportError
    from advkit.evaluation.figures import why_none, write_plots
    from advkit.evaluation.report import Report

    if not (run / "report.json").is_file():
        raise ReportError(f"no report at {run / 'report.json'}; expected the folder of a finished run")
    files = write_plots(run, form=form, only=kinds or (), out=out)
    if as_json:
        typer.echo(json.dumps({"files": [str(file) for file in files]}, indent=2))
    else:
        none = "" if files else f"nothing to draw: {why_none(Report.load(run))}"
        typer.echo(none or "\n".join(map(str, files)))
