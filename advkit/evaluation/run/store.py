"""The run folder: an append-only list of records that survives kill -9."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from advkit.core.errors import ReportError, RunInterrupted, RunInUse, StaleRun, UsageError
from advkit.core.files import Claimed, check_unclaimed, claimed, why, write_whole
from advkit.core.protocols import Label, Outcome, Record
from advkit.core.strict_json import read_json, read_object
from advkit.core.text import first_line

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("advkit")

RECORDS_NAME = "records.jsonl"
BESIDE = "beside"
"""What the store of the first companion is called; those of further ones `beside-NAME`."""
_EXAMPLES = ("origin", "adversarial")
_NAMES = tuple(f.name for f in fields(Record))
_WHERE_ANY = ("figures", "trace", "texts", "scores", "stage", "source")
"""Fields that most records have nothing for: written only where they have."""
_ALWAYS = tuple(name for name in _NAMES if name not in _WHERE_ANY)
_ENCODER = json.JSONEncoder(separators=(",", ":"))


def written(records: Iterable[Record]) -> tuple[str, ...]:
    """Names of the fields that the lines of these records have."""
    held = {name for record in records for name in _WHERE_ANY if getattr(record, name)}
    return tuple(name for name in _NAMES if name not in _WHERE_ANY or name in held)


def to_line(record: Record) -> str:
    """One line of JSON, keys in the record's order."""
    held = vars(record)
    said = {name: held[name] for name in _ALWAYS}
    for name in _WHERE_ANY:
        if value := held[name]:
            said[name] = value
    return _ENCODER.encode(said)


_MOST = 2**63  # of a whole number: arrays of such are made of records
_NAMES_OF = ("id", "attack", "stage", "source")
_CLASSES = ("label", "clean", "adversarial")
_LENGTHS = ("distance", "margin", "closeness")
_COUNTS = ("forwards", "backwards", "queries")


def _whole(value: Any) -> bool:
    return type(value) is int and abs(value) < _MOST


def _real(value: Any) -> bool:
    return type(value) is float or _whole(value)


def _plain(value: Any) -> bool:
    """Whether a value of a trace is numbers and texts all the way down."""
    if isinstance(value, list):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, str | bool) or _real(value)


_FITS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(
        _NAMES_OF, lambda value: isinstance(value, str) and value == value.encode(errors="ignore").decode()
    ),
    **dict.fromkeys(("outcome", "message"), lambda value: isinstance(value, str)),
    **dict.fromkeys(_CLASSES, lambda value: value is None or _whole(value)),
    **dict.fromkeys(_LENGTHS, lambda value: value is None or (_real(value) and math.isfinite(value))),
    **dict.fromkeys(_COUNTS, lambda value: _whole(value) and value >= 0),
    "reached": lambda value: isinstance(value, bool),
    "eight_bit": lambda value: value is None or isinstance(value, bool),
    "notes": lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
    "measures": lambda value: isinstance(value, dict) and all(map(_real, value.values())),
    "figures": lambda value: isinstance(value, dict) and all(type(v) is bool or _real(v) for v in value.values()),
    "texts": lambda value: isinstance(value, dict) and all(isinstance(each, str) for each in value.values()),
    "scores": lambda value: (
        isinstance(value, dict)
        and all(isinstance(row, list) and all(_real(v) and math.isfinite(v) for v in row) for row in value.values())
    ),
    "trace": lambda value: isinstance(value, list) and all(isinstance(each, dict) and _plain(each) for each in value),
}


def from_line(line: str) -> Record:
    """The record of one line; raises ValueError or TypeError when it is none."""
    values = json.loads(line)
    if not isinstance(values, dict):
        raise TypeError(f"it is a {type(values).__name__}")
    for name, value in values.items():
        if name in _FITS and not _FITS[name](value):
            raise TypeError(f"{name} is {value!r:.40}")
    values["outcome"] = Outcome(values["outcome"])
    values["notes"] = tuple(values["notes"])
    values["trace"] = tuple(values.get("trace", ()))
    values["scores"] = {name: tuple(row) for name, row in values.get("scores", {}).items()}
    if not values.get("stage") and not values.get("source"):
        # Runs of earlier versions wrote the label as one text.
        label = Label.parse(values["attack"])
        values |= {"attack": label.attack, "stage": label.stage, "source": label.source}
    return Record(**values)


def beside_name(companion: str, place: int) -> str:
    """The name of a companion's store: `place` counts the companions that were run, from 0."""
    return BESIDE if place == 0 else f"{BESIDE}-{companion}"


def beside_files(records: Path) -> list[Path]:
    """The records of companions beside those of a case, that of the first one first."""
    found = [records.with_name(f"{BESIDE}.jsonl"), *sorted(records.parent.glob(f"{BESIDE}-*.jsonl"))]
    return [each for each in found if each.is_file() and not each.stem.endswith(".seconds")]


def records_path(run: str | Path) -> Path:
    """records.jsonl of a run folder or beside a report.json."""
    path = Path(run)
    return (path if path.is_dir() else path.parent) / RECORDS_NAME


def read_records(path: str | Path) -> list[Record]:
    """The complete records of a finished or killed run; a line cut short by a crash is left out.

    Raises ReportError on a missing file or a broken line.
    """
    file = Path(path)
    records: list[Record] = []
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            records += (from_line(line) for line in lines if line.endswith("\n"))
        return records
    except FileNotFoundError:
        raise ReportError(f"no per-row records at {file}; expected {RECORDS_NAME} beside the run's report") from None
    except OSError as error:
        raise ReportError(f"{file} can't be read: {error.strerror or error}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReportError(
            f"{file}, line {len(records) + 1}: not a record ({error!s:.120}): remove the line to run its row again"
        ) from None


def read_examples(folder: Path, name: str = "records") -> dict[str, tuple[Tensor, Tensor]]:
    """Origin and returned input of the kept rows by record key, from a run folder.

    A damaged file is left out, with a warning: the records do not depend on it.
    """
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for _, data, (origin, adversarial) in _example_files(folder / f"{name}.examples"):
        found |= {f"{data['attack']}|{row}": (origin[i], adversarial[i]) for i, row in enumerate(data["ids"])}
    return found


def _example_files(folder: Path) -> Iterator[tuple[Path, dict[str, Any], tuple[Tensor, Tensor]]]:
    """The files of examples, in the order of their names: attack and ids, origins and returned inputs."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as held:
                data = dict(held.metadata() or {})
                origin, adversarial = (held.get_tensor(each) for each in _EXAMPLES)
            data["ids"] = read_json(data["ids"])
            if not isinstance(data["ids"], list) or not len(data["ids"]) == len(origin):
                raise ValueError("it does not hold the rows that it names")
            if origin.shape != adversarial.shape or not isinstance(data["attack"], str):
                raise ValueError("it does not hold pairs of inputs")
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
            log.warning("%s holds no examples that can be read (%s): remove it", file, first_line(error))
            continue
        yield file, data, (origin, adversarial)


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
        self.records: dict[str, Record] = {}
        self.kept: dict[str, str] = {}
        self._timing = folder / f"{name}.seconds.jsonl"
        self._case = folder / f"{name}.case.json"
        self._text = json.dumps(config, sort_keys=True, indent=1) + "\n"
        self._rows = None if rows is None else dict(rows)
        self._sides: dict[str, bytes] = {}
        self._times: list[dict[str, Any]] = []
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
        for number, record in enumerate(read_records(self.path) if raw else (), 1):
            if self.records.setdefault(self.key(record.made_by, record.id), record) != record:
                raise StaleRun(
                    f"{self.path}, line {number}: another record of row {record.id} under {record.made_by} stands "
                    "above it: it was edited, or two runs wrote to it; remove both lines, or the folder"
                )
        self._check_written(raw)
        self._begin(raw)

    def _begin(self, raw: bytes) -> None:
        """Go on behind these bytes, which are the file's."""
        self._file: IO[bytes] = self.path.open("ab", buffering=0)
        self._end, self._hash = len(raw), hashlib.sha256(raw)

    @staticmethod
    def key(label: Label, row: str) -> str:
        """Names a record within a case."""
        return f"{label}|{row}"

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
        lines = raw.splitlines(keepends=True)
        kept = [
            line
            for line, record in zip(lines, read_records(self.path) if raw else (), strict=True)
            if record.id not in changed
        ]
        if len(kept) < len(lines):
            place = _free(self.path.with_suffix(".changed"))
            write_whole(place, raw)
            write_whole(self.path, b"".join(kept))
            aside = f"; {len(lines) - len(kept)} records are put aside in {place}"
        _forget_examples(self.folder / f"{self.name}.examples", changed)
        write_whole(file, json.dumps(dict(now)) + "\n")
        write_whole(self._case, self._text)
        log.warning(
            "%d files of %s are not those that the run began with (%s): their samples are run again%s",
            len(changed),
            self.folder,
            ", ".join(sorted(changed)[:3]),
            aside,
        )

    def _mended(self) -> bytes:
        """The whole lines of the file; a last one that was cut short is taken off."""
        if not self.path.exists():
            return b""
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole != len(raw):
            with self.path.open("r+b") as handle:
                handle.truncate(whole)
        return raw[:whole]

    def _check_written(self, raw: bytes) -> None:
        """Raise StaleRun where a line is not what was written, as far as the file of times can tell.

        Lines may be taken out. Those behind the last known one are a batch whose times a crash cut off: they are known
        from now on.
        """
        self._times = _entries(self._timing)
        if self._timing.exists() and self._timing.read_bytes()[-1:] not in (b"", b"\n"):
            with self._timing.open("ab") as handle:
                handle.write(b"\n")  # what comes now is a line of its own
        known = {mark for entry in self._times for mark in _marks(entry)}
        marks = [_mark(line) for line in raw.split(b"\n")[:-1]]
        last = max((number for number, mark in enumerate(marks) if mark in known), default=-1)
        for number, mark in enumerate(marks[: last + 1], 1):
            if mark not in known:
                raise StaleRun(
                    f"{self.path}, line {number} is not what was written: it was edited or damaged; remove the line to "
                    "run its row again"
                )
        if new := marks[last + 1 :]:
            self._tell({"attack": "", "rows": 0, "seconds": 0.0, "lines": new})

    def _tell(self, entry: dict[str, Any]) -> None:
        """One line of the file of times."""
        with self._timing.open("ab", buffering=0) as handle:
            handle.write((json.dumps(entry) + "\n").encode())
        self._times.append(entry)

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
        rows: dict[str, Record] = {}
        for record in records:
            key = self.key(record.made_by, record.id)
            if key in self.records or key in rows:
                raise ValueError(f"record {key} is already in the store")
            rows[key] = record
        lines = [to_line(record).encode() for record in rows.values()]
        with self._writing():
            self._look()
            if examples is not None:
                self._write_examples(list(rows.values()), examples, keep)
            self._write(b"".join(line + b"\n" for line in lines))
            self.records |= rows
            if rows:
                first = next(iter(rows.values()))
                spent = {"attack": str(first.made_by), "rows": len(rows), "seconds": seconds}
                entry = spent | ({"tokens": tokens} if tokens else {}) | {"lines": [_mark(line) for line in lines]}
                self._tell(entry)

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
        self._hash.update(data)

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
            if hashlib.sha256(self.path.read_bytes()).digest() != self._hash.digest():
                self._put_back()

    @property
    def sha256(self) -> str:
        """Of the file's bytes."""
        return self._hash.hexdigest()

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

    def _copy_to(self, folder: Path) -> bytes:
        """Case, side files and records as this process knows them; the bytes of the records."""
        raw = "".join(to_line(record) + "\n" for record in self.records.values()).encode()
        write_whole(folder / self._case.name, self._text)
        for name, content in self._sides.items():
            write_whole(folder / name, content)
        write_whole(folder / self._timing.name, "".join(json.dumps(entry) + "\n" for entry in self._times))
        write_whole(folder / self.path.name, raw)
        return raw

    def _write_examples(self, rows: list[Record], examples: tuple[Tensor, Tensor], keep: Container[str]) -> None:
        chosen = [i for i, record in enumerate(rows) if record.id in keep]
        if not chosen:
            return
        from safetensors.torch import save

        ids = [rows[i].id for i in chosen]
        label = str(rows[0].made_by)
        word = hashlib.sha256("|".join([label, *ids]).encode()).hexdigest()[:16]
        tensors = {name: values[chosen].cpu().contiguous() for name, values in zip(_EXAMPLES, examples, strict=True)}
        content = save(tensors, metadata={"attack": label, "ids": json.dumps(ids)})
        write_whole(self.folder / f"{self.name}.examples" / f"{word}.safetensors", content)

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds spent per attack label, over all starts of the run."""
        return self._spent("seconds")

    def tokens(self) -> dict[str, int]:
        """Tokens that attacks sent through models that count them, per attack label."""
        return {label: int(number) for label, number in self._spent("tokens").items() if number}

    def _spent(self, what: str) -> dict[str, float]:
        total: dict[str, float] = {}
        for entry in self._times:
            try:
                label, spent = str(entry["attack"]), float(entry.get(what, 0.0))
            except (ValueError, TypeError, KeyError):
                continue
            if label:
                total[label] = total.get(label, 0.0) + max(0.0, spent)
        return total

    def reject(self) -> None:
        """Put the records aside, as NAME.rejected: a run whose model was changed has none."""
        self.close()
        if self.path.exists():
            os.replace(self.path, self.path.with_suffix(".rejected"))
        self.records.clear()

    def close(self) -> None:
        """Close the file and let others write to the folder; the store can be read on."""
        if not self._file.closed:
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
            _forget_examples(folder / f"{name}.examples", {r.id for r, goes in zip(records, out, strict=True) if goes})
    return sum(out)


def _forget_examples(folder: Path, rows: Container[str]) -> None:
    """Take the examples of some rows out of the files that hold them."""
    from safetensors.torch import save

    for file, data, tensors in _example_files(folder):
        left = [i for i, row in enumerate(data["ids"]) if row not in rows]
        if len(left) < len(data["ids"]):
            ids = json.dumps([data["ids"][i] for i in left])
            if left:
                kept = {name: tensor[left].contiguous() for name, tensor in zip(_EXAMPLES, tensors, strict=True)}
                write_whole(file, save(kept, metadata={"attack": data["attack"], "ids": ids}))
            else:
                file.unlink()


def _entries(file: Path) -> list[dict[str, Any]]:
    """The entries of a file of times; those cut short or damaged are passed over, they are no evidence."""
    found = []
    for line in file.read_bytes().split(b"\n") if file.exists() else ():
        with suppress(ValueError):
            found.append(read_object(line))
    return found


def _mark(line: bytes) -> str:
    """Knows a line of records again."""
    return hashlib.sha256(line).hexdigest()[:16]


def _marks(entry: dict[str, Any]) -> list[str]:
    marks = entry.get("lines")
    return [mark for mark in marks if isinstance(mark, str)] if isinstance(marks, list) else []


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
