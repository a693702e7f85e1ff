"""The stable path of run folders; the code is in `advkit.evaluation.run.store`."""

from __future__ import annotations

from advkit.evaluation.run.reading import each_record
from advkit.evaluation.run.store import (
    RECORDS_NAME,
    Stopwatch,
    Store,
    check_folder,
    from_line,
    read_examples,
    read_records,
    records_path,
    to_line,
    written,
)

__all__ = [
    "RECORDS_NAME",
    "Stopwatch",
    "Store",
    "check_folder",
    "each_record",
    "from_line",
    "read_examples",
    "read_records",
    "records_path",
    "to_line",
    "written",
]
