"""How long code of the user's may take: a victim, an attack, a goal or a judge that does not come back is stopped.

A module that is being imported is let finish: half of one would break whatever needs it next.

In the main thread the system's alarm interrupts it, in sleeps and waits, too; elsewhere, and where there is no such
alarm, an exception is put into the thread. Either comes when Python runs its next instruction. Compiled code that never
returns to Python can't be stopped from inside its process: a warning says so (a worker process is ended by the one that
started it, see `evaluation.run.workers`).
"""

from __future__ import annotations

import ctypes
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

log = logging.getLogger("advkit")

GRACE = 5.0
"""Seconds after which code that did not stop is taken to be somewhere where it can't be."""
_IMPORTING = 0.25  # seconds that an import in progress is given at a time
_AGAIN = 1.0  # seconds until what swallowed the interruption is interrupted again

observer: Callable[[float], None] | None = None
"""Told the moment (`time.time`) at which the running code has to be back, and 0 when it is: a worker's parent looks."""


class TimedOut(Exception):
    """Code that was not back in time."""


class _Rung(BaseException):
    """Inside the code that is stopped: whoever catches all exceptions would swallow an Exception."""


class _Limit:
    """One block's time; while another block runs inside it, it stands still."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.left = seconds
        self.thread = threading.get_ident()
        self.on = self.thrown = False
        self.since = self.again = 0.0
        self.timer: threading.Timer | None = None
        self.guard = threading.Lock()

    def start(self) -> None:
        self.since = time.monotonic()
        self.on = True
        if observer is not None:
            observer(time.time() + max(0.0, self.left))
        if _alarmed():
            signal.setitimer(signal.ITIMER_REAL, max(self.left, 1e-6), _IMPORTING)
            self._later(self.left + GRACE, self._tell)
        else:
            self._later(self.left, self._throw)

    def stop(self) -> None:
        with self.guard:
            self.on = False
            self.left -= time.monotonic() - self.since
            if self.timer is not None:
                self.timer.cancel()
        if _alarmed():
            signal.setitimer(signal.ITIMER_REAL, 0)
        else:
            self._take()
        if observer is not None:
            observer(0.0)

    def _take(self) -> None:
        """In the thread of the block: let an exception that is on its way come, and drop it.

        Taking it back instead (PyThreadState_SetAsyncExc without one) leaves CPython's mark that one is due, and under
        `sys.settrace` Python 3.11 then runs in circles at the next call.
        """
        try:
            for _ in range(1000 if self.thrown else 0):
                pass
        except _Rung:
            pass

    def over(self, frame: FrameType | None) -> bool:
        """Whether the time is up for code that is in this frame."""
        if not self.on or time.monotonic() - self.since < self.left - 1e-3:
            return False
        if not _importing(frame):
            return True
        self.left = time.monotonic() - self.since + _IMPORTING
        if observer is not None:
            observer(time.time() + _IMPORTING)
        return False

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        self.timer = threading.Timer(max(seconds, 1e-6), act)
        self.timer.daemon = True
        self.timer.start()

    def _tell(self) -> None:
        if self.on:
            log.warning(
                "a sample is %.0f s over its limit of %g s in code that does not return to Python, and can't be "
                "stopped from here: end this process; with --workers 2 its process would be ended and the run go on",
                GRACE,
                self.seconds,
            )

    def _throw(self) -> None:
        with self.guard:
            if self.on and not self.over(sys._current_frames().get(self.thread)):
                self._later(_IMPORTING, self._throw)
            elif self.on:
                self.thrown = True
                _set_exception(self.thread, _Rung)
                late = time.monotonic() - self.since - self.left
                if late > GRACE and late < GRACE + 2 * _AGAIN:
                    self._tell()
                self._later(_AGAIN, self._throw)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.limits: list[_Limit] = []


_stack = _Stack()


def _alarmed() -> bool:
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()


def _set_exception(thread: int, kind: type[BaseException]) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


def _rings(_: int, frame: FrameType | None) -> None:
    mine = _stack.limits[-1] if _stack.limits else None
    now = time.monotonic()
    if mine is not None and now >= mine.again and mine.over(frame):
        mine.again = now + _AGAIN
        raise _Rung


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            return True
        frame = frame.f_back
    return False


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """Raise TimedOut where the block takes longer; None sets no limit.

    The time of a limited block inside the block is not counted.
    """
    if seconds is None:
        yield
        return
    limits = _stack.limits
    outer = limits[-1] if limits else None
    before: Any = None
    if outer is not None:
        outer.stop()
    elif _alarmed():
        before = signal.signal(signal.SIGALRM, _rings), signal.getitimer(signal.ITIMER_REAL)
    mine = _Limit(seconds)
    limits.append(mine)
    try:
        try:
            mine.start()
            yield
        finally:
            mine.on = False
    except _Rung as rung:
        raise TimedOut(f"timed out after {seconds:g} s") from rung
    finally:
        mine.stop()
        limits.pop()
        if outer is not None:
            outer.start()
        elif before is not None:
            signal.signal(signal.SIGALRM, before[0])
            if before[1][0]:
                signal.setitimer(signal.ITIMER_REAL, *before[1])
