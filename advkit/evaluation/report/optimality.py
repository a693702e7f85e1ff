"""How near to optimal attacks are, from records alone: against the best distance known for every sample of a case.

As AttackBench defines it (arXiv 2404.19460). The area under robust accuracy over the radius, up to the largest best
distance, is compared with the area under the envelope of all attacks (optimality 1) and with that of an attack that
finds nothing (0). Robust accuracy is a step function here and its area exact, where the published code joins the
steps by straight lines.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from advkit.core.errors import ReportError, UsageError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.counts import contested
from advkit.evaluation.report.document import Report
from advkit.evaluation.run.store import read_records, records_path
from advkit.evaluation.stats import Interval, bootstrap_ratio

if TYPE_CHECKING:
    from rich.table import Table

Distances = dict[str, float]
"""The least distance at which an attack reached the goal, by the sample's id: 0 where there is nothing to win (a sample
that is wrong when clean), inf where it withstood."""
_Key = tuple[str, ...]
_Numbers = np.ndarray[Any, np.dtype[np.float64]]


def median(distances: Sequence[float] | _Numbers) -> float:
    """Of distances, some of them infinite; inf where half or more are."""
    found = np.asarray(distances, dtype=np.float64)
    return float(np.median(found)) if np.isfinite(found).mean() > 0.5 else math.inf


@dataclass(frozen=True)
class Envelope:
    """The best distance known for every sample of a case, against which its attacks are measured.

    best:    0 where there is nothing to win, inf where nothing reached the goal [n]
    largest: the largest finite one, up to which areas are counted
    """

    best: _Numbers
    largest: float

    @classmethod
    def of(cls, attacks: Iterable[Sequence[float]]) -> Envelope:
        """Of the distances of all attacks; one that was run on the first samples alone counts for these."""
        rows = [np.asarray(own, dtype=np.float64) for own in attacks]
        best = np.full(max(map(len, rows)), math.inf)
        for own in rows:
            best[: len(own)] = np.minimum(best[: len(own)], own)
        reachable = best[np.isfinite(best)]
        return cls(best, float(reachable.max()) if len(reachable) else 0.0)

    def local(self, own: Sequence[float] | _Numbers, level: float = 0.95) -> tuple[float | None, Interval | None]:
        """Local optimality of an attack's distances on the first len(own) samples, and its interval.

        None where no attack gains anything on them.
        """
        mine, best = np.asarray(own, dtype=np.float64), self.best[: len(own)]
        gained, possible = (self.largest - each.clip(max=self.largest) for each in (mine, best))
        right = best > 0
        if not possible[right].sum() > 0:
            return None, None
        interval = bootstrap_ratio(gained[right].tolist(), possible[right].tolist(), level)
        return float(gained[right].sum() / possible[right].sum()), interval


@dataclass(frozen=True)
class Attacked:
    """One attack on one case.

    name:       its canonical spec, with the budget of propagations where the run had one
    run:        where its report is
    n:          samples
    success:    fraction of the samples with something to win (right when clean) that it broke, at whatever distance
    median:     of its distances over all samples, 0 where there is nothing to win; inf where half or more withstood
    cost:       propagations per attacked sample: forward and backward passes
    local:      optimality in this case, in [0, 1]; None where nothing broke anything
    interval:   of `local`, by bootstrap over the samples; the envelope and its largest distance stay
    """

    name: str
    run: str
    n: int
    success: float
    median: float
    cost: float
    local: float | None
    interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """For machines; an infinite median is null."""
        return {
            "attack": self.name,
            "run": self.run,
            "n": self.n,
            "success": self.success,
            "median": self.median if math.isfinite(self.median) else None,
            "propagations": self.cost,
            "optimality": self.local,
            "ci": None if self.interval is None else self.interval.to_dict(),
        }


@dataclass(frozen=True)
class CaseOptimality:
    """The attacks on one victim, goal, norm and set of samples, the best first.

    largest:  the largest best distance, up to which areas are counted
    envelope: median of the best distances over all samples
    bounded:  runs within a radius in the same norm: what they broke is part of the envelope, and they have no
              optimality of their own, for a radius cuts their distances off
    """

    victim: str
    task: str
    goal: str
    norm: str
    n: int
    largest: float
    envelope: float
    attacks: tuple[Attacked, ...]
    bounded: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What the attacks have in common."""
        return f"{self.victim}, {self.task}, {self.goal}, {self.norm}, {self.n} samples"

    @property
    def without_median(self) -> tuple[str, ...]:
        """The attacks that half of the samples or more withstood."""
        return tuple(each.name for each in self.attacks if math.isinf(each.median))

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "victim": self.victim,
            "task": self.task,
            "goal": self.goal,
            "norm": self.norm,
            "n": self.n,
            "largest_best_distance": self.largest,
            "median_best_distance": self.envelope if math.isfinite(self.envelope) else None,
            "attacks": [each.to_dict() for each in self.attacks],
            "within_a_radius": list(self.bounded),
        }


@dataclass(frozen=True)
class Optimality:
    """Local optimality by case, and global: the mean over the cases of a norm and goal that an attack was run on.

    skipped: reports that are in no case, with the reason
    """

    cases: tuple[CaseOptimality, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def overall(self) -> list[tuple[str, str, str, float, int]]:
        """(norm, goal, attack, mean of its local optimality, number of cases), the best first within norm and goal."""
        found: dict[tuple[str, str, str], list[float]] = {}
        for case in self.cases:
            for each in case.attacks:
                if each.local is not None:
                    found.setdefault((case.norm, case.goal, each.name), []).append(each.local)
        means = [(*key, float(np.mean(values)), len(values)) for key, values in found.items()]
        return sorted(means, key=lambda each: (each[0], each[1], -each[3], each[2]))

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        names = ("norm", "goal", "attack", "optimality", "cases")
        return {
            "cases": [case.to_dict() for case in self.cases],
            "global": [dict(zip(names, each, strict=True)) for each in self.overall()],
            "skipped": [{"run": run, "reason": reason} for run, reason in self.skipped],
        }

    def tables(self) -> list[Table]:
        """Rich tables: one per case, and the means where there are several cases."""
        from rich import box
        from rich.table import Table

        made = []
        for case in self.cases:
            table = Table(title=case.title, title_justify="left", box=box.SIMPLE_HEAD)
            table.add_column("attack", overflow="fold")
            for heading in ("optimality", "95 % interval", "success", "median", "propagations"):
                table.add_column(heading, justify="right", no_wrap=True)
            for each in case.attacks:
                table.add_row(each.name, *_cells(each))
            table.add_row("best known", "100.0 %", "", "", _distance(case.envelope), "")
            made.append(table)
        if len(self.cases) > 1:
            table = Table(title="mean over cases", title_justify="left", box=box.SIMPLE_HEAD)
            for heading in ("norm", "goal", "attack"):
                table.add_column(heading)
            for heading in ("optimality", "cases"):
                table.add_column(heading, justify="right", no_wrap=True)
            for norm, goal, attack, value, count in self.overall():
                table.add_row(norm, goal, attack, f"{100 * value:.1f} %", str(count))
            made.append(table)
        return made


def _cells(each: Attacked) -> tuple[str, ...]:
    ci = each.interval
    return (
        "-" if each.local is None else f"{100 * each.local:.1f} %",
        "" if ci is None else f"{100 * ci.low:.1f} to {100 * ci.high:.1f}",
        f"{100 * each.success:.1f} %",
        _distance(each.median),
        f"{each.cost:.0f}",
    )


def _distance(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "none"


@dataclass(frozen=True)
class _Run:
    name: str
    report: Report
    distances: dict[str, Distances]
    cost: dict[str, float]
    norm: str
    bounded: bool


def optimality(folders: Iterable[str | os.PathLike[str]], level: float = 0.95) -> Optimality:
    """Optimality of every attack in the reports under some folders, each against the others on its case.

    A case is a victim (weights and defense), a goal, a norm and a set of samples. Only records count; nothing is run.
    Raises UsageError where no report has a distance in a norm.
    """
    runs, skipped = [], []
    for path in _reports(folders):
        try:
            runs.append(_run(path))
        except (ReportError, UsageError) as error:
            skipped.append((str(path), str(error)))
    by_case: dict[_Key, list[_Run]] = {}
    for run in runs:
        by_case.setdefault(_key(run), []).append(run)
    cases = [case for same in by_case.values() if (case := _case(same, level)) is not None]
    if not cases:
        raise UsageError(
            "no run without a radius here, such as --threat-model minimum-l2 --attack ddn: optimality compares the "
            "least distances that attacks find" + "".join(f"; {run}: {reason}" for run, reason in skipped[:3])
        )
    return Optimality(tuple(sorted(cases, key=lambda case: case.title)), tuple(skipped))


def _reports(folders: Iterable[str | os.PathLike[str]]) -> list[Path]:
    found: list[Path] = []
    for each in map(Path, folders):
        if not each.exists():
            raise UsageError(f"{each} does not exist; expected a run folder, or a folder of runs")
        below = sorted(each.rglob("report.json")) if each.is_dir() else [each]
        if not below:
            raise UsageError(f"there is no report.json in {each} or below it")
        found += below
    return list(dict.fromkeys(path.resolve() for path in found))


def _run(path: Path) -> _Run:
    report = Report.load(path)
    data = report.current
    norm = data["threat_model"].get("norm")
    if not norm or data["threat_model"].get("phase") != "test_time" or data["defense"].get("certified"):
        raise ReportError("it has no distances of attacks in a norm")
    grave = [flag["id"] for flag in report.flags if flag["severity"] == "unreliable"]
    if grave:
        raise ReportError(f"its number is flagged as unreliable ({', '.join(grave)})")
    records = read_records(records_path(path))
    if not records:
        raise ReportError("its records are gone: optimality is counted from them")
    return _Run(
        str(path.parent),
        report,
        _distances(records, norm.casefold()),
        {name: _cost(records, name) for name in dict.fromkeys(record.attack for record in records)},
        norm,
        data["threat_model"].get("eps") is not None,
    )


def _key(run: _Run) -> _Key:
    """What two runs must share: weights, defense, goal, norm, lattice and samples."""
    data = run.report.current
    threat, chosen = data["threat_model"], data["dataset"]["selection"]
    details = threat.get("details", {})
    return tuple(
        str(each)
        for each in (
            data["model"].get("state_sha256"),
            data["defense"]["name"],
            data["defense"]["params"],
            data.get("request", {}).get("goal", threat.get("goal")),
            run.norm,
            details.get("per", ""),
            details.get("lattice", 0),
            data["dataset"].get("sha256"),
            chosen.get("ids_sha256"),
        )
    )


def _distances(records: Iterable[Record], measure: str) -> dict[str, Distances]:
    """By attack: the least distance at which each sample was broken."""
    found: dict[str, Distances] = {}
    for record in records:
        if not contested(record):
            took = 0.0
        elif record.outcome == Outcome.BROKEN:
            took = float(record.measures.get(measure, record.distance if record.distance is not None else math.inf))
        elif record.outcome in (Outcome.ROBUST, Outcome.INVALID):
            took = math.inf
        else:
            raise ReportError(f"sample {record.id} has no verdict ({record.outcome})")
        mine = found.setdefault(record.attack, {})
        mine[record.id] = min(took, mine.get(record.id, math.inf))
    return found


def _case(runs: Sequence[_Run], level: float) -> CaseOptimality | None:
    """The attacks of runs that share everything; None where each of them has a radius."""
    found = [(run, name, each) for run in runs for name, each in run.distances.items()]
    free = [(run, name, each) for run, name, each in found if not run.bounded]
    if not free:
        return None
    ids = list(free[0][2])
    envelope = Envelope.of([[each.get(row, math.inf) for row in ids] for _, _, each in found])
    attacks = []
    for run, name, each in free:
        own = np.array([each.get(row, math.inf) for row in ids])
        right = envelope.best > 0
        local, interval = envelope.local(own, level)
        attacks.append(
            Attacked(
                _named(run, name),
                run.name,
                len(ids),
                float(np.isfinite(own[right]).mean()) if right.any() else 0.0,
                median(own),
                run.cost[name],
                local,
                interval,
            )
        )
    data = runs[0].report.current
    within = tuple(sorted({f"{name} ({run.report.threat})" for run, name, _ in found if run.bounded}))
    return CaseOptimality(
        f"{data['model']['name']} ({data['defense']['name']})",
        str(data["dataset"]["name"]),
        str(data["threat_model"].get("goal")),
        runs[0].norm,
        len(ids),
        envelope.largest,
        median(envelope.best),
        tuple(sorted(attacks, key=lambda each: (-(each.local or 0.0), each.name, each.run))),
        within,
    )


def _named(run: _Run, name: str) -> str:
    details: Mapping[str, Any] = run.report.current["threat_model"].get("details", {})
    budget = details.get("propagations")
    queries = run.report.current["threat_model"].get("query_budget")
    limits = [f"{budget} propagations"] if budget else []
    limits += [f"{queries} queries"] if queries else []
    return f"{name} ({', '.join(limits)})" if limits else name


def _cost(records: Sequence[Record], name: str) -> float:
    passes = [r.forwards + r.backwards for r in records if r.attack == name and r.forwards + r.backwards > 0]
    return float(np.mean(passes)) if passes else 0.0
