"""What the batches of a run cost, and marks by which the lines of its records are known again."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

from advkit.core.strict_json import read_object


class Times:
    """The file of times of a run folder: one line of JSON per batch, appended when its records are on the disk.

    An entry has the attack's label, the batch's rows and seconds, tokens where they are counted, and in `marks` the
    CRC-32 of every line of records, as 8 hexadecimal digits each. Earlier versions wrote `lines` in their place: the
    first 16 digits of each line's SHA-256. Lines that are no entries are passed over, they are no evidence.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._entries: list[dict[str, Any]] = []

    def open(self) -> None:
        """Read what is there; what a crash cut short is ended, so that what comes now is a line of its own."""
        self._entries = []
        raw = self.file.read_bytes() if self.file.exists() else b""
        for line in raw.split(b"\n"):
            with suppress(ValueError):
                self._entries.append(read_object(line))
        if raw and not raw.endswith(b"\n"):
            with self.file.open("ab") as handle:
                handle.write(b"\n")

    def append(
        self, lines: Sequence[bytes], attack: str = "", rows: int = 0, seconds: float = 0.0, tokens: int = 0
    ) -> None:
        """One batch.

        lines: of its records, without their ends
        """
        entry = {"attack": attack, "rows": rows, "seconds": seconds} | ({"tokens": tokens} if tokens else {})
        entry["marks"] = struct.pack(f">{len(lines)}I", *map(crc32, lines)).hex()
        with self.file.open("ab", buffering=0) as handle:
            handle.write((json.dumps(entry) + "\n").encode())
        self._entries.append(entry)

    def text(self) -> str:
        """Of the whole file, as this process knows it."""
        return "".join(json.dumps(entry) + "\n" for entry in self._entries)

    def spent(self, what: str) -> dict[str, float]:
        """Sum over all batches, per attack label."""
        total: dict[str, float] = {}
        for entry in self._entries:
            try:
                label, spent = str(entry["attack"]), float(entry.get(what, 0.0))
            except (ValueError, TypeError, KeyError):
                continue
            if label:
                total[label] = total.get(label, 0.0) + max(0.0, spent)
        return total

    def lines(self) -> int:
        """How many lines of records are known."""
        return sum(1 for _ in self._marks())

    def check(self, lines: Iterable[bytes]) -> tuple[int | None, int]:
        """Compare lines of records, without their ends, with those that were written.

        Gives the place of the first line that is not what was written, None where all are; and how many lines are
        known, counted from the first: those behind them are a batch whose times a crash cut off. Lines may be missing
        among those that were written, but are never in another order. Unknown lines in the place of some that were
        written last are edits of them: what a crash cuts off is behind all that is known.
        """
        written = list(self._marks())
        known, older = set(written), any(isinstance(mark, str) for mark in written)
        marks = [(crc32(line), _older(line) if older else "") for line in lines]
        end = max((place for place, mark in enumerate(marks, 1) if not known.isdisjoint(mark)), default=0)
        left = iter(written)
        for place, mark in enumerate(marks[:end]):
            if not any(each in mark for each in left):
                return place, end
        if end < len(marks) and next(left, None) is not None:
            return end, end
        return None, end

    def _marks(self) -> Iterator[int | str]:
        """Of all lines that were written: numbers, and texts of earlier versions."""
        for entry in self._entries:
            older, marks = entry.get("lines"), entry.get("marks")
            if isinstance(older, list):
                yield from (mark for mark in older if mark and isinstance(mark, str))
            if isinstance(marks, str):
                with suppress(ValueError, struct.error):
                    yield from struct.unpack(f">{len(marks) // 8}I", bytes.fromhex(marks))


def _older(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()[:16]
