"""`advkit evaluate`: one evaluation, from names to a report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advkit.cli.options import (
    BatchSize,
    DefenseSpec,
    Device,
    GoalSpec,
    Json,
    ModelSpec,
    Rows,
    Seed,
    SpeedSpec,
    TaskSpec,
    ThreatSpec,
    Workers,
)

if TYPE_CHECKING:
    from advkit.evaluation.api import Plan
    from advkit.evaluation.report.document import Report

UNTRUSTWORTHY = 3


def evaluate(
    attack: Annotated[str, typer.Option(help="Attack, e.g. pgd:steps=100 (see `advkit list attacks`).")] = "pgd",
    defense: DefenseSpec = "none",
    task: TaskSpec = "fashion-mnist",
    model: ModelSpec = None,
    threat_model: ThreatSpec = None,
    goal: GoalSpec = None,
    n: Rows = None,
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: BatchSize = None,
    speed: SpeedSpec = "fp32",
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
    plots: Annotated[bool, typer.Option(help="Draw plots into the run folder.")] = True,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Print every attack, metric, class and finding with advice.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Attack a model under a defense and report its robust accuracy.

    Exit status: 0 done, 2 a mistake in the request, 3 the run has errors or flags that make the number untrustworthy.
    """
    from advkit.evaluation.api import plan, run_digest
    from advkit.evaluation.run.store import check_folder

    check_folder(out if out is not None else Path("runs"))
    resolved = plan(
        attack,
        defense,
        task,
        model,
        threat_model,
        goal,
        n=n,
        seed=seed,
        device=device,
        batch_size=batch_size,
        speed=speed,
        beside=beside,
        progress=sys.stderr.isatty(),
    )
    folder = out if out is not None else Path("runs") / run_digest(resolved)[:16]
    report = carry_out(resolved, folder, plots=plots, as_json=as_json, workers=workers, verbose=verbose)
    if untrustworthy(report):
        raise typer.Exit(UNTRUSTWORTHY)


def untrustworthy(report: Report) -> bool:
    """Whether a flag or an errored row makes the number one not to be trusted."""
    data = report.to_dict()
    return any(flag["severity"] == "unreliable" for flag in data["diagnostics"]["flags"])


def carry_out(
    resolved: Plan, folder: Path, *, plots: bool, as_json: bool, workers: int | None = None, verbose: bool = False
) -> Report:
    """Run a plan with a progress bar, then print what came out."""
    import shlex

    from advkit.cli.progress import Bars
    from advkit.cli.reports import print_brief, print_full
    from advkit.evaluation.api import execute
    from advkit.evaluation.figures.pictures import draw

    command = shlex.join(["advkit", *sys.argv[1:]])
    with Bars(hidden=as_json) as bars:
        report = execute(resolved, out=folder, watch=bars.watch, command=command, workers=workers)
    drawn = draw(resolved, folder, report) if plots else []
    if as_json:
        typer.echo(report.to_json())
        return report
    (print_full if verbose else print_brief)(report, folder, drawn)
    return report


def settings_of(report: Report) -> dict[str, Any]:
    """The options that made a report, from its own record of them."""
    title = str(report.to_dict().get("title", ""))
    return dict(part.split("=", 1) for part in title.split(" | ") if "=" in part)
