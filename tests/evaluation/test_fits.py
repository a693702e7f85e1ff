"""The quick check of a report against its schema says what `jsonschema` says, only sooner."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

import advkit
from advkit.core.errors import ReportError
from advkit.evaluation.report.fits import fits
from advkit.evaluation.report.schema import schema, validate_part

ODD: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1.0,
    1.5,
    2.0,
    float("nan"),
    "",
    "x",
    "A1",
    "a b",
    [],
    [1],
    {},
    {"x": 1},
)


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    report = advkit.evaluate("pgd:steps=2", task="digits", model="zoo:digits-mlp", n=6, device="cpu")
    return report.to_dict()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*path, key))


def changed(document: dict[str, Any], path: tuple[Any, ...], how: str, value: Any) -> Any:
    """A copy in which the place is another value, is gone, or has one more key."""
    twin = copy.deepcopy(document)
    if not path:
        return value
    inner = twin
    for key in path[:-1]:
        inner = inner[key]
    if how == "other":
        inner[path[-1]] = value
    elif how == "gone":
        del inner[path[-1]]
    elif isinstance(inner[path[-1]], dict):
        inner[path[-1]]["one more"] = value
    return twin


def test_a_reports_schema_uses_no_keyword_that_is_not_known() -> None:
    """Else every report would wait for jsonschema."""
    assert fits({"a": 1}, {"type": "object", "properties": {"a": {"type": "integer"}}}, {})
    assert not fits({"a": 1}, {"type": "object", "no such keyword": 1}, {})


def test_real_reports_fit(document: dict[str, Any]) -> None:
    assert fits(document, schema(), schema())
    jsonschema.Draft202012Validator(schema()).validate(document)


@pytest.mark.slow
def test_whatever_is_changed_both_say_the_same(document: dict[str, Any]) -> None:
    judge = jsonschema.Draft202012Validator(schema())
    draw = random.Random(0)
    every = [*places(document)]
    refused = 0
    for _ in range(250):
        path, how = draw.choice(every), draw.choice(("other", "other", "gone", "more"))
        twin = changed(document, path, how, draw.choice(ODD))
        sound = judge.is_valid(twin)
        assert fits(twin, schema(), schema()) == sound, (path, how)
        refused += not sound
    assert 50 < refused < 230


def test_every_keyword_agrees_value_by_value() -> None:
    parts: list[dict[str, Any]] = [
        *({"type": name} for name in ("object", "array", "string", "boolean", "null", "number", "integer")),
        {"type": ["integer", "null"]},
        {"minimum": 1}, {"maximum": 1}, {"exclusiveMinimum": 1}, {"exclusiveMaximum": 1},
        {"minItems": 1}, {"maxItems": 0}, {"items": {"type": "string"}}, {"pattern": "^A"},
        {"required": ["x"]}, {"additionalProperties": False}, {"additionalProperties": {"type": "string"}},
        {"properties": {"x": {"type": "string"}}}, {"anyOf": [{"type": "string"}, {"minimum": 2}]},
        {"$ref": "#/$defs/word"}, {"$ref": "#/$defs/rate/properties/ci"},
    ]  # fmt: skip
    for part in parts:
        root = {**part, "$defs": schema()["$defs"]}
        for value in ODD:
            assert fits(value, part, root) == jsonschema.Draft202012Validator(root).is_valid(value), (part, value)
    # numbers and truth values of an enum are left to jsonschema; words are not
    assert fits("a", {"enum": ["a", "b"]}, {})
    assert not fits("c", {"enum": ["a", "b"]}, {})
    assert not fits(1, {"enum": [True]}, {})


def test_what_does_not_fit_is_told_in_the_old_words(document: dict[str, Any]) -> None:
    document = json.loads(json.dumps(document))
    document["dataset"]["n_total"] = 0
    with pytest.raises(ReportError, match=r"dataset\.n_total: 0 is less than the minimum of 1"):
        validate_part(document, schema(), "")
