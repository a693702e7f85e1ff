"""The stable path of pictures of a run folder and of exported examples."""

from __future__ import annotations

from advkit.evaluation.export import export
from advkit.evaluation.figures.pictures import SHOWN, draw, strip

__all__ = ["SHOWN", "draw", "export", "strip"]
