"""The call and the command that make a run again, from the request that its report keeps."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping
from typing import Any

_OF_CALLS = ("attack", "defense", "task", "model", "threat_model", "goal", "n", "seed")
_FLAGS = {"beside": "--only"}
"""Options that take no value, by the field that is false where they are given."""
_PYTHON_ALONE = ("draws",)
"""Fields that decide a record and have no option; `keep` decides none."""
_NOT_ASKED = ("keep",)


def python_call(request: Mapping[str, Any], usual: Mapping[str, Any], objects: Collection[str] = ()) -> str:
    """The call of `advkit.evaluate` for a request.

    usual:   the fields' defaults: what is not the usual is named, and always the parts, n and seed
    objects: parts that were handed over as objects: the call names a variable in their place
    """
    named = {name: request[name] for name in _OF_CALLS if request.get(name) not in (None, "")}
    named |= {name: value for name, value in request.items() if name in usual and value != usual[name]}
    given = ", ".join(f"{name}={name if name in objects else repr(value)}" for name, value in named.items())
    variables = "".join(f"{name} = ...  # an object: {request[name]}\n" for name in named if name in objects)
    return f"import advkit\n\n{variables}report = advkit.evaluate({given})"


def command_line(request: Mapping[str, Any], usual: Mapping[str, Any], objects: Collection[str] = ()) -> str:
    """The command `advkit evaluate` for a request; "" where no command can say it."""
    if objects or any(name in usual and request[name] != usual[name] for name in _PYTHON_ALONE if name in request):
        return ""
    words = ["advkit", "evaluate"]
    for name, value in request.items():
        if name in _NOT_ASKED or name not in usual:
            continue
        if name in _FLAGS:
            words += [] if value else [_FLAGS[name]]
        elif name in _OF_CALLS or value != usual[name]:
            words += [] if value in (None, "") else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)
