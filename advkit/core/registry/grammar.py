"""The spec grammar: a name, then after a colon comma-separated `key=value` pairs that fill the fields of a dataclass.

Brackets group: `attacks=[pgd:steps=20,restarts=2]+fgsm` is a tuple of two texts, `recipe=[epochs=3]` sets fields of a
nested dataclass, and `name=[a,b]` is the text `a,b`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from advkit.core.errors import SpecError

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Argument:
    """One comma-separated part of a spec.

    key:   the field it names, None where the part is a bare value
    value: the text after the `=`, brackets still on
    text:  the whole part as it was written
    """

    key: str | None
    value: str
    text: str


@dataclass(frozen=True)
class ParsedSpec:
    """A spec taken apart, before any type is known; str() gives it back in canonical spacing."""

    name: str
    arguments: tuple[Argument, ...] = ()

    def __str__(self) -> str:
        parts = [part.value if part.key is None else f"{part.key}={part.value}" for part in self.arguments]
        return f"{self.name}:{','.join(parts)}" if parts else self.name


def fold(name: str) -> str:
    """Names differ neither by case nor by underscore against hyphen."""
    return name.casefold().replace("_", "-")


def parse_spec(text: str) -> ParsedSpec:
    """Take `name:key=value,...` apart; SpecError where it is not of that form."""
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not name:
        raise SpecError(f"{text!r} has no name; expected name:key=value,key=value")
    if any(mark in name for mark in ",=[]+"):
        hint = re.sub(r",", ":", text, count=1) if "," in name else None
        raise SpecError(
            f"{text!r} does not start with a name and a colon; expected name:key=value,key=value"
            + (f", perhaps {hint!r}" if hint else "")
        )
    return ParsedSpec(name, parse_arguments(rest, text) if colon else ())


def parse_arguments(text: str, whole: str | None = None) -> tuple[Argument, ...]:
    """Split `key=value,key=value` at the commas outside brackets; `whole` is the spec that an error quotes."""
    whole = text if whole is None else whole
    if not text.strip():
        return ()
    arguments = []
    for part in split(text, ",", whole):
        part = part.strip()
        if not part:
            raise SpecError(f"{whole!r} has an empty argument; expected key=value between commas")
        key, equals, value = part.partition("=")
        if equals and _KEY.fullmatch(key.strip()):
            arguments.append(Argument(key.strip().replace("-", "_"), value.strip(), part))
        else:
            arguments.append(Argument(None, part, part))
    return tuple(arguments)


def split(text: str, mark: str, whole: str) -> list[str]:
    """Split at `mark` outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
            if depth < 0:
                break
        elif character == mark and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    if depth != 0:
        raise SpecError(f"{whole!r} has unbalanced brackets; every [ needs its ]")
    return [*parts, text[start:]]


def is_group(text: str) -> bool:
    """Whether the first bracket of the text closes at its very end."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth == 0:
            return position == len(text) - 1
    return False


def ungroup(text: str) -> str:
    return text[1:-1] if is_group(text) else text


def nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x' or 'y'?` or nothing."""
    typed, known = name.casefold(), list(names)
    # Somebody who types the beginning of a name means that name, whatever else is a letter away.
    begun = [one for one in known if typed and one.casefold().startswith(typed)]
    # Two letters swapped is the commonest slip of a quick hand, and the matcher counts it as two.
    swapped = [one for one in known if sorted(one.casefold()) == sorted(typed)]
    close = list(dict.fromkeys([*begun, *swapped, *difflib.get_close_matches(typed, known, n=3, cutoff=0.5)]))[:3]
    return f"; did you mean {' or '.join(repr(one) for one in close)}?" if close else ""
