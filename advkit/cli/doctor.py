"""`advkit doctor`: whether this installation works, and whether a model's robust accuracy can be trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advkit.cli.options import Asked, Json, takes_request

if TYPE_CHECKING:
    from advkit.evaluation.run.case import Case
    from advkit.evaluation.trust.findings import Finding

UNTRUSTWORTHY = 3
PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "safetensors", "matplotlib", "jsonschema")
LINE = "#0072B2"
STYLES = {"info": "dim", "warning": "yellow", "unreliable": "bold red"}


@takes_request("goal", "n", "batch_size", "speed", "sample_timeout", "budget")
def doctor(
    asked: Asked,
    rows: Annotated[int, typer.Option(min=1, help="Samples for the expensive checks, the task's first ones.")] = 100,
    draws: Annotated[int, typer.Option(min=1, help="Random points tried around every robust sample.")] = 1000,
    out: Annotated[
        Path | None, typer.Option(help="Folder for doctor.json and the curves as PNG.", show_default="nothing written")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check whether a model's gradients can be trusted and whether the attack does its job.

    The answer comes first. Without --model and --defense the installation is checked too, and told after it: versions,
    devices, data at hand.
    Exit status: 0 nothing unreliable, 2 a mistake in the request, 3 a finding makes robust accuracy unreliable.
    """
    from rich.console import Console

    from advkit.evaluation.run.store import check_folder

    if out is not None:
        check_folder(out)
    console = Console()
    document: dict[str, Any] = {}
    from advkit.evaluation.api import resolve
    from advkit.evaluation.execute import preflight

    case = resolve(**asked, n=rows, progress=not as_json)
    preflight(case)
    findings, curves = _examine(case, rows, draws, as_json)
    if asked["model"] is None and asked["defense"] == "none":
        document["installation"] = installation()
    document |= {
        "case": {**case.specs, "rows": case.n, "seed": case.seed, "device": case.device},
        "findings": [_plain(finding) for finding in findings],
        "curves": curves,
    }
    written = _write(document, curves, out) if out is not None else []
    if as_json:
        typer.echo(json.dumps(document, indent=2))
    else:
        _print_findings(console, case, findings, curves)
        if "installation" in document:
            _print_installation(console, document["installation"])
        if written:
            console.print(f"written: {', '.join(map(str, written))}", soft_wrap=True, highlight=False)
    if any(finding.severity == "unreliable" for finding in findings):
        raise typer.Exit(UNTRUSTWORTHY)


def installation() -> dict[str, Any]:
    """Versions, devices and the data at hand, as JSON values."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from advkit import __version__
    from advkit.core.errors import AdvkitError
    from advkit.models import zoo
    from advkit.tasks import TASKS

    packages: dict[str, str] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "missing"
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    devices += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    data: dict[str, str] = {}
    for name in TASKS.names():
        try:
            task = TASKS.build(name)
            training = task.training()
            trainable = "no training data" if training is None else f"{len(training)} rows to train on"
            data[name] = f"{len(task)} rows to evaluate, {trainable}"
        except AdvkitError as error:
            data[name] = f"not at hand: {str(error).splitlines()[0]}"
    broken = []
    cards = zoo.cards()
    for card in cards:
        try:
            zoo.load(card.name)
        except AdvkitError as error:
            broken.append(f"{card.name}: {error}")
    return {
        "advkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices,
        "data": data,
        "zoo": {"models": len(cards), "broken": broken},
    }


def _examine(case: Case, rows: int, draws: int, quiet: bool) -> tuple[list[Finding], dict[str, Any]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from advkit.evaluation.trust.battery import battery

    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=quiet) as bars:
        bar = bars.add_task("", total=None)

        def advance(name: str, done: int, total: int) -> None:
            bars.update(bar, description=name, completed=done, total=total)

        return battery(case, rows=rows, draws=draws, progress=advance)


def _plain(finding: Finding) -> dict[str, Any]:
    return {**finding.to_dict(), "message": finding.message, "advice": finding.advice}


def _print_installation(console: Any, seen: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="installation", title_justify="left", title_style="bold", box=box.SIMPLE, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    missing = [name for name, version in seen["packages"].items() if version == "missing"]
    table.add_row("advkit", f"{seen['advkit']} on Python {seen['python']}, {seen['platform']}")
    table.add_row("packages", Text(", ".join(f"{name} {version}" for name, version in seen["packages"].items())))
    if missing:
        table.add_row("missing", Text(f"{', '.join(missing)}: install advkit again", style="red"))
    table.add_row("devices", Text(", ".join(seen["devices"])))
    for name, line in seen["data"].items():
        table.add_row(Text(name), Text(line, style="dim" if line.startswith("not at hand") else ""))
    zoo = seen["zoo"]
    line = "; ".join(zoo["broken"]) or f"{zoo['models']} models, every hash right"
    table.add_row("zoo", Text(line, style="red" if zoo["broken"] else ""))
    console.print(table)


def _print_findings(console: Any, case: Case, findings: Sequence[Finding], curves: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from advkit.evaluation.trust.findings import SEVERITIES

    what = " | ".join(f"{name}={case.specs[name]}" for name in ("model", "defense", "task", "threat_model", "attack"))
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("finding", overflow="fold")
    table.add_column("evidence", overflow="fold")
    table.add_column("advice", overflow="fold")
    for finding in sorted(findings, key=lambda f: -SEVERITIES.index(f.severity)):
        style = STYLES[finding.severity]
        table.add_row(
            Text(f"{finding.id}\n{finding.severity}", style=style), Text(finding.message), Text(finding.advice)
        )
    console.print(Text(what, style="bold"), soft_wrap=True)
    console.print(_verdict(findings, curves["rows"]))
    if findings:
        console.print(table)

    measured = Table(box=box.SIMPLE_HEAD, title="measured", title_justify="left", title_style="bold")
    measured.add_column("what")
    measured.add_column("robust accuracy", overflow="fold")
    for name, text in _measured(curves):
        measured.add_row(Text(name), Text(text))
    console.print(measured)


def _verdict(findings: Sequence[Finding], rows: int) -> Any:
    from rich.text import Text

    grave = sum(finding.severity == "unreliable" for finding in findings)
    warned = sum(finding.severity == "warning" for finding in findings)
    if grave:
        noun = "finding makes" if grave == 1 else "findings make"
        return Text(f"{grave} {noun} a robust accuracy of this model and attack unreliable", style="bold red")
    if warned:
        return Text(f"{warned} warning{'s' * (warned > 1)}: read before you report a number", style="yellow")
    return Text(f"no check speaks against the numbers ({rows} samples)", style="green")


def _measured(curves: dict[str, Any]) -> list[tuple[str, str]]:
    def percent(value: float) -> str:
        return f"{100 * value:.1f} %"

    def series(name: str, axis: str) -> str:
        pairs = zip(curves[name][axis], curves[name]["robust_accuracy"], strict=True)
        return ", ".join(f"{x:.3g}: {percent(y)}" for x, y in pairs)

    titles = {"eps": ("eps", "eps sweep"), "iterations": ("steps", "iterations"), "restarts": ("restarts", "restarts")}
    lines = [(title, series(name, axis)) for name, (axis, title) in titles.items() if name in curves]
    if "losses" in curves:
        lines.append(("loss", ", ".join(f"{name}: {percent(value)}" for name, value in curves["losses"].items())))
    if "white_box" in curves:
        lines.append(("all white-box runs", percent(curves["white_box"])))
    if "square" in curves:
        lines.append((f"and square ({curves['square']['queries']})", percent(curves["square"]["robust_accuracy"])))
    if "transfer" in curves:
        transfer = curves["transfer"]
        lines.append((f"and transfer from {transfer['surrogate']}", percent(transfer["robust_accuracy"])))
    if "random_search" in curves:
        search = curves["random_search"]
        text = f"{search['draws']} points each break {search['broken']} of {search['rows']} samples"
        lines.append(("random search", text))
    if curves["indicators"]:
        named = sorted(curves["indicators"].items())
        lines.append(("indicators", ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in named)))
    return lines


def _write(document: dict[str, Any], curves: dict[str, Any], out: Path) -> list[Path]:
    """doctor.json and a figure per curve."""
    from advkit.evaluation.figures.plots import save
    from advkit.evaluation.report import write_atomic

    target = out / "doctor.json"
    write_atomic(target, json.dumps(document, indent=2) + "\n")
    figures = {"eps": _eps_figure(curves), "iterations": _steps_figure(curves), "loss": _margin_figure(curves)}
    drawn = {name: figure for name, figure in figures.items() if figure is not None}
    return [target, *(save(figure, out / f"{name}.png") for name, figure in drawn.items())]


def _eps_figure(curves: dict[str, Any]) -> Any:
    from advkit.evaluation.figures.plots import Point, robust_accuracy_curve
    from advkit.evaluation.stats import wilson

    if "eps" not in curves:
        return None
    n = curves["rows"]
    points = []
    for eps, value in zip(curves["eps"]["eps"], curves["eps"]["robust_accuracy"], strict=True):
        interval = wilson(round(value * n), n)
        points.append(Point(eps, value, interval.low, interval.high))
    return robust_accuracy_curve(points, title="PGD, margin loss")


def _steps_figure(curves: dict[str, Any]) -> Any:
    from matplotlib.ticker import PercentFormatter

    if "iterations" not in curves:
        return None
    steps = curves["iterations"]["steps"]
    figure, axes = _axes("robust accuracy by steps", "steps")
    axes.plot(steps, curves["iterations"]["robust_accuracy"], color=LINE, marker="o", markersize=5)
    axes.set_xscale("log")
    axes.set_xticks(steps, [str(step) for step in steps])
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    return figure


def _margin_figure(curves: dict[str, Any]) -> Any:
    margins = curves.get("loss", {}).get("mean_margin")
    if not margins:
        return None
    figure, axes = _axes("the attack's mean margin, best so far", "queries")
    axes.plot(range(1, len(margins) + 1), margins, color=LINE)
    return figure


def _axes(title: str, label: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.8), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
