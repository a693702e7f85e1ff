"""`advkit leaderboard`: every report under a folder, ranked within its task and threat model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def leaderboard(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs; searched for report.json at any depth.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads this annotation at run time
        typer.Option("--out", help="Where leaderboard.html, .md and .json go; the folder itself by default."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print leaderboard.json and write nothing.")] = False,
) -> None:
    """Rank every report under a folder: one self-contained HTML page, Markdown and JSON.

    Every report is counted again from the records beside it; one that does not agree with them is marked.
    """
    from advkit.core.text import printable
    from advkit.evaluation.report import leaderboard as boards

    if json:
        typer.echo(boards.scan(folder).to_json(), nl=False)
        return
    board, paths = boards.write(folder, out)
    typer.echo(f"{_many(len(board), 'report')} in {_many(len(board.groups), 'ranking')}:")
    for path in paths:
        typer.echo(f"  {path}")
    for heading, found in (("not ranked", board.unranked), ("invalid", board.invalid)):
        for name, reason in found:
            typer.echo(printable(f"{heading}: {name}: {reason}"), err=True)
    for entry in (entry for group in board.groups for entry in group.entries):
        if entry.verified.startswith("no:"):
            typer.echo(printable(f"not verified: {entry.path}: {entry.verified.removeprefix('no: ')}"), err=True)


def _many(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
