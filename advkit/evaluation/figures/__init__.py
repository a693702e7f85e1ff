"""Figures of a finished run, by name: what a report's section names is drawn from the report and its records.

| name | what it shows | nothing is drawn |
|---|---|---|
| `per_class` | robust accuracy of each class inside its clean accuracy | with one class, or more than 100 |
| `success_by_distance` | fraction of attacked samples broken within a distance | where there is a radius, or no norm |
| `success_by_queries` | success rate and robust accuracy against queries | where gradients were taken |
| `distance_by_queries` | median least distance against queries | where no decisions were asked, or most withstood |
| `accuracy_by_distance` | robust accuracy at every radius, with its interval | with a radius, or another goal |
| `transfer_grid` | accuracy for each source and attack | with fewer than two attacks that name a source |
| `certified_curve` | certified accuracy against the radius, an attack's beside it | without certificates |
| `accuracy_by_trial` | accuracy after training on clean and on flipped labels, trial by trial | without records |
| `searches` | best score so far against evaluations, one line per sample | without traces of searches |
| `transcripts` | a Markdown page: what was sent to the model and what it answered | without texts |

A scenario names them in its section: `figures=[{"name": "per_class"}]`; further keys are handed to the function. A
figure goes to `plots/NAME.png` of the run folder, a page to `NAME.md`. Names that are not in the table belong to a
plug-in that is not here: they are passed over.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from advkit.core.errors import ReportError
from advkit.evaluation.report import Report, write_atomic
from advkit.evaluation.run.store import read_records, records_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("advkit")

FIGURES: Mapping[str, str] = {
    "per_class": "advkit.evaluation.figures.plots:per_class_of",
    "success_by_distance": "advkit.evaluation.figures.plots:success_by_distance_of",
    "success_by_queries": "advkit.evaluation.figures.query_plots:success_by_queries_of",
    "distance_by_queries": "advkit.evaluation.figures.query_plots:distance_by_queries_of",
    "accuracy_by_distance": "advkit.evaluation.figures.plots:accuracy_by_distance_of",
    "transfer_grid": "advkit.evaluation.figures.plots:transfer_heatmap_of",
    "certified_curve": "advkit.evaluation.figures.plots:certified_curve_of",
    "accuracy_by_trial": "advkit.evaluation.figures.poisoning_plots:accuracy_by_trial_of",
    "searches": "advkit.evaluation.figures.text_plots:searches_of",
    "transcripts": "advkit.evaluation.figures.text_plots:transcripts_of",
}
"""Name -> module:function of (report, records, and keys of its own); gives a figure, a page of Markdown, or None."""


def figure(name: str) -> Callable[..., Figure | str | None]:
    """The function behind a name of the table; imports matplotlib only now."""
    module, function = FIGURES[name].split(":")
    found: Callable[..., Figure | str | None] = getattr(import_module(module), function)
    return found


def write_plots(run: str | os.PathLike[str], class_names: Sequence[str] = ()) -> list[Path]:
    """Draw what a finished run's report names into the run folder; returns the files.

    class_names: for figures of classes, where the report does not name them
    """
    folder = Path(run)
    report = Report.load(folder)
    path = records_path(folder)
    records = read_records(path) if path.exists() else []
    files = []
    for asked in report.current["section"]["figures"]:
        keys = {key: value for key, value in asked.items() if key != "name"}
        if asked["name"] not in FIGURES:
            log.info("no figure is called %r here: it belongs to a package that is not installed", asked["name"])
            continue
        if asked["name"] == "per_class":
            keys.setdefault("class_names", class_names)
        try:
            drawn = figure(asked["name"])(report, records, **keys)
        except TypeError as error:
            raise ReportError(f"section.figures: {asked['name']} can't be drawn with {keys}: {error}") from error
        if drawn is not None:
            files.append(_written(folder, asked["name"], drawn))
    return files


def _written(folder: Path, name: str, drawn: Figure | str) -> Path:
    if isinstance(drawn, str):
        write_atomic(folder / f"{name}.md", drawn.encode())
        return folder / f"{name}.md"
    from advkit.evaluation.figures.plots import save

    return save(drawn, folder / "plots" / f"{name}.png")
