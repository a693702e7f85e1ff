"""Whose code an exception comes from: models, judges and goals are the user's; a record says which of them raised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MODEL, BACKWARD, JUDGE, GOAL = "model", "backward", "judge", "goal"
_MARK = "advkit: raised by the "


def blame(error: BaseException, who: str) -> None:
    """Note on an exception that it came out of this part's code; what it says already stays."""
    if not blamed(error):
        error.add_note(_MARK + who)


def blamed(error: BaseException) -> str:
    """Who raised it, or what it was made of; empty where nobody said."""
    seen: set[int] = set()
    each: BaseException | None = error
    while each is not None and id(each) not in seen:
        seen.add(id(each))
        for note in getattr(each, "__notes__", ()):
            if note.startswith(_MARK):
                return str(note.removeprefix(_MARK))
        each = each.__cause__ or each.__context__
    return ""


@contextmanager
def code_of(who: str) -> Iterator[None]:
    """What is raised inside comes out of this part's code, unless another says so already."""
    try:
        yield
    except BaseException as error:
        blame(error, who)
        raise
