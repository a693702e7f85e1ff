"""Success and least distance against queries, for attackers with scores or labels."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from advkit.core.errors import UsageError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.counts import by_label, contested, count, queries_to_break
from advkit.evaluation.figures.axes import SERIES, finish, finish_shares, interval, new_axes, plain
from advkit.evaluation.report import Report
from advkit.evaluation.stats import median_interval, wilson

_LEVEL = 0.95
_ALLOWED = "queries allowed for each sample"


@dataclass(frozen=True)
class Curve:
    """Queries that broke samples, ascending, how many samples were attacked, and the most that one was asked."""

    queries: Sequence[int]
    attacked: int
    most: int

    def broken_within(self, budget: float) -> int:
        """How many samples a run with this budget of queries would have broken."""
        return bisect_right(self.queries, budget)


def curves_of(records: Sequence[Record]) -> dict[str, Curve]:
    """The curve of each attack that took no gradient, by its name."""
    curves = {}
    for label, own in by_label(records).items():
        asked = [record for record in own if record.queries]
        attacked = count(own).attackable
        if asked and attacked and not any(record.backwards for record in own):
            curves[str(label)] = Curve(queries_to_break(own), attacked, max(record.queries for record in asked))
    return curves


def success_by_queries(
    curves: Mapping[str, Curve], *, robust: Mapping[str, tuple[int, int]] | None = None, title: str = ""
) -> Figure:
    """Share of the attacked samples broken within a number of queries, with Wilson intervals of 95 %.

    curves: by the name of the attack
    robust: of each curve, the number of samples in all and of those that are right when clean: its robust accuracy is
            drawn as a dashed line
    """
    if not curves or any(not 0 < curve.attacked >= len(curve.queries) for curve in curves.values()):
        raise UsageError(
            "success_by_queries: expected curves of at least one sample, and no more successes than samples"
        )
    figure, axes = new_axes(6.0, 3.8)
    most = max(curve.most for curve in curves.values())
    for (name, curve), (color, _) in zip(curves.items(), SERIES * len(curves), strict=False):
        reach = [1, *sorted(set(curve.queries) - {1}), most]
        ends = [wilson(curve.broken_within(budget), curve.attacked, _LEVEL) for budget in reach]
        share = [curve.broken_within(budget) / curve.attacked for budget in reach]
        axes.step(reach, share, where="post", color=color, label=plain(name) or None)
        low, high = [each.low for each in ends], [each.high for each in ends]
        interval(axes, reach, low, high, color, alone=len(curves) == 1)
        if robust and name in robust:
            total, right = robust[name]
            left = [(right - curve.broken_within(budget)) / total for budget in reach]
            axes.step(reach, left, where="post", color=color, linestyle="--", label=plain(f"{name}, robust accuracy"))
    axes.set_xscale("log")
    axes.set_xlim(1, max(2, most))
    finish_shares(axes, x=_ALLOWED, y="attack success rate", title=title)
    return figure


def success_by_queries_of(report: Report, records: Sequence[Record]) -> Figure | None:
    """The curves of a run, with robust accuracy where the goal is a wrong answer; None where gradients were taken."""
    curves = curves_of(records)
    if not curves:
        return None
    robust = {}
    if report.to_dict()["threat_model"]["goal"] == "untargeted":
        for label, own in by_label(records).items():
            c = count(own)
            # What was never decided is in neither count: then there is no one curve of robust accuracy.
            if str(label) in curves and not c.unknown and c.correct == c.attackable:
                robust[str(label)] = (c.n, c.correct)
    return success_by_queries(curves, robust=robust, title=f"Success within a number of queries, {report.threat}")


@dataclass(frozen=True)
class MedianCurve:
    """The median of the least distances after so many queries, over all samples that were attacked.

    queries: ascending; median, low, high: of each of them, with the interval; infinite where too few were broken by
             then
    """

    queries: Sequence[int]
    median: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def distance_curves(records: Sequence[Record]) -> dict[str, MedianCurve]:
    """The curve of each attack whose records hold distances by queries in their traces, by its name.

    The median is over the samples that had something to lose, with its exact interval of 95 %: a sample counts as
    infinitely far until it is broken.
    """
    curves = {}
    for label, own in by_label(records).items():
        courses = [_course(record) for record in own if contested(record)]
        queries = sorted({place for course in courses for place in course})
        if not queries:
            continue
        away = np.array([[course.get(place, np.nan) for place in queries] for course in courses])
        away[:, 0] = np.where(np.isnan(away[:, 0]), np.inf, away[:, 0])
        away = np.fmin.accumulate(away, axis=1)
        intervals = [median_interval(column.tolist(), _LEVEL) for column in away.T]
        curves[str(label)] = MedianCurve(
            queries,
            np.median(away, axis=0).tolist(),
            [max(0.0, each.low) for each in intervals],
            [each.high for each in intervals],
        )
    return curves


def _course(record: Record) -> dict[int, float]:
    """Least distance by queries, of a sample that was broken."""
    steps = record.trace if record.outcome == Outcome.BROKEN else ()
    told = ((step.get("queries"), step.get("distance")) for step in steps)
    return {queries: distance for queries, distance in told if queries is not None and distance is not None}


def distance_by_queries(curves: Mapping[str, MedianCurve], *, norm: str = "", title: str = "") -> Figure:
    """The median least distance within a number of queries, with its interval of 95 %.

    Drawn from where the median is finite; the interval ends where its upper end is not. Raises UsageError where no
    curve has a finite median.
    """
    drawn = {name: curve for name, curve in curves.items() if np.isfinite(curve.median).any()}
    if not drawn:
        raise UsageError("distance_by_queries: expected curves of attacks that broke half of their samples")
    figure, axes = new_axes(6.0, 3.8)
    for (name, curve), (color, _) in zip(drawn.items(), SERIES * len(drawn), strict=False):
        median, high = np.array(curve.median), np.array(curve.high)
        known, banded = np.isfinite(median), np.isfinite(high)
        at, low = np.array(curve.queries), np.array(curve.low)
        axes.step(at[known], median[known], where="post", color=color, label=plain(name))
        interval(axes, at[banded], low[banded], high[banded], color, alone=len(drawn) == 1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    finish(axes, x=_ALLOWED, y=f"median distance ({norm})" if norm else "median distance", title=title)
    return figure


def distance_by_queries_of(report: Report, records: Sequence[Record]) -> Figure | None:
    """The curves of a run without a radius; None where records hold no distances by queries, or most withstood."""
    threat = report.to_dict()["threat_model"]
    curves = distance_curves(records)
    if threat.get("eps") is not None or not any(np.isfinite(curve.median).any() for curve in curves.values()):
        return None
    title = f"Median distance within a number of queries, {report.threat}"
    return distance_by_queries(curves, norm=threat.get("norm") or "", title=title)


__all__ = [
    "Curve",
    "MedianCurve",
    "curves_of",
    "distance_by_queries",
    "distance_by_queries_of",
    "distance_curves",
    "success_by_queries",
    "success_by_queries_of",
]
