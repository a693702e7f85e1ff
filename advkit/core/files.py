"""Files written whole, and folders that one process at a time writes to."""

from __future__ import annotations

import errno
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

from advkit.core.errors import RunInUse, UsageError

log = logging.getLogger("advkit")

LOCK = ".lock"
"""File of a folder that its writer holds; it is empty, and goes with it."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
_POLL = 0.2  # seconds


MOST_YAML = 64 * 1024
"""Bytes of a YAML file that somebody wrote by hand."""


def read_yaml_text(path: Path, what: str, source: str = "") -> str:
    """The text of a file that should be a page of YAML.

    what:   what it should hold: "recipe"
    source: what to call it; its path by default

    Raises UsageError where it is no regular file, can't be read, is too long or is no UTF-8.
    """
    source = source or str(path)
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{source} is no regular file; expected a {what} in YAML")
        with path.open("rb") as file:
            content = file.read(MOST_YAML + 1)
    except OSError as error:
        raise UsageError(f"the {what} {source} can't be read ({why(error)}); expected a YAML file") from error
    if len(content) > MOST_YAML:
        raise UsageError(f"{source} has more than {MOST_YAML // 1024} KiB; a {what} is a page of YAML")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{source} is no text in UTF-8 ({error.reason} at byte {error.start})") from error


def cache_root() -> Path:
    """Where trained models are kept: ADVKIT_CACHE, else the user's cache folder."""
    named = os.environ.get("ADVKIT_CACHE")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "advkit"


def disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room left."""
    return isinstance(error, OSError) and error.errno in _FULL


def why(error: OSError) -> str:
    """What an error of the file system says, and what to do where the disk is full."""
    return "the disk is full: make room" if disk_full(error) else str(error.strerror or error)


def write_whole(path: Path, content: str | bytes | bytearray) -> None:
    """All of the content or, after a crash, what was there before: written beside the file and renamed over it.

    Makes the folder where there is none. Raises OSError where it can't be written, and leaves nothing behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; these are meant to be read by others as any file of this user is.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


if sys.platform == "win32":
    import msvcrt

    def _seize(file: IO[bytes]) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _seize(file: IO[bytes]) -> None:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)


class _Claim:
    """A lock that the system takes back when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.thread = threading.get_ident()
        self.count = 0
        self.path = folder / LOCK
        while True:
            self.file: IO[bytes] = self.path.open("ab")
            try:
                _seize(self.file)
            except OSError as error:
                if error.errno in _TAKEN:
                    self.file.close()
                    raise _in_use(folder) from None
                log.warning("%s: this file system has no locks (%s); see that no other run writes here", folder, error)
                return
            if self.current():
                return
            self.file.close()  # the folder was replaced between the two steps

    def current(self) -> bool:
        """Whether what is held is still the folder's own file."""
        try:
            return not self.file.closed and os.path.samestat(os.fstat(self.file.fileno()), self.path.stat())
        except OSError:
            return False


_held: WeakValueDictionary[str, _Claim] = WeakValueDictionary()
_guard = threading.Lock()


def _in_use(folder: Path) -> RunInUse:
    return RunInUse(
        f"another run is writing to the folder {folder}: wait until it has ended, or name another folder with --out"
    )


class Claimed:
    """The right to write to a folder, which one thread of one process has; it may have it several times.

    Raises RunInUse where another has it, OSError where the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._claim = self._take()

    def _take(self) -> _Claim:
        self.folder.mkdir(parents=True, exist_ok=True)
        key = os.path.realpath(self.folder)
        with _guard:
            claim = _held.get(key)
            if claim is None or not claim.current():
                claim = _held[key] = _Claim(self.folder)
            elif claim.thread != threading.get_ident():
                raise _in_use(self.folder)
            claim.count += 1
            return claim

    def current(self) -> bool:
        """Whether the folder is still the one that was claimed: it may have been removed or replaced since."""
        return self._claim.current()

    def renew(self) -> None:
        """Claim the folder that is there now, made anew where there is none."""
        claim = self._take()
        self.release()
        self._claim = claim

    def release(self) -> None:
        """Give the right back."""
        with _guard:
            self._claim.count -= 1
            if self._claim.count == 0:
                if self._claim.current():  # whoever opened it before looks whether it is still there
                    with suppress(OSError):
                        self._claim.path.unlink()
                self._claim.file.close()


@contextmanager
def claimed(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """The block alone writes to the folder.

    wait: until another has ended; else RunInUse is raised
    """
    told = False
    while True:
        try:
            right = Claimed(folder)
            break
        except RunInUse:
            if not wait:
                raise
            if not told:
                log.warning("another process works in %s: waiting until it has ended", folder)
            told = True
            time.sleep(_POLL)
    try:
        yield
    finally:
        right.release()


def check_unclaimed(folder: Path) -> None:
    """Raise RunInUse where another process writes to the folder; nothing is made where there is no such folder."""
    if (folder / LOCK).is_file():
        with suppress(OSError), claimed(folder):  # a folder that can't be written is another matter
            pass
