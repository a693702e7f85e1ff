"""The index of a run's records: resumes believe it as far as the records are those that it was made of."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from advkit.core.errors import StaleRun
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.run import held
from advkit.evaluation.run import store as stores
from advkit.evaluation.run.scenario import ended_by_stage
from advkit.evaluation.run.store import Store

CASE = {"case": 1}


def made(first: int, n: int) -> list[Record]:
    ends = list(Outcome)
    return [
        Record(f"r{i}", "pgd", ends[i % 6], label=i % 3, margin=i / 8, stage="s" if i % 2 else "", source="é" * (i % 3))
        for i in range(first, first + n)
    ]


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "MANY", 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished run of 40 records, in batches."""
    store = Store(tmp_path, CASE)
    for first in range(0, 40, 8):
        store.append(made(first, 8))
    store.settle()
    store.close()
    assert (tmp_path / "records.index").exists()
    return tmp_path


def opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, int]:
    """The store, and how many lines it read."""
    read = []
    real = stores.records_in

    def counting(lines, file, before=0):
        for record in real(lines, file, before):
            read.append(1)
            yield record

    monkeypatch.setattr(stores, "records_in", counting)
    store = Store(folder, CASE)
    store.close()
    monkeypatch.setattr(stores, "records_in", real)
    return store, len(read)


def same(store: Store, records: list[Record]) -> None:
    assert list(store) == records
    assert dict(store.records) == {Store.key(r.made_by, r.id): r for r in records}
    assert list(store.records.ids()) == [r.id for r in records]
    assert ended_by_stage(store.records) == Counter((r.stage, r.outcome) for r in records)
    assert set(store.records.classes) == {r.label for r in records}


def test_a_resume_reads_no_line_that_the_index_knows(folder, monkeypatch):
    store, read = opened(folder, monkeypatch)
    assert read == 0
    same(store, made(0, 40))


def test_lines_behind_the_index_are_read(folder, monkeypatch):
    index = (folder / "records.index").read_bytes()
    store = Store(folder, CASE)
    store.append(made(40, 5))
    store.close()
    (folder / "records.index").write_bytes(index)  # a run that was killed leaves the one before
    with (folder / "records.jsonl").open("ab") as file:
        file.write(b'{"id":"r45","att')  # and a line cut short
    store, read = opened(folder, monkeypatch)
    assert read == 5
    same(store, made(0, 45))


@pytest.mark.parametrize("harm", ["gone", "cut", "flipped", "empty", "other"])
def test_without_a_sound_index_all_is_read(harm, folder, monkeypatch):
    file = folder / "records.index"
    raw = bytearray(file.read_bytes())
    if harm == "gone":
        file.unlink()
    elif harm == "other":
        file.write_bytes(b"\x00" * 32 + b"something else")
    else:
        raw[len(raw) // 2] ^= harm == "flipped"
        file.write_bytes(raw if harm == "flipped" else raw[: 0 if harm == "empty" else 50])
    store, read = opened(folder, monkeypatch)
    assert read == 40
    same(store, made(0, 40))
    assert opened(folder, monkeypatch)[1] == 0  # and the index is there again


def test_an_edited_line_is_noticed_whatever_the_index_says(folder):
    file = folder / "records.jsonl"
    raw, when = file.read_bytes(), file.stat()
    file.write_bytes(raw.replace(b'"margin":1.5', b'"margin":9.5'))  # as many bytes
    import os

    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    with pytest.raises(StaleRun, match="line 13 is not what was written"):
        Store(folder, CASE)


@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("edited", [1, 3, 40])
def test_edited_lines_at_the_end_are_noticed(edited, index, folder):
    """They are no batch whose checksums a crash cut off: the checksums of what stood there are left over."""
    file = folder / "records.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    rest = [line.replace(b'"label":', b'"label": ') for line in lines[-edited:]]
    file.write_bytes(b"".join([*lines[:-edited], *rest]))
    if not index:
        (folder / "records.index").unlink()
    with pytest.raises(StaleRun, match=f"line {41 - edited} is not what was written"):
        Store(folder, CASE)


def test_edited_lines_behind_the_index_are_noticed(folder):
    index = (folder / "records.index").read_bytes()
    store = Store(folder, CASE)
    store.append(made(40, 5))
    store.close()
    (folder / "records.index").write_bytes(index)
    file = folder / "records.jsonl"
    raw = file.read_bytes()
    file.write_bytes(raw[:-2] + b" }\n")
    with pytest.raises(StaleRun, match="line 45 is not what was written"):
        Store(folder, CASE)


def test_a_batch_behind_the_index_whose_checksums_a_crash_cut_off_counts_where_lines_were_taken_out(folder):
    file, times = folder / "records.jsonl", folder / "records.seconds.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:7] + lines[8:]))
    Store(folder, CASE).close()
    known = times.read_bytes()
    index = (folder / "records.index").read_bytes()
    store = Store(folder, CASE)
    store.append(made(40, 5))
    store.close()
    times.write_bytes(known)
    (folder / "records.index").write_bytes(index)
    same(Store(folder, CASE), made(0, 7) + made(8, 37))


def test_a_line_taken_out_is_run_again(folder, monkeypatch):
    file = folder / "records.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:7] + lines[8:]))
    store, read = opened(folder, monkeypatch)
    assert read == 39
    same(store, made(0, 7) + made(8, 32))


def test_a_lost_file_of_times_is_made_up_for(folder):
    """Lines are known from now on, those of the index among them."""
    (folder / "records.seconds.jsonl").unlink()
    Store(folder, CASE).close()
    (folder / "records.index").unlink()
    file = folder / "records.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"margin":1.5', b'"margin":9.5'))
    with pytest.raises(StaleRun, match="line 13 is not what was written"):
        Store(folder, CASE)


def test_twice_the_same_line_is_one_record_and_another_is_refused(folder, monkeypatch):
    (folder / "records.index").unlink()
    (folder / "records.seconds.jsonl").unlink()
    file = folder / "records.jsonl"
    raw = file.read_bytes()
    lines = raw.splitlines(keepends=True)
    file.write_bytes(raw + lines[3])
    store, _ = opened(folder, monkeypatch)
    same(store, made(0, 40))
    (folder / "records.seconds.jsonl").unlink()
    file.write_bytes(raw + lines[3].replace(b'"label":0', b'"label":1'))
    with pytest.raises(StaleRun, match="line 41: another record of row r3"):
        Store(folder, CASE)
