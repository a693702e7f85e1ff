"""`advkit show RUN`: all of a report. `advkit show NAME`: what a name stands for, its fields, its paper, an example."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from advkit.cli.list import REGISTRIES, registry_of
from advkit.core.errors import UnknownName, UsageError
from advkit.core.registry import FieldInfo, Signature, parse_spec

_EXAMPLES = {
    "attack": "advkit evaluate --attack {spec} --defense pubdef",
    "defense": "advkit evaluate --attack pgd --defense {spec}",
    "threat model": "advkit evaluate --attack pgd --threat-model {spec}",
    "task": "advkit evaluate --attack pgd --task {spec}",
    "model": "advkit evaluate --attack pgd --model {spec}",
    "goal": "advkit evaluate --attack pgd --goal {spec}",
    "scenario": "advkit list threat-models",
    "recipe": "advkit train --recipe {spec} --task {task}:root=FOLDER --out runs/{spec}",
}
_OF_LANGUAGE = {
    "attack": "advkit evaluate --attack {spec} --task prompts",
    "defense": "advkit evaluate --attack beast --defense {spec} --task prompts",
    "threat model": "advkit evaluate --attack beast --threat-model {spec} --task prompts",
    "task": "advkit evaluate --attack beast --task {spec}",
    "model": "advkit evaluate --attack beast --model {spec} --task prompts:set=general",
    "goal": "advkit evaluate --attack beast --goal {spec} --task prompts",
    "judge": "advkit evaluate --attack beast --goal says:judges=[{spec}] --task prompts",
}
_OF_LABELS = {
    "attack": "advkit evaluate --attack {spec} --defense svm --task digits-pair",
    "defense": "advkit evaluate --attack alfa --defense {spec} --task digits-pair",
    "threat model": "advkit evaluate --attack alfa --defense svm --task digits-pair --threat-model {spec}",
    "task": "advkit evaluate --attack alfa --defense svm --task {spec}",
}
_LABELS = ("attacks.labels", "defenses.labels", "threat_models.labels", "tasks.pools", "tasks.texts")
_TEXT = (
    "attacks.text",
    "ppl_filter",
    "threat_models.tokens",
    "tasks.prompts",
    "models.language",
    "goals.says",
    "judges",
)
# what the fields alone can't say: a radius that fits the norm, a field that is empty by default and must not stay so
_ARGUMENTS = {
    "linf": "eps=8/255",
    "l2": "eps=0.5",
    "l1": "eps=12",
    "l0": "eps=10",
    "transfer": "sources=zoo:NAME",
    "label-flips": "rate=0.1",
}
_SAMPLES = {"path": "FILE", "root": "FOLDER"}


def _example_value(field: FieldInfo) -> str:
    return _SAMPLES.get(field.name, field.name.upper())


def example(signature: Signature) -> str:
    """A command that uses the name; words in capitals are for the user to fill in."""
    templates = _EXAMPLES
    for table, parts in ((_OF_LANGUAGE, _TEXT), (_OF_LABELS, _LABELS)):
        if any(f".{part}" in signature.target for part in parts):
            templates = table
    template = templates[signature.kind]
    if signature.kind == "recipe":
        return template.format(spec=signature.name, task=registry_of("recipes").build(signature.name).task)
    if signature.name == "toychat":
        template = template.removesuffix(":set=general")
    required = [field for field in signature.fields if field.default is None]
    if signature.name.endswith(":"):
        return template.format(spec=f"{signature.name}{_example_value(signature.fields[0])}")
    if signature.kind == "threat model" and signature.name in _ARGUMENTS:
        arguments = _ARGUMENTS[signature.name]
    elif required:
        arguments = ",".join(f"{field.name}={_example_value(field)}" for field in required)
    else:
        simple = [field for field in signature.fields if field.type in ("int", "float")][:1]
        arguments = ",".join(f"{field.name}={field.default}" for field in simple)
    return template.format(spec=f"{signature.name}:{arguments}" if arguments else signature.name)


def _find(name: str, kind: str | None) -> tuple[Signature, ...]:
    """The name in every registry that holds it; a spec or `kind/name` will do too."""
    if kind is None and "/" in name.split(":", 1)[0]:
        kind, name = name.split("/", 1)
    registries = [registry_of(each) for each in ([kind] if kind else REGISTRIES)]
    bare = parse_spec(name).name
    found = tuple(registry.signature(bare) for registry in registries if bare in registry)
    if not found:
        every = {each.rstrip(":"): None for registry in registries for each in registry.names()}
        near = difflib.get_close_matches(bare.casefold().replace("_", "-"), every, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ";"
        raise UnknownName(f"nothing is called {bare!r}{hint} `advkit list` lists every name")
    return found


def _as_json(signature: Signature) -> dict[str, Any]:
    return {**asdict(signature), "example": example(signature)}


def show(
    name: Annotated[
        str,
        typer.Argument(
            help="A run folder or report.json, or a name of `advkit list`; kind/name where several kinds share it."
        ),
    ],
    kind: Annotated[str | None, typer.Option(help=f"Look only here: {' | '.join(REGISTRIES)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
    card: Annotated[
        bool, typer.Option("--card", help="Print a run's report as a RobustBench card (model_info JSON).")
    ] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print a run's report as a table for LaTeX.")] = False,
) -> None:
    """Show all of a run's report, or what a name stands for: its fields with types and defaults, paper and example."""
    path = _report_path(name) if kind is None else None
    if path is not None:
        _show_report(path, as_json, card, latex)
        return
    if card or latex:
        raise UsageError(
            f"{'--card' if card else '--latex'} wants a run folder or a report.json, and {name!r} is neither"
        )
    found = _find(name, kind)
    if as_json:
        typer.echo(json.dumps([_as_json(signature) for signature in found], indent=2))
        return

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if len(found) > 1:
        kinds = ", ".join(signature.kind for signature in found)
        ways = " or ".join(f"{signature.kind.replace(' ', '-')}/{signature.name}" for signature in found)
        console.print(Text(f"{len(found)} things are called {name!r} ({kinds}); {ways} shows one of them.\n"))
    for signature in found:
        console.print(Text.assemble((signature.name, "bold"), f"  ({signature.kind}, {signature.target})\n"))
        console.print(Text(_prose(signature)))
        if signature.fields:
            table = Table(box=box.SIMPLE_HEAD)
            table.add_column("field", no_wrap=True, style="bold")
            for heading in ("type", "default", "meaning"):
                table.add_column(heading, overflow="fold")
            for field in signature.fields:
                default = "required" if field.default is None else field.default or "(empty)"
                table.add_row(*map(Text, (field.name, field.type, default, field.doc)))
            console.print(table)
        if made_of := _made_of(signature):
            console.print(Text(f"made of: {made_of}"), soft_wrap=True)
        for paper in signature.papers:
            console.print(Text(f"paper:   https://arxiv.org/abs/{paper.removeprefix('arXiv:')}"))
        console.print(Text(f"example: {example(signature)}"), soft_wrap=True)
        console.print()


def _made_of(signature: Signature) -> str:
    """The spec that says in full what a preset is; "" for what is none."""
    from advkit.core.protocols import MadeOf

    if signature.kind != "attack" or signature.name.endswith(":"):
        return ""
    attack: object = registry_of("attacks").build(signature.name)
    return attack.made_of if isinstance(attack, MadeOf) else ""


def _report_path(name: str) -> Path | None:
    """The path that was given in place of a name: a file, a folder with a report, or what looks like either."""
    path = Path(name)
    named = path.suffix == ".json" or (path.is_dir() and len(path.parts) > 1)
    return path if named or path.is_file() or (path / "report.json").is_file() else None


def _show_report(path: Path, as_json: bool, card: bool, latex: bool) -> None:
    from advkit.cli.reports import print_full
    from advkit.evaluation.report import Report

    report = Report.load(path)
    if card:
        typer.echo(json.dumps(report.robustbench(), indent=2))
    elif latex:
        typer.echo(report.to_latex(full=True), nl=False)
    elif as_json:
        typer.echo(report.to_json())
    else:
        print_full(report)


def _prose(signature: Signature) -> str:
    """The docstring without the paragraphs that the table of fields repeats."""
    names = {field.name for field in signature.fields}
    paragraphs = []
    for paragraph in signature.doc.split("\n\n"):
        head = paragraph.lstrip().split(":", 1)[0]
        if not names.issuperset(part.strip() for part in head.split(",")):
            paragraphs.append(" ".join(paragraph.split()))
    return "\n\n".join(paragraphs) + "\n"
