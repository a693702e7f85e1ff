"""Worker processes of one thread each: the same records, more cores.

A batch's records are a function of the case and the batch alone, so batches may be run anywhere; they come back in
the task's order and the one store writes them. On a CPU two processes of one thread beat one process of two threads.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Any, Self, cast

import torch

from advkit.core.errors import RunInterrupted, UsageError
from advkit.core.oracle import Lanes
from advkit.core.protocols import Batch
from advkit.core.state import Settings, callers_settings, remember
from advkit.evaluation.run.batch import Round, Unit, models_of, run_alone
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.guard import Guard

_STAYS = ("task", "surrogates", "defense", "views")
"""Fields of a case that are not sent with a batch: the rows travel by themselves, and models went ahead."""
_worker: dict[str, Any] = {}


def _end_with_parent() -> None:
    """End this process when the one that started it is gone, however it ended: a pool's queues do not tell."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _begin(payload: bytes, places: list[str], settings: Settings) -> None:
    remember(settings)
    sys.path += [place for place in places if place not in sys.path]
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    case = torch.load(io.BytesIO(payload), weights_only=False)  # our own bytes, from the parent process
    _worker["case"] = case
    _worker["surrogates"] = dict(case.surrogates)
    _worker["guard"] = Guard(models_of(case))


def _run(unit: Unit, changes: dict[str, Any], sources: list[Any], batch: Batch, lanes: Lanes) -> Round:
    known = _worker["surrogates"]
    surrogates = tuple((one, known[one]) if isinstance(one, str) else one for one in sources)
    cell = replace(_worker["case"], **changes, surrogates=surrogates)
    each = run_alone(unit, cell, batch, lanes)
    _worker["guard"].check(cell.label)
    return each


class Workers:
    """Processes that share the batches of one case; a context manager.

    Raises UsageError where the case can't be sent to another process (a model made of a lambda, say).
    """

    def __init__(self, case: Case, processes: int) -> None:
        self.case = case
        self.processes = processes
        payload = io.BytesIO()
        try:
            torch.save(replace(case, task=cast(Any, None), defense=None), payload)
        except Exception as error:
            raise UsageError(
                f"this case can't be sent to worker processes ({type(error).__name__}: {error}): use --workers 1, or "
                "define the model at the top level of a module"
            ) from error
        # Modules of the user's may lie in the working directory, which is on no path: `core.registry.own`.
        told = (payload.getvalue(), [os.getcwd()], callers_settings())
        self._pool = ProcessPoolExecutor(
            processes, mp_context=get_context("spawn"), initializer=_begin, initargs=told
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, unit: Unit, cell: Case, batches: Iterator[Batch], lanes: Lanes) -> Iterator[Round]:
        """What the batches come to, in their order; a few batches are in flight at a time."""
        base = self.case
        changes = {
            field.name: getattr(cell, field.name)
            for field in fields(cell)
            if field.name not in _STAYS and getattr(cell, field.name) is not getattr(base, field.name)
        }
        known = dict(base.surrogates)
        sources = [name if known.get(name) is model else (name, model) for name, model in cell.surrogates]
        waiting: deque[Future[Round]] = deque()
        try:
            for batch in batches:
                waiting.append(self._pool.submit(_run, unit, changes, sources, batch, lanes))
                if len(waiting) > 2 * self.processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RunInterrupted(
                "a worker process ended before its work was done (killed, perhaps for memory); what is recorded is "
                "kept: resume with the same command, or with --workers 1"
            ) from error
