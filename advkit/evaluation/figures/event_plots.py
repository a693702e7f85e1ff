"""Figures of attacked events: flips over time, film strips and animations of clean and attacked frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from advkit.core.errors import UsageError
from advkit.evaluation.figures.axes import BLUE, ORANGE, RED, new_axes

_WHITE, _FLIPPED, _DELETED = (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.7, 0.7, 0.7)
_OFF_COLOR, _ON_COLOR, _BOTH = (0.84, 0.37, 0.0), (0.0, 0.45, 0.70), (0.55, 0.40, 0.60)

Frames = np.ndarray[Any, np.dtype[np.float32]]
Picture = np.ndarray[Any, np.dtype[np.float64]]


def _rows(value: Any, what: str) -> Frames:
    """[B, T, 2, H, W] from a tensor or an array of rows, or of one row."""
    array = np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype=np.float32)
    array = array[None] if array.ndim == 4 else array
    if array.ndim != 5 or array.shape[2] != 2 or not len(array):
        raise UsageError(f"{what} of shape {list(array.shape)}; expected event frames [B, T, 2, H, W] or [T, 2, H, W]")
    return array


def _pair(clean: Any, adversarial: Any) -> tuple[Frames, Frames]:
    before, after = _rows(clean, "clean rows"), _rows(adversarial, "adversarial rows")
    if before.shape != after.shape:
        raise UsageError(f"clean rows {list(before.shape)} and adversarial rows {list(after.shape)} differ in shape")
    return before, after


def flips_over_time(clean: Any, adversarial: Any) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Flips per frame and row, [B, T] each: `added` events (0 to 1), `deleted` ones (1 to 0)."""
    before, after = _pair(clean, adversarial)
    places = (2, 3, 4)
    return {
        "added": ((after > before).sum(places)).astype(np.float64),
        "deleted": ((after < before).sum(places)).astype(np.float64),
    }


def flips_figure(clean: Any, adversarial: Any, *, title: str = "") -> Figure:
    """When an attack flips: mean flips per frame over the rows, added events upwards, deleted ones downwards.

    clean, adversarial: rows [B, T, 2, H, W] of tensors or arrays; rows without a flip are left out
    """
    flips = flips_over_time(clean, adversarial)
    moved = (flips["added"] + flips["deleted"]).sum(1) > 0
    if not moved.any():
        raise UsageError("no row was changed; flips_figure needs at least one attacked row")
    added, deleted = flips["added"][moved], flips["deleted"][moved]
    frames = np.arange(1, added.shape[1] + 1)
    figure, axes = new_axes(6.0, 3.2)
    axes.bar(frames, added.mean(0), color=BLUE, width=0.8, label="added (0 to 1)")
    axes.bar(frames, -deleted.mean(0), color=ORANGE, width=0.8, label="deleted (1 to 0)")
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xlabel("frame")
    axes.set_ylabel("flips per row")
    axes.set_xticks(frames if len(frames) <= 16 else frames[:: len(frames) // 8])
    # Deleted flips go down and are no negative number of flips.
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    axes.legend(frameon=False, fontsize=8)
    total = (added + deleted).sum(1)
    axes.set_title(title or f"{len(total)} attacked rows, median {np.median(total):g} flips", fontsize=10)
    return figure


def frame_picture(frame: Frames, flipped: np.ndarray[Any, np.dtype[np.bool_]] | None = None) -> Picture:
    """RGB [H, W, 3] of one frame [2, H, W]: ON blue, OFF orange, both violet, nothing white; flipped bits darkened.

    flipped: bool [2, H, W]; pixels where either polarity was flipped are drawn black if the flip added an event and
             framed by a grey if it deleted one
    """
    off, on = frame[0] > 0, frame[1] > 0
    picture = np.empty((*off.shape, 3))
    picture[:] = _WHITE
    picture[on] = _ON_COLOR
    picture[off] = _OFF_COLOR
    picture[on & off] = _BOTH
    if flipped is not None:
        added = (flipped & (frame > 0)).any(0)
        deleted = (flipped & (frame == 0)).any(0)
        picture[deleted] = _DELETED
        picture[added] = _FLIPPED
    return picture


def film_strip(
    clean: Any,
    adversarial: Any,
    *,
    row: int = 0,
    clean_name: str = "",
    adversarial_name: str = "",
    frames: Sequence[int] | None = None,
) -> Figure:
    """Frames of one row side by side: clean above; below the attacked ones, added events black and deleted ones grey.

    row:    which of the rows given
    frames: which frames; None takes all, or ten spread evenly
    """
    before, after = _pair(clean, adversarial)
    if not 0 <= row < len(before):
        raise UsageError(f"row {row} of {len(before)}; expected 0 to {len(before) - 1}")
    steps = before.shape[1]
    if frames is None:
        frames = sorted({round(j) for j in np.linspace(0, steps - 1, min(steps, 10))})
    if not frames or min(frames) < 0 or max(frames) >= steps:
        raise UsageError(f"frames {list(frames)}; expected some of 0 to {steps - 1}")
    figure = Figure(figsize=(max(5.6, 1.1 * len(frames) + 0.6), 3.3), layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(frames), squeeze=False)
    for column, j in enumerate(frames):
        flipped = before[row, j] != after[row, j]
        grid[0, column].imshow(frame_picture(before[row, j]), interpolation="nearest")
        grid[1, column].imshow(frame_picture(after[row, j], flipped), interpolation="nearest")
        grid[0, column].set_title(f"{j + 1}", fontsize=8)
        grid[1, column].set_xlabel(f"{int(flipped.sum())} flips", fontsize=7, color=RED if flipped.any() else "#888888")
        for axes in (grid[0, column], grid[1, column]):
            axes.set_xticks([])
            axes.set_yticks([])
    grid[0, 0].set_ylabel(clean_name or "clean", fontsize=9)
    grid[1, 0].set_ylabel(adversarial_name or "attacked", fontsize=9)
    keys = {"ON event": _ON_COLOR, "OFF event": _OFF_COLOR, "both": _BOTH, "added": _FLIPPED, "deleted": _DELETED}
    patches = [Patch(facecolor=color, edgecolor="#888888", label=name) for name, color in keys.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=8)
    total = int((before[row] != after[row]).sum())
    share = 100 * total / before[row].size
    figure.suptitle(f"{total} of {before[row].size:,} bits flipped ({share:.2g} %)", fontsize=10)
    return figure


def animate(
    clean: Any, adversarial: Any, path: str | Path, *, row: int = 0, scale: int = 6, milliseconds: int = 200
) -> Path:
    """Write an animated GIF of one row, clean on the left and attacked on the right; returns the file.

    scale: screen pixels per sensor pixel; milliseconds: how long a frame stands (equal neighbours become one, as long
    as both)
    """
    from PIL import Image

    before, after = _pair(clean, adversarial)
    if not 0 <= row < len(before):
        raise UsageError(f"row {row} of {len(before)}; expected 0 to {len(before) - 1}")
    if scale < 1 or milliseconds < 10:
        raise UsageError(f"scale={scale}, milliseconds={milliseconds}; expected at least 1 and at least 10")
    pictures = []
    for one, other in zip(before[row], after[row], strict=True):
        gap = np.full((one.shape[1], 1, 3), 0.5)
        wide = np.concatenate((frame_picture(one), gap, frame_picture(other, one != other)), axis=1)
        large = wide.repeat(scale, 0).repeat(scale, 1)
        pictures.append(Image.fromarray((large * 255).round().astype(np.uint8)))
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(
        file, format="GIF", save_all=True, append_images=pictures[1:], duration=milliseconds, loop=0, optimize=False
    )
    return file
