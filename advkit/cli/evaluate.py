"""`advkit evaluate`: one evaluation, from names to a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advkit.cli.options import Asked, Format, Json, Workers, takes_request

if TYPE_CHECKING:
    from advkit.evaluation.plan import Plan
    from advkit.evaluation.report.document import Report

UNTRUSTWORTHY = 3


@takes_request()
def evaluate(
    asked: Asked,
    workers: Workers = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; resumed when it holds the same case.", show_default="runs/DIGEST"),
    ] = None,
    beside: Annotated[
        bool,
        typer.Option(
            "--beside/--only",
            help="Also evaluate the other side: TAPM for PubDef, white box for TAPM, attacks on the bare model for "
            "input transformations.",
        ),
    ] = True,
    rows: Annotated[
        str | None,
        typer.Option(help="START:STOP, a shard: the rows at these places of the n; others are left to other runs."),
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw plots into the run folder.")] = True,
    form: Format = "png",
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print every attack, metric, class and finding with advice.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Attack a model under a defense and report its robust accuracy.

    Exit status: 0 done, 2 a mistake in the request, 3 the run has errors or flags that make the number untrustworthy.
    """
    from advkit.evaluation.figures import check_format
    from advkit.evaluation.plan import Request, plan
    from advkit.evaluation.run.store import check_folder

    check_format(form)
    check_folder(out if out is not None else Path("runs"))
    resolved = plan(Request(**asked, beside=beside, rows=rows), progress=sys.stderr.isatty())
    folder = out if out is not None else Path("runs") / resolved.digest()[:16]
    report = carry_out(resolved, folder, plots=plots, as_json=as_json, workers=workers, verbose=verbose, form=form)
    if untrustworthy(report):
        raise typer.Exit(UNTRUSTWORTHY)


def untrustworthy(report: Report) -> bool:
    """Whether a flag or a sample without a verdict makes the number one not to be trusted."""
    return not report.trustworthy


def carry_out(
    resolved: Plan,
    folder: Path,
    *,
    plots: bool,
    as_json: bool,
    workers: int | None = None,
    verbose: bool = False,
    form: str = "png",
) -> Report:
    """Run a plan with a progress bar, then print what came out."""
    import shlex

    from advkit.cli.reports import print_brief, print_full
    from advkit.evaluation.execute import execute
    from advkit.evaluation.figures.pictures import draw
    from advkit.evaluation.progress import Bars

    command = shlex.join(["advkit", *sys.argv[1:]])
    with Bars(False if as_json else None):
        report = execute(resolved, out=folder, command=command, workers=workers)
    drawn = draw(resolved, folder, report, form) if plots else []
    if as_json:
        typer.echo(report.to_json())
        return report
    (print_full if verbose else print_brief)(report, folder, drawn)
    return report
