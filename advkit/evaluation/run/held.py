"""The records of a run in memory: their lines, read when they are asked for, and an index that finds them.

A million records take a third of the memory that they would as objects, and a run that is resumed reads none of them:
the index (`records.index`) says which there are. It is derived from the records and may be deleted. It is believed
where the first bytes of the records have the hash that it names, and no further than that.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, ValuesView
from contextlib import suppress
from itertools import accumulate, count, groupby
from operator import add, attrgetter
from pathlib import Path

import msgspec
from typing_extensions import override

from advkit.core.files import write_whole
from advkit.core.protocols import Label, Outcome, Record
from advkit.evaluation.run.codec import from_line

MANY = 10_000
"""Records from which an index pays: fewer are read in the time that it takes to look at it."""
_VERSION = 2
_OUTCOMES = tuple(Outcome)
_NUMBERS = {str(outcome): number for number, outcome in enumerate(_OUTCOMES)}
_DIGEST = hashlib.sha256().digest_size

MadeBy = tuple[str, str, str]
"""Attack, stage and source of a label."""
_MADE_BY: Callable[[Record], MadeBy] = attrgetter("attack", "stage", "source")
# The text that an outcome is: looked up faster than the outcome, whose hash is a function of Python.
_OUTCOME: Callable[[Record], str] = attrgetter("outcome._value_")
_LABEL: Callable[[Record], int | None] = attrgetter("label")


def key_of(label: Label, row: str) -> str:
    """Names a record within a case."""
    return f"{label}|{row}"


def keys_of(records: Sequence[Record]) -> tuple[list[str], list[tuple[MadeBy, int]]]:
    """Key of every record; and what made them, with the number of those that follow one another and were made by it."""
    made = list(map(_MADE_BY, records))
    alike = made.count(made[0]) == len(made) if made else False
    runs = [(made[0], len(made))] if alike else [(each, len(list(run))) for each, run in groupby(made)]
    keys: list[str] = []
    for each, number in runs:
        head = key_of(Label(*each), "")
        keys += [head + record.id for record in records[len(keys) : len(keys) + number]]
    return keys, runs


class _Index(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """What is known of the first `size` bytes of a file of records; one entry per record, in the file's order.

    labels:   attack, stage and source of every label
    classes:  labels of rows that occur
    keys:     the label's text and the row's id, as the store names a record
    makers:   number of its label; of 16 bits
    outcomes: number of its outcome; of 8 bits
    starts:   where its line begins; of 64 bits
    """

    version: int
    size: int
    sha256: bytes
    labels: list[MadeBy]
    classes: list[int | None]
    keys: list[str]
    makers: bytes
    outcomes: bytes
    starts: bytes


class Held(Mapping[str, Record]):
    """Records by key, in the order in which they were made; each is read from its line when it is asked for.

    raw:     the lines, as they lie in the file
    hash:    SHA-256 of them
    labels:  of the attacks that made them
    classes: labels of rows that occur
    """

    def __init__(self) -> None:
        self.raw = bytearray()
        self.hash = hashlib.sha256()
        self.labels: list[Label] = []
        self._tally: Counter[tuple[int, int]] = Counter()
        self.classes: dict[int | None, None] = {}
        self._places: dict[str, int] = {}
        self._numbers: dict[MadeBy, int] = {}
        self._makers, self._outcomes = array("H"), bytearray()
        self._starts = array("q")

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    @override
    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __getitem__(self, key: str) -> Record:
        return self._at(self._places[key])

    @override
    def values(self) -> ValuesView[Record]:
        return _Values(self)

    def _at(self, place: int) -> Record:
        return from_line(self._line(place))

    def line(self, key: str) -> bytes:
        """Of the record, with its end."""
        return self._line(self._places[key])

    def _line(self, place: int) -> bytes:
        start = self._starts[place]
        return bytes(self.raw[start : self.raw.index(b"\n", start) + 1])

    def ids(self) -> Iterator[str]:
        """Of the rows, one per record."""
        lengths = [len(str(label)) + 1 for label in self.labels]
        return (key[lengths[maker] :] for key, maker in zip(self._places, self._makers, strict=True))

    def ended(self) -> Counter[tuple[str, Outcome]]:
        """How many records ended how, by stage."""
        found: Counter[tuple[str, Outcome]] = Counter()
        for (maker, outcome), number in self._tally.items():
            found[self.labels[maker].stage, _OUTCOMES[outcome]] += number
        return found

    def holds_any(self, keys: Iterable[str]) -> bool:
        """Whether one of these records is there."""
        return not self._places.keys().isdisjoint(keys)

    def append(
        self,
        keys: Sequence[str],
        runs: Sequence[tuple[MadeBy, int]],
        records: Sequence[Record],
        text: bytes,
        lines: Sequence[bytes],
    ) -> None:
        """New records.

        keys, runs: of them, see `keys_of`
        text:       their lines, one after the other
        lines:      the same one by one, without their ends
        """
        starts = map(add, accumulate(map(len, lines), initial=len(self.raw)), range(len(lines)))
        self.know(keys, runs, records, list(starts))
        self.raw += text
        self.hash.update(text)

    def know(
        self,
        keys: Sequence[str],
        runs: Sequence[tuple[MadeBy, int]],
        records: Sequence[Record],
        starts: Sequence[int],
    ) -> None:
        """Records whose lines begin there in `raw`; see `append`."""
        self._places.update(zip(keys, count(len(self._starts)), strict=False))
        self._starts += array("q", starts)
        self.classes |= dict.fromkeys(map(_LABEL, records))
        outcomes, begun = bytes(map(_NUMBERS.__getitem__, map(_OUTCOME, records))), 0
        self._outcomes += outcomes
        for made_by, number in runs:
            maker, part = self._number(made_by), outcomes[begun : begun + number]
            begun += number
            self._makers += array("H", [maker]) * number
            for outcome in {*part}:
                self._tally[maker, outcome] += part.count(outcome)

    def _number(self, made_by: MadeBy) -> int:
        number = self._numbers.get(made_by)
        if number is None:
            number = self._numbers[made_by] = len(self.labels)
            self.labels.append(Label(*made_by))
        return number

    def save(self, file: Path) -> None:
        """Write the index of all of them."""
        index = _Index(
            _VERSION,
            len(self.raw),
            self.hash.digest(),
            [(label.attack, label.stage, label.source) for label in self.labels],
            list(self.classes),
            list(self._places),
            self._makers.tobytes(),
            bytes(self._outcomes),
            self._starts.tobytes(),
        )
        content = msgspec.msgpack.encode(index)
        write_whole(file, hashlib.sha256(content).digest() + content)

    def load(self, file: Path, raw: bytearray) -> int:
        """Take over what an index says of the first bytes of `raw`; how many bytes those are, 0 where it says nothing.

        An index that is damaged, of another version, or of other records says nothing.
        """
        self.raw = raw
        index, seen = _read(file), hashlib.sha256()
        with memoryview(raw) as view:
            if index is not None and index.size <= len(raw):
                seen.update(view[: index.size])
                if seen.digest() == index.sha256:
                    self._take(index)
                    seen.update(view[index.size :])
                    self.hash = seen
                    return index.size
            self.hash = hashlib.sha256(view)
        return 0

    def _take(self, index: _Index) -> None:
        for each in index.labels:
            self._number(each)
        self.classes = dict.fromkeys(index.classes)
        self._places = {key: place for place, key in enumerate(index.keys)}
        self._makers.frombytes(index.makers)
        self._outcomes = bytearray(index.outcomes)
        self._starts.frombytes(index.starts)
        self._tally = Counter(zip(self._makers, self._outcomes, strict=True))


class _Values(ValuesView[Record]):
    """The records one after the other."""

    def __init__(self, held: Held) -> None:
        super().__init__(held)
        self._held = held

    @override
    def __iter__(self) -> Iterator[Record]:
        return map(self._held._at, range(len(self._held)))


def _read(file: Path) -> _Index | None:
    """The index in a file; None where there is none, or one that is damaged or of another version."""
    with suppress(OSError, msgspec.MsgspecError):
        content = file.read_bytes()
        if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
            index = msgspec.msgpack.decode(content[_DIGEST:], type=_Index)
            return index if index.version == _VERSION else None
    return None
