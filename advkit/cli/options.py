"""Options that several commands share, with one meaning each."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

Asked = Mapping[str, Any]
"""The options of a request by name: what `advkit.evaluation.plan.Request` is made of."""

DefenseSpec = Annotated[
    str, typer.Option(help="Defense, e.g. none, pgd_at, trades, pubdef (see `advkit list defenses`).")
]
TaskSpec = Annotated[str, typer.Option(help="Task, e.g. fashion-mnist, digits, folder:path=DIR.")]
_Task = Annotated[
    str | None,
    typer.Option(
        help="Task, e.g. fashion-mnist, digits, folder:path=DIR.",
        show_default="fashion-mnist; prompts for attacks on words",
    ),
]
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
SampleTimeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which a sample whose attack or victim does not come back is given up as an error.",
        show_default="none",
    ),
]
Budget = Annotated[
    str | None,
    typer.Option(
        help="propagations=N: forward and backward passes that an attack may spend on a sample, both together.",
        show_default="none",
    ),
]
Format = Annotated[str, typer.Option("--format", help="Of plots: png, svg or pdf.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines, and nothing else, to standard output.")]


AttackSpec = Annotated[
    str, typer.Option(help="Attack, e.g. pgd:steps=100 (see `advkit list attacks`); your own is python:MODULE:NAME.")
]
_REQUEST: dict[str, tuple[Any, Any]] = {
    "attack": (AttackSpec, "pgd"),
    "defense": (DefenseSpec, "none"),
    "task": (_Task, None),
    "model": (ModelSpec, None),
    "threat_model": (ThreatSpec, None),
    "goal": (GoalSpec, None),
    "n": (Rows, None),
    "seed": (Seed, 0),
    "device": (Device, "auto"),
    "batch_size": (BatchSize, None),
    "speed": (SpeedSpec, "fp32"),
    "sample_timeout": (SampleTimeout, None),
    "budget": (Budget, None),
}


def takes_request(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a request; its first parameter gets them as one mapping.

    left_out: options that the command does not have, or has in its own way
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        named = {parameter.name for parameter in own}
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in _REQUEST.items()
            if name not in left_out
        ]

        @functools.wraps(command)
        def with_request(**options: Any) -> None:
            asked = {name: value for name, value in options.items() if name not in named}
            if "task" in asked and asked["task"] is None:
                asked["task"] = ""  # the attack's, or the usual one; None is nobody's task
            command(asked, **{name: value for name, value in options.items() if name in named})

        parameters = [*shared, *(each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own)]
        with_request.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_request.__annotations__ = {each.name: each.annotation for each in parameters}
        return with_request

    return decorate


def listed(text: str) -> list[str]:
    """The specs of a list with commas between; a spec that has commas itself stands in brackets."""
    from advkit.core.registry import parse_arguments

    return [one[1:-1] if one.startswith("[") else one for one in (each.text for each in parse_arguments(text))]
