"""The file of times: lines of records are known again by their CRC-32, those of earlier versions by their SHA-256."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path

import pytest

from advkit.core.errors import StaleRun
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.run.store import Store
from advkit.evaluation.run.times import Times

LINES = [b'{"id":"%d"}' % i for i in range(9)]


@pytest.fixture(params=["now", "earlier", "both"])
def times(request: pytest.FixtureRequest, tmp_path: Path) -> Times:
    """Three batches of three lines."""
    file = tmp_path / "records.seconds.jsonl"
    made = Times(file)
    for first in (0, 3, 6):
        lines = LINES[first : first + 3]
        if request.param == "now" or (request.param == "both" and first):
            made.append(lines, "pgd", 3, 0.5, tokens=2)
        else:
            marks = [hashlib.sha256(line).hexdigest()[:16] for line in lines]
            with file.open("a") as handle:
                entry = {"attack": "pgd", "rows": 3, "seconds": 0.5, "tokens": 2, "lines": marks}
                handle.write(json.dumps(entry) + "\n")
    again = Times(file)
    again.open()
    return again


def test_marks_are_checksums_of_the_lines(tmp_path: Path) -> None:
    times = Times(tmp_path / "times")
    times.append(LINES, "pgd", 9, 0.25)
    entry = json.loads((tmp_path / "times").read_text())
    assert entry == {
        "attack": "pgd",
        "rows": 9,
        "seconds": 0.25,
        "marks": "".join(f"{zlib.crc32(x):08x}" for x in LINES),
    }


def test_lines_may_be_missing_and_others_are_named(times: Times) -> None:
    assert times.lines() == 9
    assert times.spent("seconds") == {"pgd": 1.5}
    assert times.spent("tokens") == {"pgd": 6}
    assert times.check(LINES) == (None, 9)
    assert times.check([]) == (None, 0)
    assert times.check([LINES[0], *LINES[4:7]]) == (None, 4)
    assert times.check([*LINES[:4], b"edited", *LINES[5:]]) == (4, 9)
    assert times.check([*LINES[:3], LINES[5], LINES[4], *LINES[6:]]) == (4, 8)
    # A batch whose times a crash cut off.
    assert times.check([*LINES, b"new", b"newer"]) == (None, 9)


def test_entries_that_are_none_are_passed_over(times: Times) -> None:
    with times.file.open("a") as handle:
        handle.write(
            '{"attack":"pgd","marks":"zz"}\n{"attack":3,"marks":"abcdef"}\n{"marks":7,"lines":{}}\n{"seconds":'
        )
    again = Times(times.file)
    again.open()
    assert again.check(LINES) == (None, 9)
    assert again.lines() == 9
    again.append([b"more"])  # a line of its own behind the one that was cut short
    last = Times(times.file)
    last.open()
    assert last.check([*LINES, b"more"]) == (None, 10)


def test_a_folder_of_an_earlier_version_goes_on_and_its_edited_lines_are_noticed(tmp_path: Path) -> None:
    made = [Record(f"r{i}", "pgd", Outcome.ROBUST, i) for i in range(6)]
    store = Store(tmp_path, {"case": 1})
    store.append(made[:3])
    store.close()
    file, lines = tmp_path / "records.seconds.jsonl", (tmp_path / "records.jsonl").read_bytes().splitlines()
    marks = [hashlib.sha256(line).hexdigest()[:16] for line in lines]
    file.write_text(json.dumps({"attack": "pgd", "rows": 3, "seconds": 0.0, "lines": marks}) + "\n")
    store = Store(tmp_path, {"case": 1})
    store.append(made[3:])
    store.close()
    assert list(Store(tmp_path, {"case": 1})) == made
    for number in (2, 5):
        raw = (tmp_path / "records.jsonl").read_bytes()
        (tmp_path / "records.jsonl").write_bytes(raw.replace(b'"label":%d' % (number - 1), b'"label":9'))
        with pytest.raises(StaleRun, match=f"line {number} is not what was written"):
            Store(tmp_path, {"case": 1})
        (tmp_path / "records.jsonl").write_bytes(raw)
