"""Records as they lie in a run folder: where they are, and every one of them in turn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from advkit.core.errors import ReportError
from advkit.core.protocols import Record
from advkit.evaluation.run.codec import from_line

RECORDS_NAME = "records.jsonl"
BESIDE = "beside"
"""What the store of the first companion is called; those of further ones `beside-NAME`."""


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
    return list(each_record(path))


def each_record(path: str | Path) -> Iterator[Record]:
    """The same one by one, in the memory of one."""
    file = Path(path)
    try:
        with file.open("rb") as lines:
            yield from records_in((line for line in lines if line.endswith(b"\n")), file)
    except FileNotFoundError:
        raise ReportError(f"no per-row records at {file}; expected {RECORDS_NAME} beside the run's report") from None
    except OSError as error:
        raise ReportError(f"{file} can't be read: {error.strerror or error}") from None


def records_in(lines: Iterable[bytes], file: Path, before: int = 0) -> Iterator[Record]:
    """The records of these lines of a file, which so many are before; ReportError on a broken one."""
    number = before
    try:
        for number, line in enumerate(lines, before + 1):  # noqa: B007
            yield from_line(line)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ReportError(
            f"{file}, line {number}: not a record ({error!s:.120}): remove the line to run its row again"
        ) from None
