"""The run folder: an append-only list of records that survives kill -9."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.core.errors import ReportError, StaleRun, UsageError
from advkit.core.protocols import Label, Outcome, Record
from advkit.core.strict_json import read_json, read_object
from advkit.core.text import first_line

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger("advkit")

RECORDS_NAME = "records.jsonl"
_EXAMPLES = ("origin", "adversarial")
_NAMES = tuple(f.name for f in fields(Record))
_WHERE_ANY = ("figures", "trace", "texts", "stage", "source")
"""Fields that most records have nothing for: written only where they have."""


def written(records: Iterable[Record]) -> tuple[str, ...]:
    """Names of the fields that the lines of these records have."""
    held = {name for record in records for name in _WHERE_ANY if getattr(record, name)}
    return tuple(name for name in _NAMES if name not in _WHERE_ANY or name in held)


def to_line(record: Record) -> str:
    """One line of JSON, keys in the record's order."""
    values = asdict(record)
    said = {name: values[name] for name in _NAMES if name not in _WHERE_ANY or values[name]}
    return json.dumps(said, separators=(",", ":"))


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
    **dict.fromkeys(_NAMES_OF, lambda value: isinstance(value, str) and value == value.encode(errors="ignore").decode()),
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
    if not values.get("stage") and not values.get("source"):
        # Runs of earlier versions wrote the label as one text.
        label = Label.parse(values["attack"])
        values |= {"attack": label.attack, "stage": label.stage, "source": label.source}
    return Record(**values)


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
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[Tensor, Tensor]] = {}
    for file in sorted((folder / f"{name}.examples").glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as held:
                data = held.metadata() or {}
                origin, adversarial = (held.get_tensor(each) for each in _EXAMPLES)
            rows = read_json(data["ids"])
            if not isinstance(rows, list) or not len(rows) == len(origin) or origin.shape != adversarial.shape:
                raise ValueError("it does not hold the rows that it names")
            found |= {f"{data['attack']}|{row}": (origin[i], adversarial[i]) for i, row in enumerate(rows)}
        except (OSError, SafetensorError, LookupError, ValueError, TypeError, RuntimeError) as error:
            log.warning("%s holds no examples that can be read (%s): remove it", file, first_line(error))
    return found


def check_folder(folder: Path) -> None:
    """Raise UsageError, before anything is spent, where a run folder could not be made; nothing is written."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UsageError(f"the run folder {folder} can't be written ({place} is a file): name another with --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(
            f"the run folder {folder} can't be written (no permission in {place}): name another with --out"
        )


class Store:
    """Records of one case in a folder.

    Opening an existing folder resumes it: what is there counts as done. A last line that a crash cut short is removed.
    Raises StaleRun when the folder holds another case, UsageError when it can't be written.
    """

    def __init__(self, folder: Path, config: dict[str, Any], name: str = "records") -> None:
        self.folder = folder
        self.name = name
        self.path = folder / f"{name}.jsonl"
        self._timing = folder / f"{name}.seconds.jsonl"
        case = folder / f"{name}.case.json"
        text = json.dumps(config, sort_keys=True, indent=1) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if case.exists():
                self._same(case, text)
            elif self.path.exists() and self.path.stat().st_size:
                raise StaleRun(f"{folder} holds records without the case they belong to; name another --out")
            else:
                temporary = case.with_suffix(".tmp")
                temporary.write_text(text, encoding="utf-8")
                os.replace(temporary, case)
            self._mend()
            self._handle = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"the run folder {folder} can't be written ({error.strerror or error}): name another with --out"
            ) from error
        self.records: dict[str, Record] = {}
        for record in read_records(self.path):
            if self.records.setdefault(self.key(record.made_by, record.id), record) != record:
                raise StaleRun(
                    f"{self.path} holds two different records of row {record.id} under {record.made_by}: it was "
                    "edited, or two runs wrote to it; remove both lines, or the folder"
                )

    @staticmethod
    def key(label: Label, row: str) -> str:
        """Names a record within a case."""
        return f"{label}|{row}"

    def _same(self, case: Path, text: str) -> None:
        old = case.read_bytes()
        if old == text.encode():
            return
        try:
            before, now = json.loads(old), json.loads(text)
            differ = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k)]
        except (ValueError, TypeError, AttributeError, RecursionError):
            differ = ["an unreadable case file"]
        raise StaleRun(
            f"the run folder {self.folder} belongs to another case (different: {', '.join(differ)}): "
            "name another with --out, or remove it"
        )

    def _mend(self) -> None:
        if not self.path.exists():
            return
        raw = self.path.read_bytes()
        whole = raw.rfind(b"\n") + 1
        if whole != len(raw):
            with self.path.open("r+b") as handle:
                handle.truncate(whole)

    def __contains__(self, key: object) -> bool:
        return key in self.records

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
        """
        rows = list(records)
        if examples is not None:
            self._write_examples(rows, examples, keep)
        for record in rows:
            key = self.key(record.made_by, record.id)
            if key in self.records:
                raise ValueError(f"record {key} is already in the store")
            self.records[key] = record
        self._handle.writelines(to_line(r) + "\n" for r in rows)
        self._handle.flush()
        os.fsync(self._handle.fileno())
        if rows:
            spent = {"attack": str(rows[0].made_by), "rows": len(rows), "seconds": seconds}
            with self._timing.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(spent | ({"tokens": tokens} if tokens else {})) + "\n")

    def _write_examples(self, rows: list[Record], examples: tuple[Tensor, Tensor], keep: Container[str]) -> None:
        chosen = [i for i, record in enumerate(rows) if record.id in keep]
        if not chosen:
            return
        from safetensors.torch import save_file

        ids = [rows[i].id for i in chosen]
        label = str(rows[0].made_by)
        word = hashlib.sha256("|".join([label, *ids]).encode()).hexdigest()[:16]
        folder = self.folder / f"{self.name}.examples"
        folder.mkdir(exist_ok=True)
        file = folder / f"{word}.safetensors"
        tensors = {name: values[chosen].cpu().contiguous() for name, values in zip(_EXAMPLES, examples, strict=True)}
        temporary = file.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"attack": label, "ids": json.dumps(ids)})
        os.replace(temporary, file)

    def seconds(self) -> dict[str, float]:
        """Wall-clock seconds spent per attack label, over all starts of the run."""
        return self._spent("seconds")

    def tokens(self) -> dict[str, int]:
        """Tokens that attacks sent through models that count them, per attack label."""
        return {label: int(number) for label, number in self._spent("tokens").items() if number}

    def _spent(self, what: str) -> dict[str, float]:
        total: dict[str, float] = {}
        if self._timing.exists():
            for line in self._timing.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = read_object(line)
                    label, spent = str(entry["attack"]), float(entry.get(what, 0.0))
                except (ValueError, TypeError, KeyError):  # cut short or damaged; times are no evidence
                    continue
                total[label] = total.get(label, 0.0) + max(0.0, spent)
        return total

    def reject(self) -> None:
        """Put the records aside, as NAME.rejected: a run whose model was changed has none."""
        self._handle.close()
        if self.path.exists():
            os.replace(self.path, self.path.with_suffix(".rejected"))
        self.records.clear()

    def close(self) -> None:
        """Close the file; the store can be read on."""
        self._handle.close()

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def __len__(self) -> int:
        return len(self.records)


class Stopwatch:
    """Seconds since it was made or last read."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        spent, self._start = now - self._start, now
        return spent
