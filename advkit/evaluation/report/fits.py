"""Whether a document fits a JSON Schema, for the keywords that ours are written in.

A report is checked whenever it is written or read. The package `jsonschema` is asked only where something does not fit,
for the words: importing it and walking one report costs more than a short run's attack.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, cast

Schema = Mapping[str, Any]


def fits(data: Any, part: Schema, root: Schema) -> bool:
    """Whether `data` certainly fits a part of a JSON Schema (draft 2020-12).

    root: the schema that a `$ref` of the form `#/...` points into

    True only where `jsonschema` finds no error. False where it does, and also where a keyword is not known here: then
    `jsonschema` is to be asked.
    """
    return all(key in _KEYWORDS and _KEYWORDS[key](data, wanted, part, root) for key, wanted in part.items())


def _whole(data: Any) -> bool:
    return _number(data) and (isinstance(data, int) or data.is_integer())


def _number(data: Any) -> bool:
    return isinstance(data, (int, float)) and not isinstance(data, bool)


_TYPES: Mapping[str, Callable[[Any], bool]] = {
    "object": lambda data: isinstance(data, dict),
    "array": lambda data: isinstance(data, list),
    "string": lambda data: isinstance(data, str),
    "boolean": lambda data: isinstance(data, bool),
    "null": lambda data: data is None,
    "number": _number,
    "integer": _whole,
}


def _type(data: Any, wanted: Any, part: Schema, root: Schema) -> bool:
    return any(name in _TYPES and _TYPES[name](data) for name in ([wanted] if isinstance(wanted, str) else wanted))


def _ref(data: Any, wanted: str, part: Schema, root: Schema) -> bool:
    if not wanted.startswith("#/"):
        return False
    found: Any = root
    for step in wanted[2:].split("/"):
        if not isinstance(found, Mapping) or step not in found:
            return False
        found = found[step]
    return fits(data, cast("Schema", found), root)


def _properties(data: Any, wanted: Schema, part: Schema, root: Schema) -> bool:
    return not isinstance(data, dict) or all(fits(data[key], wanted[key], root) for key in data.keys() & wanted.keys())


def _additional(data: Any, wanted: Any, part: Schema, root: Schema) -> bool:
    if not isinstance(data, dict) or wanted is True:
        return True
    others = data.keys() - part.get("properties", {}).keys()
    if "patternProperties" in part:
        return False
    return not others if wanted is False else all(fits(data[key], wanted, root) for key in others)


def _bound(holds: Callable[[Any, Any], bool]) -> Callable[[Any, Any, Schema, Schema], bool]:
    return lambda data, wanted, part, root: not _number(data) or holds(data, wanted)


_KEYWORDS: Mapping[str, Callable[[Any, Any, Schema, Schema], bool]] = {
    **dict.fromkeys(("$schema", "$id", "$defs", "title", "description", "format"), lambda *_: True),
    "type": _type,
    "$ref": _ref,
    "properties": _properties,
    "additionalProperties": _additional,
    "required": lambda data, wanted, *_: not isinstance(data, dict) or all(key in data for key in wanted),
    "items": lambda data, wanted, part, root: (
        not isinstance(data, list) or all(fits(each, wanted, root) for each in data)
    ),
    "minItems": lambda data, wanted, *_: not isinstance(data, list) or len(data) >= wanted,
    "maxItems": lambda data, wanted, *_: not isinstance(data, list) or len(data) <= wanted,
    "anyOf": lambda data, wanted, part, root: any(fits(data, each, root) for each in wanted),
    # Words alone: JSON's 1, 1.0 and true need more care, and no schema of ours lists them.
    "enum": lambda data, wanted, *_: isinstance(data, str) and data in wanted,
    "pattern": lambda data, wanted, *_: not isinstance(data, str) or re.search(wanted, data) is not None,
    "minimum": _bound(lambda data, bound: not data < bound),
    "maximum": _bound(lambda data, bound: not data > bound),
    "exclusiveMinimum": _bound(lambda data, bound: not data <= bound),
    "exclusiveMaximum": _bound(lambda data, bound: not data >= bound),
}
