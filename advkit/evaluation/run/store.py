"""The run folder: an append-only list of records that survives kill -9."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import accumulate, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from advkit.core.errors import RunInterrupted, RunInUse, StaleRun, UsageError
from advkit.core.files import Claimed, check_unclaimed, claimed, why, write_whole
from advkit.core.protocols import Label, Outcome, Record
from advkit.core.strict_json import read_object
from advkit.evaluation.run import held
from advkit.evaluation.run.codec import from_line as from_line
from advkit.evaluation.run.codec import to_line as to_line
from advkit.evaluation.run.codec import to_lines
from advkit.evaluation.run.codec import written as written
from advkit.evaluation.run.examples import forget_examples, write_examples
from advkit.evaluation.run.examples import read_examples as read_examples
from advkit.evaluation.run.held import Held
from advkit.evaluation.run.reading import BESIDE as BESIDE
from advkit.evaluation.run.reading import RECORDS_NAME as RECORDS_NAME
from advkit.evaluation.run.reading import beside_files as beside_files
from advkit.evaluation.run.reading import beside_name as beside_name
from advkit.evaluation.run.reading import read_records as read_records
from advkit.evaluation.run.reading import records_in
from advkit.evaluation.run.reading import records_path as records_path
from advkit.evaluation.run.times import Times

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("advkit")

_BLOCK = 4096
"""Lines that are read at a time."""


def check_folder(folder: Path) -> None:
    """Raise UsageError, before anything is spent, where a run folder could not be made; nothing is written.

    RunInUse where another process is writing to it.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"the run folder {folder} can't be written ({place} is a file): name another with --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(
            f"the run folder {folder} can't be written (no permission in {place}): name another with --out"
        )
    check_unclaimed(folder)


class Store:
    """Records of one case in a folder, which this process alone writes to.

    Opening an existing folder resumes it: what is there counts as done. A last line that a crash cut short is removed.
    Every line is known by a short hash in the file of times, so that one which was changed since is noticed.

    Where the folder or its records are removed or changed while the run goes on, they are written anew from memory, and
    what was found in their place is put aside; where another case lies there by then, beside it.

    rows: a hash of each row's file, by id, where a row's records depend on that row alone: then a folder whose case
          differs in nothing but some files is taken up, and the records of those rows are put aside

    Raises StaleRun when the folder holds another case or records that are not what was written, RunInUse while another
    process writes to it, UsageError when it can't be written.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], name: str = "records", rows: Mapping[str, str] | None = None
    ) -> None:
        self.folder = folder
        self.name = name
        self.path = folder / f"{name}.jsonl"
        self.records = Held()
        self.kept: dict[str, str] = {}
        self._index = folder / f"{name}.index"
        self._indexed = 0
        self._case = folder / f"{name}.case.json"
        self._text = json.dumps(config, sort_keys=True, indent=1) + "\n"
        self._rows = None if rows is None else dict(rows)
        self._sides: dict[str, bytes] = {}
        self._times = Times(folder / f"{name}.seconds.jsonl")
        try:
            self._right = Claimed(folder)
            try:
                self._open()
            except BaseException:
                self._right.release()
                raise
        except OSError as error:
            raise UsageError(f"the run folder {folder} can't be written ({why(error)}): name another with --out") from (
                error
            )

    def _open(self) -> None:
        file = self.folder / f"{self.name}.rows.json"
        if self._case.exists():
            self._same(self._case, file)
        elif self.path.exists() and self.path.stat().st_size:
            raise StaleRun(f"{self.folder} holds records without the case they belong to; name another --out")
        else:
            write_whole(self._case, self._text)
        if self._rows is not None:
            if not file.exists():
                write_whole(file, json.dumps(self._rows) + "\n")
            self.remember(file)
        raw = self._mended()
        size = self.records.load(self._index, raw)
        self._indexed = len(self.records)
        before = raw.count(b"\n", 0, size)
        self._read(size, before)
        self._check_written(size, before)
        self._begin(raw)

    def _read(self, start: int, before: int) -> None:
        """Know the records whose lines begin there, which so many lines are before."""
        lines = _lines(self.records.raw, start)
        while block := list(islice(lines, _BLOCK)):
            borders = list(accumulate(map(len, block), initial=start))
            start = borders[-1]
            records = list(records_in(block, self.path, before))
            keys, runs = held.keys_of(records)
            new: Sequence[int] = range(len(keys))
            if self._known(keys):
                new = self._once(block, records, keys, before)
                records = [records[place] for place in new]
                keys, runs = held.keys_of(records)
            before += len(block)
            self.records.know(keys, runs, records, [borders[place] for place in new])

    def _known(self, keys: Sequence[str]) -> bool:
        """Whether a record is among these twice, or there already."""
        return len({*keys}) < len(keys) or self.records.holds_any(keys)

    def _once(self, lines: Sequence[bytes], records: Sequence[Record], keys: Sequence[str], before: int) -> list[int]:
        """Places of the records that are not there already; StaleRun where another one of the same name is."""
        new: dict[str, int] = {}
        for place, key in enumerate(keys):
            if key in new:
                same = lines[place] == lines[new[key]] or records[place] == records[new[key]]
            elif key in self.records:
                same = lines[place] == self.records.line(key) or records[place] == self.records[key]
            else:
                new[key], same = place, True
            if not same:
                record = records[place]
                raise StaleRun(
                    f"{self.path}, line {before + place + 1}: another record of row {record.id} under {record.made_by} "
                    "stands above it: it was edited, or two runs wrote to it; remove both lines, or the folder"
                )
        return list(new.values())

    def _begin(self, raw: bytearray) -> None:
        """Go on behind these bytes, which are the file's."""
        self._file: IO[bytes] = self.path.open("ab", buffering=0)
        self._end = len(raw)

    @staticmethod
    def key(label: Label, row: str) -> str:
        """Names a record within a case."""
        return held.key_of(label, row)

    def _same(self, case: Path, rows: Path | None = None) -> None:
        old = case.read_bytes()
        if old == self._text.encode():
            return
        try:
            before, now = read_object(old), json.loads(self._text)
            differ = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
        except ValueError:
            differ = ["an unreadable case file"]
        if rows is not None and self._rows is not None and differ in (["data"], ["data", "n"]) and rows.exists():
            self._without_changed(rows, self._rows)
            return
        raise StaleRun(
            f"the run folder {self.folder} belongs to another case (different: {', '.join(differ)}): "
            "name another with --out, or remove it"
        )

    def _without_changed(self, file: Path, now: Mapping[str, str]) -> None:
        """Put aside the records of rows whose files are not those that the folder knows, and know the new ones."""
        try:
            before = read_object(file.read_bytes())
        except ValueError as error:
            raise StaleRun(f"{file} is damaged ({error}): name another --out, or remove the folder") from None
        changed = {row for row in {*before, *now} if before.get(row) != now.get(row)}
        raw, aside = self._mended(), ""
        lines = list(_lines(raw, 0))
        kept = [
            line for line, record in zip(lines, records_in(lines, self.path), strict=True) if record.id not in changed
        ]
        if len(kept) < len(lines):
            place = _free(self.path.with_suffix(".changed"))
            write_whole(place, raw)
            write_whole(self.path, b"".join(kept))
            aside = f"; {len(lines) - len(kept)} records are put aside in {place}"
        forget_examples(self.folder / f"{self.name}.examples", changed)
        write_whole(file, json.dumps(dict(now)) + "\n")
        write_whole(self._case, self._text)
        log.warning(
            "%d files of %s are not those that the run began with (%s): their samples are run again%s",
            len(changed),
            self.folder,
            ", ".join(sorted(changed)[:3]),
            aside,
        )

    def _mended(self) -> bytearray:
        """The whole lines of the file; a last one that was cut short is taken off."""
        if not self.path.exists():
            return bytearray()
        with self.path.open("r+b") as handle:
            raw = bytearray(self.path.stat().st_size)
            del raw[handle.readinto(raw) :]
            whole = raw.rfind(b"\n") + 1
            if whole != len(raw):
                handle.truncate(whole)
                del raw[whole:]
        return raw

    def _check_written(self, start: int, before: int) -> None:
        """Raise StaleRun where a line is not what was written, as far as the file of times can tell.

        Lines may be taken out. Those behind the last known one are a batch whose times a crash cut off: they are known
        from now on.

        start, before: where the lines begin of which the index says nothing, and how many are before them
        """
        self._times.open()
        if self._times.lines() < before:
            start = before = 0  # lines that the index knows are unknown to the file of times: it was cut
        other, known = self._times.check(line[:-1] for line in _lines(self.records.raw, start))
        if other is not None and before:
            start = before = 0  # with those that the index knows: what was written last may be among them
            other, known = self._times.check(line[:-1] for line in _lines(self.records.raw, start))
        if other is not None:
            raise StaleRun(
                f"{self.path}, line {before + other + 1} is not what was written: it was edited or damaged; remove the "
                "line to run its row again"
            )
        if new := [line[:-1] for line in islice(_lines(self.records.raw, start), known, None)]:
            self._times.append(new)

    def __contains__(self, key: object) -> bool:
        return key in self.records

    def remember(self, file: Path) -> None:
        """A side file that a resumed run needs as it is: written again with the records where it is lost."""
        with suppress(OSError):
            self._sides[file.name] = file.read_bytes()

    def append(
        self,
        records: Iterable[Record],
        seconds: float = 0.0,
        examples: tuple[Tensor, Tensor] | None = None,
        keep: Container[str] = (),
        tokens: int = 0,
    ) -> None:
        """Write and flush to disk; a record already there is an error of the caller.

        tokens:   how many the attack sent through its models for these records, where those count them
        examples: origins and returned inputs of these records; those whose id is in `keep` are written beside them,
                  before the records, so that a row on record never lacks its example

        Raises RunInterrupted where the disk is full or the folder can't be written any more: what was on record stays
        so, and nothing of these records is.
        """
        new = list(records)
        keys, runs = held.keys_of(new)
        if self._known(keys):
            twice = next(key for place, key in enumerate(keys) if key in self.records or key in keys[:place])
            raise ValueError(f"record {twice} is already in the store")
        lines = to_lines(new)
        text = b"\n".join([*lines, b""])
        with self._writing():
            self._look()
            if examples is not None:
                write_examples(self.folder / f"{self.name}.examples", new, examples, keep)
            self._write(text)
            self.records.append(keys, runs, new, text, lines)
            if new:
                self._times.append(lines, str(new[0].made_by), len(new), seconds, tokens)
        if len(self.records) >= 2 * max(self._indexed, held.MANY):
            self._write_index()

    def _write_index(self) -> None:
        """So that a resume reads few lines; a disk that is full for it costs time alone."""
        if len(self.records) >= held.MANY and self._indexed != len(self.records):
            with suppress(OSError):
                self.records.save(self._index)
                self._indexed = len(self.records)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunInterrupted(
                f"the run folder {self.folder} can't be written ({why(error)}); the {len(self.records)} records so far "
                "are kept: resume with the same command"
            ) from error

    def _write(self, data: bytes) -> None:
        """All of the bytes, on the disk; or none, and OSError."""
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise
        self._end += len(data)

    def _look(self) -> None:
        """Put the records back where they are no longer what was written."""
        try:
            there = self.path.stat()
            same = os.path.samestat(os.fstat(self._file.fileno()), there) and there.st_size == self._end
        except OSError:
            same = False
        if not same or not self._right.current():
            self._put_back()

    def settle(self) -> None:
        """See at the end of a run that the file holds what was written; where it does not it is written anew."""
        with self._writing():
            self._look()
            with self.path.open("rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == self.sha256
            if not same:
                self._put_back()
        self._write_index()

    @property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return self.records.hash.hexdigest()

    def _put_back(self) -> None:
        """Write case, side files and records anew; what lies in the records' place is put aside."""
        try:
            self._right.renew()
            if self._case.exists():
                self._same(self._case)
        except (RunInUse, StaleRun, FileExistsError, NotADirectoryError) as error:
            place = _free(self.folder.with_name(f"{self.folder.name}-rescued"))
            self._copy_to(place)
            raise RunInterrupted(
                f"the run folder {self.folder} was replaced while the run went on ({error}); the "
                f"{len(self.records)} records of this run are in {place}: resume with --out {place}"
            ) from error
        self._file.close()
        aside = ""
        if self.path.exists():
            other = _free(self.path.with_suffix(".changed"))
            os.replace(self.path, other)
            aside = f"; what was there is in {other}"
        log.warning("%s was removed or changed while the run went on: it is written anew%s", self.path, aside)
        self._begin(self._copy_to(self.folder))

    def _copy_to(self, folder: Path) -> bytearray:
        """Case, side files and records as this process knows them; the bytes of the records."""
        raw = self.records.raw
        write_whole(folder / self._case.name, self._text)
        for name, content in self._sides.items():
            write_whole(folder / name, content)
        write_whole(folder / self._times.file.name, self._times.text())
        write_whole(folder / self.path.name, raw)
        return raw

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds spent per attack label, over all starts of the run."""
        return self._times.spent("seconds")

    def tokens(self) -> dict[str, int]:
        """Tokens that attacks sent through models that count them, per attack label."""
        return {label: int(number) for label, number in self._times.spent("tokens").items() if number}

    def reject(self) -> None:
        """Put the records aside, as NAME.rejected: a run whose model was changed has none."""
        self.close()
        if self.path.exists():
            os.replace(self.path, self.path.with_suffix(".rejected"))
        self._index.unlink(missing_ok=True)
        self.records = Held()

    def close(self) -> None:
        """Close the file and let others write to the folder; the store can be read on."""
        if not self._file.closed:
            self._write_index()
            self._file.close()
            self._right.release()

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def __len__(self) -> int:
        return len(self.records)


def take_out(folder: Path, name: str, outcomes: Container[Outcome]) -> int:
    """Take the records that ended so out of a run folder and put the file as it was aside; gives how many there were.

    A run that is started again then has these rows to do.
    """
    path = folder / f"{name}.jsonl"
    with claimed(folder):
        raw = path.read_bytes()
        lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
        records = read_records(path)
        out = [record.outcome in outcomes for record in records]
        if any(out):
            write_whole(_free(path.with_suffix(".retried")), raw)
            write_whole(path, b"".join(line for line, goes in zip(lines, out, strict=True) if not goes))
            forget_examples(folder / f"{name}.examples", {r.id for r, goes in zip(records, out, strict=True) if goes})
    return sum(out)


def _lines(raw: bytearray, start: int) -> Iterator[bytes]:
    """The whole lines from there on, with their ends."""
    while start < len(raw):
        end = raw.index(b"\n", start) + 1
        yield bytes(raw[start:end])
        start = end


def _free(path: Path) -> Path:
    """The path, or the first one with a number behind it that nothing has."""
    found, number = path, 1
    while found.exists():
        found, number = path.with_name(f"{path.name}{number}"), number + 1
    return found


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        spent, self._start = now - self._start, now
        return spent
