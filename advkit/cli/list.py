"""`advkit list`: every name the registries hold, by group, with what is known of it, read without importing torch."""

from __future__ import annotations

import builtins
import importlib
import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advkit.cli.catalogue import GROUPS, OTHER, VARIES, Facts, facts, inputs_of_threat
from advkit.core.errors import UnknownName, UsageError
from advkit.core.protocols import Access
from advkit.core.registry import Registry, parse_spec

if TYPE_CHECKING:
    from rich.console import Console

REGISTRIES = {
    "attacks": "advkit.attacks:ATTACKS",
    "defenses": "advkit.defenses:DEFENSES",
    "threat-models": "advkit.threat_models:THREAT_MODELS",
    "tasks": "advkit.tasks:TASKS",
    "models": "advkit.models:MODELS",
    "goals": "advkit.threat_models:GOALS",
    "judges": "advkit.threat_models:JUDGES",
    "scenarios": "advkit.evaluation.scenarios:SCENARIOS",
    "recipes": "advkit.training.recipes:RECIPES",
}
_COLUMNS = {
    "attacks": ("access", "norms", "goals"),
    "defenses": ("inputs",),
    "threat-models": ("inputs", "scenario"),
    "tasks": ("threat_model", "model"),
}
_LEVELS = tuple(level.name.lower() for level in Access)
_ROOM = 48  # columns that a first line needs beside the facts; with fewer it stands below them


def registry_of(kind: str) -> Registry[Any]:
    """The registry of a plural word of the command line, singular and underscores forgiven."""
    word = kind.strip().casefold().replace("_", "-")
    for each in (word, f"{word}s"):
        if each in REGISTRIES:
            module, _, attribute = REGISTRIES[each].partition(":")
            found: Registry[Any] = getattr(importlib.import_module(module), attribute)
            return found
    raise UnknownName(f"no kind {kind!r} to list; expected one of {', '.join(REGISTRIES)}")


@dataclass(frozen=True)
class Entry:
    """One name: what `advkit list` prints of it."""

    kind: str
    name: str
    summary: str
    target: str
    facts: Facts

    @property
    def group(self) -> str:
        """The heading it stands under, "" for kinds without groups."""
        return str(self.facts.get("group", ""))

    @property
    def cells(self) -> tuple[str, ...]:
        """Its columns between name and first line."""
        return tuple(_cell(self.facts[column]) for column in _COLUMNS.get(self.kind, ()))

    @property
    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {"name": self.name, "summary": self.summary, "target": self.target, **self.facts}

    def matches(self, words: Iterable[str]) -> bool:
        """Whether every word stands in the name, the group or the first line; case and hyphens do not matter."""
        text = _plain(f"{self.name} {self.group} {self.summary}")
        return all(_plain(word) in text for word in words)


def _plain(text: str) -> str:
    return text.casefold().replace("_", "-")


def _cell(value: str | tuple[str, ...]) -> str:
    """As it stands in a column: after `minimum-l0` the other norms without a radius stand as `l1`, `l2`..."""
    if isinstance(value, str):
        return value or "-"
    short = [
        word.removeprefix("minimum-") if at and value[at - 1].startswith("minimum-") else word
        for at, word in enumerate(value)
    ]
    return ",".join(short) or "-"


def _entries(kind: str) -> builtins.list[Entry]:
    """A registry's entries in its order."""
    registry = registry_of(kind)
    targets = {name: registry.target(name) for name in registry.names()}
    return [Entry(kind, name, registry.summary(name), target, facts(kind, target)) for name, target in targets.items()]


def _grouped(kind: str, entries: Iterable[Entry]) -> dict[str, builtins.list[Entry]]:
    """Entries by group: first the groups known here in their order, then those of other packages."""
    groups: dict[str, builtins.list[Entry]] = {group: [] for group in GROUPS.get(kind, ())}
    for entry in sorted(entries, key=lambda each: (each.group == OTHER, each.group)):
        groups.setdefault(entry.group, []).append(entry)
    return {group: members for group, members in groups.items() if members}


def _by_access(asked: str) -> Callable[[Facts], bool]:
    level = _plain(asked)
    if level not in _LEVELS:
        raise UsageError(f"--access {asked}; expected one of {', '.join(_LEVELS)}")
    enough = {*_LEVELS[: _LEVELS.index(level) + 1], VARIES}
    return lambda known: known["access"] in enough


def _by_norm(asked: str) -> Callable[[Facts], bool]:
    norm = registry_of("threat-models").known(asked)
    return lambda known: norm in known["norms"]


def _by_task(asked: str) -> Callable[[Facts], bool]:
    tasks = registry_of("tasks")
    inputs = facts("tasks", tasks.target(parse_spec(asked).name))["inputs"]
    if not inputs:  # a task of another package that computes its defaults: it has to be asked
        inputs = inputs_of_threat(tasks.build(asked).defaults.threat_model)
    return lambda known: bool({*inputs} & {*known["inputs"]})


def list(
    kind: Annotated[str | None, typer.Argument(help=" | ".join(REGISTRIES), show_default="all of them")] = None,
    words: Annotated[
        builtins.list[str] | None, typer.Argument(help="Only what has these words in its name, group or first line.")
    ] = None,
    access: Annotated[
        str | None, typer.Option(help=f"Only attacks that need no more access than this: {' | '.join(_LEVELS)}.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="Only attacks that work in this threat model, e.g. linf.")] = None,
    task: Annotated[
        str | None, typer.Option("--for", metavar="TASK", help="Only what works on the inputs of this task.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """List attacks, defenses, threat models, tasks, models, goals, recipes...; `advkit show NAME` says more of one.

    Through a pipe it prints one name a line, with everything that is known of it.
    """
    filters: dict[str, tuple[str, Callable[[Facts], bool]]] = {}
    if access is not None:
        filters["--access"] = ("access", _by_access(access))
    if norm is not None:
        filters["--norm"] = ("norms", _by_norm(norm))
    if task is not None:
        filters["--for"] = ("inputs", _by_task(task))
    kinds = [*REGISTRIES] if kind is None else [registry_of(kind).plural]
    every = {each: _entries(each) for each in kinds}
    for option, (fact, suits) in filters.items():
        serving = {each: rows for each, rows in every.items() if rows and fact in rows[0].facts}
        if not serving:
            raise UsageError(
                f"{option} does not apply to {', '.join(kinds)}: no {fact} are known of them; leave it out"
            )
        every = {each: [row for row in rows if suits(row.facts)] for each, rows in serving.items()}
    every = {each: [row for row in rows if row.matches(words or ())] for each, rows in every.items()}
    if as_json:
        typer.echo(json.dumps({each: [row.as_json for row in rows] for each, rows in every.items()}, indent=2))
        return
    if not any(every.values()):
        typer.echo(f"advkit: nothing of {', '.join(every)} is like that; leave a filter or a word out", err=True)
        return

    from rich.console import Console

    console = Console(highlight=False)
    if console.is_terminal:
        for each, rows in every.items():
            _print_page(console, each, rows)
    else:
        for each, rows in every.items():
            _print_lines(each, rows, titled=len(every) > 1)


def _print_page(console: Console, kind: str, entries: Iterable[Entry]) -> None:
    """For people: a heading per group, and first lines wrapped to the terminal. Names are never broken."""
    from rich.text import Text

    tables: builtins.list[tuple[builtins.list[Entry], builtins.list[tuple[str, ...]], builtins.list[int]]] = []
    for group, members in _grouped(kind, entries).items():
        title = group if group and group != OTHER else f"{group} {kind}".strip()
        heads = (title, *(column.replace("_", " ") for column in _COLUMNS.get(kind, ())))
        rows = [heads, *((f"  {each.name}{'...' * each.name.endswith(':')}", *each.cells) for each in members)]
        tables.append((members, rows, _widths(rows)))
    beside = all(console.width - sum(widths) - 2 * len(widths) >= _ROOM for _, _, widths in tables)
    for members, lines, widths in tables:
        left = sum(widths) + 2 * len(widths)
        console.print(Text(_line(lines[0], widths), style="bold underline"), soft_wrap=True)
        for each, row in zip(members, lines[1:], strict=True):
            line = Text(_line(row, widths))
            line.stylize("bold", 0, len(row[0]))
            indent = left if beside else 6
            below = textwrap.wrap(
                each.summary, max(console.width - indent, _ROOM), break_long_words=False, break_on_hyphens=False
            )
            if beside and below:
                line.append(f"{' ' * (left - len(line))}{below.pop(0)}")
            for text in below:
                line.append(f"\n{' ' * indent}{text}")
            console.print(line, soft_wrap=True)
        console.print()


def _print_lines(kind: str, entries: Iterable[Entry], titled: bool) -> None:
    """For pipes: one name a line, first on it, with all that is known of it; nothing is clipped or wrapped."""
    found = [each for members in _grouped(kind, entries).values() for each in members]
    rows = [(each.name, *([kind] if titled else []), *filter(None, [each.group]), *each.cells) for each in found]
    widths = _widths(rows)
    for each, row in zip(found, rows, strict=True):
        typer.echo(f"{_line(row, widths):{sum(widths) + 2 * len(widths)}}{each.summary}".rstrip())


def _widths(rows: Sequence[Sequence[str]]) -> builtins.list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
