"""A record and its line of JSON.

Lines are what `json.dumps` writes. msgspec writes most of them, several times faster, and reads all that it can. What
it would write otherwise (text outside ASCII, numbers with an exponent) or can't read (NaN in lines of earlier versions)
is left to `json`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import msgspec
from msgspec import structs

from advkit.core.protocols import Label, Record

_NAMES = Record.__struct_fields__
_WHERE_ANY = ("figures", "trace", "texts", "scores", "stage", "source")
"""Fields that most records have nothing for: written only where they have."""
_LENGTHS = ("distance", "margin", "closeness")
_NAMES_OF = ("id", "attack", "stage", "source")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How numbers that JSON lacks are written among measures, figures and in traces: as these texts, as ProtoJSON does."""

_encode, _encode_lines = msgspec.json.Encoder().encode, msgspec.json.Encoder().encode_lines
_decode = msgspec.json.Decoder(Record).decode
_EXACT = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def written(records: Sequence[Record]) -> tuple[str, ...]:
    """Names of the fields that the lines of these records have."""
    return tuple(name for name in _NAMES if name not in _WHERE_ANY or any(map(attrgetter(name), records)))


def to_line(record: Record) -> str:
    """One line of JSON, keys in the record's order; see `to_bytes`."""
    return to_bytes(record).decode()


def to_bytes(record: Record) -> bytes:
    """One line of JSON in ASCII, without its end.

    NaN and infinity are never written: a distance, margin or closeness becomes null, a number among measures, figures
    or in a trace one of the texts "NaN", "Infinity" and "-Infinity".
    """
    if _unusual([record]):
        return _exactly(record)
    try:
        line = _encode(record)
    except UnicodeEncodeError:  # half of a surrogate pair
        return _exactly(record)
    return line if _ascii(line) else _exactly(record)


def to_lines(records: Sequence[Record]) -> list[bytes]:
    """The same for many, faster: all are written at once, and those that `json` writes otherwise once more."""
    try:
        text = _encode_lines(records)
    except UnicodeEncodeError:  # half of a surrogate pair
        return list(map(to_bytes, records))
    lines, others = text.split(b"\n"), _unusual(records)
    lines.pop()
    if not _ascii(text):
        others |= {place for place, line in enumerate(lines) if not _ascii(line)}
    for place in others:
        lines[place] = to_bytes(records[place])
    return lines


def _ascii(text: bytes) -> bool:
    """Whether msgspec writes the text as `json` does."""
    return text.isascii() and b"\x7f" not in text


def _unusual(records: Sequence[Record]) -> set[int]:
    """Places of those that `json` writes otherwise than msgspec: with numbers that have an exponent there.

    Records with a trace or scores are among them, whatever their numbers.
    """
    found = set()
    for place, record in enumerate(records):
        for value in (record.distance, record.margin, record.closeness, *record.measures.values()):
            if value and not (1e-4 <= value < 1e16 or -1e16 < value <= -1e-4):
                found.add(place)
        if record.figures or record.trace or record.scores:
            figures = record.figures.values()
            if record.trace or record.scores or not all(not v or 1e-4 <= abs(v) < 1e16 for v in figures):
                found.add(place)
    return found


def _exactly(record: Record) -> bytes:
    said = {name: value for name, value in structs.asdict(record).items() if value or name not in _WHERE_ANY}
    try:
        return _EXACT.encode(said).encode()
    except ValueError:  # NaN or infinity
        lengths = {name: None for name in _LENGTHS if said[name] is not None and not math.isfinite(said[name])}
        return _EXACT.encode(_named(said | lengths)).encode()


def _named(value: Any) -> Any:
    """The value with texts in place of the numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_named(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _numbers(value: Any) -> Any:
    """The opposite of `_named`."""
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_numbers(each) for each in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def from_line(line: str | bytes) -> Record:
    """The record of one line; raises ValueError or TypeError when it is none."""
    try:
        record = _decode(line)
    except (msgspec.MsgspecError, RecursionError):
        record = _read_exactly(line)
    if record.trace:
        record = structs.replace(record, trace=tuple(_numbers(each) for each in record.trace))
        if not _plain(record.trace):
            raise TypeError(f"trace is {record.trace!r:.40}")
    if not record.stage and not record.source:
        # Runs of earlier versions wrote the label as one text.
        label = _label_of(record.attack)
        if label.stage or label.source:
            record = structs.replace(record, attack=label.attack, stage=label.stage, source=label.source)
    return record


_label_of = functools.lru_cache(maxsize=4096)(Label.parse)


def _read_exactly(line: str | bytes) -> Record:
    """A line that msgspec does not read by itself: numbers that JSON lacks, halves of surrogate pairs, or no record."""
    values = json.loads(line if isinstance(line, str) else line.decode())
    if not isinstance(values, dict):
        raise TypeError(f"it is a {type(values).__name__}")
    for name in ("measures", "figures"):
        if isinstance(values.get(name), dict):
            values[name] = _numbers(values[name])
    try:
        record = msgspec.convert(values, Record)
    except msgspec.MsgspecError as error:
        raise TypeError(str(error)) from None
    for name in _NAMES_OF:
        if (text := getattr(record, name)) != text.encode(errors="ignore").decode():
            raise TypeError(f"{name} is {text!r:.40}")
    for name in _LENGTHS:
        if (value := getattr(record, name)) is not None and not math.isfinite(value):
            raise TypeError(f"{name} is {value!r}, which is not finite")
    if not all(math.isfinite(value) for row in record.scores.values() for value in row):
        raise TypeError(f"scores is {record.scores!r:.40}, which is not all finite")
    return record


def _plain(value: Any) -> bool:
    """Whether a value of a trace is numbers and texts all the way down."""
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, str | bool | float) or (isinstance(value, int) and abs(value) < 2**63)
