"""Carries a sweep's lines out: what is done is skipped, what crashes is tried again, what kills is put aside."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from advkit import __version__
from advkit.core.errors import RunInterrupted, UsageError
from advkit.core.files import claimed, why
from advkit.evaluation.report.document import REPORT_NAME
from advkit.evaluation.sweep.engines import Engine
from advkit.evaluation.sweep.line import Line, Note, State, state_of

Watch = Callable[[int, int], None]  # lines that ended, lines in all
DEADLY = (
    "it ended its worker process {times} (killed, perhaps for memory); put aside: `--again` tries it once more, or run "
    "its command by itself"
)


def drive(
    home: Path, lines: Sequence[Line], engine: Engine, *, workers: int, retries: int, again: bool, watch: Watch | None
) -> None:
    """Carry out all lines that are to be run and have not ended; what became of each is in its folder.

    retries: how often a line that failed, or ended its process, is tried again
    again:   also run lines that an earlier sweep refused or put aside

    Raises UsageError where the folder can't be written or the engine has nothing to run on, RunInUse where another
    sweep works in the folder.
    """
    try:
        with claimed(home / "sweep"):
            _forget(home, lines, again)
            _Driver(home, lines, engine, workers, retries, watch).run()
    except OSError as error:
        raise UsageError(f"the folder {home} can't be written ({why(error)}): name another with --out") from error


def _forget(home: Path, lines: Sequence[Line], again: bool) -> None:
    """Begin anew with lines that failed, and, where that is asked for or advkit has changed, with the others."""
    for line in lines:
        note = state_of(home, line)
        stale = again or note.version != __version__
        if not line.reason and (note.state == "failed" or (stale and note.state in ("refused", "quarantined"))):
            with suppress(UsageError):  # a file in the folder's place: the line says so, and the others are run
                Note(tries=note.tries).write(home / line.folder)


class _Driver:
    def __init__(
        self, home: Path, lines: Sequence[Line], engine: Engine, workers: int, retries: int, watch: Watch | None
    ) -> None:
        self.home, self.lines, self.engine = home, lines, engine
        self.workers, self.retries, self.watch = workers, retries, watch
        self.failed: dict[int, int] = {}
        # A report that is not the line's, or a file in the folder's place, stays where it is: the line can't be run.
        self.ended = {line.line for line in lines if self._over(line)}

    def _over(self, line: Line) -> bool:
        final = ("done", "refused", "excluded", "quarantined")
        folder = self.home / line.folder
        return state_of(self.home, line).state in final or (folder / REPORT_NAME).exists() or folder.is_file()

    def run(self) -> None:
        """Shards and whole cells, then the cells that take over records of shards."""
        self._rounds([line for line in self.lines if not line.shards])
        whole = [line for line in self.lines if line.shards]
        self._rounds([line for line in whole if self._joinable(line)])

    def _joinable(self, line: Line) -> bool:
        """Whether all shards are done; else the line's note says which is not."""
        if line.line in self.ended:
            return False
        for number in line.shards:
            shard = self.lines[number]
            note = state_of(self.home, shard)
            if note.state != "done":
                state: State = "refused" if note.state == "refused" else "failed"
                self._note(line, replace(note, state=state, reason=f"rows {shard.rows}: {note.reason}"))
                self._end(line)
                return False
        return True

    def _rounds(self, lines: Sequence[Line]) -> None:
        left = sorted((line for line in lines if line.line not in self.ended), key=lambda line: -line.passes)
        while left:
            before = {line.line: state_of(self.home, line) for line in left}
            for number in self._round(left):
                self._settle(self.lines[number])
            if all(state_of(self.home, line) == before[line.line] for line in left):
                raise RunInterrupted("the engine began none of the lines that are left; what is done is kept")
            left = [line for line in left if line.line not in self.ended]

    def _round(self, lines: Sequence[Line]) -> Iterator[int]:
        yield from self.engine.run(self.home, lines, self.workers)

    def _settle(self, line: Line) -> None:
        """See how a line that its engine is through with ended, and whether it is to be tried again."""
        note = state_of(self.home, line)
        if note.state in ("running", "left off"):  # its process did not live to say more
            deaths = note.deaths + 1
            times = "once" if deaths == 1 else f"{deaths} times"
            over = deaths > self.retries
            state: State = "quarantined" if over else "waiting"
            reason = DEADLY.format(times=times) if over else ""
            self._note(line, replace(note, state=state, deaths=deaths, reason=reason))
            if over:
                self._end(line)
        elif note.state == "failed":
            self.failed[line.line] = self.failed.get(line.line, 0) + 1
            if self.failed[line.line] > self.retries:
                self._end(line)
        elif note.state != "waiting":
            self._end(line)

    def _note(self, line: Line, note: Note) -> None:
        note.write(self.home / line.folder)

    def _end(self, line: Line) -> None:
        self.ended.add(line.line)
        if self.watch is not None:
            self.watch(len(self.ended), len(self.lines))
