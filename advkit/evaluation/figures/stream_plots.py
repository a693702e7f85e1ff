"""Figures of online selection: competitive ratio against the budget, measured on top of what theory says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter, ScalarFormatter

from advkit.core.errors import UsageError
from advkit.evaluation.figures.axes import BLUE, GREEN, ORANGE, PINK, RED, SKY, new_axes, plain

_GREY = "#888888"
STYLES = {
    "optimal-dp": (RED, "D"),
    "single-ref": (GREEN, "s"),
    "virtual+": (BLUE, "o"),
    "optimistic": (ORANGE, "^"),
    "virtual": (PINK, "v"),
    "random": (_GREY, "x"),
    "offline": (SKY, "P"),
}


class Ratios(Protocol):
    """What is drawn of one selector: `advkit.evaluation.scenarios.ratios.RatioCurve`."""

    @property
    def measured(self) -> Mapping[int, tuple[float, float]]:
        """k -> (mean, standard error)."""
        ...

    @property
    def exact(self) -> Mapping[int, float]:
        """k -> the ratio that theory gives."""
        ...


def competitive_ratio_curves(curves: Mapping[str, Ratios], *, title: str = "") -> Figure:
    """Competitive ratio against the budget k: lines are theory, points with two-standard-error bars are measured."""
    if not curves or not any(curve.measured or curve.exact for curve in curves.values()):
        raise UsageError("competitive_ratio_curves: expected at least one selector with at least one k")
    figure, axes = new_axes(6.8, 4.2)
    budgets: set[int] = set()
    for name, curve in curves.items():
        color, marker = STYLES.get(name, (_GREY, "o"))
        label: str | None = plain(name)
        if curve.exact:
            ks = sorted(curve.exact)
            budgets.update(ks)
            axes.plot(ks, [curve.exact[k] for k in ks], color=color, linewidth=1.4, alpha=0.9)
        if curve.measured:
            ks = sorted(curve.measured)
            budgets.update(ks)
            axes.errorbar(
                ks,
                [curve.measured[k][0] for k in ks],
                yerr=[2 * curve.measured[k][1] for k in ks],
                fmt=marker,
                color=color,
                markersize=4.5,
                capsize=2,
                elinewidth=1,
                linestyle="none" if curve.exact else ":",
                label=label,
            )
            label = None
        if label:
            axes.plot([], [], color=color, label=label)
    if max(budgets) > 4 * min(budgets):
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(_spread(sorted(budgets)))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.set_ylim(0, 1.03)
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_xlabel("k, submissions")
    axes.set_ylabel("competitive ratio")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), title="line: theory\npoint: measured")
    if title:
        axes.set_title(plain(title), loc="left", fontsize=11)
    return figure


def _spread(ks: Sequence[int]) -> list[int]:
    """Ticks far enough apart to be read on a logarithmic axis."""
    kept: list[int] = []
    for k in ks:
        if not kept or k >= 1.3 * kept[-1]:
            kept.append(k)
    return kept


def fool_rate_bars(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], *, title: str = "") -> Figure:
    """Fool rate of each selector, one group of bars per stream.

    tables: stream -> selector -> figures as `streams.compare_selectors` gives them
    """
    if not tables:
        raise UsageError("fool_rate_bars: expected at least one stream")
    names = list(dict.fromkeys(name for table in tables.values() for name in table))
    figure, axes = new_axes(max(5.0, 1.6 + 1.7 * len(tables)), 3.8)
    width = 0.8 / len(names)
    for j, name in enumerate(names):
        color, _ = STYLES.get(name, (_GREY, "o"))
        places = [i for i, table in enumerate(tables.values()) if name in table]
        found = [table[name] for table in tables.values() if name in table]
        axes.bar(
            [i + (j - (len(names) - 1) / 2) * width for i in places],
            [each["fool_rate"] for each in found],
            width=0.92 * width,
            yerr=[2 * each.get("fool_rate_error", 0.0) for each in found],
            color=color,
            ecolor="#222222",
            capsize=1.5,
            label=plain(name),
        )
    axes.set_xticks(range(len(tables)), [plain(name) for name in tables])
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.8)
    axes.set_ylabel("submissions that fool the victim")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    if title:
        axes.set_title(plain(title), loc="left", fontsize=11)
    return figure
