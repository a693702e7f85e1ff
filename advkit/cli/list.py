"""`advkit list`: every name the registries hold, with one line each, read without importing torch."""

from __future__ import annotations

import importlib
import json
from typing import Annotated, Any

import typer

from advkit.core.errors import UnknownName
from advkit.core.registry import Registry

REGISTRIES = {
    "attacks": "advkit.attacks:ATTACKS",
    "defenses": "advkit.defenses:DEFENSES",
    "threat-models": "advkit.threat_models:THREAT_MODELS",
    "tasks": "advkit.tasks:TASKS",
    "models": "advkit.models:MODELS",
    "goals": "advkit.threat_models:GOALS",
    "judges": "advkit.threat_models:JUDGES",
}


def registry_of(kind: str) -> Registry[Any]:
    """The registry of a plural word of the command line, singular and underscores forgiven."""
    word = kind.strip().casefold().replace("_", "-")
    for each in (word, f"{word}s"):
        if each in REGISTRIES:
            module, _, attribute = REGISTRIES[each].partition(":")
            found: Registry[Any] = getattr(importlib.import_module(module), attribute)
            return found
    raise UnknownName(f"no kind {kind!r} to list; expected one of {', '.join(REGISTRIES)}")


def list(
    kind: Annotated[str | None, typer.Argument(help=" | ".join(REGISTRIES), show_default="all of them")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """List attacks, defenses, threat models, tasks, models, goals and judges; `advkit show NAME` says more of one."""
    kinds = [*REGISTRIES] if kind is None else [registry_of(kind).plural]
    found = {
        each: [
            {"name": name, "summary": registry.summary(name), "target": registry.target(name)}
            for name in registry.names()
        ]
        for each, registry in ((each, registry_of(each)) for each in kinds)
    }
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for each, rows in found.items():
        table = Table(title=each.replace("-", " "), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
        table.add_column("name", no_wrap=True, style="bold")
        table.add_column("what it is", overflow="fold")
        for row in rows:
            name = f"{row['name']}..." if row["name"].endswith(":") else row["name"]
            table.add_row(Text(name), Text(row["summary"]))
        console.print(table)
