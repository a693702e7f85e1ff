"""`advkit benchmark`: our suites against the reference's AutoAttack, PGD against bare passes, operations per step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from advkit.cli.options import Json, SpeedSpec, TaskSpec, listed

MODELS = ",".join(f"zoo:fashion-mnist-cnn{kind}" for kind in ("", "-pgd_at", "-trades", "-pubdef"))
PARTS = ("suites", "overhead", "ops", "goals", "sizes")
USUAL = ",".join(PARTS[:3])


def benchmark(
    models: Annotated[str, typer.Option(help="Models, comma between them; a spec with commas in brackets.")] = MODELS,
    suites: Annotated[str, typer.Option(help="Attacks of ours to time, comma between them.")] = (
        "thorough,lean,autoattack"
    ),
    reference: Annotated[
        str, typer.Option(help="pyautoattack (AutoAttack standard), or the spec of any attack to time against.")
    ] = "pyautoattack",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Samples, the task's first ones.")] = 200,
    repetitions: Annotated[
        str, typer.Option(help="Interleaved repetitions, each with a seed of its own; or one number per threat model.")
    ] = "3",
    task: TaskSpec = "fashion-mnist",
    threat_models: Annotated[
        str | None, typer.Option(help="Threat models, comma between them.", show_default="the task's")
    ] = None,
    speed: SpeedSpec = "fp32",
    workers: Annotated[
        int, typer.Option(min=1, help="Processes of one thread each that share the pairs of model and threat model.")
    ] = 1,
    parts: Annotated[str, typer.Option(help=f"What to measure: {', '.join(PARTS)}.")] = USUAL,
    out: Annotated[
        Path | None, typer.Option(help="Folder for benchmarks.md and benchmarks.json.", show_default="nothing written")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure our suites against a peer in this process: robust accuracy, broken samples, passes, CPU time.

    Runs on the CPU, one thread, for minutes. What is done so far is written after every model.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from advkit import benchmark as bench
    from advkit.evaluation.run.store import check_folder

    wanted = _parts(parts)
    requests = _requests(
        listed(models), None if threat_models is None else listed(threat_models), repetitions,
        suites=listed(suites), task=task, n=n, reference=reference, speed=speed,
    )  # fmt: skip
    if out is not None:
        check_folder(out)
    progress = Console(stderr=True, quiet=as_json, highlight=False)
    given = {"models": models, "suites": suites, "reference": reference, "n": n, "repetitions": repetitions}
    given |= {"task": task, "threat-models": threat_models, "speed": speed, "workers": workers, "parts": parts}
    results: dict[str, Any] = {"command": _command(given), "environment": bench.environment(), "suites": []}
    if "ops" in wanted:
        results["ops"] = bench.dispatcher_ops()
    if "overhead" in wanted:
        results["overhead"] = bench.pgd_overhead()
    if "sizes" in wanted:
        results["sizes"] = bench.call_sizes()
    results["goals"] = []
    for row in bench.goals_table() if "goals" in wanted else ():
        results["goals"].append(row)
        if out is not None:
            _write(results, out)
    if "suites" in wanted:
        for entry in bench.entries(requests, workers, lambda line: progress.print(line, markup=False, soft_wrap=True)):
            results["suites"].append(entry)
            if out is not None:
                _write(results, out)
    if out is not None:
        _write(results, out)
    if as_json:
        typer.echo(json.dumps(results, indent=2))
    else:
        Console().print(Markdown(bench.markdown(results)))


def _parts(text: str) -> list[str]:
    from advkit.core.errors import UsageError

    parts = listed(text)
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UsageError(f"nothing to measure is called {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    return parts


def _requests(
    models: Sequence[str], threat_models: Sequence[str] | None, repetitions: str, **settings: Any
) -> list[dict[str, Any]]:
    """Keywords of `side_by_side` for every threat model and model."""
    threats = [None] if threat_models is None else threat_models
    return [
        {"model": model, "threat_model": threat, "repetitions": times, **settings}
        for threat, times in zip(threats, _counts(repetitions, len(threats)), strict=True)
        for model in models
    ]


def _counts(text: str, threats: int) -> list[int]:
    """Repetitions of each threat model."""
    from advkit.core.errors import UsageError

    numbers = listed(text)
    if not all(number.isdecimal() and int(number) for number in numbers) or len(numbers) not in (1, threats):
        raise UsageError(f"repetitions {text!r}; expected a whole number >= 1, or {threats} of them, comma between")
    counts = [int(number) for number in numbers]
    return counts * threats if len(counts) == 1 else counts


def _command(given: dict[str, Any]) -> str:
    """The command that these options spell, however it was started."""
    import inspect
    import shlex

    defaults = inspect.signature(benchmark).parameters
    words = ["advkit", "benchmark"]
    for name, value in given.items():
        if value != defaults[name.replace("-", "_")].default:
            words += [f"--{name}", str(value)]
    return shlex.join([*words, "--out", "docs"])


def _write(results: dict[str, Any], out: Path) -> None:
    from advkit import benchmark as bench
    from advkit.evaluation.report import write_atomic

    write_atomic(out / "benchmarks.json", json.dumps(results, indent=2) + "\n")
    write_atomic(out / "benchmarks.md", bench.markdown(results, gpu=(out / "gpu.json").exists()))
