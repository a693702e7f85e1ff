"""The stable path of pictures of a run folder; the code is in `advkit.evaluation.figures.pictures`."""

from __future__ import annotations

from advkit.evaluation.figures.pictures import (
    SHOWN,
    draw,
    export,
    strip,
)

__all__ = [
    "SHOWN",
    "draw",
    "export",
    "strip",
]
