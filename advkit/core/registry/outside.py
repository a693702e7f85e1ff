"""What a spec would load beyond advkit's own parts, read from its text alone: nothing is imported or built.

Specs come from files, too: a checkpoint names its architecture, a report the parts of its evaluation. Whoever wrote the
file would otherwise choose what runs on the reader's machine.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from advkit.core.registry.grammar import fold

OUTSIDE = {
    "python": "runs a Python module",
    "maite": "runs a Python module",
    "hf": "loads from a folder or from the Hugging Face hub",
    "timm": "loads from timm and its hub",
    "torchvision": "loads from torchvision and its hub",
    "robustbench": "fetches files and unpickles them",
    "path": "opens a file",
    "http": "sends samples to a web service",
    "https": "sends samples to a web service",
    "gguf": "opens a file or a package's weights",
    "clip": "opens a folder",
    "open_clip": "opens a folder",
}
"""Prefixes of parts that come from outside advkit, and what using one does."""
_OUTSIDE = {fold(name): what for name, what in OUTSIDE.items()}
_OPENED = {"weights": "opens a file", "cache": "writes to a folder", "images": "reads a folder and trains on it"}
_SHOWN = 60
_NUMBER = re.compile(r"[-+.\d][-+.\de_]*", re.IGNORECASE)
_PIECE = re.compile(r"[^\[\],=+]+")


def outside(spec: str) -> list[str]:
    """What a spec names at any nesting that is not advkit's own, each with what it does; empty where all is.

    Errs on the side of naming: a text that only looks like such a name is listed, too.
    """
    others = _installed_parts()
    found = []
    for match in _PIECE.finditer(spec):
        piece = match[0].strip()
        # What a prefix names may stand in brackets after it.
        shown = spec[match.start() :].strip()[:_SHOWN] if piece.endswith(":") else piece
        # A matrix names a model behind a defense as DEFENSE@MODEL.
        names = [fold(name.strip()) for name in re.split("[:@]", piece)]
        for position, name in enumerate(names):
            if name in _OUTSIDE and position + 1 < len(names):
                found.append(f"{shown} ({_OUTSIDE[name]})")
            elif name in others:
                found.append(f"{shown} (runs the installed {others[name].value})")
    found.extend(f"{file[0]} (opens a file)" for file in re.finditer(r"[^\[\],=+:]+\.ya?ml\b", spec, re.IGNORECASE))
    # Brackets around a value say the same as the value.
    for key, value in re.findall(r"\b(weights|cache|images)\s*=[\s\[]*([^\[\],+]+)", spec):
        if not _NUMBER.fullmatch(value.strip()):  # weights of a sum name no file
            found.append(f"{key}={value.strip()} ({_OPENED[key]})")
    if re.search(r"download\s*=[\s\[]*(true|yes|1|on)\b", spec, re.IGNORECASE):
        found.append("download=true (fetches from the network)")
    return list(dict.fromkeys(found))


@cache
def scanned() -> Any:
    """Every installed package's entry points, read once for all groups: a scan costs some 15 ms."""
    return entry_points()


@cache
def _installed_parts() -> dict[str, EntryPoint]:
    """The parts of other packages, of every kind, by name."""
    groups = scanned()
    found = [each for group in groups.groups if group.startswith("advkit.") for each in groups.select(group=group)]
    return {fold(each.name).rstrip(":"): each for each in found}
