"""What all figures share: colours, a panel, its labels, and how a figure becomes a file; without pyplot's global state.

Colours are Okabe and Ito's, told apart by colour-blind readers and in grey.
"""

from __future__ import annotations

import io
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from advkit.core.errors import UsageError
from advkit.evaluation.report import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
SERIES = ((BLUE, "o"), (RED, "s"), (GREEN, "^"), (ORANGE, "D"), (PINK, "v"), (SKY, "P"))
INK, FAINT = "#222222", "#DDDDDD"


def new_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel, in inches, as all of them look."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#888888")
    axes.tick_params(colors=INK, length=3)
    axes.set_axisbelow(True)
    return figure, axes


def finish(axes: Axes, *, x: str, y: str, legend: bool = True, title: str = "") -> None:
    """Labels, a faint grid, and a legend and a title where there are any, as all curves have them."""
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))
    if legend:
        axes.legend(frameon=False, fontsize=8)
    if title:
        # Characters of this size in a line.
        axes.set_title(wrapped(title, 66), loc="left", fontsize=11)


def finish_shares(axes: Axes, *, x: str, y: str, legend: bool = True, title: str = "") -> None:
    """The same of curves of shares of samples, in percent."""
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    finish(axes, x=x, y=y, legend=legend, title=title)


def interval(
    axes: Axes, x: Sequence[float], low: Sequence[float], high: Sequence[float], color: str, *, alone: bool
) -> None:
    """Both ends of an interval along a curve of steps: a band where the curve stands alone, else two thin lines.

    Bands of several curves would lie over one another, and no colour of theirs could be told.
    """
    if alone:
        axes.fill_between(x, low, high, step="post", color=color, alpha=0.18, linewidth=0)
        return
    for end in (low, high):
        axes.step(x, end, where="post", color=color, linewidth=0.6, alpha=0.75, linestyle=(0, (4, 2)))


def wrapped(text: str, width: int) -> str:
    """Text in lines of so many characters, as `plain` has it; an equation (n = 60) is not broken."""
    return plain(textwrap.fill(text.replace(" = ", "\u00a0=\u00a0"), width).replace("\u00a0", " "))


def plain(text: str) -> str:
    """Text as it stands: matplotlib would set what stands between dollar signs as mathematics, or fail at it."""
    return text.replace("$", r"\$")


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
