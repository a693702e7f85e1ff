"""`advkit compare A B`: a paired test of two runs on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compare(
    a: Annotated[Path, typer.Argument(help="Run folder or report.json.")],
    b: Annotated[Path, typer.Argument(help="Run folder or report.json.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Compare runs under other threat models or goals.")] = False,
    level: Annotated[float, typer.Option("--level", help="Confidence level of the intervals.")] = 0.95,
) -> None:
    """Say which of two runs on the same rows is more robust: McNemar's exact test, Newcombe's interval."""
    from advkit.evaluation.report import compare as pairs

    found = pairs.compare(a, b, level=level, force=force)
    if json:
        from json import dumps

        typer.echo(dumps(found.to_dict(), indent=2, allow_nan=False))
        return
    from rich.console import Console

    Console().print(found.table())
    for note in found.notes:
        typer.echo(f"note: {note}")
    typer.echo(found.sentence())
