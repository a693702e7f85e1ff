"""Examples: samples before and after an attack, side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from advkit.core.errors import UsageError
from advkit.evaluation.figures.axes import INK, RED, plain, wrapped
from advkit.evaluation.report.text import shorten

_MOST_EXAMPLES = 10
_SIDE, _COLUMN, _FILLED, _ABOVE = 0.6, 1.15, 0.92, 0.25
"""Of a grid of examples: inches at the side, of a column, above a row; the third is the part that an image fills."""
_LINE, _FITS = 0.15, 15
"""Inches of a line of small text, and characters of it that fit into a column."""


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
    heading = wrapped(title, int(12 * room)) if title else ""
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
            style: dict[str, Any] = {"color": RED, "fontweight": "bold"} if turned else {"color": INK}
            axes.text(i + _FILLED / 2, 1 + 0.05 / high, answer, ha="center", va="bottom", fontsize=8.5, **style)
        axes.set(xlim=(0, count), ylim=(0, 1), xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for i, lines in enumerate(notes[:count]):
        text = "\n".join(plain(shorten(line, _FITS)) for line in lines)
        axes.text(i + _FILLED / 2, -0.06 / high, text, ha="center", va="top", fontsize=8, color=INK, linespacing=1.25)
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
