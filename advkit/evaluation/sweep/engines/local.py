"""Processes of this machine, one thread each, that take line after line."""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from advkit.evaluation.run.workers import end_with_parent
from advkit.evaluation.sweep.engines import one_thread
from advkit.evaluation.sweep.line import Line, carry_out

LINES_EACH = 500
"""Lines after which a process is replaced: what libraries keep in memory goes with it."""


@dataclass(frozen=True)
class Local:
    """Processes of this machine; one that ends before its line does takes nothing with it but that line's time."""

    def run(self, home: Path, lines: Sequence[Line], workers: int) -> Iterator[int]:
        """See `Engine.run`."""
        waiting = deque(line.line for line in lines)
        at_work: dict[Future[None], tuple[int, ProcessPoolExecutor]] = {}
        idle: list[ProcessPoolExecutor] = []
        try:
            while waiting or at_work:
                while waiting and len(at_work) < workers:
                    pool, number = idle.pop() if idle else _process(), waiting.popleft()
                    with one_thread():  # a pool starts its process with its first task
                        at_work[pool.submit(_begin, home, number)] = number, pool
                done, _ = wait(at_work, return_when=FIRST_COMPLETED)
                for future in done:
                    number, pool = at_work.pop(future)
                    if future.exception() is None:
                        idle.append(pool)
                    else:
                        pool.shutdown(wait=False)
                    yield number
        finally:
            for pool in [*idle, *(pool for _, pool in at_work.values())]:
                for process in list((pool._processes or {}).values()):  # what still works is not waited for
                    process.terminate()
                pool.shutdown(wait=False, cancel_futures=True)


def _process() -> ProcessPoolExecutor:
    """A pool of one, so that who ended is known by its line."""
    return ProcessPoolExecutor(
        1,
        mp_context=get_context("spawn"),
        initializer=_prepare,
        initargs=(os.getcwd(),),
        max_tasks_per_child=LINES_EACH,
    )


def _prepare(place: str) -> None:
    import torch

    sys.path += [place] if place not in sys.path else []
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)


def _begin(home: Path, number: int) -> None:
    carry_out(home, number)
