"""SLURM through submitit: an array of tasks, each a command line; without SLURM, submitit's local executor."""

from __future__ import annotations

import heapq
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from advkit.core.checks import one_of
from advkit.core.errors import MissingExtra, UsageError
from advkit.core.text import first_line
from advkit.evaluation.sweep.engines import one_thread
from advkit.evaluation.sweep.line import Line

LOGS = "submitit"
_LOOK = 0.2  # seconds


@dataclass(frozen=True)
class Submitit:
    """SLURM through submitit 1.5: lines are shared out among the tasks of one array, which get command lines alone.

    cluster:   slurm, local (processes of this machine), or auto: slurm where its commands are installed
    partition: of SLURM; empty takes the usual one
    hours:     most time of a task
    cpus:      of a task
    gpus:      of a task
    """

    cluster: Literal["auto", "slurm", "local"] = "auto"
    partition: str = ""
    hours: float = 24.0
    cpus: int = 1
    gpus: int = 0

    def __post_init__(self) -> None:
        one_of(self, "cluster", ("auto", "slurm", "local"))

    def run(self, home: Path, lines: Sequence[Line], workers: int) -> Iterator[int]:
        """See `Engine.run`. A task has several lines, one after another: a process that ends leaves those behind it."""
        submitit = _package()
        tasks = shared_out(lines, workers)
        try:
            executor = self._executor(submitit, home, workers)
            with one_thread(), executor.batch():
                jobs = [executor.submit(submitit.helpers.CommandFunction(_command(home, each))) for each in tasks]
        except RuntimeError as error:  # what submitit makes of a command of SLURM's that is not there or fails
            raise UsageError(
                f"SLURM did not take the tasks ({first_line(error)}): see that `sbatch` works here, or take --engine "
                "submitit:cluster=local; what is done is kept"
            ) from error
        waiting = dict(zip(jobs, tasks, strict=True))
        try:
            while waiting:
                for job in [job for job in waiting if job.done()]:
                    yield from (line.line for line in waiting.pop(job))
                if waiting:
                    time.sleep(_LOOK)
        finally:
            for job in waiting:
                job.cancel()

    def _executor(self, submitit: Any, home: Path, workers: int) -> Any:
        if self.cluster == "slurm" and shutil.which("sbatch") is None:
            raise UsageError(
                "there is no SLURM here (sbatch is not on the path): start the sweep on a login node, or take "
                "--engine submitit:cluster=local"
            )
        cluster = self.cluster
        if cluster == "auto":
            cluster = "slurm" if shutil.which("sbatch") is not None else "local"
        executor = submitit.AutoExecutor(folder=home / LOGS, cluster=cluster)
        executor.update_parameters(
            name="advkit", timeout_min=int(60 * self.hours), cpus_per_task=self.cpus, gpus_per_node=self.gpus
        )
        if cluster == "slurm":
            executor.update_parameters(slurm_array_parallelism=workers)
            if self.partition:
                executor.update_parameters(slurm_partition=self.partition)
        return executor


def shared_out(lines: Sequence[Line], workers: int) -> list[list[Line]]:
    """The lines in as many groups as workers, the next dearest always to the group that costs least so far."""
    groups: list[list[Line]] = [[] for _ in range(min(workers, len(lines)))]
    spent = [(0.0, number) for number in range(len(groups))]
    for line in lines:
        cost, number = heapq.heappop(spent)
        groups[number].append(line)
        heapq.heappush(spent, (cost + max(line.passes, 1.0), number))
    return groups


def _command(home: Path, lines: Sequence[Line]) -> list[str]:
    numbers = ",".join(str(line.line) for line in lines)
    return [sys.executable, "-m", "advkit", "sweep", str(home.absolute()), "--cell", numbers, "--trust"]


def _package() -> Any:
    try:
        import submitit
    except ImportError:
        raise MissingExtra("the engine submitit needs a package: pip install 'advkit[slurm]'") from None
    return submitit
