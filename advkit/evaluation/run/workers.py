"""Worker processes of one thread each: the same records, more cores.

A batch's records are a function of the case and the batch alone, so batches may be run anywhere; they come back in
the task's order and the one store writes them. On a CPU two processes of one thread beat one process of two threads.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import count
from multiprocessing import get_context, parent_process
from types import TracebackType
from typing import Any, Self, cast

import torch

from advkit.core import limits
from advkit.core.errors import RunInterrupted, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import Batch, Examined, Examines
from advkit.core.state import Settings, callers_settings, remember
from advkit.evaluation.run.batch import Round, Unit, counting, given_up, halved, lost, models_of, rows_of, run_alone
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.guard import Guard

log = logging.getLogger("advkit")

_STAYS = ("task", "surrogates", "defense", "views")
"""Fields of a case that are not sent with a batch: the rows travel by themselves, and models went ahead."""


@dataclass(frozen=True)
class _Task:
    """What is sent of a task, as `protocols.Examined` has it: its rows travel by themselves."""

    examiner: Examines


_worker: dict[str, Any] = {}
_LOOK = 0.25  # seconds between two looks at workers that are at work
_SLOT = 3  # numbers per worker: process, job, and the moment at which it has to be back


def end_with_parent() -> None:
    """End this process when the one that started it is gone, however it ended: a pool's queues do not tell."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _begin(payload: bytes, number: Any, slots: Any, places: list[str], settings: Settings) -> None:
    remember(settings)
    sys.path += [place for place in places if place not in sys.path]
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    case = torch.load(io.BytesIO(payload), weights_only=False)  # our own bytes, from the parent process
    _worker["case"] = case
    _worker["surrogates"] = dict(case.surrogates)
    _worker["guard"] = Guard(models_of(case))
    with number.get_lock():
        slot, number.value = _SLOT * number.value, number.value + 1
    slots[slot] = os.getpid()

    def tell(moment: float) -> None:
        slots[slot + 2] = moment

    _worker["slot"], _worker["slots"] = slot, slots
    limits.observer = tell


def _run(unit: Unit, changes: dict[str, Any], sources: list[Any], batch: Batch, lanes: Lanes, job: int) -> Round:
    known = _worker["surrogates"]
    surrogates = tuple((one, known[one]) if isinstance(one, str) else one for one in sources)
    cell = replace(_worker["case"], **changes, surrogates=surrogates)
    _worker["slots"][_worker["slot"] + 1] = job
    each = run_alone(unit, cell, batch, lanes)
    _worker["guard"].check(cell.label)
    return each


@dataclass
class _Job:
    """A batch that a worker is to run, and what has become of it."""

    number: int
    unit: Unit
    batch: Batch
    future: Future[Round]


class Workers:
    """Processes that share the batches of one case; a context manager.

    Raises UsageError where the case can't be sent to another process (a model made of a lambda, say).
    """

    def __init__(self, case: Case, processes: int) -> None:
        self.case = case
        self.processes = processes
        if any(counting(model) is not None for model in models_of(case)):
            raise UsageError(
                "the queries of this model are counted, and a service's rate is kept, in one process: use --workers 1"
            )
        payload = io.BytesIO()
        try:
            task = _Task(case.task.examiner) if isinstance(case.task, Examined) else None
            torch.save(replace(case, task=cast(Any, task), defense=None), payload)
        except Exception as error:
            raise UsageError(
                f"this case can't be sent to worker processes ({type(error).__name__}: {error}): use --workers 1, or "
                "define the model at the top level of a module"
            ) from error
        self._payload = payload.getvalue()
        self._jobs = count(1)
        self._stuck: int | None = None  # the job of a worker that was ended because it did not come back
        self._open()

    def _open(self) -> None:
        context = get_context("spawn")
        # A pool replaces no worker that ends, so that there are as many slots as processes. Without a lock: a worker
        # that was killed would keep it.
        self._slots = context.Array("d", _SLOT * self.processes, lock=False)
        # Modules of the user's may lie in the working directory, which is on no path: `core.registry.own`.
        arguments = (self._payload, context.Value("i", 0), self._slots, [os.getcwd()], callers_settings())
        self._pool = ProcessPoolExecutor(self.processes, mp_context=context, initializer=_begin, initargs=arguments)

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

        def submit(unit: Unit, batch: Batch) -> _Job:
            number = next(self._jobs)
            try:
                future = self._pool.submit(_run, unit, changes, sources, batch, lanes, number)
            except BrokenProcessPool as error:  # told by its result, when that is its turn
                future = Future()
                future.set_exception(error)
            return _Job(number, unit, batch, future)

        waiting: deque[_Job] = deque()
        more = True
        while more or waiting:
            while more and len(waiting) <= 2 * self.processes:
                batch = next(batches, None)
                more = batch is not None
                if batch is not None:
                    waiting.append(submit(unit, batch))
            if not waiting:
                return
            try:
                each = self._result(waiting[0].future, cell)
            except BrokenProcessPool as error:
                if self._stuck is None:
                    raise RunInterrupted(
                        "a worker process ended before its work was done (killed, perhaps for memory); what is "
                        "recorded is kept: resume with the same command, or with --workers 1"
                    ) from error
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._open()
                waiting = deque(self._again(cell, waiting, submit))
                self._stuck = None
                continue
            waiting.popleft()
            yield each

    def _result(self, future: Future[Round], cell: Case) -> Round:
        """What a worker hands back. One that is over its time and did not stop is ended, which ends the pool."""
        if cell.sample_timeout is None:
            return future.result()
        while not future.done():
            wait([future], timeout=_LOOK)
            for slot in range(0, len(self._slots), _SLOT):
                process, job, moment = self._slots[slot : slot + _SLOT]
                if moment and time.time() > moment + limits.GRACE and self._stuck is None:
                    self._stuck = int(job)
                    log.warning(
                        "a worker does not come back from compiled code: it is ended, and its batch tried again"
                    )
                    with suppress(OSError):
                        os.kill(int(process), getattr(signal, "SIGKILL", signal.SIGTERM))
        return future.result()

    def _again(self, cell: Case, waiting: Iterable[_Job], submit: Callable[[Unit, Batch], _Job]) -> Iterator[_Job]:
        """The jobs that are left, in their order: what was done, the others anew, the stuck one in halves."""
        for job in waiting:
            if job.future.done() and not job.future.cancelled() and job.future.exception() is None:
                yield job
            elif job.number != self._stuck:
                yield submit(job.unit, job.batch)
            elif job.unit is given_up:  # the victim itself does not come back from the clean row
                done: Future[Round] = Future()
                done.set_result(lost(cell, job.batch))
                yield replace(job, future=done)
            elif len(job.batch.ids) > 1 and not cell.together:
                yield from (submit(job.unit, half) for half in halved(job.batch))
            else:
                for row in range(len(job.batch.ids)):
                    yield submit(given_up, rows_of(job.batch, torch.tensor([row])))
