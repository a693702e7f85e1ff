"""What a parser may not do, watched from inside its process: run code, start a program, open a socket, take memory.

Used in a process of its own (`fuzz_run.py`): an audit hook can't be taken off again.
"""

from __future__ import annotations

import resource
import signal
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import advkit
from advkit.core.errors import AdvkitError

SPARE = 1536 << 20
"""Bytes of address space beyond what the process has when a file is read; threads of libraries take most of it."""
TOUCHED = 400 << 20
"""Bytes of memory that one file of some kilobytes may really use at its peak."""
SECONDS = 120

_FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "ftplib.connect",
    "http.client.connect", "pickle.find_class", "marshal.loads", "code.__new__", "webbrowser.open", "ctypes.dlopen",
)  # fmt: skip
_INSTALLED = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(each).resolve().parents[up]) for each, up in ((__file__, 2), (advkit.__file__, 1))}
)


class Executed(BaseException):
    """A parser did what only code may do."""


class Hung(BaseException):
    """A parser did not come to an end."""


class Watch:
    """Counts what happened while it was on."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "code.__new__" and self._installed(None, str(arguments[1])):
            return  # templates of the package itself are compiled
        if event in _FORBIDDEN and not self._of_an_import():
            self._note(f"{event} {arguments!r:.200}")
        elif event == "exec" and not self._installed(arguments[0]):
            self._note(f"exec {arguments[0]!r:.200}")

    def _note(self, what: str) -> None:
        self.seen.append(what)
        raise Executed(what)

    @staticmethod
    def _of_an_import() -> bool:
        """Whether an installed module is being imported: what it does then is the installation's."""
        frame = sys._getframe()
        while frame is not None:
            if frame.f_globals.get("__name__") == "importlib._bootstrap":
                return True
            frame = frame.f_back
        return False

    def _installed(self, code: Any, name: str = "") -> bool:
        name = name or getattr(code, "co_filename", "")
        if name == "<template>":  # chat templates are compiled by a sandbox
            return True
        if name.startswith("<"):
            return self._of_an_import() or self._of_the_library()
        return str(Path(name).resolve()).startswith(_INSTALLED)

    @staticmethod
    def _of_the_library() -> bool:
        """Whether a dataclass or a named tuple is being made, which Python does by running text of its own."""
        frame = sys._getframe()
        while frame is not None:
            if frame.f_globals.get("__name__") in ("dataclasses", "collections", "enum", "typing", "functools"):
                return True
            frame = frame.f_back
        return False


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise LookupError(key)


@contextmanager
def _bounded() -> Iterator[None]:
    """Let the process take SPARE bytes of address space more than it has now, and no more."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize:") + SPARE, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


@contextmanager
def _in_time(seconds: int) -> Iterator[None]:
    def late(*_: object) -> None:
        raise Hung(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(watch: Watch, parse: Callable[[], object]) -> str:
    """ "taken", "refused: LINE", or "FAULT: what": never raises."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status("VmRSS:")
    del watch.seen[:]
    said = "taken"
    try:
        with warnings.catch_warnings(), _bounded(), _in_time(SECONDS), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            watch.on = True
            try:
                parse()
            finally:
                watch.on = False
    except AdvkitError as error:
        line = str(error)
        said = f"refused: {line}"
        if "\n" in line or not line.strip() or len(line) > 1500:
            said = f"FAULT: a message of {len(line)} characters and {line.count(chr(10))} line breaks: {line[:300]!r}"
        elif _out_of_memory(error):
            said = f"FAULT: it took memory before it refused: {line[:300]}"
    except BaseException as error:
        import traceback

        where = traceback.extract_tb(error.__traceback__)
        own = [each for each in where if "advkit" in each.filename] or list(where)
        said = f"FAULT: {type(error).__name__}: {error!s:.300} at " + " < ".join(
            f"{Path(each.filename).name}:{each.lineno}" for each in own[::-1][:4]
        )
    if watch.seen:
        said = f"FAULT: it ran {watch.seen[0]}"
    peak = _status("VmHWM:") - before
    if peak > TOUCHED and not said.startswith("FAULT"):
        said = f"FAULT: it used {peak >> 20} MiB"
    return said


def _out_of_memory(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        word = str(error)
        if isinstance(error, MemoryError) or "not enough memory" in word or "Cannot allocate" in word:
            return True
        error = error.__cause__ or error.__context__
    return False


def settle() -> None:
    """Threads and caches of libraries that would otherwise appear later and count as a parser's."""
    torch.set_num_threads(1)
    torch.zeros(8).sum()
    sys.setrecursionlimit(1000)
