"""The shapes of a run's calls: probed once for each set of models, and kept in the run folder.

A sample's bits are the same in all of them, so that workers, verdicts and a resumed run get what the first start got.
Another machine, or another torch, may compute other bits: that is noticed, and said.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import StaleRun
from advkit.core.files import write_whole
from advkit.core.lanes import Lanes
from advkit.core.protocols import DrawsByRow
from advkit.core.strict_json import read_object
from advkit.evaluation.run.batch import models_attacked, own_randomness
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.rehearsal import first_rows
from advkit.evaluation.run.speed import VICTIM, planned_passes
from advkit.evaluation.run.store import Store

log = logging.getLogger("advkit")

_MAY = (
    "records from here on may differ in their last bits from those that the run would have had where it began, and "
    "single samples near the boundary may end otherwise"
)


def lanes_file(folder: Path, name: str) -> Path:
    """Where a run keeps the shapes of its calls."""
    return folder / f"{name}.lanes.json"


class KeptLanes:
    """The shapes of the calls of a run, by the models that are called, in its folder.

    Raises StaleRun where the file there says nothing sensible.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.file = lanes_file(store.folder, store.name)
        self.known = _read(self.file) if self.file.exists() else {}
        self.store.remember(self.file)

    def of(self, cell: Case) -> Lanes:
        """Those that the run began with, as far as a sample's bits are the same in all of them here; else probed."""
        name = "+".join([VICTIM, *(name for name, _ in cell.surrogates)])
        before = self.known.get(name)
        if before is not None and answered(cell) == before.bits:
            return before
        found = lanes_of(cell, () if before is None else before.sizes)
        if before is not None and len(self.store):
            found = _told(before, found)
        if found.sizes:
            self.known[name] = found
            kept = {name: {"sizes": lanes.sizes, "bits": lanes.bits} for name, lanes in self.known.items()}
            write_whole(self.file, json.dumps(kept, sort_keys=True) + "\n")
            self.store.remember(self.file)
        return found


def _told(before: Lanes, found: Lanes) -> Lanes:
    """The shapes to go on with where other bits are computed than where the run began; a warning says so."""
    here = f"this machine, with torch {torch.__version__},"
    if set(before.sizes) <= set(found.sizes):
        log.warning("%s computes other last bits than where the run began: %s", here, _MAY)
        return replace(before, bits=found.bits)
    log.warning(
        "the run began with calls of %s samples; on %s their last bits are not the same in all of these: calls of %s "
        "samples are made, and %s",
        _listed(before.sizes), here, _listed(found.sizes), _MAY,
    )  # fmt: skip
    return found


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(map(str, sizes)) or "any number of"


def _read(file: Path) -> dict[str, Lanes]:
    try:
        return {str(name): _lanes(entry) for name, entry in read_object(file.read_bytes()).items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise StaleRun(f"{file} is damaged ({error}): name another --out, or remove the folder") from error


def _lanes(entry: dict[str, Any]) -> Lanes:
    sizes, bits = entry["sizes"], entry["bits"]
    sane = isinstance(sizes, list) and sizes and all(type(size) is int and 0 < size <= 1024 for size in sizes)
    if not sane or not isinstance(bits, str):
        raise ValueError("it names no sizes of calls")
    return replace(Lanes.of_sizes(sizes), bits=bits)


def lanes_of(case: Case, also: Iterable[int] = ()) -> Lanes:
    """Shapes in which every model of the case answers the same bits for a row in any batch.

    Always probed on the task's first rows, so that a resumed run chooses the same. A victim that the attacker may not
    differentiate is not differentiated here either.

    also: sizes of a call to try in any case
    """
    first = rows_to_probe(case)
    sent, batch = _rows_sent(case), min(case.batch_size, case.n)
    found = []
    for number, (model, backward) in enumerate(_asked(case)):
        with own_randomness(case.device, "lanes", number):
            found.append(Lanes.probed(model, first, backward, sent, batch, also))
    if case.views is not None:
        for name, model, backward in models_attacked(case):
            with own_randomness(case.device, "lanes", name):
                found.append(case.views.lanes(name, model, first, backward))
    return Lanes.shared(found)


def answered(case: Case) -> str:
    """The `bits` of `lanes_of`, from a call of every model."""
    first = rows_to_probe(case)
    found = []
    for number, (model, backward) in enumerate(_asked(case)):
        with own_randomness(case.device, "lanes", number):
            found.append(Lanes.answered(model, first, backward))
    if case.views is not None:
        for name, model, backward in models_attacked(case):
            with own_randomness(case.device, "lanes", name):
                found.append(case.views.answered(name, model, first, backward))
    return Lanes.joined(found)


def _asked(case: Case) -> list[tuple[Any, bool]]:
    """Every model of the case that is called, an attacker's view of the victim too, and whether it is differentiated.

    A smoothed model calls its chain in shapes of its own; the chain is asked here for what it says of the machine.
    """
    attacked = [(model, backward) for _, model, backward in models_attacked(case)]
    victim = [] if any(model is case.victim for model, _ in attacked) else [(case.victim, False)]
    return [(_with_same_draws(model), backward) for model, backward in (*victim, *attacked)]


def _with_same_draws(model: Any) -> Any:
    if not isinstance(model, DrawsByRow):
        return model
    return model.base if Lanes.own(model) else _SameDraws(model)


class _SameDraws:
    """A model that draws by row, with one key for all rows: an answer does not depend on a row's place."""

    def __init__(self, model: DrawsByRow) -> None:
        self.model = model

    def __call__(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model.drawing(x, torch.zeros(len(x), dtype=torch.int64))
        return answer

    def modules(self) -> Any:
        """Those of the model that it calls."""
        return self.model.base.modules()


def _rows_sent(case: Case) -> float:
    """About how many rows the case sends through its models."""
    return planned_passes(case.attack) * case.n if case.attack is not None else case.n


def rows_to_probe(case: Case) -> Tensor:
    """The task's first rows."""
    victim = case.victim.base if isinstance(case.victim, DrawsByRow) else case.victim
    first: Tensor = first_rows(replace(case, victim=victim, batch_size=64, n=min(64, len(case.task)))).x
    return first
