"""From a grid to lines: every cell resolved as far as that is cheap, what does not fit named with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import one_hot

from advkit.core.errors import AdvkitError, ReportError
from advkit.core.protocols import AboutSamples, Label, ThroughView, answer_shape
from advkit.core.registry import outside
from advkit.evaluation.inputs import pick_device
from advkit.evaluation.matrix.images import NoVictim
from advkit.evaluation.plan import NO_ATTACK, PARTS, Outline, Request, outline, registries, with_data
from advkit.evaluation.report import Report
from advkit.evaluation.run.batch import own_randomness
from advkit.evaluation.run.case import Case, digest_of
from advkit.evaluation.run.rehearsal import rehearse
from advkit.evaluation.run.speed import planned_passes
from advkit.evaluation.sweep.grid import REQUEST_DEFAULTS, Grid
from advkit.evaluation.sweep.line import Line
from advkit.evaluation.sweep.shards import apart, cut, folder_of
from advkit.tasks.base import ClassificationTask

Watch = Callable[[int, int], None]  # cells looked at, cells in all


def resolve(
    grid: Grid, home: Path, *, shard: int | None = None, trust: bool = False, watch: Watch | None = None
) -> list[Line]:
    """The lines of a grid: one for each cell, and one for each shard of the large ones before it.

    shard: rows of a shard; None cuts cells that cost more than a million passes
    trust: also cells that name what is not advkit's own, which may run code and fetch files

    Raises UsageError where the device is not here; what is wrong with one cell is that line's reason.
    """
    pick_device(grid.device)
    lines, known = list[Line](), _Known(measured(home))
    cells = list(grid.cells())
    for number, cell in enumerate(cells):
        if not trust and (reason := _outside(cell)):
            lines.append(_unrun(_request(cell), number, len(lines), reason))
        else:
            lines += _lines(grid, cell, number, len(lines), known, shard)
        if watch is not None:
            watch(number + 1, len(cells))
    return lines


def _request(cell: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a request that its command line names: attack, defense, task, and what is not the usual."""
    given = {name: value for name, value in cell.items() if value != getattr(REQUEST_DEFAULTS, name)}
    return {name: cell[name] for name in ("attack", "defense", "task")} | given


def _outside(cell: Mapping[str, Any]) -> str:
    found = [f"{name}={each}" for name in PARTS if cell[name] for each in outside(cell[name])]
    if not found:
        return ""
    return f"it would load what is not advkit's own ({'; '.join(found)}): where you trust the file, run it with --trust"


@dataclass(frozen=True)
class _Known:
    """What cells share: passes of attacks per sample, parts by their specs, reasons by the parts they are about."""

    passes: dict[str, float]
    parts: dict[tuple[str, str], Any] = field(default_factory=dict)
    misfits: dict[tuple[str, ...], str] = field(default_factory=dict)

    def built(self, asked: Request) -> Request:
        """The request with its parts built, each once; one that is somebody's own stays its spec, which names it."""
        specs = {name: getattr(asked, name) for name in PARTS if name != "model"}
        return replace(asked, **{name: self._part(name, spec) for name, spec in specs.items() if spec is not None})

    def _part(self, name: str, spec: str) -> Any:
        if spec == NO_ATTACK or (name != "task" and outside(spec)):
            return spec
        if (name, spec) not in self.parts:
            self.parts[name, spec] = registries()[name].build(spec)
        return self.parts[name, spec]

    def misfit(self, begun: Outline) -> str:
        """See `misfit`: the defense has no part in it. Parts of somebody's own do not run in this process."""
        parts = tuple(spec for name, spec in begun.specs.items() if name != "defense")
        if parts not in self.misfits:
            self.misfits[parts] = "" if any(outside(spec) for spec in parts) else misfit(begun)
        return self.misfits[parts]

    def passes_of(self, begun: Outline) -> float:
        """About how many passes a cell costs: measured per sample in this folder, else planned by the attack."""
        name = begun.specs["attack"]
        if name not in self.passes:
            self.passes[name] = 1.0
            with suppress(Exception):  # a part of somebody's own may have settings of any kind
                self.passes[name] = 1.0 if begun.parts.attack is None else planned_passes(begun.parts.attack)
        return self.passes[name] * begun.n


def _lines(grid: Grid, cell: dict[str, Any], number: int, first: int, known: _Known, shard: int | None) -> list[Line]:
    request = _request(cell)
    if reason := grid.excluded(cell):
        return [_unrun(request, number, first, reason, excluded=True)]
    asked = Request(**request, beside=False)
    try:
        begun = outline(known.built(asked))
        if reason := known.misfit(begun):
            return [_unrun(request, number, first, reason)]
        specs = {**begun.specs, "n": begun.n, "seed": asked.seed}
        digest = digest_of(
            {**specs, "model": asked.model or begun.parts.task.defaults.model, "speed": str(asked.speed)}
        )
        passes = known.passes_of(begun)
        pieces = cut(begun.n, passes, shard)
        if pieces and not apart(asked):
            pieces = []
    except AdvkitError as error:
        return [_unrun(request, number, first, str(error))]
    whole = Line(
        line=first + len(pieces),
        cell=number,
        digest=digest,
        folder=digest[:16],
        request=request,
        specs=specs,
        passes=passes,
        shards=tuple(range(first, first + len(pieces))),
    )
    return [*(_shard(whole, first + at, rows, begun.n) for at, rows in enumerate(pieces)), whole]


def _shard(whole: Line, number: int, rows: str, n: int) -> Line:
    places = Request(rows=rows).places
    assert places is not None
    return replace(
        whole,
        line=number,
        digest=digest_of([whole.digest, rows]),
        folder=f"{whole.folder}/{folder_of(rows)}",
        request={**whole.request, "rows": rows},
        passes=whole.passes * (places[1] - places[0]) / n,
        shards=(),
    )


def _unrun(request: dict[str, Any], cell: int, number: int, reason: str, *, excluded: bool = False) -> Line:
    digest = digest_of(request)
    return Line(
        line=number,
        cell=cell,
        digest=digest,
        folder=digest[:16],
        request=request,
        reason=reason,
        excluded=excluded,
    )


def misfit(begun: Outline) -> str:
    """Why parts do not fit together, as far as that can be told without a model; "" where it can't.

    The scenario is asked, and the attack takes its first step on one sample, as before every run; the model's answer is
    that of one which is right.
    """
    parts, scenario = begun.parts, begun.scenario
    task, rule = parts.task, parts.rule
    if scenario.name != "evasion" or not isinstance(task, ClassificationTask) or answer_shape(task):
        return ""
    if isinstance(rule, AboutSamples | ThroughView) or parts.threat.scenario != "evasion":
        return ""
    specs = begun.specs
    case = Case(
        task=task,
        victim=NoVictim(task.space, task.classes),
        attack=parts.attack,
        threat=parts.threat.bind(task.space),
        rule=rule,
        label=Label(specs["attack"]),
        n=begun.n,
        specs=specs,
        defense=parts.defense,
        seed=begun.request.seed,
    )
    try:
        if reason := scenario.accepts(case):
            return reason
        case = with_data(case, scenario)
        batch = next(iter(task.batches(1, n=1)))
        assert batch.labels is not None
        answer = 10.0 * one_hot(batch.labels, task.classes).to(torch.float32)
        with own_randomness("cpu", "rehearsal"):
            for cell in scenario.cells(case):
                rehearse(cell, batch, answer)
    except AdvkitError as error:
        return str(error)
    return ""


def measured(home: Path) -> dict[str, float]:
    """Forward and backward passes per sample of every attack whose report lies in the folder."""
    found: dict[str, list[float]] = {}
    for file in sorted(home.glob("*/report.json")):
        try:
            data = Report.load(file).to_dict()
        except ReportError:
            continue
        cost = [each.get("cost", {}) for each in data["attacks"]]
        spent = sum(each.get("forward", 0) + each.get("backward", 0) for each in cost)
        name, n = (data.get("request") or {}).get("attack", NO_ATTACK), data["dataset"]["n_evaluated"]
        if spent and n:
            found.setdefault(name, []).append(spent / n)
    return {name: sum(each) / len(each) for name, each in found.items()}
