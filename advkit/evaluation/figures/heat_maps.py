"""Transfer as heat maps: accuracy in each cell of sources and attacks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from advkit.core.errors import UsageError
from advkit.core.protocols import Record
from advkit.evaluation.figures.axes import RED, plain, wrapped
from advkit.evaluation.report import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_CELLS = 1500


def transfer_heatmap(
    accuracy: Any, sources: Sequence[str], attacks: Sequence[str], seen: Collection[str] = (), *, title: str = ""
) -> Figure:
    """Accuracy of the victim in each cell of a transfer grid, seen sources above the unseen, the worst cell framed.

    accuracy: [S, A] fractions, NaN where a cell is missing
    seen:     names of the sources the defender trained on
    """
    table = np.asarray(accuracy, dtype=np.float64)
    if table.shape != (len(sources), len(attacks)) or table.size == 0 or not np.isfinite(table).any():
        raise UsageError(
            f"transfer_heatmap: a table of shape {table.shape} for {len(sources)} sources and {len(attacks)} attacks; "
            "expected [sources, attacks] with at least one value"
        )
    order = sorted(range(len(sources)), key=lambda s: sources[s] not in seen)
    table = table[order]
    known = sum(name in seen for name in sources)
    height = 1.9 + 0.34 * len(sources)
    figure = Figure(figsize=(max(5.2, 3.0 + 0.75 * len(attacks)), height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    image = _heat(axes, table)
    marks = ["\u25cf" if s < known else "\u25cb" for s in range(len(sources))]
    axes.set_yticks(range(len(sources)), [f"{plain(sources[o])} {m}" for o, m in zip(order, marks, strict=True)])
    axes.set_xticks(range(len(attacks)), [plain(name) for name in attacks], rotation=25, ha="right")
    if 0 < known < len(sources):
        axes.axhline(known - 0.5, color="white", linewidth=4)
    _framed(axes, table)
    _scale(figure, image, axes)
    axes.set_xlabel("attack")
    axes.set_ylabel("source model")
    note = "\u25cf seen by the defender   \u25cb unseen   red frame: strongest cell"
    figure.supxlabel(note, fontsize=9, color="#555555")
    if title:
        _titled(figure, title)
    return figure


def _heat(axes: Axes, table: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    """Draw fractions with their numbers; NaN is a grey cell with a dash."""
    image = axes.imshow(np.ma.masked_invalid(table), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    axes.set_facecolor("#F0F0F0")
    if table.size <= _MOST_CELLS:
        for (row, column), value in np.ndenumerate(table):
            shown = "-" if np.isnan(value) else f"{100 * value:.0f}"
            dark = np.isfinite(value) and value < 0.55
            axes.text(column, row, shown, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _framed(axes: Axes, table: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """A red frame around the smallest value."""
    from matplotlib.patches import Rectangle

    worst = np.unravel_index(int(np.nanargmin(table)), table.shape)
    corner = (float(worst[1]) - 0.5, float(worst[0]) - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=RED, linewidth=2.5))


def _scale(figure: Figure, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0, decimals=0, symbol=" %"), pad=0.02)
    bar.outline.set_visible(False)
    bar.set_label("accuracy of the victim")


def _titled(figure: Figure, title: str) -> None:
    """A title in room of its own: one over the axes would run into the colour bar's top tick."""
    characters = int(11 * figure.get_figwidth())
    figure.suptitle(wrapped(title, characters), x=0.01, ha="left", fontsize=11)


def matrix_heatmap(
    cells: Iterable[Mapping[str, Any]],
    targets: Sequence[str],
    sources: Sequence[str],
    attacks: Sequence[str],
    *,
    short: Callable[[str], str] = str,
    title: str = "",
) -> Figure:
    """Accuracy of every target in each cell of a transfer matrix: a heat map per target, its strongest cell framed.

    cells: of a matrix's JSON; white-box ones are hatched and never framed, missing ones grey
    short: names as they are to be shown
    """
    from matplotlib.patches import Rectangle

    if not targets or not sources or not attacks:
        raise UsageError("matrix_heatmap: expected at least one target, source and attack")
    shape = (len(targets), len(sources), len(attacks))
    values, white = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    for cell in cells:
        place = targets.index(cell["t"]), sources.index(cell["s"]), attacks.index(cell["a"])
        values[place] = np.nan if cell["acc"]["value"] is None else cell["acc"]["value"]
        white[place] = cell["whitebox"]
    size = (max(6.0, 3.2 + 0.62 * len(attacks)), 1.6 + len(targets) * (0.55 + 0.32 * len(sources)))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(len(targets), 1, sharex=True, squeeze=False)[:, 0]
    for t, (target, axes) in enumerate(zip(targets, panels, strict=True)):
        image = _heat(axes, values[t])
        axes.set_yticks(range(len(sources)), [plain(short(name)) for name in sources])
        axes.set_xticks(
            range(len(attacks)),
            [plain(short(name)) for name in attacks],
            rotation=30,
            ha="right",
            rotation_mode="anchor",
        )
        axes.set_title(plain(f"target {short(target)}"), loc="left", fontsize=10)
        for s, a in zip(*np.nonzero(white[t]), strict=True):
            corner = (float(a) - 0.5, float(s) - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="#AAAAAA", linewidth=0, hatch="////"))
        transfer = np.where(white[t], np.nan, values[t])
        if np.isfinite(transfer).any():
            _framed(axes, transfer)
    _scale(figure, image, list(panels))
    note = "rows: source models   hatched: white box   red frame: strongest cell of the target"
    figure.supxlabel(note, fontsize=9, color="#555555")
    if title:
        _titled(figure, title)
    return figure


def _title(report: Report) -> str:
    """What the cells are, under which threat model, over how many samples."""
    n = report.view["dataset"]["n_evaluated"]
    return f"Robust accuracy under transfer, {report.threat}, n = {n}"


def transfer_heatmap_of(report: Report, records: Sequence[Record] = ()) -> Figure | None:
    """The grid of a report whose attacks name their source; None where there is none."""
    cells = [attack for attack in report.attacks if attack["source"]]
    sources = list(dict.fromkeys(cell["source"] for cell in cells))
    attacks = list(dict.fromkeys(cell["attack"] for cell in cells))
    if len(cells) < 2:
        return None
    table = np.full((len(sources), len(attacks)), np.nan)
    for cell in cells:
        value = cell["robust_accuracy"]["value"]
        if value is not None:
            table[sources.index(cell["source"]), attacks.index(cell["attack"])] = value
    if not np.isfinite(table).any():
        return None
    seen = {cell["source"] for cell in cells if cell["params"].get("seen")}
    return transfer_heatmap(table, sources, attacks, seen, title=_title(report))
