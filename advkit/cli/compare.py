"""`advkit compare`: a paired test of two runs on the same rows, or how near to optimal attacks are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Two run folders or reports; with --optimality any number.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Compare runs under other threat models or goals.")] = False,
    level: Annotated[float, typer.Option("--level", help="Confidence level of the intervals.")] = 0.95,
    optimality: Annotated[
        bool,
        typer.Option(
            "--optimality",
            help="Each attack's distances against the best known for every sample, over all runs in the folders.",
        ),
    ] = False,
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads this annotation at run time
        typer.Option("--out", help="Write the result as JSON to this file, too."),
    ] = None,
) -> None:
    """Say which of two runs on the same rows is more robust: McNemar's exact test, Newcombe's interval.

    With --optimality: how near to the least distances known each minimum-norm attack comes, per case and over all cases
    (AttackBench, arXiv 2404.19460). Runs are counted from their records; nothing is attacked.
    """
    from advkit.core.errors import UsageError

    if not optimality and len(runs) != 2:
        raise UsageError(
            f"{len(runs)} runs; expected two: advkit compare A B (any number with --optimality; `advkit "
            "leaderboard` ranks more)"
        )
    found = _optimality(runs, level) if optimality else _pair(runs, level, force)
    if out is not None:
        from advkit.evaluation.report.document import write_atomic

        write_atomic(out, _text(found))
    if json:
        typer.echo(_text(found))
    else:
        _show(found)


def _pair(runs: list[Path], level: float, force: bool) -> Any:
    from advkit.evaluation.report import compare as pairs

    return pairs.compare(runs[0], runs[1], level=level, force=force)


def _optimality(runs: list[Path], level: float) -> Any:
    from advkit.evaluation.report.optimality import optimality

    return optimality(runs, level)


def _text(found: Any) -> str:
    from json import dumps

    return dumps(found.to_dict(), indent=2, allow_nan=False)


def _show(found: Any) -> None:
    from rich.console import Console

    from advkit.evaluation.report.optimality import Optimality
    from advkit.evaluation.report.text import NO_MEDIAN

    console = Console()
    if not isinstance(found, Optimality):
        console.print(found.table())
        for note in found.notes:
            typer.echo(f"note: {note}")
        typer.echo(found.sentence())
        return
    for table in found.tables():
        console.print(table)
    for case in found.cases:
        if case.without_median:
            typer.echo(f"note: {case.title}: {NO_MEDIAN} ({', '.join(case.without_median)})")
        if case.bounded:
            typer.echo(f"note: {case.title}: the best known distances include {', '.join(case.bounded)}")
    for run, reason in found.skipped:
        typer.echo(f"note: {run} is left out: {reason}")
