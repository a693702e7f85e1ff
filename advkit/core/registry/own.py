"""Parts of the user's own by `python:MODULE:NAME`: what a Python module holds under a name, imported now.

Importing a module runs it. A spec from a file may not get here unasked: see `outside`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from advkit.core.errors import AdvkitError, SpecError, UnknownName, UsageError
from advkit.core.registry.fields import construct, read_fields
from advkit.core.registry.grammar import ParsedSpec, nearest, ungroup
from advkit.core.state import as_caller

PYTHON = "python"


def imported(target: str, expected: str = "an object, a class or a function without arguments") -> Any:
    """What `MODULE:NAME` names; the module may lie in the working directory, NAME may have dots.

    expected: what NAME should be, for the message where there is none

    Raises UnknownName, and UsageError for a module that does not import.
    """
    name, colon, attribute = target.partition(":")
    if not colon or not name or not attribute:
        raise UsageError(f"python:{target} is incomplete; expected python:MODULE:NAME")
    found: Any = _module(name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            own = [each for each in dir(found) if not each.startswith("_")]
            raise UnknownName(f"{name} has no {attribute!r}{nearest(part, own)}; expected {expected}")
        found = getattr(found, part)
    return found


def _module(name: str) -> ModuleType:
    """A module by name, the working directory searched last; sys.path is given back as it was."""
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.append(here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UnknownName(f"there is no Python module {name!r}, neither installed nor in {here}") from error
        raise UsageError(f"{name} does not import: {error}; install what it needs") from error
    except AdvkitError:
        raise
    except Exception as error:  # a module runs when it is imported, and raises whatever it likes
        raise UsageError(f"{name} does not import: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)


def target_of(parsed: ParsedSpec) -> str:
    """The `MODULE:NAME` of a parsed `python:` spec; SpecError where it says none."""
    first = parsed.arguments[0] if parsed.arguments else None
    if first is None or first.key is not None:
        raise SpecError(f"{str(parsed)!r} does not say which; expected python:MODULE:NAME")
    return ungroup(first.text)


def part_of(parsed: ParsedSpec, complete: bool) -> Any:
    """The part that a `python:` spec describes.

    A class is called, with the settings of the spec where it is a dataclass; a function is called without arguments;
    any other object is the part itself.

    complete: also a function may be the part itself, since it has all that such a part has
    """
    target, spec = target_of(parsed), str(parsed)
    found, settings = imported(target), parsed.arguments[1:]
    if isinstance(found, type):
        given = read_fields(settings, found, target)
        return _called(lambda: construct(found, given, spec), spec)
    if settings:
        raise SpecError(
            f"{spec!r}: {target} is no class, so it takes no settings; name a dataclass that has them as fields"
        )
    if not complete and (inspect.isroutine(found) or isinstance(found, functools.partial)):
        return _called(found, spec)
    return found


def _called(make: Any, spec: str) -> Any:
    try:
        return as_caller(make)
    except AdvkitError:
        raise
    except Exception as error:  # code of the user's own
        raise UsageError(f"{spec} can't be made: {type(error).__name__}: {error}") from error
