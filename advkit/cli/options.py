"""Options that several commands share, with one meaning each."""

from __future__ import annotations

from typing import Annotated

import typer

DefenseSpec = Annotated[
    str, typer.Option(help="Defense, e.g. none, pgd_at, trades, pubdef (see `advkit list defenses`).")
]
TaskSpec = Annotated[str, typer.Option(help="Task, e.g. fashion-mnist, digits, folder:path=DIR.")]
ModelSpec = Annotated[
    str | None,
    typer.Option(
        help="Model: an architecture (cnn), zoo:NAME, path:FILE, timm:NAME, torchvision:NAME, python:MODULE:FACTORY.",
        show_default="the task's",
    ),
]
ThreatSpec = Annotated[
    str | None,
    typer.Option(
        help="Threat model, e.g. linf:eps=8/255, tapm, transfer:sources=zoo:NAME.",
        show_default="the attack's or the task's",
    ),
]
GoalSpec = Annotated[
    str | None,
    typer.Option(
        help="The attacker's goal: untargeted, targeted:how=next, ordered-topk:k=5, ...",
        show_default="the attack's or the task's",
    ),
]
Rows = Annotated[
    int | None, typer.Option("--n", "-n", help="Rows to evaluate, the task's first ones.", show_default="all")
]
Seed = Annotated[int, typer.Option(help="The run's only seed.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda[:i] or mps.")]
BatchSize = Annotated[
    int | None,
    typer.Option(help="Rows in flight, recorded together; changes no figure.", show_default="256; fewer for words"),
]
SpeedSpec = Annotated[
    str,
    typer.Option(
        help="How the attack computes: fp32, or bf16, fp16, channels_last, compile joined by +. Verdicts stay fp32.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes of one thread each that share the batches (CPU); changes no figure.",
        show_default="one per core for long work",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else, to standard output.")]


def listed(text: str) -> list[str]:
    """The specs of a list with commas between; a spec that has commas itself stands in brackets."""
    from advkit.core.registry import parse_arguments

    return [one[1:-1] if one.startswith("[") else one for one in (each.text for each in parse_arguments(text))]
