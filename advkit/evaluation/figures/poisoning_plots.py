"""Figures of label flips: accuracy trial by trial, accuracy against the rate, and boundaries of models in the plane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter
from numpy.typing import NDArray

from advkit.core.errors import UsageError
from advkit.core.learners import scores
from advkit.core.protocols import Record
from advkit.evaluation.figures.axes import BLUE, GREEN, ORANGE, PINK, RED, SERIES, SKY, new_axes, plain
from advkit.evaluation.figures.plots import Point
from advkit.evaluation.poisonings import trials_of
from advkit.evaluation.report import Report

_FAINT, _GREY = "#DDDDDD", "#888888"
_COLORS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, _GREY, "#222222", "#8C564B", "#17BECF", "#BCBD22")


class Fitted(Protocol):
    """A fitted classifier of points in the plane with scikit-learn's interface."""

    classes_: Any

    def predict(self, x: Any, /) -> Any:
        """The class of every point."""
        ...


def accuracy_by_trial_of(report: Report, records: Sequence[Record]) -> Figure | None:
    """Clean and robust accuracy of every trial, joined by a line; None without records."""
    return accuracy_by_trial(records, title=report.threat) if records else None


def accuracy_by_trial(records: Sequence[Record], *, title: str = "") -> Figure:
    """The same of records: one attack on labels in several trials."""
    trials = trials_of(records)
    if not trials:
        raise UsageError("accuracy_by_trial: expected the records of at least one trial")
    figure, axes = new_axes(5.6, 3.4)
    place = [each.number for each in trials]
    for each in trials:
        axes.plot([each.number] * 2, [each.clean, each.robust], color=_FAINT, linewidth=2, zorder=1)
    for name, values, (color, marker) in (
        ("trained on clean labels", [each.clean for each in trials], SERIES[0]),
        ("trained on flipped labels", [each.robust for each in trials], SERIES[1]),
    ):
        axes.plot(place, values, color=color, marker=marker, linestyle="none", label=name)
        axes.axhline(float(np.mean(values)), color=color, linewidth=0.8, alpha=0.6)
    axes.set_xticks(place)
    axes.set_xlabel("trial")
    _accuracies(axes)
    axes.legend(frameon=False, loc="lower right", fontsize=9)
    if title:
        axes.set_title(plain(title), loc="left", fontsize=10)
    return figure


def _accuracies(axes: Any) -> None:
    axes.set_ylim(0, 1.02)
    axes.set_ylabel("accuracy on clean test labels")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)


def accuracy_by_rate(panels: Mapping[str, Mapping[str, Sequence[Point]]], *, title: str = "") -> Figure:
    """Robust accuracy against the share of flipped labels, one panel per attack and one line per defense.

    panels: attack -> defense -> points, whose eps is the rate; intervals are drawn as bars
    """
    if not panels or not all(panels.values()) or not all(p for each in panels.values() for p in each.values()):
        raise UsageError("accuracy_by_rate: expected at least one attack, one defense and one rate")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.7), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    names = list(dict.fromkeys(name for each in panels.values() for name in each))
    shift = 0.002
    for axes, (attack, lines) in zip(grid.flat, panels.items(), strict=False):
        for place, (name, given) in enumerate(lines.items()):
            points = sorted(given, key=lambda point: point.eps)
            color, (_, marker) = _COLORS[names.index(name) % len(_COLORS)], SERIES[names.index(name) % len(SERIES)]
            value = np.array([point.value for point in points])
            low = value - [point.value if point.low is None else point.low for point in points]
            high = [point.value if point.high is None else point.high for point in points] - value
            axes.errorbar(
                [point.eps + shift * (place - len(lines) / 2) for point in points],
                value,
                yerr=np.maximum([low, high], 0),
                color=color,
                marker=marker,
                markersize=4,
                linewidth=1.2,
                elinewidth=0.7,
                capsize=1.5,
                label=plain(name),
            )
        axes.set_title(plain(attack), loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        _accuracies(axes)
        axes.set_ylabel("")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel("robust accuracy")
    for axes in grid[-1]:
        axes.set_xlabel("flipped training labels")
    handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )
    if title:
        figure.suptitle(plain(title), fontsize=11)
    return figure


def boundaries(
    x: NDArray[Any], panels: Mapping[str, tuple[NDArray[Any], Fitted]], flipped: NDArray[Any] | None = None
) -> Figure:
    """The decision boundaries of models of points in the plane, with the labels each was trained on.

    x:       training samples [n, 2]
    panels:  title -> (labels 0 or 1 that were trained on [n], the fitted model)
    flipped: bool [n], samples whose labels an attacker changed; they are circled where the panel's labels are changed
    """
    if not panels or np.ndim(x) != 2 or np.shape(x)[1] != 2:
        raise UsageError(f"boundaries: expected samples in the plane [n, 2] and at least one panel, got {np.shape(x)}")
    figure = Figure(figsize=(3.5 * len(panels), 3.3), layout="constrained", facecolor="white")
    grid = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    low, high = x.min(0) - 0.4, x.max(0) + 0.4
    across, up = np.meshgrid(np.linspace(low[0], high[0], 160), np.linspace(low[1], high[1], 160))
    points = np.column_stack((across.ravel(), up.ravel()))
    first = next(iter(panels.values()))[0]
    for axes, (title, (labels, model)) in zip(grid, panels.items(), strict=True):
        every = scores(model, points, 2)
        value = (every[:, 1] - every[:, 0]).reshape(across.shape)
        axes.contourf(across, up, value, levels=[-np.inf, 0, np.inf], colors=[BLUE, RED], alpha=0.13)
        if value.min() < 0 < value.max():
            axes.contour(across, up, value, levels=[0], colors="#222222", linewidths=1.2)
        for label, color, marker in ((0, BLUE, "o"), (1, RED, "s")):
            mine = labels == label
            axes.scatter(*x[mine].T, s=9, color=color, marker=marker, linewidths=0)
        changed = labels != first if flipped is None else flipped & (labels != first)
        axes.scatter(*x[changed].T, s=42, facecolors="none", edgecolors="#222222", linewidths=0.8)
        axes.set_title(plain(title), loc="left", fontsize=10)
        axes.set_xticks([])
        axes.set_yticks([])
    return figure
