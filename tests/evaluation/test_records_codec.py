"""A record and its line: byte for byte what json writes, and read back the same."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from advkit.core.errors import ReportError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.run.codec import from_line, to_bytes, to_line, to_lines
from advkit.evaluation.run.reading import each_record, read_records

OLD = Path(__file__).parent / "run_of_schema_1_0" / "records.jsonl"
RARE = ("figures", "trace", "texts", "scores", "stage", "source")

reals = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 1e-5, 1e16, 1e22, 5e-324, 1e-4])
whole = st.integers(-(2**63) + 1, 2**63 - 1)
texts = st.text(max_size=6) | st.sampled_from(["\x7f", "\u2028é", '"\\\n', "\ud800", "🙂", "NaN text"])
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
plain = st.recursive(st.none() | st.booleans() | whole | reals | names, lambda each: st.lists(each, max_size=2))
records = st.builds(
    Record,
    id=names,
    attack=names.filter(lambda text: "/" not in text and "@" not in text),
    outcome=st.sampled_from(Outcome),
    label=st.none() | whole,
    clean=st.none() | whole,
    reached=st.booleans(),
    distance=st.none() | reals,
    margin=st.none() | reals,
    eight_bit=st.none() | st.booleans(),
    forwards=st.integers(0, 2**63 - 1),
    notes=st.lists(texts, max_size=2).map(tuple),
    message=texts,
    measures=st.dictionaries(names, reals, max_size=3),
    figures=st.dictionaries(names, st.booleans() | reals, max_size=2),
    trace=st.lists(st.dictionaries(names, plain, max_size=2), max_size=2).map(tuple),
    texts=st.dictionaries(names, texts, max_size=2),
    scores=st.dictionaries(names, st.lists(reals, max_size=3).map(tuple), max_size=2),
    stage=names,
    source=names,
)


def as_json_writes(record: Record) -> bytes:
    """The line as the standard library writes it, fields that few records have left out where they are empty."""
    said = {name: value for name, value in asdict(record).items() if name not in RARE or value}
    return json.dumps(said, separators=(",", ":")).encode()


@pytest.mark.slow
@given(st.lists(records, max_size=4))
@settings(max_examples=40, deadline=None)
def test_a_line_is_what_json_writes_and_is_read_back(made: list[Record]) -> None:
    assert [to_bytes(record) for record in made] == [as_json_writes(record) for record in made]
    assert to_lines(made) == [to_bytes(record) + b"\n" for record in made]
    for record in made:
        again = from_line(to_bytes(record))
        assert again == record
        assert to_bytes(again) == to_bytes(record)


def test_lines_of_ordinary_records_are_what_json_writes() -> None:
    """Those that go the short way."""
    made = [
        Record(f"r{i}", "fgsm", Outcome.ROBUST, i % 3, i % 3, margin=i / 7, distance=0.1, measures={"l2": i + 0.5})
        for i in range(1, 300)
    ]
    assert to_lines(made) == [as_json_writes(record) + b"\n" for record in made]


def test_a_file_of_the_first_version_is_read() -> None:
    """Its lines hold the label as one text; records that are read are written in today's words, and read the same."""
    found = read_records(OLD)
    assert len(found) == len(OLD.read_bytes().splitlines())
    assert list(each_record(OLD)) == found
    assert [from_line(to_line(record)) for record in found] == found
    for line, record in zip(OLD.read_text().splitlines(), found, strict=True):
        said = json.loads(line)
        assert said.pop("attack") == str(record.made_by)
        for name in ("stage", "source"):
            said.pop(name, None)
        held = json.loads(to_line(record))
        assert {name: held.get(name) for name in said} == said


ONE = Record("a", "pgd", Outcome.BROKEN, label=1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_lacks_are_texts_and_come_back(value: float) -> None:
    record = replace(ONE, measures={"x": value, "y": 0.5}, figures={"z": value}, trace=({"loss": [value, 1]},))
    line = to_line(record)
    json.loads(line, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    again = from_line(line)
    for found in (again.measures["x"], again.figures["z"], again.trace[0]["loss"][0]):
        assert isinstance(found, float)
        assert found == value or (math.isnan(found) and math.isnan(value))
    assert to_line(again) == line
    assert to_lines([record]) == [line.encode() + b"\n"]
    # A length has no such number: none was measured.
    assert json.loads(to_line(replace(ONE, distance=value)))["distance"] is None


def test_lines_of_earlier_versions_with_nan_are_read() -> None:
    line = to_line(replace(ONE, measures={"x": 1.0}, trace=({"loss": 2.0},)))
    old = line.replace('"x":1.0', '"x":NaN').replace('"loss":2.0', '"loss":-Infinity')
    record = from_line(old)
    assert math.isnan(record.measures["x"])
    assert record.trace == ({"loss": -math.inf},)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"label":1', '"label":1,"unknown":2'),
        ('"label":1', '"label":1.5'),
        ('"label":1', '"label":true'),
        ('"label":1', '"label":9223372036854775808'),
        ('"distance":null', '"distance":NaN'),
        ('"distance":null', '"distance":1e999'),
        ('"margin":null', '"margin":"NaN"'),
        ('"forwards":0', '"forwards":-1'),
        ('"reached":false', '"reached":0'),
        ('"notes":[]', '"notes":[1]'),
        ('"measures":{}', '"measures":{"a":null}'),
        ('"measures":{}', '"measures":{"a":"1"}'),
        ('"measures":{}', '"measures":{},"trace":[{"a":9223372036854775808}]'),
        ('"broken"', '"brken"'),
        ('"id":"a"', '"id":"\\ud800"'),
        ('"id":"a",', ""),
        ('{"id"', '["id"'),
    ],
)
def test_what_is_no_record_is_refused_with_its_line(old: str, new: str, tmp_path: Path) -> None:
    good = to_line(ONE)
    bad = good.replace(old, new)
    assert bad != good
    with pytest.raises((ValueError, TypeError)):
        from_line(bad)
    file = tmp_path / "records.jsonl"
    file.write_text(f"{good}\n{bad}\n{good}\n")
    with pytest.raises(ReportError, match="line 2: not a record") as told:
        read_records(file)
    assert "\n" not in str(told.value)


def test_a_record_is_a_dataclass_for_those_who_ask() -> None:
    assert [each.name for each in fields(ONE)] == list(asdict(ONE))
    assert replace(ONE, label=2).label == 2
    assert hash(ONE) == hash(replace(ONE))
    changed: Any = ONE
    with pytest.raises(AttributeError):
        changed.label = 3
