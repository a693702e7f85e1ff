"""Paths that come as text."""

from __future__ import annotations

from pathlib import Path

from advkit.core.text import first_line


def place_of(name: str) -> Path:
    """The path that a name says, ~ filled in; it need not exist.

    Raises ValueError, one line, for a name that no file can have: too long, or in the folder of an unknown user.
    """
    try:
        place = Path(name).expanduser()
        place.stat()
    except FileNotFoundError:
        return place
    except (RuntimeError, OSError, ValueError) as error:
        said = (error.strerror or "") if isinstance(error, OSError) else first_line(error)
        raise ValueError(f"{name if len(name) <= 80 else name[:80] + '...'} is no path ({said})") from error
    return place
