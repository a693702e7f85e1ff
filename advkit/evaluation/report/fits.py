"""Whether a document fits a JSON Schema, for the keywords that ours are written in.

A report is checked whenever it is written or read. The package `jsonschema` is asked only where something does not fit,
for the words: importing it and walking one report costs more than a short run's attack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

Schema = Mapping[str, Any]
Check = Callable[[Any], bool]


def fits(data: Any, part: Schema, root: Schema) -> bool:
    """Whether `data` certainly fits a part of a JSON Schema (draft 2020-12).

    root: the schema that a `$ref` of the form `#/...` points into

    True only where `jsonschema` finds no error. False where it does, and also where a keyword is not known here: then
    `jsonschema` is to be asked.
    """
    return checker(part, root)(data)


def checker(part: Schema, root: Schema) -> Check:
    """`fits` for many documents: the part is read once, and what comes back is asked of each."""
    return _Compiler(root).check(part)


class _Compiler:
    """Turns parts of one schema into functions; what a `$ref` points to is turned once, and may name itself."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self._pointed: dict[str, Check] = {}

    def check(self, part: Schema) -> Check:
        if not part.keys() <= _KEYWORDS.keys():
            return lambda data: False
        made = [each for key, wanted in part.items() if (each := _KEYWORDS[key](wanted, part, self)) is not None]
        if len(made) == 1:
            return made[0]

        def check(data: Any) -> bool:
            for each in made:  # noqa: SIM110 - a generator costs more than what it asks
                if not each(data):
                    return False
            return True

        return check

    def pointed(self, pointer: str) -> Check:
        """What a `$ref` points to."""
        if pointer not in self._pointed:
            self._pointed[pointer] = lambda data: self._pointed[pointer](data)
            self._pointed[pointer] = self.check(found) if (found := self._found(pointer)) is not None else _never
        return self._pointed[pointer]

    def _found(self, pointer: str) -> Schema | None:
        if not pointer.startswith("#/"):
            return None
        found: Any = self.root
        for step in pointer[2:].split("/"):
            if not isinstance(found, Mapping) or step not in found:
                return None
            found = found[step]
        return cast("Schema", found)


def _never(data: Any) -> bool:
    return False


def _whole(data: Any) -> bool:
    return _number(data) and (isinstance(data, int) or data.is_integer())


def _number(data: Any) -> bool:
    return isinstance(data, (int, float)) and not isinstance(data, bool)


_TYPES: Mapping[str, Check] = {
    "object": lambda data: isinstance(data, dict),
    "array": lambda data: isinstance(data, list),
    "string": lambda data: isinstance(data, str),
    "boolean": lambda data: isinstance(data, bool),
    "null": lambda data: data is None,
    "number": _number,
    "integer": _whole,
}


def _type(wanted: Any, part: Schema, made: _Compiler) -> Check:
    names = [wanted] if isinstance(wanted, str) else wanted
    kinds = [_TYPES[name] for name in names if name in _TYPES]
    return kinds[0] if len(kinds) == 1 else _either(kinds)


def _properties(wanted: Mapping[str, Schema], part: Schema, made: _Compiler) -> Check:
    checks = {key: made.check(each) for key, each in wanted.items()}

    def check(data: Any) -> bool:
        if isinstance(data, dict):
            for key, each in checks.items():
                if key in data and not each(data[key]):
                    return False
        return True

    return check


def _additional(wanted: Any, part: Schema, made: _Compiler) -> Check | None:
    if wanted is True:
        return None
    if "patternProperties" in part:
        return lambda data: not isinstance(data, dict)
    known = part.get("properties", {}).keys()
    if wanted is False:
        return lambda data: not isinstance(data, dict) or data.keys() <= known
    other = made.check(wanted)
    return lambda data: not isinstance(data, dict) or all(map(other, map(data.get, data.keys() - known)))


def _required(wanted: Any, part: Schema, made: _Compiler) -> Check:
    names = frozenset(wanted)
    return lambda data: not isinstance(data, dict) or names <= data.keys()


def _items(wanted: Schema, part: Schema, made: _Compiler) -> Check:
    each = made.check(wanted)
    return lambda data: not isinstance(data, list) or all(map(each, data))


def _any_of(wanted: Any, part: Schema, made: _Compiler) -> Check:
    return _either([made.check(each) for each in wanted])


def _either(ways: Sequence[Check]) -> Check:
    def check(data: Any) -> bool:
        for way in ways:  # noqa: SIM110 - a generator costs more than what it asks
            if way(data):
                return True
        return False

    return check


def _enum(wanted: Any, part: Schema, made: _Compiler) -> Check:
    # Words alone: JSON's 1, 1.0 and true need more care, and no schema of ours lists them.
    words = [word for word in wanted if isinstance(word, str)]
    return lambda data: isinstance(data, str) and data in words


def _pattern(wanted: str, part: Schema, made: _Compiler) -> Check:
    search = re.compile(wanted).search
    return lambda data: not isinstance(data, str) or search(data) is not None


def _bound(holds: Callable[[Any, Any], bool]) -> Callable[[Any, Schema, _Compiler], Check]:
    return lambda bound, part, made: lambda data: not _number(data) or holds(data, bound)


_KEYWORDS: Mapping[str, Callable[[Any, Schema, _Compiler], Check | None]] = {
    **dict.fromkeys(("$schema", "$id", "$defs", "title", "description", "format"), lambda *_: None),
    "type": _type,
    "$ref": lambda wanted, part, made: made.pointed(wanted),
    "properties": _properties,
    "additionalProperties": _additional,
    "required": _required,
    "items": _items,
    "minItems": lambda wanted, *_: lambda data: not isinstance(data, list) or len(data) >= wanted,
    "maxItems": lambda wanted, *_: lambda data: not isinstance(data, list) or len(data) <= wanted,
    "anyOf": _any_of,
    "enum": _enum,
    "pattern": _pattern,
    "minimum": _bound(lambda data, bound: not data < bound),
    "maximum": _bound(lambda data, bound: not data > bound),
    "exclusiveMinimum": _bound(lambda data, bound: not data <= bound),
    "exclusiveMaximum": _bound(lambda data, bound: not data >= bound),
}
