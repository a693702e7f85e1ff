"""`advkit matrix`: sources x attacks x targets, as a table, JSON and a heat map."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from advkit.cli.options import Device, GoalSpec, Json, TaskSpec, listed

_COMMAS = "comma between them, a spec with commas in brackets"


def matrix(
    sources: Annotated[
        str,
        typer.Option(
            help=f"Source models, {_COMMAS}; a+b is the ensemble of two, public the task's public zoo models."
        ),
    ] = "public",
    attacks: Annotated[
        str, typer.Option(help=f"Attacks, {_COMMAS}; a sum such as ni+ti is a composition.")
    ] = "[pgd:steps=10,step_size=0.25],mifgsm",
    targets: Annotated[
        str,
        typer.Option(
            help=f"Target models, {_COMMAS}; DEFENSE@MODEL for one with a defense, victims the task's zoo victims."
        ),
    ] = "victims",
    task: TaskSpec = "fashion-mnist",
    threat_model: Annotated[
        str | None, typer.Option(help="A ball, e.g. linf:eps=8/255.", show_default="the task's")
    ] = None,
    eps: Annotated[
        str | None, typer.Option(help="Radius, e.g. 0.1 or 8/255.", show_default="the threat model's")
    ] = None,
    goal: GoalSpec = "untargeted",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Rows, the task's first ones.")] = 500,
    seeds: Annotated[str, typer.Option(help="How many seeds random attacks get, or which: 0,1,2.")] = "3",
    budget: Annotated[
        str, typer.Option(help="Gradients per image of the second table: auto, a number, or none for no such table.")
    ] = "auto",
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Also compare the perturbations of every two pairs.")
    ] = False,
    device: Device = "auto",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes of one thread each that make images (CPU); change no figure.")
    ] = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of image sets, shared by all runs.", show_default="the user's cache")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for matrix.json, matrix.md and heatmap.png.", show_default="runs/matrix")
    ] = None,
    plots: Annotated[bool, typer.Option(help="Draw the heat maps.")] = True,
    as_json: Json = False,
) -> None:
    """Make images with every attack on every source, show them to every target, and tell how many stay right.

    Image sets are made once and kept by content: a command that was cut off goes on where it stopped.
    """
    import shlex

    from rich.console import Console
    from rich.markdown import Markdown

    from advkit.evaluation.run.store import check_folder
    from advkit.evaluation.scenarios.matrix import matrix as make

    folder = out if out is not None else Path("runs") / "matrix"
    check_folder(folder)
    with _Bar(hidden=as_json) as bar:
        made = make(
            listed(sources), listed(attacks), listed(targets), task=task, threat_model=threat_model,
            eps=None if eps is None else _fraction(eps), goal=goal, n=n, seeds=_seeds(seeds),
            equal_budget=_budget(budget), similarity=similarity, device=device, workers=workers, cache=cache,
            out=folder, watch=bar.watch, command=shlex.join(["advkit", *sys.argv[1:]]),
        )  # fmt: skip
    drawn = []
    if plots:
        from advkit.evaluation.figures.plots import save

        drawn.append(save(made.plot(), folder / "heatmap.png"))
        if made.to_dict()["equal_budget"] is not None:
            drawn.append(save(made.plot(equal_budget=True), folder / "heatmap_equal_budget.png"))
    if as_json:
        typer.echo(made.to_json())
        return
    console = Console()
    console.print(Markdown(made.markdown(brief=True)))
    told = ", ".join(str(path) for path in (folder / "matrix.json", folder / "matrix.md", *drawn))
    console.print(f"written: {told}", soft_wrap=True, highlight=False, markup=False)


def _fraction(text: str) -> float:
    from advkit.core.errors import UsageError

    above, slash, below = text.partition("/")
    try:
        return float(above) / float(below) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"eps {text!r}; expected a number such as 0.1 or 8/255") from None


def _seeds(text: str) -> int | list[int]:
    from advkit.core.errors import UsageError

    try:
        found = [int(one) for one in text.split(",")]
    except ValueError:
        raise UsageError(f"seeds {text!r}; expected how many (3) or which (0,1,2)") from None
    return found[0] if "," not in text else found


def _budget(text: str) -> int | str | None:
    from advkit.core.errors import UsageError

    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"budget {text!r}; expected a number of gradients, auto or none") from None


class _Bar:
    """One bar over everything there is to do, on standard error."""

    def __init__(self, *, hidden: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            disable=hidden,
        )
        self._task: object = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._progress.stop()

    def watch(self, text: str, done: int, units: int) -> None:
        """Where the matrix is."""
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task(text, total=units)
        self._progress.update(self._progress.task_ids[0], description=text, completed=done, total=units)
