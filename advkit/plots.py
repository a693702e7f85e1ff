"""Figures of runs, of several runs, and of examples: functions that return matplotlib's Figure, and `save`.

`report.plot()` draws what a run has. These draw what several runs come to, or what one likes to see otherwise. A module
is imported where a name of it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkit.evaluation.figures import write_plots
    from advkit.evaluation.figures.event_plots import animate, film_strip, flips_figure
    from advkit.evaluation.figures.pictures import strip
    from advkit.evaluation.figures.plots import (
        Point,
        accuracy_by_distance,
        certified_curve,
        curve_points,
        example_grid,
        matrix_heatmap,
        per_class_bars,
        robust_accuracy_curve,
        save,
        success_by_distance,
        transfer_heatmap,
        transfer_heatmap_of,
    )
    from advkit.evaluation.figures.poisoning_plots import accuracy_by_rate, accuracy_by_trial, boundaries
    from advkit.evaluation.figures.query_plots import distance_by_queries, success_by_queries
    from advkit.evaluation.figures.stream_plots import competitive_ratio_curves, fool_rate_bars
    from advkit.evaluation.figures.text_plots import search_figure, transcripts_page
    from advkit.evaluation.figures.training_plots import training_curves

__all__ = [
    "Point",
    "accuracy_by_distance",
    "accuracy_by_rate",
    "accuracy_by_trial",
    "animate",
    "boundaries",
    "certified_curve",
    "competitive_ratio_curves",
    "curve_points",
    "distance_by_queries",
    "example_grid",
    "film_strip",
    "flips_figure",
    "fool_rate_bars",
    "matrix_heatmap",
    "per_class_bars",
    "robust_accuracy_curve",
    "save",
    "search_figure",
    "strip",
    "success_by_distance",
    "success_by_queries",
    "training_curves",
    "transcripts_page",
    "transfer_heatmap",
    "transfer_heatmap_of",
    "write_plots",
]
_MODULES: Mapping[str, tuple[str, ...]] = {
    "advkit.evaluation.figures": ("write_plots",),
    "advkit.evaluation.figures.event_plots": ("animate", "film_strip", "flips_figure"),
    "advkit.evaluation.figures.pictures": ("strip",),
    "advkit.evaluation.figures.poisoning_plots": ("accuracy_by_rate", "accuracy_by_trial", "boundaries"),
    "advkit.evaluation.figures.query_plots": ("distance_by_queries", "success_by_queries"),
    "advkit.evaluation.figures.stream_plots": ("competitive_ratio_curves", "fool_rate_bars"),
    "advkit.evaluation.figures.text_plots": ("search_figure", "transcripts_page"),
    "advkit.evaluation.figures.training_plots": ("training_curves",),
}
_LAZY = dict.fromkeys(__all__, "advkit.evaluation.figures.plots") | {
    name: module for module, names in _MODULES.items() for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'advkit.plots' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
