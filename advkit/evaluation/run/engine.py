"""The loop around a scenario: check before spending, play what is not done, store each record as it ends."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.oracle import Lanes, frozen
from advkit.core.protocols import Record
from advkit.evaluation.run.batch import on_device, own_randomness
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.judge import Judge
from advkit.evaluation.run.store import Stopwatch, Store
from advkit.evaluation.run.workers import Crew
from advkit.evaluation.scenarios.evasion import Evasion, Grid, rehearse, with_views
from advkit.evaluation.scenarios.stream import Stream

log = logging.getLogger("advkit")

MANY = 3000
"""Records from which worker processes, which take seconds to start, pay."""

Progress = Callable[[list[Record], int], None]  # the new records, and how many the case has in all


SCENARIOS: dict[str, Callable[[], Any]] = {"evasion": Evasion, "grid": Grid, "stream": Stream}


def scenario_of(case: Case) -> Any:
    """The scenario that the case's threat model names; raises UsageError when it does not accept the case."""
    scenario = SCENARIOS[case.threat.scenario]()
    reason = scenario.accepts(case)
    if reason:
        raise UsageError(reason)
    return scenario


def preflight(case: Case) -> None:
    """Refuse what can't give a number: raises BadInput, BadModel or UsageError before anything is spent."""
    scenario_of(case)
    info = case.victim.describe()
    if info.classes is not None and info.classes != case.task.classes:
        raise BadModel(
            f"the model answers {info.classes} classes, the task {case.task.name} has {case.task.classes}: "
            "choose a model trained for this task"
        )
    for name, model in (("the model", case.victim), *((f"surrogate {n}", s) for n, s in case.surrogates)):
        if any(module.training for top in model.modules() for module in top.modules()):
            raise BadModel(
                f"{name} is in training mode (dropout and batch statistics would answer): call .eval() on it first"
            )
    misfit = getattr(case.rule, "misfit", None)
    if misfit is not None and (reason := misfit(case.victim)):
        raise UsageError(reason)
    first = next(iter(case.task.batches(min(case.batch_size, 64), n=case.n)))
    x = first.x.to(case.device)
    complaint = case.victim.space.complaint(x)
    if complaint:
        raise BadInput(complaint)
    with frozen(*case.victim.modules()), own_randomness(case.device, "preflight"):
        try:
            answer = Judge(case.victim, Lanes.fitting(x)).answer(x)
        except (RuntimeError, ValueError, TypeError) as error:
            raise BadModel(
                f"the model can't take inputs of shape {tuple(x.shape[1:])} of task {case.task.name}: {error}"
            ) from error
    if answer.ndim == 2 and answer.shape[1] != case.task.classes:
        raise BadModel(
            f"the model answers {answer.shape[1]} classes, the task {case.task.name} has {case.task.classes}: "
            "choose a model trained for this task"
        )
    if len(answer) != len(x) or answer.ndim not in (1, 2):
        raise BadModel(
            f"the model answers a tensor of shape {tuple(answer.shape)} for {len(x)} inputs; expected logits "
            f"[{len(x)}, {case.task.classes}] or decisions [{len(x)}]"
        )
    with own_randomness(case.device, "rehearsal"):
        rehearse(case, on_device(first, case.device), answer)


def run(case: Case, store: Store, progress: Progress | None = None, workers: int | None = 1) -> list[Record]:
    """Play what the store does not hold yet and return the case's records in playing order.

    workers: processes of one thread each that share the batches; 1 plays here, None takes one per core for long work on
             a CPU (a case that can't travel to other processes is then played here)
    """
    preflight(case)
    case = with_views(case, speed_file(store.folder, store.name))
    asked = workers
    if workers is None:
        ahead = scenario_of(case).expected(case, store.records) - len(store)
        workers = available_cores() if ahead >= MANY and torch.device(case.device).type == "cpu" else 1
    if workers > 1:
        try:
            crew = Crew(case, workers)
        except UsageError as error:
            if asked is not None:
                raise
            log.info("%s", error)
        else:
            with crew:
                return _run(case, store, progress, crew)
    return _run(case, store, progress, None)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _run(case: Case, store: Store, progress: Progress | None, crew: Crew | None) -> list[Record]:
    scenario = scenario_of(case)
    if progress and len(store):
        progress(list(store), scenario.expected(case, store.records))
    kept = first_ids(case, case.keep)
    watch = Stopwatch()
    while True:
        try:
            for records, origin, returned in scenario.rounds(case, store.records, crew):
                tokens = case.spent.pop(records[0].attack, 0) if records else 0
                store.append(records, watch.lap(), examples=(origin, returned), keep=kept, tokens=tokens)
                if progress:
                    progress(records, scenario.expected(case, store.records))
            break
        except torch.OutOfMemoryError:
            if case.batch_size == 1 or getattr(case.attack, "together", False):
                raise
            case = replace(case, batch_size=case.batch_size // 2)
            log.warning("out of memory: going on with batches of %d rows", case.batch_size)
    return list(store)


def speed_file(folder: Path, name: str) -> Path:
    """Where a run keeps which speed switches its models were settled to keep."""
    return folder / f"{name}.speed.json"


def first_ids(case: Case, n: int) -> frozenset[str]:
    """The ids of the case's first n rows."""
    if n < 1:
        return frozenset()
    wanted = min(n, case.n)
    return frozenset(row for batch in case.task.batches(wanted, n=wanted) for row in batch.ids)


def open_store(case: Case, folder: Path, name: str = "records") -> Store:
    """The case's store in a run folder."""
    return Store(folder, case.config(), name)
