"""Figures for reports: accuracy against eps, classes, examples, transfer grids; drawn without pyplot's global state.

Every function returns a matplotlib Figure of its own; `save` writes it. Colours are Okabe and Ito's, told apart by
colour-blind readers and in grey.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from advkit.core.errors import ReportError, UsageError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.certificates import ACCURACY, certificates
from advkit.evaluation.counts import was_right
from advkit.evaluation.report import Report, write_atomic
from advkit.evaluation.report.compare import per_class_rates
from advkit.evaluation.report.text import MOST_CLASSES, shorten
from advkit.evaluation.stats import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
SERIES = ((BLUE, "o"), (RED, "s"), (GREEN, "^"), (ORANGE, "D"), (PINK, "v"), (SKY, "P"))
_INK, _FAINT, _CLEAN = "#222222", "#DDDDDD", "#BDBDBD"
_MOST_EXAMPLES = 10
_SIDE, _COLUMN, _FILLED, _ABOVE = 0.6, 1.15, 0.92, 0.25
"""Of a grid of examples: inches at the side, of a column, above a row; the third is the part that an image fills."""
_LINE, _FITS = 0.15, 15
"""Inches of a line of small text, and characters of it that fit into a column."""
_MOST_CELLS = 1500


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


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel, in inches, as all of them look."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors=_INK, length=3)
    axes.set_axisbelow(True)
    return figure, axes


def finish(axes: Axes, *, x: str, y: str, legend: bool = True, title: str = "") -> None:
    """Labels, a faint grid, and a legend and a title where there are any, as all curves have them."""
    axes.grid(axis="y", color=_FAINT, linewidth=0.8)
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))
    if legend:
        axes.legend(frameon=False, fontsize=8)
    if title:
        # Characters of this size in a line.
        axes.set_title(plain(textwrap.fill(title, 66)), loc="left", fontsize=11)


def finish_shares(axes: Axes, *, x: str, y: str, legend: bool = True, title: str = "") -> None:
    """The same of curves of shares of samples, in percent."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    finish(axes, x=x, y=y, legend=legend, title=title)


def plain(text: str) -> str:
    """Text as it stands: matplotlib would set what stands between dollar signs as mathematics, or fail at it."""
    return text.replace("$", r"\$")


def _eps_text(eps: float) -> str:
    whole = Fraction(eps).limit_denominator(255)
    if 0 < eps < 1 and abs(eps * 255 - round(eps * 255)) < 1e-6 and whole.denominator > 20:
        return f"{round(eps * 255)}/255"
    return f"{eps:.3g}"


def robust_accuracy_curve(
    curves: Mapping[str, Sequence[Point]] | Sequence[Point], *, norm: str = "", title: str = ""
) -> Figure:
    """Robust accuracy against eps, one line per name, with its interval as a band.

    curves: points of one curve, or name -> points; any order; radii in units of the model's space
    """
    named = {"": curves} if not isinstance(curves, Mapping) else curves
    if not named or any(len(points) == 0 for points in named.values()):
        raise UsageError("robust_accuracy_curve: expected at least one point per curve")
    figure, axes = new_axes(6.0, 3.8)
    for i, (name, given) in enumerate(named.items()):
        color, marker = SERIES[i % len(SERIES)]
        points = sorted(given, key=lambda point: point.eps)
        eps = [point.eps for point in points]
        axes.plot(
            eps, [point.value for point in points], color=color, marker=marker, markersize=5, label=plain(name) or None
        )
        low = [point.value if point.low is None else point.low for point in points]
        high = [point.value if point.high is None else point.high for point in points]
        axes.fill_between(eps, low, high, color=color, alpha=0.18, linewidth=0)
    ticks = sorted({point.eps for points in named.values() for point in points})
    apart: list[float] = []
    for eps_value in reversed(ticks):
        if not apart or apart[-1] - eps_value >= 0.09 * (ticks[-1] - ticks[0]):
            apart.append(eps_value)
    axes.set_xticks(apart)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _eps_text(value)))
    finish_shares(axes, x=f"eps ({norm})" if norm else "eps", y="robust accuracy", legend=any(named), title=title)
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
    band per name.

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
        axes.fill_between(reach, low, high, step="post", color=color, alpha=0.18, linewidth=0)
    axes.set_xlim(0, furthest)
    finish_shares(axes, x=f"eps ({norm})", y="robust accuracy, 95 % interval", legend=any(curves), title=title)
    return figure


def per_class_bars(
    rates: Mapping[int, Mapping[str, Mapping[str, Any]]], class_names: Sequence[str] = (), *, title: str = ""
) -> Figure:
    """Robust accuracy of each class inside its clean accuracy, the weakest class at the bottom.

    rates: label -> {"clean": rate, "robust": rate} as `compare.per_class_rates` makes them
    """
    if not rates:
        raise UsageError("per_class_bars: no class to draw; the records carry no labels")
    order = sorted(rates, key=lambda label: (rates[label]["robust"]["value"] or 0.0, -label))
    names = [plain(class_names[k]) if 0 <= k < len(class_names) else str(k) for k in order]
    figure, axes = new_axes(6.4, 1.2 + 0.3 * len(order))
    y = np.arange(len(order))
    clean = [rates[k]["clean"]["value"] or 0.0 for k in order]
    robust = [rates[k]["robust"]["value"] or 0.0 for k in order]
    cis = [rates[k]["robust"]["ci"] or {"low": v, "high": v} for k, v in zip(order, robust, strict=True)]
    axes.barh(y, clean, height=0.72, color=_CLEAN, label="clean accuracy")
    axes.barh(y, robust, height=0.42, color=BLUE, label="robust accuracy")
    levels = [rates[k]["robust"]["ci"]["level"] for k in order if rates[k]["robust"]["ci"]]
    interval = f"{100 * levels[0]:g} % interval" if levels else "interval"
    spread = [
        [max(0.0, v - ci["low"]) for v, ci in zip(robust, cis, strict=True)],
        [max(0.0, ci["high"] - v) for v, ci in zip(robust, cis, strict=True)],
    ]
    axes.errorbar(robust, y, xerr=spread, fmt="none", ecolor=_INK, elinewidth=1.1, capsize=2.5, label=interval)
    axes.set_yticks(y, names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlim(0, 1.0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    axes.grid(axis="x", color=_FAINT, linewidth=0.8)
    axes.set_xlabel("share of the class's rows")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    if title:
        axes.set_title(plain(title), loc="left", fontsize=11)
    return figure


def example_grid(
    clean: Any,
    adversarial: Any,
    *,
    clean_names: Sequence[str] = (),
    adversarial_names: Sequence[str] = (),
    notes: Sequence[Sequence[str]] = (),
    bounds: tuple[float, float] = (0.0, 1.0),
    title: str = "",
) -> Figure:
    """Columns of images: clean, adversarial, and their difference amplified by the factor it names.

    clean, adversarial: tensors or arrays [B, C, H, W] or [B, H, W], C 1 or 3; at most the first 10 are drawn
    clean_names, adversarial_names: the model's answer above each image; bold and red where the two differ
    notes:  lines of text below each column, such as the sample's id
    bounds: smallest and largest value of a pixel
    """
    before, after = _images(clean, *bounds), _images(adversarial, *bounds)
    if before.shape != after.shape:
        raise UsageError(f"example_grid: {before.shape} clean and {after.shape} adversarial images; expected the same")
    before, after = before[:_MOST_EXAMPLES], after[:_MOST_EXAMPLES]
    difference = after - before
    size = float(np.abs(difference).max())
    # The largest change fills half the range at most: mid grey is "unchanged".
    factor = max(1, int(0.5 / size + 1e-4)) if size > 0 else 1
    count = len(before)
    room = max(3.2, _SIDE + _COLUMN * count)
    # Characters of the title's size in a line.
    heading = plain(textwrap.fill(title, int(12 * room))) if title else ""
    top = 0.15 + (0.2 * (1 + heading.count("\n")) if heading else 0.0)
    rows = (
        ("clean", before, clean_names),
        ("adversarial", after, adversarial_names),
        (f"difference\namplified x{factor}", np.clip(0.5 + factor * difference, 0, 1), ()),
    )
    high = _COLUMN * _FILLED * before.shape[1] / before.shape[2]
    below = _LINE * max((len(each) for each in notes), default=0)
    answers = [[_in_column(name) for name in names[:count]] for _, _, names in rows]
    above = [_ABOVE + _LINE * max((name.count("\n") for name in each), default=0) for each in answers]
    height = top + sum(high + each for each in above) + below + 0.1
    figure = Figure(figsize=(room, height), facecolor="white")
    bottom = height - top
    for r, (name, images, names) in enumerate(rows):
        # One panel for a whole row, placed by hand: a panel for each image and a layout that measures them all cost
        # ten times as much.
        bottom -= high + above[r]
        axes = figure.add_axes((_SIDE / room, bottom / height, _COLUMN * count / room, high / height))
        axes.set_ylabel(name, fontsize=10)
        for i, image in enumerate(images):
            shown = image[..., 0] if image.shape[-1] == 1 else image
            place = (i, i + _FILLED, 0, 1)
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=place, aspect="auto")
        for i, answer in enumerate(answers[r]):
            turned = r == 1 and i < len(clean_names) and clean_names[i] != names[i]
            style: dict[str, Any] = {"color": RED, "fontweight": "bold"} if turned else {"color": _INK}
            axes.text(i + _FILLED / 2, 1 + 0.05 / high, answer, ha="center", va="bottom", fontsize=8.5, **style)
        axes.set(xlim=(0, count), ylim=(0, 1), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for i, lines in enumerate(notes[:count]):
        text = "\n".join(plain(shorten(line, _FITS)) for line in lines)
        axes.text(i + _FILLED / 2, -0.06 / high, text, ha="center", va="top", fontsize=8, color=_INK, linespacing=1.25)
    if heading:
        figure.suptitle(heading, fontsize=11, x=0.1 / room, y=1 - 0.1 / height, ha="left", va="top")
    return figure


def _in_column(name: str) -> str:
    """A class's name on at most two lines of a column."""
    first, *rest = textwrap.wrap(str(name), _FITS) or [""]
    return plain(shorten(first, _FITS) + ("\n" + shorten(" ".join(rest), _FITS) if rest else ""))


def _images(batch: Any, low: float, high: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[B, H, W, C] in [0, 1]."""
    if hasattr(batch, "detach"):
        batch = batch.detach().cpu().float().numpy()
    images = np.asarray(batch, dtype=np.float64)
    if images.ndim == 3:
        images = images[:, None]
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise UsageError(f"example_grid: shape {images.shape}; expected images [B, C, H, W] with C 1 or 3")
    images = (images - low) / (high - low)
    if not np.isfinite(images).all() or images.min() < -1e-6 or images.max() > 1 + 1e-6:
        raise UsageError(f"example_grid: values outside [{low:g}, {high:g}]; name the range with bounds")
    return np.moveaxis(images, 1, -1)


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
    figure.suptitle(plain(title), x=0.01, ha="left", fontsize=11)


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


def curve_points(reports: Iterable[Report]) -> list[Point]:
    """The points of a curve from reports that differ in eps; raises ReportError where one has none."""
    points = []
    for report in reports:
        eps, rate = report.to_dict()["threat_model"].get("eps"), report.metrics.get("robust_accuracy")
        if eps is None or rate is None:
            raise ReportError(f"{report.title}: has no eps or no robust accuracy; it is no point of a curve")
        points.append(Point.of(eps, rate))
    return points


def per_class_of(report: Report, records: Sequence[Record], class_names: Sequence[str] = ()) -> Figure | None:
    """The classes of a run; None for one class, and for more than can be told apart."""
    rates = per_class_rates(records)
    if not 1 < len(rates) <= MOST_CLASSES:
        return None
    return per_class_bars(rates, class_names, title=f"Per class, {report.threat}")


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
    return transfer_heatmap(table, sources, attacks, seen, title="Robust accuracy under transfer")


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
    return accuracy_by_distance(curves, norm=threat["norm"], title=report.threat)


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


_DATELESS = {"png": ("Software",), "svg": ("Date", "Creator"), "pdf": ("CreationDate", "Creator", "Producer")}
"""What a file of a kind would say of when and by what it was made, which is left out."""


def save(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> Path:
    """Write PNG, SVG or PDF in one move; the same figure gives the same bytes. Raises ReportError when it can't."""
    target = Path(path)
    kind = target.suffix.lower().lstrip(".")
    if kind not in _DATELESS:
        raise UsageError(f"{target.name}: expected a name that ends in .png, .svg or .pdf")
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "advkit"}):
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=dict.fromkeys(_DATELESS[kind]))
    write_atomic(target, buffer.getvalue())
    return target
