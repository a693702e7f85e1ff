"""One line of a sweep: a command with a digest and a folder, carried out here, and the note that it leaves behind."""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
import traceback
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self

import msgspec

from advkit import __version__
from advkit.core.errors import AdvkitError, ReportError, RunInUse, UsageError
from advkit.core.files import check_unclaimed, why, write_whole
from advkit.core.registry import outside
from advkit.core.strict_json import read_object
from advkit.core.text import first_line
from advkit.evaluation.plan import PARTS, Request
from advkit.evaluation.report import Report
from advkit.evaluation.report.document import REPORT_NAME
from advkit.evaluation.run.store import RECORDS_NAME

NOTE = "line.json"
"""File of a run folder that says what became of its line."""
LINES = "sweep.jsonl"
"""File of a sweep's folder that holds its lines."""
State = Literal["waiting", "running", "left off", "done", "refused", "failed", "quarantined", "excluded"]
ENDED: tuple[State, ...] = ("done", "refused", "failed", "quarantined", "excluded")
PROBLEMS: tuple[State, ...] = ("failed", "quarantined")
_POLL = 0.5  # seconds between two looks at a folder that another process writes to


@dataclass(frozen=True, kw_only=True)
class Line:
    """One command of a sweep.

    line:    its number, from 0
    cell:    number of the cell that it is, or is a shard of
    digest:  names what is evaluated: sha256 of the canonical request
    folder:  of the run, within the sweep's
    request: fields of `Request`
    specs:   canonical parts, seed and n, as far as they are known before a victim is: what the report has to agree with
    passes:  about how many passes it costs; lines are started from the dearest on
    shards:  lines whose records it takes over; they are to run before
    reason:  why it is not run; "" where it is
    excluded: whether the grid left it out, in place of parts that do not fit
    """

    line: int
    cell: int
    digest: str
    folder: str
    request: Mapping[str, Any]
    specs: Mapping[str, Any] = field(default_factory=dict)
    passes: float = 0.0
    shards: tuple[int, ...] = ()
    reason: str = ""
    excluded: bool = False

    @property
    def rows(self) -> str | None:
        """The rows of a shard; None for a whole cell."""
        rows: str | None = self.request.get("rows")
        return rows

    @property
    def outside(self) -> list[str]:
        """What it would load that is not advkit's own."""
        return [each for name in PARTS if self.request.get(name) for each in outside(self.request[name])]

    def argv(self, home: Path) -> list[str]:
        """The command that carries it out, without the name of the program."""
        words = ["evaluate"]
        for name, value in self.request.items():
            words += [f"--{name.replace('_', '-')}", str(value)]
        return [*words, "--only", "--no-plots", "--workers", "1", "--out", str(home / self.folder)]

    def to_json(self, home: Path) -> str:
        """Its line of the file."""
        return json.dumps({**asdict(self), "argv": self.argv(home)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The line of a line of the file; raises ValueError, KeyError or MsgspecError where it is none."""
        data = read_object(text.encode())
        found = msgspec.convert({each.name: data[each.name] for each in fields(cls)}, cls)
        named = [found.request.get(name) for name in PARTS]
        if not all(each is None or isinstance(each, str) for each in named):
            raise ValueError("its request has parts that are no specs")
        if Path(found.folder).is_absolute() or ".." in Path(found.folder).parts:
            raise ValueError(f"its folder {found.folder!r} is not within the sweep's")
        return found


def write_lines(home: Path, lines: Iterable[Line]) -> Path:
    """The list of commands, in one move; raises UsageError where the folder can't be written."""
    path = home / LINES
    try:
        write_whole(path, "".join(line.to_json(home) + "\n" for line in lines))
    except OSError as error:
        raise UsageError(f"the folder {home} can't be written ({why(error)}): name another with --out") from None
    return path


def read_lines(home: Path, numbers: Collection[int] | None = None) -> list[Line]:
    """The lines of a sweep's folder, or those of some numbers, in their order.

    Raises ReportError where there are none, UsageError for a number that is not among them.
    """
    path = home / LINES
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
        chosen = range(len(texts)) if numbers is None else numbers
        for each in chosen:
            if not 0 <= each < len(texts):
                raise UsageError(f"{home} has no line {each}; expected 0 to {len(texts) - 1}")
        return [Line.from_json(texts[each]) for each in chosen]
    except OSError as error:
        raise ReportError(f"{home} is no folder of a sweep ({LINES}: {why(error)})") from None
    except (ValueError, KeyError, msgspec.MsgspecError) as error:
        raise ReportError(
            f"{path} is damaged or of another version ({first_line(error)}): run the sweep again"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Note:
    """What became of a line.

    deaths:   how often it ended its worker process
    tries:    how often it was begun
    moment:   when this was written, seconds since 1970
    """

    state: State = "waiting"
    reason: str = ""
    tries: int = 0
    deaths: int = 0
    moment: float = 0.0
    place: str = ""
    version: str = __version__

    def write(self, folder: Path) -> Self:
        """Into the run folder, in one move; raises UsageError where it can't be written."""
        try:
            write_whole(folder / NOTE, json.dumps(asdict(self)) + "\n")
        except OSError as error:
            raise UsageError(
                f"the run folder {folder} can't be written ({why(error)}): move what is there, or name another folder "
                "with --out"
            ) from error
        return self

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What the folder says; a missing or damaged note says nothing."""
        with suppress(OSError, ValueError, msgspec.MsgspecError):
            return msgspec.convert(read_object((folder / NOTE).read_bytes()), cls)
        return cls()


def state_of(home: Path, line: Line) -> Note:
    """What became of a line, from its folder alone."""
    return looked_at(home, line)[0]


def looked_at(home: Path, line: Line) -> tuple[Note, Report | None]:
    """What became of a line, and the report of one that is done in a folder of its own."""
    if line.reason:
        return Note(state="excluded" if line.excluded else "refused", reason=line.reason), None
    folder = home / line.folder
    if folder.exists() and not folder.is_dir():
        reason = f"{folder} is a file and no run folder: move it, or name another with --out"
        return Note(state="failed", reason=reason), None
    if line.rows is not None and (folder.parent / REPORT_NAME).exists():  # taken over, and removed
        return Note(state="done"), None
    if (folder / REPORT_NAME).exists():
        try:
            return Note(state="done"), report_of(folder, line)
        except ReportError as error:
            return Note(state="failed", reason=str(error)), None
    note = Note.read(folder)
    if note.state == "done":  # and no report: it was removed, to be made again
        note = replace(note, state="waiting")
    if note.state == "running" and not _held(folder) and not _alive(note.place):
        note = replace(note, state="left off")
    return note, None


def report_of(folder: Path, line: Line) -> Report:
    """The line's report; raises ReportError where there is none, or another evaluation's."""
    try:
        report = Report.load(folder)
    except ReportError as error:
        raise ReportError(f"{error}; remove it, or name another folder with --out") from None
    held = report.to_dict().get("request") or {}
    differ = [name for name, value in line.specs.items() if held.get(name) != value]
    if held.get("rows") != line.rows:
        differ.append("rows")
    if differ:
        raise ReportError(
            f"{folder} holds the report of another evaluation ({', '.join(differ)} differ): name another with --out"
        )
    return report


def _held(folder: Path) -> bool:
    """Whether another process writes to the folder."""
    try:
        check_unclaimed(folder)
    except RunInUse:
        return True
    return False


def _alive(place: str) -> bool:
    """Whether HOST:PROCESS is a process of this machine: one that still finds or trains its victim holds no folder."""
    host, _, number = place.rpartition(":")
    if host != socket.gethostname() or not number.isdecimal() or int(number) < 1:
        return False
    with suppress(OSError, OverflowError):
        os.kill(int(number), 0)
        return True
    return False


def records_in(folder: Path) -> int:
    """How many records there are."""
    try:
        return (folder / RECORDS_NAME).read_bytes().count(b"\n")
    except OSError:
        return 0


def carry_out(home: Path, number: int) -> Note:
    """Run one line in this process, and leave a note of how it ended.

    Waits where another process is at it: a task of a sweep whose driver was ended goes on by itself.

    Raises UsageError for a number without a line, and where the run folder can't be written.
    """
    while True:
        try:
            return _carried_out(home, number)
        except RunInUse:
            time.sleep(_POLL)


def _carried_out(home: Path, number: int) -> Note:
    """The same; raises RunInUse where another process is at it."""
    (line,) = read_lines(home, [number])  # and no others: a sweep may have thousands
    now = state_of(home, line)
    if line.reason or now.state == "done":
        return now
    folder = home / line.folder
    check_unclaimed(folder)
    before = Note.read(folder)
    place = f"{socket.gethostname()}:{os.getpid()}"

    def ended(state: State, reason: str = "") -> Note:
        note = Note(
            state=state, reason=reason, tries=before.tries + 1, deaths=before.deaths, moment=time.time(), place=place
        )
        return note.write(folder)

    ended("running")
    try:
        if (folder / REPORT_NAME).exists():
            report_of(folder, line)
        _evaluate(home, line, read_lines(home, line.shards))
    except RunInUse:
        raise
    except UsageError as error:
        return ended("refused", str(error))
    except AdvkitError as error:
        return ended("failed", str(error))
    except Exception as error:
        (folder / "traceback.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return ended("failed", f"{type(error).__name__}: {first_line(error)} (traceback.txt)")
    return ended("done")


def _evaluate(home: Path, line: Line, shards: list[Line]) -> None:
    from advkit.core.state import plain_torch
    from advkit.evaluation.execute import execute
    from advkit.evaluation.plan import plan
    from advkit.evaluation.sweep.shards import remove_shards, take_over

    with plain_torch():
        resolved = plan(Request(**line.request, beside=False))
        take_over(resolved, home / line.folder, [(home / each.folder, each.rows) for each in shards])
        command = shlex.join(["advkit", *line.argv(home)])
        execute(resolved, out=home / line.folder, command=command, workers=1)
    if line.rows is None:
        remove_shards(home / line.folder)
