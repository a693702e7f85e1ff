"""`advkit init-attack NAME` and `advkit init-defense NAME`: a package for a part of one's own."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from advkit.cli.options import Json

if TYPE_CHECKING:
    from advkit.skeleton import Package

Name = Annotated[str, typer.Argument(help="The name in specs: an identifier, hyphens allowed.")]
Out = Annotated[
    str | None, typer.Option("--out", help="Folder of the package, new or empty.", show_default="./advkit-NAME")
]


def init_attack(name: Name, out: Out = None, as_json: Json = False) -> None:
    """Write a package with an attack to edit: entry point, a module that works, tests of the contract kit, README."""
    from advkit import skeleton

    _say(skeleton.init_attack(name, out), as_json)


def init_defense(name: Name, out: Out = None, as_json: Json = False) -> None:
    """Write a package with a defense to edit: entry point, a module that works, tests of the contract kit, README."""
    from advkit import skeleton

    _say(skeleton.init_defense(name, out), as_json)


def _say(made: Package, as_json: bool) -> None:
    if as_json:
        files = [file.as_posix() for file in made.files]
        told = {"kind": made.kind, "name": made.name, "folder": made.folder.as_posix(), "files": files}
        typer.echo(json.dumps({**told, "entry_point": made.entry_point}, indent=2))
        return
    folder = shlex.quote(f"{made.folder}")
    for file in made.files:
        typer.echo(str(file))
    typer.echo(
        f"next: cd {folder} && python -m pip install -e '.[test]' && advkit show {made.name} && python -m pytest"
    )
