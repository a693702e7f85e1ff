"""The engine: runs a scenario's rounds and stores each record as it ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import ModelChanged, RunInterrupted, StaleRun, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import Batch, OfFiles, Record, Suite, ids_of
from advkit.core.watching import watcher
from advkit.evaluation.run.batch import (
    Round,
    Unit,
    attacked,
    judged,
    models_attacked,
    models_of,
    own_randomness,
    run_alone,
)
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.guard import Guard, unchanged
from advkit.evaluation.run.lanes import KeptLanes, lanes_of, rows_to_probe
from advkit.evaluation.run.rehearsal import preflight
from advkit.evaluation.run.scenario import Records, RowsApart, Scenario
from advkit.evaluation.run.speed import FastViews, planned_passes
from advkit.evaluation.run.store import Stopwatch, Store
from advkit.evaluation.run.workers import Workers

log = logging.getLogger("advkit")

MANY = 3000
"""Records from which worker processes, which take seconds to start, pay."""

Progress = Callable[[list[Record], int], None]  # the new records, and how many the case has in all


class Without:
    """Rows to leave out of a cell's batches: those on record under its label, and those that nobody asked for, or that
    are another shard's.
    """

    def __init__(self, done: Records, cell: Case, only: Container[str] | None) -> None:
        self.done, self.prefix, self.only = done, Store.key(cell.label, ""), only
        self.ours = None if cell.places is None else frozenset(cell.ids())

    def __contains__(self, row: object) -> bool:
        name = str(row)
        if (self.only is not None and name not in self.only) or (self.ours is not None and name not in self.ours):
            return True
        return self.prefix + name in self.done


@dataclass
class LocalEngine:
    """Batches in this process, or shared between worker processes; see `scenario.Engine`."""

    workers: Workers | None = None
    guard: Guard | None = None
    kept: KeptLanes | None = None
    _lanes: dict[tuple[int, ...], tuple[Lanes, Any]] = field(default_factory=dict)

    def attack(self, cell: Case, done: Records, only: Container[str] | None = None) -> Iterator[Round]:
        """Attack and judge the rows that are not on record."""
        return self.run(attacked, cell, done, only)

    def judge(self, cell: Case, done: Records, only: Container[str] | None = None) -> Iterator[Round]:
        """Judge the rows as they are."""
        return self.run(judged, cell, done, only)

    def run(self, unit: Unit, cell: Case, done: Records, only: Container[str] | None = None) -> Iterator[Round]:
        """A function of batches on the rows that are not on record; batch by batch, in the task's order.

        An attack that makes something of all rows together gets all of them, those on record too where a run that was
        cut short left some out: what is on record is not yielded again.
        """
        skip = Without(done, cell, only)
        batches = cell.task.batches(cell.batch_size, skip=skip, n=cell.n)
        first = next(batches, None)
        if first is None:
            return
        together = cell.together
        if together:
            batches = cell.task.batches(cell.n, skip=Without({}, cell, only), n=cell.n)
            first = next(batches)
        for each in self.over(unit, cell, chain([first], batches)):
            yield _new_of(each, skip) if together else each

    def over(self, unit: Unit, cell: Case, batches: Iterator[Batch]) -> Iterator[Round]:
        """A function of batches on these batches of the task, in their order."""
        lanes = self.lanes(cell)
        if self.workers is not None:
            return self.workers.run(unit, cell, batches, lanes)
        return (self._guarded(unit, cell, batch, lanes) for batch in batches)

    def _guarded(self, unit: Unit, cell: Case, batch: Batch, lanes: Lanes) -> Round:
        if (told := watcher()) is not None:
            told.begins(cell.label, len(batch.ids), 1.0 if cell.attack is None else planned_passes(cell.attack))
        each = run_alone(unit, cell, batch, lanes)
        if self.guard is not None:
            self.guard.check(cell.label)
        return each

    def lanes(self, cell: Case) -> Lanes:
        """Probed once per set of models, or what the run folder keeps of them."""
        models = (cell.victim, *(model for _, model in cell.surrogates), cell.views)
        key = tuple(map(id, models))
        if key not in self._lanes:
            lanes = lanes_of(cell) if self.kept is None else self.kept.of(cell)
            self._lanes[key] = lanes, models  # the models are kept so that their ids stay theirs
        return self._lanes[key][0]


def _new_of(each: Round, skip: Container[str]) -> Round:
    rows = [i for i, record in enumerate(each.records) if record.id not in skip]

    def chosen(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[rows]

    records = [each.records[i] for i in rows]
    return replace(each, records=records, clean=chosen(each.clean), adversarial=chosen(each.adversarial))


def run(
    case: Case, scenario: Scenario, store: Store, progress: Progress | None = None, workers: int | None = 1
) -> list[Record]:
    """Run what the store does not hold yet and return the case's records in the order of the run.

    workers: processes of one thread each that share the batches; 1 runs here, None takes one per core for long work on
             a CPU (a case that can't travel to other processes is then run here)
    """
    _check_store(case, scenario, store)
    preflight(case, scenario)
    case = with_views(case, scenario.cells(case), speed_file(store.folder, store.name))
    if case.views is not None:
        store.kept = dict(case.views.chosen)
        store.remember(speed_file(store.folder, store.name))
    asked = workers
    if workers is None:
        ahead = scenario.expected(case, store.records) - len(store)
        workers = available_cores() if ahead >= MANY and torch.device(case.device).type == "cpu" else 1
    crew: Workers | None = None
    if workers > 1:
        try:
            crew = Workers(case, workers)
        except UsageError as error:
            if asked is not None:
                raise
            log.info("%s", error)
    try:
        with crew or nullcontext(), unchanged(models_of(case), case.label) as guard:
            return _run(case, scenario, store, progress, LocalEngine(crew, guard, KeptLanes(store)))
    except ModelChanged:
        store.reject()
        raise


def _run(case: Case, scenario: Scenario, store: Store, progress: Progress | None, engine: LocalEngine) -> list[Record]:
    records = list(store)
    if progress and records:
        progress(records, scenario.expected(case, store.records))
    kept = first_ids(case, case.keep)
    watch = Stopwatch()
    for each in within_memory(case, lambda cell: scenario.rounds(cell, engine, store.records)):
        examples = None if each.clean is None or each.adversarial is None else (each.clean, each.adversarial)
        store.append(each.records, watch.lap(), examples=examples, keep=kept, tokens=each.tokens)
        records += each.records
        if progress:
            progress(list(each.records), scenario.expected(case, store.records))
    return records


def within_memory(case: Case, rounds: Callable[[Case], Iterator[Round]]) -> Iterator[Round]:
    """The rounds of a case; where the device's memory ends, those that are left, in batches of half the size.

    rounds: begins where the rounds before ended
    """
    while True:
        try:
            yield from rounds(case)
            return
        except torch.OutOfMemoryError as error:
            if case.batch_size == 1 or case.together:
                rows = "all rows at once" if case.together else "one row at a time"
                raise RunInterrupted(
                    f"out of memory with {rows}; what is recorded is kept: take a smaller model or attack, or another "
                    "--device"
                ) from error
            case = replace(case, batch_size=case.batch_size // 2)
            log.warning("out of memory: going on with batches of %d rows", case.batch_size)


def _check_store(case: Case, scenario: Scenario, store: Store) -> None:
    """Raise StaleRun where a record is of a row or an attack that the case does not have."""
    if not len(store):
        return
    labels = [case.label, *(cell.label for cell in scenario.cells(case))]
    known: dict[str, set[Any]] = {
        "id": set(ids_of(case.task, case.n)),
        "attack": {label.attack for label in labels},
        "source": {label.source for label in labels},
        "label": {None, *range(case.task.classes)},
    }
    attack: object = case.attack
    if isinstance(attack, Suite):
        known["stage"] = {"", *(stage.name for stage in attack.stages())}
    held = store.records
    seen: dict[str, Iterable[Any]] = {"id": held.ids(), "label": held.classes}
    seen |= {name: [getattr(label, name) for label in held.labels] for name in ("attack", "source", "stage")}
    for name, values in known.items():
        if (value := next((each for each in seen[name] if each not in values), None)) is not None:
            word = {"id": "row", "label": "class"}.get(name, name)
            raise StaleRun(
                f"{store.path} holds a record of {word} {value!s:.200}, which this case does not have: name another "
                "--out"
            )


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def speed_file(folder: Path, name: str) -> Path:
    """Where a run keeps which speed switches its models were settled to keep."""
    return folder / f"{name}.speed.json"


def first_ids(case: Case, n: int) -> frozenset[str]:
    """The ids of the case's first n rows."""
    if n < 1:
        return frozenset()
    return frozenset(ids_of(case.task, min(n, case.n)))


def open_store(case: Case, folder: Path, name: str = "records", scenario: object = None) -> Store:
    """The case's store in a run folder.

    scenario: of the case, where records of rows whose files did not change are to outlive a change of others
    """
    apart = isinstance(scenario, RowsApart) and scenario.rows_apart(case)
    rows = case.task.marks(case.n) if apart and isinstance(case.task, OfFiles) else None
    return Store(folder, case.config(), name, rows)


def with_views(case: Case, cells: Sequence[Case], file: Path | None = None) -> Case:
    """The case with the views that its speed asks for; itself in full precision, or where it has them.

    cells: the single attacks of the case, from which its cost is estimated
    file:  where what is settled is read from, or written to
    """
    if not case.speed.switches or case.views is not None:
        return case
    if file is not None and file.exists():
        return replace(case, views=FastViews.load(file, case.speed, [name for name, _, _ in models_attacked(case)]))
    sources = {name for cell in cells for name, _ in cell.surrogates}
    apart = len(sources) if any(len(cell.surrogates) < len(case.surrogates) for cell in cells) else 1
    passes = sum(planned_passes(cell.attack) for cell in cells if cell.attack is not None) / apart
    with own_randomness(case.device, "speed"):
        views = FastViews.settle(case.speed, models_attacked(case), rows_to_probe(case), passes * case.n)
    if file is not None:
        views.save(file)
    return replace(case, views=views)
