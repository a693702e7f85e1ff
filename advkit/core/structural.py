"""Protocols whose `isinstance` is as fast on Python 3.11 as it is later.

There `typing` gathers the members of a protocol anew at every check, and the checks of a batch take longer than the
passes of a small model.
"""

from __future__ import annotations

import sys
import typing
from abc import ABCMeta
from typing import Any, Protocol, TypeVar

_P = TypeVar("_P", bound=type)

_members: dict[type, tuple[tuple[str, bool], ...]] = {}
"""Names of the members of every protocol, and whether it is a method. No attribute: that would be a member itself."""


class _Gathered(type(Protocol)):  # type: ignore[misc]  # a type without a public name
    """Checks as `typing` does, with the members that were gathered when the protocol was made."""

    def __instancecheck__(cls, instance: Any) -> bool:
        members = _members.get(cls)
        if members is None:  # a class that fulfils protocols
            return bool(super().__instancecheck__(instance))
        for name, method in members:
            if not hasattr(instance, name) or (method and getattr(instance, name) is None):
                return ABCMeta.__instancecheck__(cls, instance)
        return True


def runtime_checkable(protocol: _P) -> _P:
    """`typing.runtime_checkable`."""
    made: Any = typing.runtime_checkable(protocol)
    if sys.version_info < (3, 12):
        names = sorted(typing._get_protocol_attrs(made))  # type: ignore[attr-defined]
        _members[made] = tuple((name, callable(getattr(made, name, None))) for name in names)
        made.__class__ = _Gathered
    return protocol
