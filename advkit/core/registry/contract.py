"""Whether what an entry point names has the members of its kind: found out when it is loaded, not rows later."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from typing_extensions import get_protocol_members, is_protocol


def lacking(loaded: object, contract: type) -> list[str]:
    """What a loaded class has not of a contract, a protocol or a base class; empty where nothing is missing.

    A field without a default is there. What an `__init__` of the class's own may set, or `__getattr__` pass on, is seen
    on instances only (`lacking_in`); so is all that a function returns.
    """
    if not isinstance(loaded, type):
        return []
    if not is_protocol(contract):
        return [] if issubclass(loaded, contract) else [f"the base class {contract.__name__}"]
    own = [vars(base) for base in loaded.__mro__ if base is not object and not is_protocol(base)]
    declared = {name for each in own for name in (*each, *each.get("__annotations__", ()))}
    made = not dataclasses.is_dataclass(loaded) and any("__init__" in each for each in own)
    opaque = made or "__getattr__" in declared
    return [each for each in _members(contract) if each not in declared and (_is_method(contract, each) or not opaque)]


def lacking_in(part: object, contract: type) -> list[str]:
    """What an instance has not of a contract."""
    if not is_protocol(contract):
        return [] if isinstance(part, contract) else [f"the base class {contract.__name__}"]
    static = object()
    return [
        name
        for name in _members(contract)
        if inspect.getattr_static(part, name, static) is static and not _passed_on(part, name)
    ]


def _passed_on(part: Any, name: str) -> bool:
    """Whether `__getattr__` answers for a name."""
    try:
        getattr(part, name)
    except AttributeError:
        return False
    return True


def _is_method(contract: type, name: str) -> bool:
    return inspect.isfunction(inspect.getattr_static(contract, name, None))


def _members(contract: type) -> list[str]:
    """The members of a protocol: values first, then methods, by name."""
    names = get_protocol_members(contract)
    return sorted(names, key=lambda name: (_is_method(contract, name), name))


def members_text(contract: type) -> str:
    """`advkit.core.protocols.Attack: needs, __call__(oracle, x, goal, threat, rng)`, for messages."""
    if not is_protocol(contract):
        return f"a subclass of {contract.__module__}.{contract.__name__}"
    words = []
    for name in _members(contract):
        if not _is_method(contract, name):
            words.append(name)
            continue
        given = inspect.signature(inspect.getattr_static(contract, name)).parameters
        words.append(f"{name}({', '.join(each for each in given if each != 'self')})")
    return f"{contract.__module__}.{contract.__name__}: {', '.join(words)}"
