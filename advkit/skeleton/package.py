"""A package with one part: its entry point, a module to edit, tests that run the contract kit, a README."""

from __future__ import annotations

import keyword
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.core.errors import UsageError
from advkit.core.files import why, write_whole
from advkit.core.paths import place_of
from advkit.core.registry import OUTSIDE, Registry

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).resolve().parent / "templates"
RESERVED = {"none", *OUTSIDE}
"""Names that mean something else wherever a spec is written."""
_LONGEST = 50  # characters of a name: files and distributions are called after it


@dataclass(frozen=True)
class Package:
    """What was written.

    kind:   "attack" or "defense"
    name:   of the part in specs
    folder: of the package
    module: that holds the part, as it is imported
    cls:    the part's class
    files:  all that were written, below the folder
    """

    kind: str
    name: str
    folder: Path
    module: str
    cls: str
    files: tuple[Path, ...]

    @property
    def entry_point(self) -> str:
        """What the name stands for, `module:class`."""
        return f"{self.module}:{self.cls}"


def init_attack(name: str, out: str | os.PathLike[str] | None = None) -> Package:
    """Write a package with an attack that works, to be edited: gradient steps that become shorter.

    name: of the attack in specs: an identifier in ASCII, hyphens allowed
    out:  folder of the package, new or empty; ./advkit-NAME by default

    Raises UsageError for a name that is none or is taken, and for a folder that is not empty or can't be written.
    """
    from advkit.attacks import ATTACKS

    return _write(ATTACKS, name, out)


def init_defense(name: str, out: str | os.PathLike[str] | None = None) -> Package:
    """Write a package with a defense that works, to be edited: inputs rounded before any model sees them.

    name: of the defense in specs: an identifier in ASCII, hyphens allowed
    out:  folder of the package, new or empty; ./advkit-NAME by default

    Raises UsageError for a name that is none or is taken, and for a folder that is not empty or can't be written.
    """
    from advkit.defenses import DEFENSES

    return _write(DEFENSES, name, out)


def _write(registry: Registry[Any], name: str, out: str | os.PathLike[str] | None) -> Package:
    plain = _checked(registry, name)
    folder = _free(f"advkit-{plain.replace('_', '-')}" if out is None else os.fspath(out))
    module = f"advkit_{plain}"
    cls = _class_name(registry.kind, plain)
    values = {
        "kind": registry.kind,
        "name": name,
        "distribution": f"advkit-{plain.replace('_', '-')}",
        "module": module,
        "cls": cls,
    }
    pages = {
        "pyproject.toml": "pyproject.toml.jinja",
        "README.md": "README.md.jinja",
        f"{module}.py": f"{registry.kind}.py.jinja",
        f"tests/test_{plain}.py": f"test_{registry.kind}.py.jinja",
    }
    contents = {path: _template(template).render(values) for path, template in pages.items()}
    return Package(registry.kind, name, folder, module, cls, _written(folder, contents))


def _checked(registry: Registry[Any], name: str) -> str:
    """The name as Python writes it; UsageError where it can't be the name of a new part."""
    plain = name.replace("-", "_")
    fine = plain.isascii() and plain.isidentifier() and not plain.startswith("_") and not plain.endswith("_")
    if not fine or len(plain) > _LONGEST:
        raise UsageError(
            f"{name!r} can't be the name of {registry.kind}s; expected at most {_LONGEST} letters and digits, joined "
            "by _ or -, the first a letter, such as my_method"
        )
    if name in registry:
        raise UsageError(
            f"there is already a registered {registry.kind} {registry.known(name).rstrip(':')!r} "
            f"({registry.target(name)}); choose another name"
        )
    if plain.casefold() in RESERVED:
        raise UsageError(f"{name!r} means something else in specs; choose another name")
    return plain


def _class_name(kind: str, plain: str) -> str:
    """The name in capitals (my_method: MyMethod), with the kind after it where the template uses the word itself."""
    camel = "".join(part[:1].upper() + part[1:] for part in plain.split("_"))
    source = (TEMPLATES / f"{kind}.py.jinja").read_text(encoding="utf-8")
    taken = keyword.iskeyword(camel) or re.search(rf"\b{camel}\b", source)
    return f"{camel}{kind.capitalize()}" if taken else camel


def _free(out: str) -> Path:
    """The folder that a path names, where it is new or empty."""
    try:
        folder = place_of(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "is not empty" if folder.is_dir() else "is no folder"
            raise UsageError(f"{out} {what}; name a folder that is new or empty with --out")
    except ValueError as error:
        raise UsageError(f"--out: {error}") from error
    except OSError as error:
        raise _unwritable(out, error) from error
    return folder


def _written(folder: Path, contents: Mapping[str, str]) -> tuple[Path, ...]:
    """All of the files, or none of them."""
    made: list[Path] = []
    try:
        for path, content in contents.items():
            made.append(folder / path)
            write_whole(made[-1], content)
    except OSError as error:
        for each in made:
            with suppress(OSError):
                each.unlink(missing_ok=True)
        for left in (folder / "tests", folder):
            with suppress(OSError):
                left.rmdir()
        raise _unwritable(str(folder), error) from error
    return tuple(made)


def _unwritable(folder: str, error: OSError) -> UsageError:
    return UsageError(f"the folder {folder} can't be written ({why(error)}); name another one with --out")


def _template(name: str) -> jinja2.Template:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    ).get_template(name)
