"""`advkit matrix`: sources x attacks x targets, as a table, JSON and a heat map."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advkit.cli.options import Device, Format, GoalSpec, Json, TaskSpec, listed

if TYPE_CHECKING:
    from advkit.evaluation.matrix import Matrix

_COMMAS = "comma between them, a spec with commas in brackets"
_Sources = Annotated[
    str,
    typer.Option(help=f"Source models, {_COMMAS}; a+b is the ensemble of two, public the task's public zoo models."),
]
_Attacks = Annotated[str, typer.Option(help=f"Attacks, {_COMMAS}; a sum such as ni+ti is a composition.")]
_Targets = Annotated[
    str,
    typer.Option(
        help=f"Target models, {_COMMAS}; DEFENSE@MODEL for one with a defense, victims the task's zoo victims."
    ),
]
_Ball = Annotated[str | None, typer.Option(help="A ball, e.g. linf:eps=8/255.", show_default="the task's")]
_Eps = Annotated[str | None, typer.Option(help="Radius, e.g. 0.1 or 8/255.", show_default="the threat model's")]
_Rows = Annotated[int, typer.Option("--n", "-n", min=1, help="Samples, the task's first ones.")]
_Seeds = Annotated[str, typer.Option(help="How many seeds random attacks get, or which: 0,1,2.")]
_Budget = Annotated[
    str, typer.Option(help="Gradients per image of the second table: auto, a number, or none for no such table.")
]
_Similarity = Annotated[bool, typer.Option("--similarity", help="Also compare the perturbations of every two pairs.")]
_Workers = Annotated[
    int, typer.Option(min=1, help="Processes of one thread each that make images (CPU); change no figure.")
]
_Cache = Annotated[
    Path | None, typer.Option(help="Folder of image sets, shared by all runs.", show_default="the user's cache")
]
_Out = Annotated[
    Path | None, typer.Option(help="Folder for matrix.json, matrix.md and heatmap.png.", show_default="runs/matrix")
]
_Plots = Annotated[bool, typer.Option(help="Draw the heat maps.")]


def matrix(
    sources: _Sources = "public",
    attacks: _Attacks = "[pgd:steps=10,step_size=0.25],mifgsm",
    targets: _Targets = "victims",
    task: TaskSpec = "fashion-mnist",
    threat_model: _Ball = None,
    eps: _Eps = None,
    goal: GoalSpec = "untargeted",
    n: _Rows = 500,
    seeds: _Seeds = "3",
    budget: _Budget = "auto",
    similarity: _Similarity = False,
    device: Device = "auto",
    workers: _Workers = 1,
    cache: _Cache = None,
    out: _Out = None,
    plots: _Plots = True,
    form: Format = "png",
    as_json: Json = False,
) -> None:
    """Make images with every attack on every source, show them to every target, and count how many stay right.

    Image sets are made once and kept by content: a command that was cut off goes on where it stopped.
    """
    import shlex

    from advkit.evaluation.figures import check_format
    from advkit.evaluation.matrix import MatrixRequest, execute
    from advkit.evaluation.run.store import check_folder

    folder = out if out is not None else Path("runs") / "matrix"
    check_format(form)
    check_folder(folder)
    request = MatrixRequest(
        sources=listed(sources),
        attacks=listed(attacks),
        targets=listed(targets),
        task=task,
        threat_model=threat_model,
        eps=None if eps is None else _fraction(eps),
        goal=goal,
        n=n,
        seeds=_seeds(seeds),
        equal_budget=_budget(budget),
        similarity=similarity,
        device=device,
    )
    command = shlex.join(["advkit", *sys.argv[1:]])
    progress = False if as_json else None
    result = execute(request, workers=workers, cache=cache, out=folder, progress=progress, command=command)
    drawn = _heatmaps(result, folder, form) if plots else []
    if as_json:
        typer.echo(result.to_json())
    else:
        _print(result, [folder / "matrix.json", folder / "matrix.md", *drawn])


def _heatmaps(result: Matrix, folder: Path, form: str) -> list[Path]:
    from advkit.evaluation.figures.plots import save

    drawn = [save(result.plot(), folder / f"heatmap.{form}")]
    if result.to_dict()["equal_budget"] is not None:
        drawn.append(save(result.plot(equal_budget=True), folder / f"heatmap_equal_budget.{form}"))
    return drawn


def _print(result: Matrix, files: Sequence[Path]) -> None:
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(result.markdown(brief=True)))
    console.print(f"written: {', '.join(map(str, files))}", soft_wrap=True, highlight=False, markup=False)


def _fraction(text: str) -> float:
    from advkit.core.errors import UsageError
    from advkit.core.registry.fields import Misfit, read

    try:
        return float(read(text, float))
    except Misfit:
        raise UsageError(f"eps {text!r}; expected a number such as 0.1 or 8/255") from None


def _seeds(text: str) -> int | list[int]:
    from advkit.core.errors import UsageError

    try:
        numbers = [int(one) for one in text.split(",")]
    except ValueError:
        raise UsageError(f"seeds {text!r}; expected how many (3) or which (0,1,2)") from None
    return numbers[0] if "," not in text else numbers


def _budget(text: str) -> int | str | None:
    from advkit.core.errors import UsageError

    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"budget {text!r}; expected a number of gradients, auto or none") from None
