"""Lines that are shown in one place, again and again: on a terminal's standard error, or in a notebook's cell.

Nothing is shown where standard error is neither.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, ClassVar, Self

from advkit.core.protocols import Label, Record
from advkit.core.watching import SearchStep, watching
from advkit.evaluation.report.text import shorten

_CELLS = 12  # of a bar
_NAME = 18
_OFTEN = 0.3  # seconds between two pictures


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel; IPython is not imported for it."""
    shell = sys.modules.get("IPython")
    running = None if shell is None else shell.get_ipython()
    return running is not None and running.__class__.__name__ == "ZMQInteractiveShell"


def shown(progress: bool | None) -> bool:
    """Whether to show progress: as asked, or for None where standard error is a terminal, and in notebooks."""
    return (sys.stderr.isatty() or in_notebook()) if progress is None else progress


class WorkProgress:
    """How far work is that is no case, by its units."""

    def __init__(self, name: str, done: int) -> None:
        self.name, self.begun = name, time.monotonic()
        self.done, self.units, self.said = done, 0, ""
        self._found = done  # what an earlier run had done

    def goes_on(self, done: int, units: int, said: str) -> None:
        """So many units are done now."""
        self.done, self.units, self.said = done, units, said

    @property
    def seconds_left(self) -> float | None:
        """About how long it still takes; None before that can be told, 0 at the end."""
        if self.done >= self.units:
            return 0.0
        if self.done <= self._found:
            return None
        return (time.monotonic() - self.begun) * (self.units - self.done) / (self.done - self._found)

    def lines(self) -> Iterator[str]:
        """What is shown of it."""
        share = min(1.0, self.done / self.units) if self.units else 0.0
        yield line(self.name, share, self.seconds_left, self.begun, f"{self.done} of {self.units}", self.said)


def line(name: str, share: float, left: float | None, begun: float, *more: str) -> str:
    """A name, a bar, how long it still takes or took, and what else there is to say."""
    filled = int(_CELLS * share)
    rest = "" if left is None else f"about {clock(left)} left" if left else clock(time.monotonic() - begun)
    bar = f"[{'#' * filled}{'-' * (_CELLS - filled)}] {100 * share:3.0f} %"
    return "  ".join(part for part in (f"{shorten(name, _NAME)} {bar}", rest, *more) if part)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


class Works:
    """Shows how far work is, on standard error or in a notebook's cell; a context manager.

    progress: None shows it where standard error is a terminal, and in notebooks; True always, False never

    Inside the block it hears of work that is no case, and leaves out what else is told (`core.watching`).
    """

    def __init__(self, progress: bool | None = None) -> None:
        self.shown = shown(progress)
        self.work: dict[str, WorkProgress] = {}
        self._screen: _Screen | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(watching(self if self.shown else None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._screen is not None:
            self._screen.close(self.lines())

    def starts(self, title: str, case: Any) -> None:
        """A case is about to run."""

    def recorded(self, records: Sequence[Record], total: int) -> None:
        """New records of a case."""

    def begins(self, label: Label, rows: int, passes: float) -> None:
        """A batch of a case is under way."""

    def passed(self, rows: int) -> None:
        """Samples went through a model."""

    def searched(self, rows: Sequence[int], step: SearchStep) -> None:
        """A step of a search."""

    def works(self, name: str, done: int, units: int, said: str = "") -> None:
        """Advance work that is no case."""
        known = self.work.get(name)
        if known is None or done < known.done:  # another work of this name
            known = self.work[name] = WorkProgress(name, done)
        known.goes_on(done, units, said)
        self._draw()

    def lines(self) -> list[str]:
        """What is shown now."""
        return [text for each in self.work.values() for text in each.lines()]

    def _draw(self) -> None:
        if not self.shown:
            return
        if self._screen is None:  # not before there is something to show: an error says its one line alone
            self._screen = _Cell() if in_notebook() else _Terminal()
        if self._screen.due:
            self._screen.write(self.lines())


class _Screen(ABC):
    """Where lines are shown, again and again in the same place; written to by the thread that computes alone."""

    patience: ClassVar[float] = 0.0
    """Seconds before anything is shown."""

    def __init__(self) -> None:
        self._last = time.monotonic() + self.patience - _OFTEN

    @property
    def due(self) -> bool:
        """Whether it is time for another picture."""
        now = time.monotonic()
        if now - self._last < _OFTEN:
            return False
        self._last = now
        return True

    @abstractmethod
    def write(self, lines: Sequence[str]) -> None:
        """Show the lines in place of the last ones."""

    @abstractmethod
    def close(self, lines: Sequence[str]) -> None:
        """Leave these lines, where any were shown."""


class _Terminal(_Screen):
    """Standard error."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__()
        self._live = Live(console=Console(stderr=True), auto_refresh=False)
        self._live.start()

    def write(self, lines: Sequence[str]) -> None:
        from rich.console import Group
        from rich.text import Text

        # Texts, not markup: names are shown, never obeyed. Sentences fold, lines of figures lose their ends.
        texts = (Text(line, overflow="ellipsis", no_wrap=not line.endswith(".")) for line in lines)
        self._live.update(Group(*texts), refresh=True)

    def close(self, lines: Sequence[str]) -> None:
        self.write(lines)
        self._live.stop()


class _Cell(_Screen):
    """The output of a notebook's cell, as text that is replaced; nothing for runs of less than a second."""

    patience = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._handle: Any = None

    def write(self, lines: Sequence[str]) -> None:
        from IPython.display import display

        content = {"text/plain": "\n".join(lines)}
        if self._handle is None:
            self._handle = display(content, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(content, raw=True)

    def close(self, lines: Sequence[str]) -> None:
        if self._handle is not None:
            self.write(lines)


__all__ = ["WorkProgress", "Works", "clock", "in_notebook", "line", "shown"]
