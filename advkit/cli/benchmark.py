"""`advkit benchmark`: our suites beside the reference's AutoAttack, PGD beside bare passes, operations per step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from advkit.cli.options import Json, SpeedSpec, TaskSpec, listed

MODELS = ",".join(f"zoo:fashion-mnist-cnn{kind}" for kind in ("", "-pgd_at", "-trades", "-pubdef"))
PARTS = ("suites", "overhead", "ops")


def benchmark(
    models: Annotated[str, typer.Option(help="Models, comma between them; a spec with commas in brackets.")] = MODELS,
    suites: Annotated[str, typer.Option(help="Attacks of ours to time, comma between them.")] = (
        "thorough,lean,autoattack"
    ),
    reference: Annotated[
        str, typer.Option(help="pyautoattack (AutoAttack standard), or the spec of any attack to time against.")
    ] = "pyautoattack",
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Rows, the task's first ones.")] = 200,
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
    parts: Annotated[str, typer.Option(help=f"What to measure: {', '.join(PARTS)}.")] = ",".join(PARTS),
    out: Annotated[
        Path | None, typer.Option(help="Folder for benchmarks.md and benchmarks.json.", show_default="nothing written")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure our suites beside a peer in this process: robust accuracy, flags per image, passes, CPU time.

    Runs on the CPU, one thread, for minutes. What is done so far is written after every model.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from advkit import benchmark as bench
    from advkit.core.errors import UsageError
    from advkit.evaluation.run.store import check_folder

    wanted = listed(parts)
    if unknown := sorted(set(wanted) - set(PARTS)):
        raise UsageError(f"nothing to measure is called {', '.join(unknown)}; expected some of {', '.join(PARTS)}")
    threats = [None] if threat_models is None else listed(threat_models)
    counts = _counts(repetitions, len(threats))
    if out is not None:
        check_folder(out)
    progress = Console(stderr=True, quiet=as_json, highlight=False)
    given = {"models": models, "suites": suites, "reference": reference, "n": n, "repetitions": repetitions}
    given |= {"task": task, "threat-models": threat_models, "speed": speed, "workers": workers, "parts": parts}
    found: dict[str, Any] = {"command": _command(given), "environment": bench.environment(), "suites": []}
    if "ops" in wanted:
        found["ops"] = bench.dispatcher_ops()
    if "overhead" in wanted:
        found["overhead"] = bench.pgd_overhead()
    if "suites" in wanted:
        settings = {"task": task, "n": n, "reference": reference, "speed": speed}
        asked = [
            {"model": model, "suites": listed(suites), "threat_model": threat, "repetitions": times, **settings}
            for threat, times in zip(threats, counts, strict=True)
            for model in listed(models)
        ]
        for entry in bench.entries(asked, workers, lambda line: progress.print(line, markup=False, soft_wrap=True)):
            found["suites"].append(entry)
            if out is not None:
                _write(found, bench.markdown(found), out)
    if out is not None:
        _write(found, bench.markdown(found), out)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console().print(Markdown(bench.markdown(found)))


def _counts(text: str, threats: int) -> list[int]:
    """Repetitions of each threat model."""
    from advkit.core.errors import UsageError

    words = listed(text)
    if not all(word.isdecimal() and int(word) for word in words) or len(words) not in (1, threats):
        raise UsageError(f"repetitions {text!r}; expected a whole number >= 1, or {threats} of them, comma between")
    found = [int(word) for word in words]
    return found * threats if len(found) == 1 else found


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


def _write(found: dict[str, Any], page: str, out: Path) -> None:
    from advkit.core.errors import UsageError

    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "benchmarks.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        (out / "benchmarks.md").write_text(page, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out} can't be written ({error.strerror or error}): name another --out") from error
