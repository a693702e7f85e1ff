"""How commands print a report: a page that fits 80 columns and 15 lines, or everything."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from advkit.evaluation.report.document import Report

_NARROW, _WIDE = 60, 120


def print_brief(report: Report, folder: Path, plots: Sequence[Path] = ()) -> None:
    """What decides, and where the rest is."""
    console, width = _console()
    rest = f"`advkit show {folder}` shows all"
    rest += "; plots are beside the report" if plots else ""
    where = [f"report: {folder / 'report.json'}", rest]
    _print(console, [*report.brief(width), *((line, "") for line in where)])


def print_full(report: Report, folder: Path | None = None, plots: Sequence[Path] = ()) -> None:
    """Every attack, metric, class and finding with advice."""
    console, width = _console()
    where = [] if folder is None else [f"report: {folder / 'report.json'}"]
    where += [f"plots:  {', '.join(map(str, plots))}"] if plots else []
    _print(console, [*report.full(width), *((line, "") for line in where)])


def _console() -> tuple[Console, int]:
    """The console and the width of a report on it."""
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    return console, max(_NARROW, min(console.width, _WIDE))


def _print(console: Console, lines: Iterable[tuple[str, str]]) -> None:
    from rich.text import Text

    for line, style in lines:
        # Text, not markup: names are shown, never obeyed; paths stay in one piece, to be copied.
        console.print(Text(line, style=style), soft_wrap=True)
