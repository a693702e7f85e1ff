"""What came out of a sweep, from the files of its folder alone: for every cell a number, or the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from advkit.core.text import printable
from advkit.evaluation.report import Report
from advkit.evaluation.report.text import NO_MEDIAN
from advkit.evaluation.sweep.line import ENDED, PROBLEMS, Line, Note, State, looked_at, records_in, state_of

COLUMNS = ("attack", "defense", "task", "model", "threat_model", "goal", "seed")


@dataclass(frozen=True, kw_only=True)
class Row:
    """A cell of the table.

    parts:  what was asked for, by field
    state:  of its line
    metric: what the report ranks by; "" without a report
    value:  of that metric, with its 95 % interval where it has one
    undecided: samples without a verdict
    reason: why there is no value
    folder: of the run
    """

    cell: int
    parts: Mapping[str, Any]
    state: State
    metric: str = ""
    value: float | None = None
    interval: tuple[float, float] | None = None
    n: int = 0
    undecided: int = 0
    reason: str = ""
    folder: str = ""

    @property
    def outcome(self) -> str:
        """The number, or the reason."""
        if self.state != "done":
            return f"{self.state}: {self.reason}" if self.reason else self.state
        if self.value is None:
            return self.reason or f"no {self.metric or 'figure'}"
        text = f"{self.metric} {self.value:.3g}"
        if self.interval is not None:
            text += f" [{self.interval[0]:.3g}, {self.interval[1]:.3g}]"
        return text + (f", {self.undecided} undecided" if self.undecided else "")


def rows_of(home: Path, lines: Sequence[Line]) -> Iterator[Row]:
    """One row for each cell, in the grid's order."""
    for line in lines:
        if line.rows is not None:
            continue
        parts = {name: line.specs.get(name, line.request.get(name)) for name in COLUMNS}
        parts["seed"] = line.request.get("seed", 0)
        note, report = looked_at(home, line)
        if report is None:
            yield Row(cell=line.cell, parts=parts, state=note.state, reason=note.reason, folder=line.folder)
        else:
            yield _done(report, line, parts)


def _done(report: Report, line: Line, parts: dict[str, Any]) -> Row:
    data = report.to_dict()
    headline = report.current["section"]["headline"]
    metric = "robust_accuracy" if headline is None else str(headline["metric"])
    held = report.metrics.get(metric) or {}
    interval = report.interval(metric)
    return Row(
        cell=line.cell,
        parts=parts | {"model": data["request"]["model"]},
        state="done",
        metric=metric,
        value=held.get("value"),
        reason=NO_MEDIAN if held.get("unbounded") else "",
        interval=None if interval is None else (interval.low, interval.high),
        n=data["dataset"]["n_evaluated"],
        undecided=report.undecided,
        folder=line.folder,
    )


def to_dict(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as plain data."""
    return [{**asdict(row), "outcome": row.outcome} for row in rows]


def markdown(rows: Sequence[Row], of: Sequence[Row] | None = None) -> str:
    """The rows as a table, how all of them (`of`) ended before it."""
    every = rows if of is None else of
    counts = Counter(row.state for row in every)
    lines = [f"{len(every)} cells: {', '.join(f'{number} {state}' for state, number in counts.most_common())}.", ""]
    shown = [name for name in COLUMNS if len({row.parts[name] for row in every}) > 1] or ["attack"]
    lines += [f"| {' | '.join((*shown, 'outcome'))} |", f"|{'---|' * (len(shown) + 1)}"]
    for row in rows:
        cells = [str(row.parts[name] if row.parts[name] is not None else "-") for name in shown]
        lines.append(f"| {' | '.join(_cell(each) for each in (*cells, row.outcome))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return printable(" ".join(text.split())).replace("|", "\\|")


def failed(rows: Iterable[Row]) -> bool:
    """Whether a cell that fits has no number, or one that leaves samples out."""
    return any(row.state in PROBLEMS or row.undecided for row in rows)


@dataclass(frozen=True)
class Progress:
    """Where a sweep is.

    states:  how many lines are in each state
    at_work: line, records so far and records in all, of lines that are being run
    problems: lines that failed, were put aside or were left off
    """

    states: Mapping[State, int]
    at_work: Sequence[tuple[Line, int, int | None]]
    problems: Sequence[tuple[Line, Note]]

    @property
    def over(self) -> bool:
        """Whether every line ended."""
        return all(state in ENDED for state in self.states)


def progress_of(home: Path, lines: Sequence[Line]) -> Progress:
    """Where the sweep of a folder is, from its files alone."""
    notes = [(line, state_of(home, line)) for line in lines]
    at_work = [(line, records_in(home / line.folder), _rows(line)) for line, note in notes if note.state == "running"]
    problems = [(line, note) for line, note in notes if note.state in ("failed", "quarantined", "left off")]
    return Progress(Counter(note.state for _, note in notes), at_work, problems)


def _rows(line: Line) -> int | None:
    if line.rows is not None:
        first, _, last = line.rows.partition(":")
        return int(last) - int(first)
    n = line.specs.get("n")
    return None if n is None else int(n)
