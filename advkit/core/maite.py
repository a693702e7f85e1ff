"""Objects of MAITE 0.10 (github.com/mit-ll-ai-technology/maite), taken by their members: the package is not needed."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from advkit.core.errors import AdvkitError, BadInput, UsageError
from advkit.core.registry import imported
from advkit.core.state import as_caller
from advkit.core.text import first_line


def component(target: str, members: tuple[str, ...], what: str) -> Any:
    """The MAITE object that MODULE.NAME (or MODULE:NAME) names; a class or a function without arguments is called.

    members: what it must have beside `metadata`; what: its kind in words, for errors

    Raises UsageError where it can't be made, or lacks a member.
    """
    module, dot, name = target.rpartition(".")
    if ":" not in target and not (dot and module and name):
        raise UsageError(f"maite:{target} is incomplete; expected maite:MODULE.NAME")
    found = imported(target if ":" in target else f"{module}:{name}", f"a MAITE {what}")
    if isinstance(found, type) or inspect.isroutine(found):
        try:
            found = as_caller(found)
        except AdvkitError:
            raise
        except Exception as error:  # code of the user's own
            raise UsageError(
                f"maite:{target} can't be made without arguments ({type(error).__name__}: {first_line(error)}); name "
                f"the MAITE {what} itself, or a function without arguments that makes it"
            ) from error
    return checked(found, members, what, f"maite:{target}")


def checked(thing: Any, members: tuple[str, ...], what: str, name: str) -> Any:
    """The object, where it has the members and metadata that MAITE wants of its kind; else UsageError."""
    if missing := [member for member in ("metadata", *members) if not hasattr(thing, member)]:
        raise UsageError(
            f"{name} is no MAITE {what}: {type(thing).__name__} lacks {', '.join(missing)} (MAITE 0.10 wants metadata, "
            f"{', '.join(members)})"
        )
    told = thing.metadata
    if not isinstance(told, Mapping) or not isinstance(told.get("id"), str) or not told["id"].strip():
        raise UsageError(f"{name} has the metadata {_short(told)}; MAITE 0.10 wants a mapping whose id is a text")
    return thing


def labels_of(thing: Any, classes: int, name: str) -> tuple[str, ...]:
    """Names of the classes by `index2label` of the metadata; empty where there are none. UsageError for misfits."""
    told = thing.metadata.get("index2label")
    if told is None:
        return ()
    if not isinstance(told, Mapping) or set(told) != set(range(classes)):
        raise UsageError(
            f"{name}: metadata['index2label'] is {_short(told)}; expected a name for each of the classes 0 to "
            f"{classes - 1}"
        )
    return tuple(str(told[index]) for index in range(classes))


def label_of(target: Any, where: str) -> tuple[int, int]:
    """The class of a MAITE target, [classes] of probabilities, and how many classes it has; BadInput for another."""
    import numpy as np

    try:
        held = np.asarray(target, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{where} has a target that is no array: {first_line(error)}") from error
    if held.ndim != 1 or not held.size:
        raise BadInput(
            f"{where} has a target of shape {list(held.shape)}; MAITE 0.10 wants one number per class, [classes]"
        )
    if not np.isfinite(held).all() or (held == held.max()).sum() != 1:
        raise BadInput(f"{where} has the target {_short(held.tolist())}, of which no class is the likeliest")
    return int(held.argmax()), len(held)


def datum_id(metadata: Any, where: str) -> str:
    """The id of a sample by its MAITE metadata, as text; BadInput where there is none."""
    told = metadata.get("id") if isinstance(metadata, Mapping) else None
    if isinstance(told, bool) or not isinstance(told, int | str) or not str(told).strip():
        raise BadInput(
            f"{where} has the metadata {_short(metadata)}; MAITE 0.10 wants a mapping whose id is a number or text"
        )
    return str(told)


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else text[:57] + "..."
