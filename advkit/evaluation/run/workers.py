"""Worker processes of one thread each: the same records, more cores.

A batch's records are a function of the case and the batch alone, so batches may be played anywhere; they come back in
the task's order and the one store writes them. On a CPU two processes of one thread beat one process of two threads.
"""

from __future__ import annotations

import io
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Any, Self, cast

import torch

from advkit.core.errors import UsageError
from advkit.core.protocols import Batch
from advkit.evaluation.run.batch import played_alone
from advkit.evaluation.run.case import Case

_CELL = ("attack", "label", "threat", "everyone", "exact", "seed")
_worker: dict[str, Any] = {}


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however it ended: a pool's queues do not tell."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _begin(payload: bytes) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    case = torch.load(io.BytesIO(payload), weights_only=False)  # our own bytes, from the parent process
    _worker["case"] = case
    _worker["surrogates"] = dict(case.surrogates)


def _play(cell: dict[str, Any], batch: Batch, lanes: Any) -> Any:
    names = cell["surrogates"]
    surrogates = tuple((name, _worker["surrogates"][name]) for name in names)
    case = replace(_worker["case"], **{key: cell[key] for key in _CELL}, surrogates=surrogates)
    return played_alone(case, batch, lanes)


class Crew:
    """Processes that play the batches of one case; a context manager.

    Raises UsageError where the case can't be sent to another process (a model made of a lambda, say).
    """

    def __init__(self, case: Case, workers: int) -> None:
        self.workers = workers
        held = io.BytesIO()
        try:
            torch.save(replace(case, task=cast(Any, None)), held)  # the rows travel with the batches
        except Exception as error:
            raise UsageError(
                f"this case can't be sent to worker processes ({type(error).__name__}: {error}): use --workers 1, or "
                "define the model at the top level of a module"
            ) from error
        self._pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(held.getvalue(),)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def play(self, case: Case, batches: Iterator[Batch], lanes: Any) -> Iterator[Any]:
        """What the batches come to, in their order; a few batches are in flight at a time."""
        cell = {key: getattr(case, key) for key in _CELL} | {"surrogates": [name for name, _ in case.surrogates]}
        waiting: deque[Future[Any]] = deque()
        for batch in batches:
            waiting.append(self._pool.submit(_play, cell, batch, lanes))
            if len(waiting) > 2 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
