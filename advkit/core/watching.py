"""What a long computation tells while it goes on: its batches, their passes through models, the steps of its searches.

Whoever shows progress watches a block; nobody else pays more than a look at one variable per call of a model. What is
told changes no figure.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from advkit.core.protocols import Label, Record


@dataclass(frozen=True)
class SearchStep:
    """How far a search for one or more samples of the batch is.

    step:    steps done
    steps:   steps at most, 0 where only a budget ends it
    loss:    the lowest so far, None before there is one
    reached: whether the goal seems to hold for all of its samples
    over:    whether the search has ended
    """

    step: int
    steps: int
    loss: float | None
    reached: bool
    over: bool = False


class Watcher(Protocol):
    """Who is told; each method is called in the thread and process that computes."""

    def starts(self, title: str, case: Any) -> None:
        """A case of the run, by the name of its records, is about to begin or to go on."""
        ...

    def recorded(self, records: Sequence[Record], total: int) -> None:
        """New records of the case that was started last, and how many there are to be in all."""
        ...

    def begins(self, label: Label, rows: int, passes: float) -> None:
        """A batch of so many samples, each sent through a model about so many times at most."""
        ...

    def passed(self, rows: int) -> None:
        """So many samples went through a model."""
        ...

    def searched(self, rows: Sequence[int], step: SearchStep) -> None:
        """A step of the search for these samples of the batch."""
        ...

    def works(self, name: str, done: int, units: int, said: str = "") -> None:
        """Work that is no case: units done, units in all, and what there is to say of it."""
        ...


_WATCHER: ContextVar[Watcher | None] = ContextVar("advkit watcher", default=None)


def watcher() -> Watcher | None:
    """Who watches here; None for nobody."""
    return _WATCHER.get()


@contextmanager
def watching(who: Watcher | None) -> Iterator[None]:
    """Tell `who` inside the block, in place of whoever watches outside; None tells nobody."""
    token = _WATCHER.set(who)
    try:
        yield
    finally:
        _WATCHER.reset(token)
