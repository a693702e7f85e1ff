"""Curves of a training run: loss, accuracies, learning rate, and the detector of catastrophic overfitting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from advkit.core.errors import UsageError
from advkit.evaluation.figures.axes import BLUE, GREEN, ORANGE, RED, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entries = Sequence[Mapping[str, Any]]


def training_curves(log: Entries, *, title: str = "") -> Figure:
    """Panels over the epochs of a log (`advkit.training.loop.log_entries`): loss, accuracy, learning rate, detector.

    The detector has a panel where it looked: FGSM accuracy minus PGD accuracy (the score), the share of abnormal
    examples where the method has one, and a red line in every epoch in which it fired. Raises UsageError for an empty
    log.
    """
    if not log:
        raise UsageError("training_curves: expected at least one epoch")
    watched = any("overfitting" in entry["figures"] for entry in log)
    panels: list[Callable[[Axes, Entries], None]] = [_loss, _accuracies, _rate, *([_detector] if watched else [])]
    figure = Figure(figsize=(9.0, 6.2) if watched else (12.0, 3.4), layout="constrained", facecolor="white")
    grid = figure.subplots(*((2, 2) if watched else (1, 3)))
    for axes, panel in zip(grid.flat, panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel(axes, log)
    if title:
        figure.suptitle(wrapped(title, 110), fontsize=10)
    return figure


def _line(axes: Axes, log: Entries, value: Callable[[Mapping[str, Any]], float | None], color: str, label: str) -> None:
    """One curve through the epochs that have the value; nothing where none has."""
    points = [(entry["epoch"], value(entry)) for entry in log]
    known = [(epoch, y) for epoch, y in points if y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), color=color, marker="o", markersize=3, linewidth=1.4, label=label)


def _legend(axes: Axes) -> None:
    """Above the panel, where no curve runs."""
    if axes.lines:
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)


def _loss(axes: Axes, log: Entries) -> None:
    _line(axes, log, lambda entry: entry["loss"], BLUE, "loss")
    axes.set_ylabel("training loss")


def _accuracies(axes: Axes, log: Entries) -> None:
    watched = any("overfitting" in entry["figures"] for entry in log)
    _line(axes, log, lambda entry: entry["clean"], BLUE, "clean")
    _line(axes, log, lambda entry: entry["figures"].get("fgsm_accuracy"), ORANGE, "FGSM")
    if watched or any(entry["score"] != entry["clean"] for entry in log):
        _line(axes, log, lambda entry: entry["score"], RED, "PGD-10 (score)" if watched else "score")
    axes.set_ylabel("on validation samples")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _legend(axes)


def _rate(axes: Axes, log: Entries) -> None:
    _line(axes, log, lambda entry: entry["lr"], GREEN, "learning rate")
    axes.set_ylabel("learning rate, last step")
    axes.set_ylim(bottom=0)


def _detector(axes: Axes, log: Entries) -> None:
    def gap(entry: Mapping[str, Any]) -> float | None:
        fgsm, pgd = entry["figures"].get("fgsm_accuracy"), entry["score"]
        return None if fgsm is None or pgd is None else fgsm - pgd

    fired = [entry["epoch"] for entry in log if entry["figures"].get("overfitting")]
    for place, epoch in enumerate(fired):
        axes.axvline(epoch, color=RED, alpha=0.35, linewidth=2, label="detector fires" if place == 0 else None)
    _line(axes, log, gap, ORANGE, "FGSM - PGD accuracy")
    _line(axes, log, lambda entry: entry["figures"].get("abnormal_share"), BLUE, "abnormal examples")
    axes.set_ylabel("catastrophic overfitting")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _legend(axes)
