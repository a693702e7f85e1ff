"""`advkit leaderboard`: the victims of all reports under a folder, ranked within task, samples and threat model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from advkit.evaluation.report.board import Board


def leaderboard(
    folder: Annotated[Path, typer.Argument(help="Folder that holds runs; searched for report.json at any depth.")],
    out: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads this annotation at run time
        typer.Option("--out", help="Where leaderboard.html, .md and .json go; the folder itself by default."),
    ] = None,
    claims: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option("--claims", help="Folder of RobustBench cards (model_info), listed as claimed and never ranked."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print leaderboard.json and write nothing.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Write again whenever a report changes, until Ctrl-C.")
    ] = False,
    seconds: Annotated[float, typer.Option("--every", help="With --watch: seconds between two looks.")] = 2.0,
) -> None:
    """Rank the victims of all reports under a folder: one self-contained HTML page, Markdown and JSON.

    A victim (weights and defense) has one line per threat model, goal and set of samples. Its score is the worst case
    per sample over its reports. Every report is counted again from the records beside it; one that does not agree with
    them is marked and counts for nothing.
    """
    from advkit.core.errors import UsageError
    from advkit.evaluation.report import leaderboard as boards

    if watch and (json or not 0 < seconds <= 86_400):
        said = (
            "--watch writes files: leave --json out" if json else f"--every {seconds:g}: expected more than 0 seconds"
        )
        raise UsageError(said)
    if json:
        typer.echo(boards.scan(folder, claims).to_json(), nl=False)
        return
    if not watch:
        _tell(*boards.write(folder, out, claims), folder)
        return
    try:
        boards.watch(folder, out, claims, seconds=seconds, told=lambda board, paths: _tell(board, paths, folder))
    except KeyboardInterrupt:
        typer.echo("watching ended")


def _tell(board: Board, paths: list[Path], folder: Path) -> None:
    from advkit.core.text import printable

    reports = _many(len(board.attacks), "report")
    typer.echo(f"{_many(len(board), 'line')} in {_many(len(board.groups), 'ranking')}, of {reports}:")
    for path in paths:
        typer.echo(f"  {path}")
    if not (board.attacks or board.unranked or board.invalid):
        typer.echo(f"no report.json under {folder}: run `advkit evaluate ... --out {folder}/NAME` first", err=True)
    for heading, found in (("not ranked", board.unranked), ("invalid", board.invalid)):
        for name, reason in found:
            typer.echo(printable(f"{heading}: {name}: {reason}"), err=True)
    bare = sum(attack.verified == "no records" for attack in board.attacks.values())
    if bare:
        what = f"{_many(bare, 'report')} without records.jsonl beside {'it' if bare == 1 else 'them'}"
        typer.echo(f"{what}: figures stand as written; put run folders here to have them counted again", err=True)
    for name, attack in sorted(board.attacks.items()):
        if attack.verified.startswith("no:"):
            typer.echo(printable(f"not verified: {name}: {attack.verified.removeprefix('no: ')}"), err=True)


def _many(count: int, word: str) -> str:
    return f"{count} {word}" + ("" if count == 1 else "s")
