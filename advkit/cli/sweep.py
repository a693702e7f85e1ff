"""`advkit sweep`: a grid of evaluations on any engine, or one evaluation at several radii."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advkit.cli.options import Asked, Json, takes_request

if TYPE_CHECKING:
    from rich.table import Table

    from advkit.evaluation.sweep import Curve, Sweep
    from advkit.evaluation.sweep.table import Progress, Row

FAILED = 3
_SHOWN = 40
"""Cells that a terminal shows; the file has all."""
_EVERY = 1.0  # seconds between two looks at a folder

_Grid = Annotated[
    Path | None, typer.Argument(help="The grid, a YAML file; with --cell the folder of a sweep.", show_default=False)
]
_Out = Annotated[Path, typer.Option(help="Folder with one run folder for each cell; what is done there is skipped.")]
_Engine = Annotated[str, typer.Option(help="local, submitit (SLURM) or ray, with settings: submitit:partition=gpu.")]
_Workers = Annotated[int | None, typer.Option(min=1, help="Lines at a time.", show_default="one per core")]
_Shard = Annotated[int | None, typer.Option(min=1, help="Rows of a shard.", show_default="what a million passes are")]
_Retries = Annotated[int, typer.Option(min=0, help="How often a line that crashes is tried again.")]
_Again = Annotated[bool, typer.Option("--again", help="Also run cells that an earlier sweep refused or put aside.")]
_Dry = Annotated[
    bool, typer.Option("--dry-run", "--list", help="Write and print the list of commands, and run nothing.")
]
_Cell = Annotated[str | None, typer.Option(help="Run these lines of the sweep in the folder, by number: 3 or 3,4,9.")]
_Status = Annotated[Path | None, typer.Option(help="Where the sweep in a folder is, from its files, until it is over.")]
_Eps = Annotated[
    str | None, typer.Option(help="Radii of a curve in place of a grid: START:STOP:POINTS (0:16/255:17) or 0.05,0.1.")
]
_Trust = Annotated[
    bool,
    typer.Option("--trust", help="Also run cells of a file that name what is not advkit's own (python:, hf:...)."),
]
_Plots = Annotated[bool, typer.Option(help="Draw the curve.")]


_TAKES = {
    "--status": ("status", "as_json"),
    "--cell": ("grid", "cell", "trust", "as_json"),
    "--eps": ("eps", "out", "workers", "plots", "as_json"),
    "grid": ("grid", "out", "engine", "workers", "shard", "retries", "again", "dry_run", "trust", "as_json"),
}
"""Parameters that each use of the command has; a curve has those of an evaluation, too."""


@takes_request()
def sweep(
    asked: Asked,
    context: typer.Context,
    grid: _Grid = None,
    out: _Out = Path("runs"),
    engine: _Engine = "local",
    workers: _Workers = None,
    shard: _Shard = None,
    retries: _Retries = 1,
    again: _Again = False,
    dry_run: _Dry = False,
    cell: _Cell = None,
    status: _Status = None,
    eps: _Eps = None,
    trust: _Trust = False,
    plots: _Plots = True,
    as_json: Json = False,
) -> None:
    """Run every cell of a grid (advkit sweep grid.yaml), or one evaluation at several radii (--eps 0:16/255:17).

    Cells whose parts do not fit together are listed with their reason, and the sweep goes on. What was cut off goes on
    where it stopped, with the same command. The options of an evaluation (--attack to --budget) belong to --eps; of a
    grid they stand in its file.

    Exit status: 0 every cell that fits has its number, 2 a mistake in the request, 3 a cell failed or was put aside.
    """
    mode = _mode(context, asked)
    if mode == "--status" and status is not None:
        _show_status(status, as_json)
    elif mode == "--cell" and grid is not None and cell is not None:
        _carry_out(grid, cell, trust, as_json)
    elif mode == "--eps" and eps is not None:
        _trace(asked, eps, out, workers, plots, as_json)
    elif grid is not None:
        _sweep(grid, out, engine, workers, shard, retries, again, dry_run, trust, as_json)


def _mode(context: typer.Context, asked: Asked) -> str:
    """What is asked for; UsageError where that is nothing, or where an option is given that would say nothing there."""
    from advkit.core.errors import UsageError

    names = {each.name: max(each.opts, key=len) for each in context.command.params if each.name is not None}
    given = {name for name in names if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"}
    mode = next((names[each] for each in ("status", "cell", "eps") if each in given), "grid")
    if "grid" not in given and mode in ("grid", "--cell"):
        lacking = "sweep takes one of: a grid (GRID.yaml), a curve (--eps), a folder (--status FOLDER)"
        raise UsageError(
            lacking if mode == "grid" else "--cell needs the folder of the sweep: advkit sweep FOLDER --cell 3"
        )
    takes = {*_TAKES[mode], *(asked if mode == "--eps" else ())}
    for name in (each for each in names if each in given and each not in takes):
        shown = "a grid" if name == "grid" else names[name]
        if name in asked and mode == "grid":
            raise UsageError(f"{shown} belongs to --eps; of a grid it stands in the file")
        said = ", ".join(names[each] for each in names if each in _TAKES[mode] and names[each] != mode)
        raise UsageError(f"{shown} does not go with {'a grid' if mode == 'grid' else mode}, which takes {said}")
    return mode


def _sweep(
    grid: Path,
    out: Path,
    engine: str,
    workers: int | None,
    shard: int | None,
    retries: int,
    again: bool,
    dry_run: bool,
    trust: bool,
    as_json: bool,
) -> None:
    import json

    from advkit.evaluation.screen import Works
    from advkit.evaluation.sweep.api import LOOKING, RUNNING, carry_out, prepare
    from advkit.evaluation.sweep.engines import ENGINES
    from advkit.evaluation.sweep.table import failed, to_dict

    chosen = ENGINES.build(engine)  # a slip in its name is told before anything is looked at
    watched = False if as_json else None
    with Works(watched) as shows:
        made = prepare(grid, out, shard=shard, trust=trust, watch=functools.partial(shows.works, LOOKING))
    if dry_run:
        _print_lines(made, as_json)
        return
    with Works(watched) as shows:
        carry_out(
            made,
            engine=chosen,
            workers=workers,
            retries=retries,
            again=again,
            watch=functools.partial(shows.works, RUNNING),
        )
    rows = made.rows  # once: every row is read from its folder
    if as_json:
        typer.echo(json.dumps(to_dict(rows), indent=2))
    else:
        _print_table(made.folder, rows)
    if failed(rows):
        raise typer.Exit(FAILED)


def _print_lines(made: Sweep, as_json: bool) -> None:
    import shlex

    from advkit.core.text import printable

    for line in made.lines:
        if as_json:
            typer.echo(line.to_json(made.folder))
        elif line.reason:
            parts = " ".join(f"{name}={value}" for name, value in line.request.items())
            typer.echo(printable(f"{line.line}: not run ({parts}): {line.reason}"))
        else:
            typer.echo(printable(f"{line.line}: {shlex.join(['advkit', *line.argv(made.folder)])}"))


def _print_table(home: Path, rows: list[Row]) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    from advkit.evaluation.sweep.api import TABLE
    from advkit.evaluation.sweep.table import markdown

    console = Console()
    # Numbers and problems first: parts that do not fit are many, and the file has them.
    order = sorted(rows, key=lambda row: (row.state in ("refused", "excluded"), row.cell))
    console.print(Markdown(markdown(order[:_SHOWN], rows)))
    more = f" ({len(rows) - _SHOWN} cells more)" if len(rows) > _SHOWN else ""
    console.print(f"written: {home / TABLE}{more}", soft_wrap=True, highlight=False, markup=False)


def _carry_out(home: Path, cells: str, trust: bool, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from advkit.core.errors import UsageError
    from advkit.core.text import printable
    from advkit.evaluation.sweep.line import PROBLEMS, carry_out, read_lines

    try:
        numbers = [int(each) for each in cells.split(",")]
    except ValueError:
        raise UsageError(f"cell {cells!r}; expected numbers of lines with commas between: 3 or 3,4,9") from None
    lines = read_lines(home)
    found = [each for line in lines if line.line in numbers for each in line.outside]
    if found and not trust:
        raise UsageError(f"the lines would load what is not advkit's own ({'; '.join(found)}): run them with --trust")
    notes = [carry_out(home, number) for number in numbers]
    for number, note in zip(numbers, notes, strict=True):
        said = json.dumps({"line": number, **asdict(note)}) if as_json else f"{number}: {note.state} {note.reason}"
        typer.echo(printable(said.rstrip()))
    if any(note.state in PROBLEMS for note in notes):
        raise typer.Exit(FAILED)


def _trace(asked: Asked, eps: str, out: Path, workers: int | None, plots: bool, as_json: bool) -> None:
    import shlex

    from rich.console import Console
    from rich.markdown import Markdown

    from advkit.evaluation.plan import Request
    from advkit.evaluation.progress import Bars
    from advkit.evaluation.run.store import check_folder
    from advkit.evaluation.screen import shown
    from advkit.evaluation.sweep.curve import radii, trace

    levels = radii(eps)
    check_folder(out / "sweep")
    command = shlex.join(["advkit", *sys.argv[1:]])
    watched = False if as_json else None
    with Bars(watched):
        made: Curve = trace(
            Request(**asked),
            levels,
            out,
            workers=workers or 1,
            progress=shown(watched),
            command=command,
        )
    files = made.save(plots)
    if as_json:
        typer.echo(made.to_json())
        return
    console = Console()
    console.print(Markdown(made.markdown()))
    console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True, highlight=False, markup=False)


def _show_status(home: Path, as_json: bool) -> None:
    import json
    import time

    from rich.console import Console
    from rich.live import Live

    from advkit.evaluation.sweep.line import read_lines
    from advkit.evaluation.sweep.table import progress_of

    lines = read_lines(home)
    now = progress_of(home, lines)
    if as_json:
        typer.echo(json.dumps({"states": dict(now.states), "over": now.over}))
        return
    console = Console()
    if now.over or not console.is_terminal:
        console.print(_status_table(now))
        return
    with Live(_status_table(now), console=console, auto_refresh=False) as live:
        while not now.over:
            time.sleep(_EVERY)
            now = progress_of(home, lines)
            live.update(_status_table(now), refresh=True)


def _status_table(now: Progress) -> Table:
    from rich.table import Table
    from rich.text import Text

    from advkit.core.text import printable

    table = Table(title=f"{sum(now.states.values())} lines")
    for name in ("state", "lines", "what"):
        table.add_column(name)
    for state, number in sorted(now.states.items()):
        table.add_row(state, str(number), "")
    for line, records, size in now.at_work:
        what = f"{line.request['attack']} on {line.request['defense']}, {line.request['task']}"
        table.add_row(f"line {line.line}", f"{records}/{size or '?'} records", Text(printable(what)))
    for line, note in now.problems:
        table.add_row(note.state, f"line {line.line}", Text(printable(note.reason or "not run on yet")))
    return table
