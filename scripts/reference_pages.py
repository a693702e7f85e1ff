"""docs/methods.md, docs/cli.md and docs/report_schema.md: made of the registries, the commands and the schema.

python scripts/reference_pages.py [--check]

Parts of other packages are left out. A test fails where a page is not what this script makes.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from advkit.cli.catalogue import GROUPS, OTHER, facts
from advkit.cli.commands import COMMANDS, load_command
from advkit.cli.list import registry_of
from advkit.core.registry.docs import docstrings, glimpse
from advkit.evaluation.report import schema

DOCS = Path(__file__).resolve().parents[1] / "docs"
MADE = "<!-- made by scripts/reference_pages.py; do not edit -->"
_ARXIV = re.compile(r"\b\d\d(?:0[1-9]|1[0-2])\.\d{4,5}\b")

# --- methods

_KINDS = {
    "attacks": ("needs", "threat models", "goals"),
    "defenses": ("inputs",),
    "threat-models": ("inputs", "scenario"),
    "goals": (),
}
_FACTS = {"needs": "access", "threat models": "norms"}
_BY_GROUP = {
    "attacks": {
        "gradient": "gradient_attacks", "minimum norm": "minimal", "adaptive": "input_defenses",
        "query": "query_attacks", "spatial": "other_attacks", "universal": "other_attacks",
        "corruptions": "other_attacks", "ordered": "ordered_topk", "transfer": "transfer", "events": "spiking",
        "text": "language", "stream": "online", "labels": "poisoning", "suites": "suites", "peers": "peers",
    },
    "defenses": {
        "none": "first_evaluation", "trains the model": "adversarial_training",
        "in front of any model": "input_defenses", "inside the model": "eigenshield", "smoothing": "certification",
        "filter": "language", "learns from labels": "poisoning",
    },
    "threat-models": {
        "ball": "gradient_attacks", "minimum": "minimal", "images": "other_attacks", "events": "spiking",
        "text": "language", "transfer": "transfer", "stream": "online", "certificates": "certification",
        "labels": "poisoning",
    },
}  # fmt: skip
"""Page of a group; where a method has one of its own, it stands below."""
_OWN_PAGE = {
    "attacks": {"fab": "suites", "fab-t": "suites"},
    "defenses": {
        "pubdef": "pubdef", "convex_relu_at": "convex_relu_at", "raw_isp": "raw_isp", "floral": "floral",
        "denoised_smoothing": "zo_ae_ds", "zo_ae_ds": "zo_ae_ds", "zo_ds": "zo_ae_ds", "fo_ae_ds": "zo_ae_ds",
        "fo_ds": "zo_ae_ds",
    },
    "threat-models": {"tapm": "pubdef"},
    "goals": {
        "untargeted": "methodology", "targeted": "methodology", "ordered-topk": "ordered_topk",
        "topk": "ordered_topk", "out-of-topk": "ordered_topk", "near": "image_text", "says": "language",
        "reconstruction": "zo_ae_ds",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A registered part, told of by its source alone: nothing is imported."""

    kind: str
    name: str
    target: str
    summary: str

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def doc(self) -> str:
        """The docstring of the class."""
        name = self.target.partition(":")[2]
        return glimpse(self.module, name) or docstrings(self.module, name)[1]

    @property
    def of_module(self) -> str:
        """The docstring of its module."""
        return docstrings(self.module, self.target.partition(":")[2])[0]


def methods() -> str:
    """Every attack, defense, threat model and goal: a line each."""
    pages = [
        MADE,
        "# All methods",
        "Every part that advkit has of its own, as `advkit list` shows it. `advkit show NAME` prints the fields of "
        "one, what deviates from its paper, and an example. The page behind a name has the threat model, commands "
        "that run, what was measured, and where the method fails.",
    ]
    for kind in _KINDS:
        registry = registry_of(kind)
        pages.append(f"## {kind.replace('-', ' ').capitalize()}")
        parts = [Part(kind, name, registry.target(name), registry.summary(name)) for name in registry.table]
        groups = _grouped(kind, parts)
        for group, members in groups.items():
            if group:
                pages.append(f"### {kind.replace('-', ' ').capitalize()}: {group}")
            pages.append(_methods_table(kind, members, parts))
    return "\n\n".join(pages) + "\n"


def _grouped(kind: str, parts: Iterable[Part]) -> dict[str, list[Part]]:
    groups: dict[str, list[Part]] = {group: [] for group in GROUPS.get(kind, ())}
    for each in parts:
        group = str(facts(kind, each.target).get("group", ""))
        groups.setdefault("" if group == OTHER else group, []).append(each)
    return {group: members for group, members in groups.items() if members}


def _methods_table(kind: str, members: Sequence[Part], all_of_kind: Sequence[Part]) -> str:
    columns = _KINDS[kind]
    rows = [["name", "what it is", *columns, "paper"]]
    for each in members:
        known = facts(kind, each.target)
        cells = [known[_FACTS.get(column, column)] for column in columns]
        told = [cell if isinstance(cell, str) else ", ".join(cell) for cell in cells]
        name = f"[`{each.name}`]({page_of(kind, each.name)})"
        rows.append([name, each.summary, *told, _papers(each, all_of_kind)])
    return _table(rows)


def page_of(kind: str, name: str) -> str:
    """The page of docs/ that has a method's threat model, figures and limits."""
    own = _OWN_PAGE.get(kind, {}).get(name)
    if own is None:
        group = str(facts(kind, registry_of(kind).target(name)).get("group", ""))
        own = _BY_GROUP[kind][group]
    return f"{own}.md"


def _papers(part: Part, all_of_kind: Iterable[Part]) -> str:
    """The papers that the class names; the module's where no class in it names any."""
    siblings = [each for each in all_of_kind if each.module == part.module]
    named = any(_ARXIV.search(each.doc) for each in siblings)
    found = _ARXIV.findall(part.doc if named else part.of_module)
    return ", ".join(f"[{each}](https://arxiv.org/abs/{each})" for each in dict.fromkeys(found))


# --- commands


def cli() -> str:
    """Every subcommand with its arguments and options."""
    pages = [
        MADE,
        "# Command line",
        "`advkit COMMAND --help` prints the same. Exit status: 0 done, 2 a mistake in the request, 3 the number is not "
        "to be trusted, 130 interrupted. `--debug` shows the traceback of an error.",
    ]
    for name, (_, line) in COMMANDS.items():
        command = load_command(name)
        pages += [f"## advkit {name}", " ".join(str(command.help or line).split("\n\n", 1)[0].split())]
        pages += [" ".join(each.split()) for each in str(command.help or "").split("\n\n")[1:]]
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        usage = " ".join([f"advkit {name}", "[OPTIONS]", *map(_usage, arguments)])
        pages += [f"```text\n{usage}\n```"]
        rows = [["", "type", "default", "meaning"]]
        types = _types(name)
        rows += [_option(each, types[each.name]) for each in command.params if each.name in types]
        pages += [_table(rows)] if len(rows) > 1 else []
    return "\n\n".join(pages) + "\n"


def _usage(argument: Any) -> str:
    shown = str(argument.name).upper() + ("..." if argument.nargs == -1 else "")
    return shown if argument.required else f"[{shown}]"


def _option(parameter: Any, kind: str) -> list[str]:
    """An argument or option as a row; what typer and click print of it may change with their versions, this not."""
    if parameter.param_type_name == "argument":
        shown = f"`{str(parameter.name).upper()}`"
    else:
        shown = ", ".join(f"`{each}`" for each in (*parameter.opts, *parameter.secondary_opts))
    default = "required" if parameter.required else _default(parameter)
    return [shown, kind, default, " ".join(str(getattr(parameter, "help", None) or "").split())]


def _types(command: str) -> dict[str, str]:
    """The types of a command's parameters as its function declares them: the parser's own vary with its version."""
    module = importlib.import_module(COMMANDS[command][0])
    parameters = inspect.signature(getattr(module, command.replace("-", "_")), eval_str=True).parameters
    return {name: _told_type(get_args(each.annotation)[0]) for name, each in parameters.items()}


def _told_type(annotation: Any) -> str:
    """`int`, `text`, `path`, `flag`, one of several words; None and lists are told by default and usage."""
    inner = [_told_type(each) for each in get_args(annotation) if each is not type(None)]
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{each}`" for each in get_args(annotation))
    if inner:
        return ", ".join(dict.fromkeys(inner))
    return {str: "text", bool: "flag", Path: "path", float: "number", int: "whole number"}[annotation]


def _default(parameter: Any) -> str:
    shown = getattr(parameter, "show_default", None)
    if isinstance(shown, str):
        return shown
    value = parameter.default
    if value is None or value is False or value == () or callable(value) or type(value).__name__ == "Sentinel":
        return ""
    return "on" if value is True else f"`{value}`"


# --- schema


def report_schema() -> str:
    """The fields of a report, with their types and the words that the schema says of them."""
    held = schema()
    pages = [
        MADE,
        "# JSON schema of reports",
        f"`report.json` is one JSON object that validates against the schema `{held['$id']}` (JSON Schema 2020-12), "
        "which is shipped with the package. A report that does not validate is never written. Versions of the schema: "
        f"{', '.join(held['properties']['schema_version']['enum'])}; older ones are read.",
        "```python\nimport jsonschema\n\nimport advkit\nfrom advkit.evaluation.report import schema\n\n"
        'report = advkit.evaluate("fgsm", task="digits", model="zoo:digits-mlp", n=8)\n'
        "jsonschema.Draft202012Validator(schema()).validate(report.to_dict())\n"
        'print(report.to_dict()["metrics"]["robust_accuracy"])\n```',
        "Fields whose name is in **bold** are always there.",
        _schema_table(held),
    ]
    pages.append("## Fields of the fields")
    for name, field in held["properties"].items():
        if "properties" in field:
            pages += [f"### {name}", _schema_table(field)]
        elif "properties" in field.get("items", {}):
            pages += [f"### {name}, each", _schema_table(field["items"])]
    pages.append("## Kinds of numbers")
    for name, field in held["$defs"].items():
        pages.append(f"### {name}")
        pages.append(_schema_table(field) if "properties" in field else f"{_type(field)}. {_words(field)}".strip())
    return "\n\n".join(pages) + "\n"


def _schema_table(held: Mapping[str, Any]) -> str:
    required = set(held.get("required", ()))
    rows = [["field", "type", "meaning"]]
    for name, field in held["properties"].items():
        shown = f"**`{name}`**" if name in required else f"`{name}`"
        rows.append([shown, _type(field), _words(field)])
    return _table(rows)


def _type(field: Mapping[str, Any]) -> str:
    if "$ref" in field:
        _, _, kind, *inside = str(field["$ref"]).split("/")
        return f"`{inside[-1]}` of [{kind}](#{kind})" if inside else f"[{kind}](#{kind})"
    if "enum" in field:
        return "one of " + ", ".join(f"`{each}`" for each in field["enum"])
    if "anyOf" in field or "oneOf" in field:
        return " or ".join(_type(each) for each in field.get("anyOf", field.get("oneOf")))
    kind = field.get("type", "anything")
    kinds = [kind] if isinstance(kind, str) else kind
    shown = " or ".join(kinds)
    return f"{shown} of {_type(field['items'])}" if "array" in kinds and field.get("items") else shown


def _words(field: Mapping[str, Any]) -> str:
    return str(field.get("description", ""))


# --- pages


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is its head."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;") for cell in row] for row in rows]
    head, *rest = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([head, f"|{'---|' * len(rows[0])}", *rest])


PAGES: dict[str, Callable[[], str]] = {"methods.md": methods, "cli.md": cli, "report_schema.md": report_schema}


def main() -> int:
    """Write the pages, or say which are not as they would be written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a page is out of date")
    asked = parser.parse_args()
    stale = []
    for name, make in PAGES.items():
        made, file = make(), DOCS / name
        if not file.exists() or file.read_text(encoding="utf-8") != made:
            stale.append(name)
            if not asked.check:
                file.write_text(made, encoding="utf-8")
    sys.stdout.write(f"{'out of date' if asked.check else 'written'}: {', '.join(stale) or 'none'}\n")
    return 1 if stale and asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
