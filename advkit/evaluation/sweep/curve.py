"""Robust accuracy over radii: one curve with intervals, in which nothing is searched for twice.

Balls of one norm lie inside each other, so an adversarial example that is found at one radius is admissible at every
larger one. It is shown to the victim again, in the larger ball; where the verdict holds it is that sample's record
there, with the note `found_at_eps=...`, and only the other samples are attacked. Those end as they do in a run of that
radius alone. A run without a radius (minimum norm) gives the whole curve by its distances.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from advkit.core.errors import UsageError
from advkit.core.files import claimed, why, write_whole
from advkit.core.lanes import Lanes
from advkit.core.protocols import Batch, LeastChange, Outcome, Record, Suite
from advkit.core.state import plain_torch
from advkit.evaluation.counts import count, was_right
from advkit.evaluation.execute import Watch, execute, first_look, in_order, preflight
from advkit.evaluation.plan import Outline, Plan, Request, outline, plan
from advkit.evaluation.report import Report
from advkit.evaluation.report.document import REPORT_NAME
from advkit.evaluation.run.batch import Round, shown
from advkit.evaluation.run.case import Case, digest_of
from advkit.evaluation.run.engine import LocalEngine, open_store, speed_file, with_views
from advkit.evaluation.run.lanes import KeptLanes
from advkit.evaluation.run.store import Stopwatch, Store, read_examples, read_records
from advkit.evaluation.scenarios.evasion import labelled, schedule
from advkit.evaluation.stats import rate
from advkit.threat_models.lp import NormBall, eps_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = "1.0"
FOUND = "found_at_eps="
"""What the note of a record begins with that was found at a smaller radius."""


def radii(text: str) -> list[float]:
    """The radii of START:STOP:POINTS (both ends among them, evenly apart) or of a list with commas: 0:16/255:17.

    Raises UsageError.
    """
    try:
        if ":" not in text:
            return [float(_fraction(each)) for each in text.split(",")]
        start, stop, points = text.split(":")
        first, last, number = _fraction(start), _fraction(stop), int(points)
        if number < 2 or not first < last:
            raise ValueError
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UsageError(
            f"eps {text!r}; expected START:STOP:POINTS with START < STOP and at least 2 points (0:16/255:17), or "
            "radii with commas between (0.05,0.1)"
        ) from None
    return [float(first + (last - first) * step / (number - 1)) for step in range(number)]


def _fraction(text: str) -> Fraction:
    number, bar, below = text.partition("/")
    return Fraction(number.strip()) / (Fraction(below.strip()) if bar else 1)


@dataclass(frozen=True)
class Curve:
    """Robust accuracy at every radius of a list.

    data:   plain JSON values: `points` have eps, robust_accuracy (a rate with its interval), attacked, taken_over and
            passes
    folder: of its files and runs
    """

    data: Mapping[str, Any]
    folder: Path

    @property
    def points(self) -> list[tuple[float, float]]:
        """(eps, robust accuracy), the smallest radius first."""
        return [(point["eps"], point["robust_accuracy"]["value"]) for point in self.data["points"]]

    def to_dict(self) -> dict[str, Any]:
        """A copy of the data."""
        copied: dict[str, Any] = json.loads(json.dumps(self.data))
        return copied

    def to_json(self) -> str:
        """The data, indented."""
        return json.dumps(self.data, indent=2, allow_nan=False)

    def markdown(self) -> str:
        """The points as a table."""
        lines = [f"Robust accuracy over eps, {self.data['title']}; n = {self.data['n']}.", ""]
        lines += [
            "| eps | robust accuracy | 95 % interval | attacked | taken over | passes |",
            "|---|---|---|---|---|---|",
        ]
        for point in self.data["points"]:
            held = point["robust_accuracy"]
            ends = f"[{held['ci']['low']:.3f}, {held['ci']['high']:.3f}]"
            cells = (point["attacked"], point["taken_over"], point["passes"])
            lines.append(f"| {point['eps_string']} | {held['value']:.3f} | {ends} | {' | '.join(map(str, cells))} |")
        return "\n".join(lines) + "\n"

    def plot(self) -> Figure:
        """A step at every radius and the band of the intervals.

        Between two radii the accuracy of the smaller one is drawn, from which the attack's own is not further up.
        """
        from advkit.evaluation.figures.plots import accuracy_by_distance

        n, last = self.data["n"], self.data["right"]
        broken: list[float] = []
        for point in self.data["points"]:
            left = point["robust_accuracy"]["numerator"]
            broken += [point["eps"]] * (last - left)
            last = left
        name = str(self.data["attack"])
        title = f"Robust accuracy over eps, {self.data['title']}, n = {n}"
        return accuracy_by_distance({name: (broken, self.data["right"], n)}, norm=self.data["norm"], title=title)

    def save(self, plots: bool = True) -> list[Path]:
        """Write curve.json, curve.md and curve.png into the folder."""
        files = [self.folder / "curve.json", self.folder / "curve.md"]
        write_whole(files[0], self.to_json() + "\n")
        write_whole(files[1], self.markdown())
        if plots:
            from advkit.evaluation.figures.plots import save

            files.append(save(self.plot(), self.folder / "curve.png"))
        return files


@dataclass(frozen=True)
class _Found:
    """An adversarial example: where it was found, the record of it, and the input."""

    eps: float
    record: Record
    x: Tensor


def trace(
    request: Request,
    eps: Sequence[float | str],
    home: Path,
    *,
    workers: int | None = 1,
    watch: Watch | None = None,
    progress: bool = False,
    command: str = "",
) -> Curve:
    """The curve of a request at these radii; runs and figures go to a folder of `home`, and are resumed there.

    Raises UsageError where the threat model has no radius or not one of these, the goal is not untargeted, the victim's
    answers vary, or a shard is asked for.
    """
    levels = _checked(eps)
    begun = outline(request)
    _check(begun)
    threat: Any = begun.parts.threat
    balls = [] if _least(begun) else [replace(threat, eps=each) for each in levels if each > 0]
    first = plan(replace(request, threat_model=balls[0], beside=False) if balls else request, progress=progress)
    _check_steady(first.case)
    preflight(first.case)
    _check_steady(replace(first.case, randomized=first_look(first.case)[1]))
    folder = home / f"curve-{digest_of([first.case.config(), levels])[:16]}"
    carry = _Carrier(request, begun, folder, workers, watch, progress, command)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with claimed(folder), plain_torch():
            points = carry.by_distance(levels) if _least(begun) else carry.by_radius(levels)
    except OSError as error:
        raise UsageError(f"the folder {folder} can't be written ({why(error)}): name another with --out") from error
    data = {
        "schema_version": SCHEMA,
        "kind": "curve",
        "title": " | ".join(f"{name}={spec}" for name, spec in carry.specs.items()),
        **carry.specs,
        "norm": carry.norm,
        "n": carry.n,
        "seed": request.seed,
        "right": carry.right,
        "points": points,
        "command": command,
    }
    return Curve(data, folder)


def _name(eps: float) -> str:
    """Of the run folder of a radius."""
    return f"eps-{eps:.9g}"


def _checked(eps: Sequence[float | str]) -> list[float]:
    """The radii, the smallest first; those that share a run folder (0.3 and 3 * 0.1) are one."""
    said = f"eps is {eps!r:.80}; expected finite radii >= 0, one of them above 0"
    try:
        levels = sorted(float(_fraction(each)) if isinstance(each, str) else float(each) for each in eps)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        raise UsageError(said) from None
    if not levels or levels[-1] <= 0 or any(not math.isfinite(each) or each < 0 for each in levels):
        raise UsageError(said)
    return list({_name(each): each for each in reversed(levels)}.values())[::-1]


def _least(begun: Outline) -> bool:
    threat: object = begun.parts.threat
    return isinstance(threat, LeastChange) and bool(threat.least) and not isinstance(threat, NormBall)


def _check(begun: Outline) -> None:
    threat, rule = begun.parts.threat, begun.parts.rule
    if begun.scenario.name != "evasion" or not (isinstance(threat, NormBall) or _least(begun)):
        raise UsageError(
            f"the threat model {begun.specs['threat_model']} has no radius to vary: a curve needs a ball (linf, l2, l1 "
            "or l0) or a minimum-norm threat model"
        )
    if rule.kind != "untargeted":
        raise UsageError(
            f"a curve is of robust accuracy, and the goal {begun.specs['goal']} is another: use untargeted"
        )
    if begun.request.rows is not None:
        raise UsageError(f"rows {begun.request.rows} with eps; a curve is of all n samples: leave rows out")


def _check_steady(case: Case) -> None:
    """Raise UsageError where the victim is known to answer otherwise when it is asked again."""
    if case.randomized:
        raise UsageError(
            f"the victim's answers vary from call to call (model {case.specs['model']}, defense "
            f"{case.specs['defense']}), so a verdict does not carry over to a larger radius: name single radii in a "
            "grid"
        )


class _Carrier:
    """Carries out the runs of a curve."""

    def __init__(
        self,
        request: Request,
        begun: Outline,
        folder: Path,
        workers: int | None,
        watch: Watch | None,
        progress: bool,
        command: str,
    ) -> None:
        # Every example is kept: the larger radii are shown them.
        self.request = replace(request, keep=max(request.keep, begun.n), beside=False)
        self.begun, self.folder = begun, folder
        self.workers, self.watch, self.progress, self.command = workers, watch, progress, command
        self.specs: dict[str, str] = {}
        self.norm, self.n, self.right = "", begun.n, 0

    def by_radius(self, levels: Sequence[float]) -> list[dict[str, Any]]:
        """A run for each radius above 0, the smallest first."""
        found: dict[str, _Found] = {}
        robust: set[str] | None = None
        points = []
        for eps in (each for each in levels if each > 0):
            threat: Any = self.begun.parts.threat
            at = replace(self.request, threat_model=replace(threat, eps=eps))
            folder = self.folder / _name(eps)
            records, report = self._run(at, folder, found)
            robust = self._still_robust(robust, records)
            points.append(self._point(eps, robust, records, folder, report))
            held = read_examples(folder)
            for record in records:
                key = Store.key(record.made_by, record.id)
                if record.outcome == Outcome.BROKEN and record.id not in found and key in held:
                    found[record.id] = _Found(eps, record, held[key][1])
        return self._with_zero(levels, points)

    def by_distance(self, levels: Sequence[float]) -> list[dict[str, Any]]:
        """One run, whose distances tell at which radius each sample breaks."""
        folder = self.folder / "run"
        records, report = self._run(self.request, folder, {})
        robust = self._still_robust(None, [r for r in records if r.outcome != Outcome.BROKEN])
        broken = {
            r.id: r.distance for r in records if r.outcome == Outcome.BROKEN and r.distance is not None and was_right(r)
        }
        points = []
        for number, eps in enumerate(each for each in levels if each > 0):
            left = robust | {row for row, distance in broken.items() if distance > eps}
            points.append(self._point(eps, left, records if number == 0 else [], folder, report))
        return self._with_zero(levels, points)

    def _run(self, request: Request, folder: Path, found: Mapping[str, _Found]) -> tuple[list[Record], Report]:
        resolved = plan(request, progress=self.progress)
        case = resolved.case
        if not (folder / REPORT_NAME).exists():
            preflight(case)
            _seed(resolved, folder, found)
        report = execute(resolved, out=folder, watch=self.watch, command=self.command, workers=self.workers)
        records = in_order(case, read_records(folder / "records.jsonl"))
        self.specs = {name: case.specs[name] for name in ("attack", "defense", "task", "model")}
        self.specs["threat_model"] = str(case.specs["threat_model"]).partition(":")[0]
        self.norm = str(case.threat.describe().get("norm") or "")
        self.right = len({record.id for record in records if was_right(record)})
        return records, report

    @staticmethod
    def _still_robust(before: set[str] | None, records: Sequence[Record]) -> set[str]:
        """The samples that are robust in these records, among those that were at every smaller radius."""
        groups: dict[str, list[Record]] = {}
        for record in records:
            groups.setdefault(record.id, []).append(record)
        now = {row for row, group in groups.items() if count(group).right_after}
        return now if before is None else now & before

    def _point(
        self, eps: float, robust: set[str], records: Sequence[Record], folder: Path, report: Report
    ) -> dict[str, Any]:
        taken = [record for record in records if any(note.startswith(FOUND) for note in record.notes)]
        own = [record for record in records if not any(note.startswith(FOUND) for note in record.notes)]
        attacked = {record.id for record in own if record.outcome != Outcome.WRONG}
        return {
            "eps": eps,
            "eps_string": eps_text(eps),
            "robust_accuracy": rate(len(robust), self.n, "all_samples"),
            "undecided": report.undecided,
            "attacked": len(attacked),
            "taken_over": len(taken),
            "passes": sum(record.forwards + record.backwards for record in own),
            "run": folder.name,
        }

    def _with_zero(self, levels: Sequence[float], points: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With the point at radius 0, where the input is the clean one: from its records, too."""
        if levels[0] > 0:
            return points
        clean = {
            "eps": 0.0,
            "eps_string": "0",
            "robust_accuracy": rate(self.right, self.n, "all_samples"),
            "undecided": 0,
            "attacked": 0,
            "taken_over": 0,
            "passes": 0,
            "run": points[0]["run"],
        }
        return [clean, *points]


def _seed(resolved: Plan, folder: Path, found: Mapping[str, _Found]) -> None:
    """Put what smaller radii found into the run of a larger one, each verdict made anew in its ball."""
    if not found or _first_cell(resolved.case) is None:
        return
    with closing(open_store(resolved.case, folder, scenario=resolved.scenario)) as store:
        # As the run itself does it, so that its shapes of calls are those that are kept here.
        cells = resolved.scenario.cells(resolved.case)
        cell = _first_cell(with_views(resolved.case, cells, speed_file(folder, store.name)))
        assert cell is not None
        engine = LocalEngine(None, None, KeptLanes(store))
        rows = {row for row in found if Store.key(cell.label, row) not in store}
        others = frozenset(row for row in cell.ids() if row not in rows)
        clock = Stopwatch()
        for batch in cell.task.batches(cell.batch_size, skip=others, n=cell.n):
            held = torch.stack([found[row].x for row in batch.ids])
            for each in engine.over(partial(_shown, returned=held), cell, iter([batch])):
                _append(store, each, found, clock.lap())


def _shown(case: Case, batch: Batch, lanes: Lanes, returned: Tensor) -> Round:
    if len(returned) != len(batch.ids):  # a batch is halved where something raises: then nothing is taken over
        return Round([])
    return shown(case, batch, lanes, returned)


def _append(store: Store, each: Round, found: Mapping[str, _Found], seconds: float) -> None:
    """Record the samples whose verdict holds; others are attacked like any."""
    kept = [i for i, record in enumerate(each.records) if record.outcome == Outcome.BROKEN]
    if not kept or each.clean is None or each.adversarial is None:
        return
    records = [_told(each.records[i], found[each.records[i].id]) for i in kept]
    store.append(records, seconds, examples=(each.clean[kept], each.adversarial[kept]), keep={r.id for r in records})


def _told(record: Record, found: _Found) -> Record:
    """The record, with where it was found and what that took."""
    first = found.record
    notes = [note for note in first.notes if note.startswith(FOUND)] or [f"{FOUND}{found.eps!r}"]
    return replace(
        record,
        forwards=first.forwards,
        backwards=first.backwards,
        queries=first.queries,
        notes=(*record.notes, *notes),
    )


def _first_cell(case: Case) -> Case | None:
    """The attack under whose name a sample that is broken leaves the run; None where some samples do not meet it."""
    attack: Any = case.attack
    stages = schedule(attack)
    if case.together or not stages:
        return None
    first = stages[0]
    if isinstance(attack, Suite) and (first.share < 1 or first.when != "always" or first.above > 0):
        return None
    return replace(case, attack=first.attack, label=labelled(case, first))


__all__: Sequence[str] = ["Curve", "radii", "trace"]
