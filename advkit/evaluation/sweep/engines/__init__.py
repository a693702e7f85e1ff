"""Engines of a sweep: who carries its lines out. A new one is a file here and a line of the table."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from advkit.core.registry import Registry
from advkit.evaluation.sweep.line import Line


class Engine(Protocol):
    """Carries lines out, each through `line.carry_out` in a process of its own or shared with other lines.

    What became of a line is in its folder: an engine says nothing of it, and survives a process that ends.
    """

    def run(self, home: Path, lines: Sequence[Line], workers: int) -> Iterator[int]:
        """Begin the lines in this order, so many at a time; yields the number of each as it ends, however it ends.

        Raises UsageError where there is nothing to run them on.
        """
        ...


ENGINES: Registry[Engine] = Registry(
    "engine",
    {
        "local": "advkit.evaluation.sweep.engines.local:Local",
        "submitit": "advkit.evaluation.sweep.engines.slurm:Submitit",
        "ray": "advkit.evaluation.sweep.engines.rays:Ray",
    },
    contract="advkit.evaluation.sweep.engines:Engine",
)

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
"""Environment of a worker: two processes of one thread beat one of two, and threads that wait must not spin."""


@contextmanager
def one_thread() -> Iterator[None]:
    """The environment that processes which are started inside the block inherit."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


__all__ = ["ENGINES", "ONE_THREAD", "Engine", "one_thread"]
