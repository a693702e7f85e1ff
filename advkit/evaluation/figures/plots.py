"""Curves: accuracy and success against radius, distance and certified radius; and the other figures by their names.

Every function returns a matplotlib Figure of its own; `save` writes it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from advkit.core.errors import ReportError, UsageError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.certificates import ACCURACY, certificates
from advkit.evaluation.counts import was_right
from advkit.evaluation.figures.axes import BLUE as BLUE
from advkit.evaluation.figures.axes import ORANGE as ORANGE
from advkit.evaluation.figures.axes import RED as RED
from advkit.evaluation.figures.axes import SERIES, finish_shares, interval, new_axes, plain
from advkit.evaluation.figures.axes import finish as finish
from advkit.evaluation.figures.axes import save as save
from advkit.evaluation.figures.class_plots import per_class_bars as per_class_bars
from advkit.evaluation.figures.class_plots import per_class_of as per_class_of
from advkit.evaluation.figures.example_plots import example_grid as example_grid
from advkit.evaluation.figures.heat_maps import matrix_heatmap as matrix_heatmap
from advkit.evaluation.figures.heat_maps import transfer_heatmap as transfer_heatmap
from advkit.evaluation.figures.heat_maps import transfer_heatmap_of as transfer_heatmap_of
from advkit.evaluation.report import Report
from advkit.evaluation.stats import wilson

_APART = 0.012
"""Of the axis: how far the points of two curves at one radius stand apart."""


@dataclass(frozen=True)
class Point:
    """Robust accuracy at one radius, as fractions; low and high None without an interval."""

    eps: float
    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, eps: float, rate: Mapping[str, Any]) -> Point:
        """From a report's rate; raises UsageError for a rate of no rows."""
        if rate["value"] is None:
            raise UsageError(f"robust accuracy at eps {eps:g} has no value (0 rows); nothing to draw")
        ci = rate["ci"] or {}
        return cls(eps, rate["value"], ci.get("low"), ci.get("high"))


def _eps_texts(levels: Sequence[float]) -> dict[float, str]:
    """Radii as they stand at an axis: all as k/255 where all are such and some are no short decimals."""
    short = all(abs(each - round(each, 2)) < 1e-9 for each in levels)
    if not short and all(abs(each * 255 - round(each * 255)) < 1e-6 and each < 1 for each in levels):
        return {each: f"{round(each * 255)}/255" if each else "0" for each in levels}
    return {each: f"{each:.3g}" for each in levels}


def robust_accuracy_curve(
    curves: Mapping[str, Sequence[Point]] | Sequence[Point], *, norm: str = "", title: str = ""
) -> Figure:
    """Robust accuracy against eps, one line per name, with its intervals as bars.

    Several curves stand a little apart, so that their bars do not cover one another.

    curves: points of one curve, or name -> points; any order; radii in units of the model's space
    title:  without one it says what is drawn
    """
    named = {"": curves} if not isinstance(curves, Mapping) else curves
    if not named or any(len(points) == 0 for points in named.values()):
        raise UsageError("robust_accuracy_curve: expected at least one point per curve")
    figure, axes = new_axes(6.0, 3.8)
    levels = sorted({point.eps for points in named.values() for point in points})
    width = (levels[-1] - levels[0]) or 1.0
    for i, (name, given) in enumerate(named.items()):
        color, marker = SERIES[i % len(SERIES)]
        points = sorted(given, key=lambda point: point.eps)
        at = [point.eps + _APART * width * (i - (len(named) - 1) / 2) for point in points]
        value = [point.value for point in points]
        axes.plot(at, value, color=color, marker=marker, markersize=5, label=plain(name) or None)
        low = [0.0 if point.low is None else max(0.0, point.value - point.low) for point in points]
        high = [0.0 if point.high is None else max(0.0, point.high - point.value) for point in points]
        axes.errorbar(at, value, yerr=[low, high], fmt="none", ecolor=color, elinewidth=1.0, capsize=2.5)
    apart: list[float] = []
    for level in reversed(levels):
        if not apart or apart[-1] - level >= 0.09 * width:
            apart.append(level)
    texts = _eps_texts(apart)
    axes.set_xticks(apart, [texts[level] for level in apart])
    what = f"eps ({norm})" if norm else "eps"
    finish_shares(
        axes, x=what, y="robust accuracy", legend=any(named), title=title or f"Robust accuracy against {what}"
    )
    return figure


def success_by_distance(
    curves: Mapping[str, tuple[Sequence[float], int]], *, norm: str = "L2", title: str = ""
) -> Figure:
    """Share of the attacked rows whose goal is reached within a distance, one step line per name.

    curves: name -> distances of the successes, and how many rows were attacked
    """
    if not curves or any(attacked < 1 or len(found) > attacked for found, attacked in curves.values()):
        raise UsageError("success_by_distance: expected curves of at least one row, and no more successes than rows")
    figure, axes = new_axes(6.0, 3.8)
    furthest = _furthest(found for found, _ in curves.values())
    for i, (name, (found, attacked)) in enumerate(curves.items()):
        reach = [0.0, *sorted(found), furthest]
        share = [k / attacked for k in range(len(found) + 1)]
        color, _ = SERIES[i % len(SERIES)]
        axes.step(reach, [*share, share[-1]], where="post", color=color, label=plain(name) or None)
    axes.set_xlim(0, furthest)
    finish_shares(axes, x=f"distance allowed ({norm})", y="attack success rate", legend=any(curves), title=title)
    return figure


def _furthest(distances: Iterable[Sequence[float]]) -> float:
    """Where the curves of these distances end: a little beyond the largest."""
    return 1.05 * (max((max(found) for found in distances if len(found)), default=0.0) or 1.0)


def accuracy_by_distance(
    curves: Mapping[str, tuple[Sequence[float], int, int]], *, norm: str = "L2", title: str = ""
) -> Figure:
    """Robust accuracy at every radius, from the least distances that attacks found: a step line and its 95 % Wilson
    interval per name.

    curves: name -> distances of the broken samples, how many samples are right when clean, and how many there are
    """
    if not curves or any(not len(found) <= right <= n or n < 1 for found, right, n in curves.values()):
        raise UsageError("accuracy_by_distance: expected at least one sample, and no more broken ones than right ones")
    figure, axes = new_axes(6.0, 3.8)
    furthest = _furthest(found for found, _, _ in curves.values())
    for i, (name, (found, right, n)) in enumerate(curves.items()):
        reach = [0.0, *sorted(found), furthest]
        kept = [right - k for k in range(len(found) + 1)]
        kept.append(kept[-1])
        bands = {k: wilson(k, n) for k in kept}
        color, _ = SERIES[i % len(SERIES)]
        axes.step(reach, [k / n for k in kept], where="post", color=color, label=plain(name) or None)
        low, high = [bands[k].low for k in kept], [bands[k].high for k in kept]
        interval(axes, reach, low, high, color, alone=len(curves) == 1)
    axes.set_xlim(0, furthest)
    finish_shares(axes, x=f"eps ({norm})", y="robust accuracy, 95 % interval", legend=any(curves), title=title)
    return figure


def curve_points(reports: Iterable[Report]) -> list[Point]:
    """The points of a curve from reports that differ in eps; raises ReportError where one has none."""
    points = []
    for report in reports:
        eps, rate = report.to_dict()["threat_model"].get("eps"), report.metrics.get("robust_accuracy")
        if eps is None or rate is None:
            raise ReportError(f"{report.title}: has no eps or no robust accuracy; it is no point of a curve")
        points.append(Point.of(eps, rate))
    return points


def success_by_distance_of(report: Report, records: Sequence[Record]) -> Figure | None:
    """The curve of each attack of a run without a radius; None where there is one, or nothing was attacked."""
    threat = report.to_dict()["threat_model"]
    if threat.get("eps") is not None or not threat.get("norm"):
        return None
    found = _broken_at(records)
    rates = {attack["name"]: attack["attack_success_rate"] for attack in report.attacks}
    curves = {
        name: (found.get(name, []), rate["denominator"])
        for name, rate in rates.items()
        if len(found.get(name, [])) == rate["numerator"] and rate["denominator"]
    }
    if not curves:
        return None
    return success_by_distance(curves, norm=threat["norm"], title=f"Success within a distance, {report.threat}")


def accuracy_by_distance_of(report: Report, records: Sequence[Record]) -> Figure | None:
    """Robust accuracy at every radius, of each attack of a run without one; None where there is one.

    None, too, for goals other than a wrong answer, and where a sample has no verdict.
    """
    threat = report.to_dict()["threat_model"]
    if threat.get("eps") is not None or not threat.get("norm") or threat.get("goal") != "untargeted":
        return None
    if any(record.outcome in (Outcome.ERROR, Outcome.NON_FINITE) for record in records):
        return None
    of_attack: dict[str, list[Record]] = {}
    for record in records:
        of_attack.setdefault(str(record.made_by), []).append(record)
    found = _broken_at(records)
    curves = {
        name: (found.get(name, []), sum(was_right(record) for record in own), len(own))
        for name, own in of_attack.items()
    }
    if not curves:
        return None
    return accuracy_by_distance(curves, norm=threat["norm"], title=f"Robust accuracy at every radius, {report.threat}")


def _broken_at(records: Iterable[Record]) -> dict[str, list[float]]:
    """By attack: the distances of the samples that it broke."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record.outcome == Outcome.BROKEN and record.distance is not None:
            found.setdefault(str(record.made_by), []).append(record.distance)
    return found


def certified_curve(
    curves: Mapping[str, Sequence[float]],
    points: Mapping[str, Sequence[Point]],
    attacked: Mapping[str, Point],
    *,
    title: str = "",
) -> Figure:
    """Certified accuracy against the L2 radius: a step for every sample, intervals at the reported radii.

    curves:   radii of the samples that are right, 0 for all others, by the name of the model
    points:   reported values with intervals, by the same names
    attacked: what an attack at a radius leaves, an upper bound on what can be certified there, by the attack's name
    """
    figure, axes = new_axes(6.0, 4.0)
    for (name, radii), (color, _) in zip(curves.items(), SERIES, strict=False):
        ordered = np.sort(np.asarray(radii, dtype=np.float64))
        right = ordered[ordered > 0]
        at = np.concatenate(([0.0], right, right[-1:]))
        left = np.concatenate((len(right) - np.arange(len(right) + 1), [0])) / max(1, len(ordered))
        axes.step(at, left[: len(at)], where="post", color=color, label=plain(name))
        for point in points.get(name, ()):
            if point.low is not None and point.high is not None:
                bars = [[max(0.0, point.value - point.low)], [max(0.0, point.high - point.value)]]
                axes.errorbar([point.eps], [point.value], yerr=bars, fmt="o", color=color, capsize=3, markersize=3)
    for (name, point), (color, marker) in zip(attacked.items(), reversed(SERIES), strict=False):
        axes.plot([point.eps], [point.value], marker, color=color, label=plain(name))
    axes.set_xlabel("L2 radius")
    axes.set_ylabel("certified accuracy")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(title, fontsize=10)
    return figure


def certified_curve_of(report: Report, records: Sequence[Record]) -> Figure | None:
    """The curve of a run's certificates, with the attack beside it; None where there are none."""
    data = report.to_dict()
    alpha, entry = data["threat_model"].get("details", {}).get("alpha"), data["metrics"].get(ACCURACY)
    if alpha is None or not entry or not records:
        return None
    found = certificates(records, alpha)
    name = data["model"]["name"]
    points = [Point.of(point["radius"], point["certified_accuracy"]) for point in entry]
    attacked = {}
    for companion in data.get("companions", ()):
        if companion["name"] == "empirical" and data["threat_model"].get("eps") is not None:
            attacked[companion["title"]] = Point.of(data["threat_model"]["eps"], data["metrics"][companion["metric"]])
    radii = [each.radius if each.right else 0.0 for each in found]
    return certified_curve({name: radii}, {name: points}, attacked, title=f"Certified accuracy, {len(found)} samples")
