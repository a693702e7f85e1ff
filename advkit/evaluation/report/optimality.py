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
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from advkit.core.errors import ReportError, UsageError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.counts import contested
from advkit.evaluation.report.document import Report
from advkit.evaluation.report.text import describe_threat
from advkit.evaluation.run.store import read_records, records_path
from advkit.evaluation.stats import Interval, bootstrap_mean_ratio, bootstrap_ratio

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

    def areas(self, own: Sequence[float] | _Numbers) -> tuple[list[float], list[float]] | None:
        """Per sample with something to win: what an attack's distances gain, and what the best known ones gain.

        The attack was run on the first len(own) samples. None where there is nothing to gain on them.
        """
        best = self.best[: len(own)]
        right = best > 0
        each = (np.asarray(own, dtype=np.float64)[right], best[right])
        gained, possible = (self.largest - distances.clip(max=self.largest) for distances in each)
        return (gained.tolist(), possible.tolist()) if possible.sum() > 0 else None

    def local(self, own: Sequence[float] | _Numbers, level: float = 0.95) -> tuple[float | None, Interval | None]:
        """Local optimality of an attack's distances on the first samples, and its interval; None as `areas`."""
        areas = self.areas(own)
        if areas is None:
            return None, None
        gained, possible = areas
        return sum(gained) / sum(possible), bootstrap_ratio(gained, possible, level)


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
    areas:      per sample with something to win: what the attack gained, and what the best known gain; None as `local`
    """

    name: str
    run: str
    n: int
    success: float
    median: float
    cost: float
    local: float | None
    interval: Interval | None
    areas: tuple[list[float], list[float]] | None = field(default=None, repr=False)

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


class Overall(NamedTuple):
    """An attack over all cases of a norm and goal that it was run on.

    value:    mean of its local optimality; interval: of that, by bootstrap over the samples of each case
    cases:    how many
    """

    norm: str
    goal: str
    attack: str
    value: float
    cases: int
    interval: Interval


@dataclass(frozen=True)
class Standing:
    """What a leaderboard says of a report: local and global optimality of its attack; see `Attacked` and `Overall`."""

    local: float
    interval: Interval
    overall: Overall

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "local": self.local,
            "ci": self.interval.to_dict(),
            "global": self.overall.value,
            "global_ci": self.overall.interval.to_dict(),
            "cases": self.overall.cases,
        }

    @property
    def text(self) -> str:
        """As it stands in a table: "93.1 % (90.2 to 95.0); 88.0 % (85.1 to 90.3) over 3 cases"."""
        here = _with_interval(self.local, self.interval)
        if self.overall.cases == 1:
            return here
        return f"{here}; {_with_interval(self.overall.value, self.overall.interval)} over {self.overall.cases} cases"


@dataclass(frozen=True)
class Optimality:
    """Local optimality by case, and global: the mean over the cases of a norm and goal that an attack was run on.

    skipped: reports that are in no case, with the reason
    level:   of all intervals
    """

    cases: tuple[CaseOptimality, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    level: float = 0.95

    def overall(self) -> list[Overall]:
        """Every attack over its cases, the best first within norm and goal."""
        found: dict[tuple[str, str, str], list[Attacked]] = {}
        for case in self.cases:
            for each in case.attacks:
                if each.areas is not None:
                    found.setdefault((case.norm, case.goal, each.name), []).append(each)
        means = [
            Overall(
                *key,
                float(np.mean([each.local for each in own])),
                len(own),
                bootstrap_mean_ratio([each.areas for each in own if each.areas is not None], self.level),
            )
            for key, own in found.items()
        ]
        return sorted(means, key=lambda each: (each.norm, each.goal, -each.value, each.attack))

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "cases": [case.to_dict() for case in self.cases],
            "global": [
                {
                    "norm": each.norm,
                    "goal": each.goal,
                    "attack": each.attack,
                    "optimality": each.value,
                    "ci": each.interval.to_dict(),
                    "cases": each.cases,
                }
                for each in self.overall()
            ],
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
            for heading in ("optimality", "95 % interval", "cases"):
                table.add_column(heading, justify="right", no_wrap=True)
            for one in self.overall():
                ci = one.interval
                table.add_row(
                    one.norm,
                    one.goal,
                    one.attack,
                    f"{100 * one.value:.1f} %",
                    f"{100 * ci.low:.1f} to {100 * ci.high:.1f}",
                    str(one.cases),
                )
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


def _with_interval(value: float, ci: Interval) -> str:
    return f"{100 * value:.1f} % ({100 * ci.low:.1f} to {100 * ci.high:.1f})"


def _distance(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "none"


@dataclass(frozen=True)
class _Run:
    """A report's document with the distances of its records.

    distances, cost: by attack; bounded: the attacker had a radius
    """

    name: str
    data: Mapping[str, Any]
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
            data = Report.load(path).current
            _norm(data)
            runs.append(_run(str(path.parent), data, read_records(records_path(path))))
        except (ReportError, UsageError) as error:
            skipped.append((str(path), str(error)))
    cases = _cases(runs, level)
    if not cases:
        raise UsageError(
            "no run without a radius here, such as --threat-model minimum-l2 --attack ddn: optimality compares the "
            "least distances that attacks find" + "".join(f"; {run}: {reason}" for run, reason in skipped[:3])
        )
    return Optimality(cases, tuple(skipped), level)


def standings(
    reports: Iterable[tuple[str, Mapping[str, Any], Sequence[Record]]], level: float = 0.95
) -> dict[str, Standing]:
    """What a leaderboard says of reports without a radius, by path.

    reports: (path, document, its records)

    A report that is alone on its case has none, for it would be the best known; nor has one of several attacks.
    """
    held: dict[_Key, list[tuple[str, Mapping[str, Any], Sequence[Record]]]] = {}
    for path, data, records in reports:
        with suppress(ReportError):
            _norm(data)
            held.setdefault(_key(data), []).append((path, data, records))
    runs = []
    for same in held.values():
        if len(same) > 1 and not all(_bounded(data) for _, data, _ in same):
            for each in same:
                with suppress(ReportError):
                    runs.append(_run(*each))
    found = Optimality(_cases(runs, level, least=2), level=level)
    overall = {(each.norm, each.goal, each.attack): each for each in found.overall()}
    single = {run.name for run in runs if len(run.distances) == 1}
    return {
        each.run: Standing(each.local, each.interval, overall[case.norm, case.goal, each.name])
        for case in found.cases
        for each in case.attacks
        if each.run in single and each.local is not None and each.interval is not None
    }


def _cases(runs: Sequence[_Run], level: float, least: int = 1) -> tuple[CaseOptimality, ...]:
    """The cases of so many runs or more, by their titles; those without a run without a radius are left out."""
    by_case: dict[_Key, list[_Run]] = {}
    for run in runs:
        by_case.setdefault(_key(run.data), []).append(run)
    made = [case for same in by_case.values() if len(same) >= least and (case := _case(same, level)) is not None]
    return tuple(sorted(made, key=lambda case: case.title))


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


def _norm(data: Mapping[str, Any]) -> str:
    """The norm of a report's distances; ReportError where they are not to be compared."""
    norm = data["threat_model"].get("norm")
    if not norm or data["threat_model"].get("phase") != "test_time" or data["defense"].get("certified"):
        raise ReportError("it has no distances of attacks in a norm")
    grave = [flag["id"] for flag in data["diagnostics"]["flags"] if flag["severity"] == "unreliable"]
    if grave:
        raise ReportError(f"its number is flagged as unreliable ({', '.join(grave)})")
    return str(norm)


def _bounded(data: Mapping[str, Any]) -> bool:
    return data["threat_model"].get("eps") is not None


def _run(name: str, data: Mapping[str, Any], records: Sequence[Record]) -> _Run:
    norm = _norm(data)
    if not records:
        raise ReportError("its records are gone: optimality is counted from them")
    return _Run(
        name,
        data,
        _distances(records, norm.casefold()),
        {name: _cost(records, name) for name in dict.fromkeys(record.attack for record in records)},
        norm,
        _bounded(data),
    )


def _key(data: Mapping[str, Any]) -> _Key:
    """What two runs must share: weights, defense, goal, norm, lattice and samples."""
    threat, chosen = data["threat_model"], data["dataset"]["selection"]
    details = threat.get("details", {})
    return tuple(
        str(each)
        for each in (
            data["model"].get("state_sha256"),
            data["defense"]["name"],
            data["defense"]["params"],
            data.get("request", {}).get("goal", threat.get("goal")),
            threat.get("norm"),
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
            if not took >= 0:
                raise ReportError(f"sample {record.id} was broken at the distance {took}")
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
        areas = envelope.areas(own)
        local, interval = envelope.local(own, level)
        right = envelope.best > 0
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
                areas,
            )
        )
    data = runs[0].data
    within = tuple(
        sorted({f"{name} ({describe_threat(run.data['threat_model'])})" for run, name, _ in found if run.bounded})
    )
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
    details: Mapping[str, Any] = run.data["threat_model"].get("details", {})
    budget = details.get("propagations")
    queries = run.data["threat_model"].get("query_budget")
    limits = [f"{budget} propagations"] if budget else []
    limits += [f"{queries} queries"] if queries else []
    return f"{name} ({', '.join(limits)})" if limits else name


def _cost(records: Sequence[Record], name: str) -> float:
    passes = [r.forwards + r.backwards for r in records if r.attack == name and r.forwards + r.backwards > 0]
    return float(np.mean(passes)) if passes else 0.0
