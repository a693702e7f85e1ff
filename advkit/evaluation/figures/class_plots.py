"""Accuracy class by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from advkit.core.errors import UsageError
from advkit.core.protocols import Record
from advkit.evaluation.figures.axes import BLUE, FAINT, INK, new_axes, plain
from advkit.evaluation.report import Report
from advkit.evaluation.report.compare import per_class_rates
from advkit.evaluation.report.text import MOST_CLASSES, shorten
from advkit.evaluation.stats import rate

Rates = Mapping[str, Mapping[str, Any]]
LEAST = 20
"""Samples below which a class has no bar of its own: its interval would fill the figure."""
_CLEAN = "#BDBDBD"
_WIDE = 88  # characters of a note in a line


def per_class_bars(
    rates: Mapping[int, Rates], class_names: Sequence[str] = (), *, title: str = "", least: int = LEAST
) -> Figure:
    """Robust accuracy of each class inside its clean accuracy, in the order of the classes' numbers.

    Classes of few samples share one bar at the bottom, unless all have few. Classes without a sample are named below.

    rates: label -> {"clean": rate, "robust": rate} as `compare.per_class_rates` makes them
    least: samples below which a class is folded into the last bar
    """
    if not rates:
        raise UsageError("per_class_bars: no class to draw; the records carry no labels")

    def name(label: int) -> str:
        return class_names[label] if 0 <= label < len(class_names) else str(label)

    small = [k for k in sorted(rates) if rates[k]["robust"]["denominator"] < least]
    few = len(small) == len(rates)
    folded = [] if few or len(small) < 2 else small
    bars = [
        (f"{name(k)} (n = {rates[k]['robust']['denominator']})", rates[k]) for k in sorted(rates) if k not in folded
    ]
    if folded:
        together = _together([rates[k] for k in folded])
        bars.append((f"{len(folded)} others (n = {together['robust']['denominator']})", together))
    notes = []
    if folded:
        notes.append(f"others, fewer than {least} samples each: {', '.join(map(name, folded))}")
    elif few:
        notes.append(f"fewer than {least} samples in every class: the intervals are wide")
    if missing := [name(k) for k in range(len(class_names)) if k not in rates]:
        notes.append(f"no sample of: {', '.join(missing)}")
    return _drawn(bars, [shorten(note, _WIDE) for note in notes], title)


def _together(rates: Sequence[Rates]) -> dict[str, dict[str, Any]]:
    """The rates of several classes as of one."""
    level = next((each["robust"]["ci"]["level"] for each in rates if each["robust"]["ci"]), 0.95)

    def summed(what: str) -> dict[str, Any]:
        right, n = (sum(each[what][part] for each in rates) for part in ("numerator", "denominator"))
        return rate(right, n, "source_class", level)

    return {what: summed(what) for what in ("clean", "robust")}


def _drawn(bars: Sequence[tuple[str, Rates]], notes: Sequence[str], title: str) -> Figure:
    figure, axes = new_axes(6.4, 1.2 + 0.3 * len(bars) + 0.18 * len(notes))
    y = np.arange(len(bars))[::-1]
    clean, robust = ([each[what]["value"] or 0.0 for _, each in bars] for what in ("clean", "robust"))
    cis = [each["robust"]["ci"] or {"low": v, "high": v} for (_, each), v in zip(bars, robust, strict=True)]
    axes.barh(y, clean, height=0.72, color=_CLEAN, label="clean accuracy")
    axes.barh(y, robust, height=0.42, color=BLUE, label="robust accuracy")
    levels = [each["robust"]["ci"]["level"] for _, each in bars if each["robust"]["ci"]]
    interval = f"{100 * levels[0]:g} % interval" if levels else "interval"
    spread = [
        [max(0.0, v - ci["low"]) for v, ci in zip(robust, cis, strict=True)],
        [max(0.0, ci["high"] - v) for v, ci in zip(robust, cis, strict=True)],
    ]
    axes.errorbar(robust, y, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5, label=interval)
    # A mark that is seen at 0 %, too, where a bar has no width.
    axes.plot(robust, y, "D", color=BLUE, markeredgecolor="white", markersize=6, clip_on=False, zorder=4)
    for place, value in zip(y, robust, strict=True):
        axes.text(1.02, place, f"{100 * value:.0f} %", va="center", fontsize=9, color=INK, clip_on=False)
    axes.set_yticks(y, [plain(shorten(label, 34)) for label, _ in bars])
    axes.tick_params(axis="y", length=0, pad=7)
    axes.set_ylim(-0.6, len(bars) - 0.4)
    axes.set_xlim(0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.set_xlabel("\n".join(["share of the class's samples", *map(plain, notes)]), fontsize=9)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    if title:
        axes.set_title(plain(title), loc="left", fontsize=11)
    return figure


def per_class_of(report: Report, records: Sequence[Record], class_names: Sequence[str] = ()) -> Figure | None:
    """The classes of a run; None for one class, and for more than can be told apart."""
    rates = per_class_rates(records)
    if not 1 < len(rates) <= MOST_CLASSES:
        return None
    return per_class_bars(rates, class_names, title=f"Per class, {report.threat}")
