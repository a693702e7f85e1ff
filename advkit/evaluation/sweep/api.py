"""`advkit.sweep`: a grid of evaluations on this machine, a SLURM cluster or Ray; or a curve over radii."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from advkit.core.checks import whole
from advkit.core.errors import UsageError
from advkit.core.files import write_whole
from advkit.evaluation.execute import Watch
from advkit.evaluation.keywords import explained
from advkit.evaluation.plan import Request
from advkit.evaluation.progress import Bars
from advkit.evaluation.run.engine import available_cores
from advkit.evaluation.run.store import check_folder
from advkit.evaluation.screen import Works, shown
from advkit.evaluation.sweep.curve import Curve, radii, trace
from advkit.evaluation.sweep.driver import drive
from advkit.evaluation.sweep.engines import ENGINES, Engine
from advkit.evaluation.sweep.grid import Grid, read_grid
from advkit.evaluation.sweep.line import Line, read_lines, write_lines
from advkit.evaluation.sweep.plan import resolve
from advkit.evaluation.sweep.table import Row, failed, markdown, rows_of, to_dict

TABLE = "sweep.md"
LOOKING, RUNNING = "cells looked at", "lines"
"""What progress calls the two parts of a grid."""


@dataclass(frozen=True)
class Sweep:
    """A sweep's folder: its lines, and what came out."""

    folder: Path
    lines: Sequence[Line]

    @property
    def rows(self) -> list[Row]:
        """One for each cell: a number, or the reason why there is none."""
        return list(rows_of(self.folder, self.lines))

    @property
    def failed(self) -> bool:
        """Whether a cell that fits has no number."""
        return failed(self.rows)

    def to_dict(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return to_dict(self.rows)

    def markdown(self) -> str:
        """The table."""
        return markdown(self.rows)

    @classmethod
    def load(cls, folder: str | Path) -> Sweep:
        """The sweep of a folder; raises ReportError where there is none."""
        return cls(Path(folder), read_lines(Path(folder)))


def prepare(
    grid: str | Path | Mapping[str, Any] | Grid,
    out: str | Path = "runs",
    *,
    shard: int | None = None,
    trust: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Sweep:
    """The lines of a grid, written to FOLDER/sweep.jsonl; nothing is run. See `sweep`.

    watch: called with how many cells were looked at, and how many there are
    """
    home = Path(out)
    asked = read_grid(grid)
    check_folder(home / "sweep")
    shard = None if shard is None else whole("shard", shard, 1)
    own = not isinstance(grid, str | Path)  # the caller's own words, and no file from anybody
    lines = resolve(asked, home, shard=shard, trust=trust or own, watch=watch)
    write_lines(home, lines)
    return Sweep(home, lines)


def carry_out(
    prepared: Sweep,
    *,
    engine: str | Engine = "local",
    workers: int | None = None,
    retries: int = 1,
    again: bool = False,
    watch: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Run the lines of a sweep that have not ended, and write FOLDER/sweep.md. See `sweep`."""
    workers = None if workers is None else whole("workers", workers, 1)
    retries = whole("retries", retries, 0)
    chosen = ENGINES.build(engine)
    drive(
        prepared.folder,
        prepared.lines,
        chosen,
        workers=workers or available_cores(),
        retries=retries,
        again=again,
        watch=watch,
    )
    write_whole(prepared.folder / TABLE, prepared.markdown())
    return prepared


@explained(Request)
def sweep(
    grid: str | Path | Mapping[str, Any] | Grid | None = None,
    *,
    out: str | Path = "runs",
    engine: str | Engine = "local",
    workers: int | None = None,
    shard: int | None = None,
    retries: int = 1,
    again: bool = False,
    trust: bool = False,
    eps: Sequence[float | str] | str | None = None,
    watch: Watch | None = None,
    progress: bool | None = None,
    command: str = "",
    **settings: Any,
) -> Sweep | Curve:
    """Run a grid of evaluations, or one evaluation at several radii.

    grid:    YAML file or mapping: lists of `attacks`, `defenses`, `tasks`, `models`, `threat_models`, `goals`, `seeds`;
             `n`, `batch_size`, `device`, `speed` for all; `exclude`, patterns of cells to leave out
    out:     folder with one run folder for each cell; what is done there is not run again
    engine:  local, submitit or ray, with settings as in any spec: `submitit:partition=gpu`
    workers: lines at a time; None takes one per core
    shard:   rows of a shard; None cuts cells that cost more than a million passes, where rows do not depend on others
    retries: how often a line that crashes is tried again
    again:   also run cells that an earlier sweep refused or put aside
    trust:   also cells of a file that name what is not advkit's own (python:, hf:, path:...)
    eps:     radii, or START:STOP:POINTS, in place of a grid: a `Curve`; settings are then those of `advkit.evaluate`
    progress: as of `advkit.evaluate`; of a grid, how many of its lines have ended
    watch, command: of a curve, as of `advkit.evaluate`

    Raises UsageError for a grid that can't be read, a folder that can't be written, an engine with nothing to run on.
    What is wrong with one cell is no error: its row says so. A script needs the usual `if __name__ == "__main__"`.
    """
    if eps is not None:
        if grid is not None:
            raise UsageError("a grid and eps at once; a curve is of one evaluation: name its attack, defense and task")
        asked = {"engine": engine != "local", "shard": shard is not None, "retries": retries != 1, "again": again}
        if given := [name for name, other in asked.items() if other]:
            raise UsageError(f"{', '.join(given)} with eps; a curve is run in this process: these belong to a grid")
        levels: Sequence[float | str] = radii(eps) if isinstance(eps, str) else eps
        with Bars(progress):
            made = trace(
                Request(**settings),
                levels,
                Path(out),
                workers=workers or 1,
                watch=watch,
                progress=shown(progress),
                command=command,
            )
        made.save(plots=False)
        return made
    if grid is None:
        raise UsageError("sweep needs a grid (a YAML file or a mapping), or eps with the parts of one evaluation")
    if settings:
        raise UsageError(f"{', '.join(settings)}: with a grid these belong into it, as lists")
    if watch is not None or command:
        raise UsageError("watch and command are of a curve (eps); `advkit sweep --status` shows where a grid is")
    with Works(progress) as shows:
        return carry_out(
            prepare(grid, out, shard=shard, trust=trust, watch=partial(shows.works, LOOKING)),
            engine=engine,
            workers=workers,
            retries=retries,
            again=again,
            watch=partial(shows.works, RUNNING),
        )
