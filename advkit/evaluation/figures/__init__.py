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
| `examples` | some samples before and after the attack, broken ones and some that held | without images |
| `transcripts` | a Markdown page: what was sent to the model and what it answered | without texts |

A scenario names them in its section: `figures=[{"name": "per_class"}]`; further keys are handed to the function. A
figure goes to `plots/NAME.png` of the run folder (or .svg, .pdf), a page to `NAME.md`. Names that are not in the table
belong to a plug-in that is not here: they are passed over. `examples` are drawn of every run that kept some.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from advkit.core.errors import ReportError, UsageError
from advkit.core.protocols import Record
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
    "examples": "advkit.evaluation.figures.pictures:examples_figure_of",
    "transcripts": "advkit.evaluation.figures.text_plots:transcripts_of",
}
"""Name -> module:function of (report, records, and keys of its own); gives a figure, a page of Markdown, or None."""


def figure(name: str) -> Callable[..., Figure | str | None]:
    """The function behind a name of the table; imports matplotlib only now."""
    module, function = FIGURES[name].split(":")
    found: Callable[..., Figure | str | None] = getattr(import_module(module), function)
    return found


EXAMPLES = "examples"
FORMATS = ("png", "svg", "pdf")
_OF_CLASSES = ("per_class", EXAMPLES)


def write_plots(
    run: str | os.PathLike[str],
    class_names: Sequence[str] = (),
    *,
    form: str = "png",
    only: Sequence[str] = (),
    out: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Draw what a finished run's report names, and its examples, into the run folder; returns the files.

    class_names: for figures of classes, where the report does not name them
    form:        png, svg or pdf
    only:        the kinds to draw; none takes all. Raises ReportError for one that the run does not have
    out:         folder for the files; None puts figures into RUN/plots, and pages into RUN
    """
    folder = Path(run)
    check_format(form)
    report = Report.load(folder)
    path = records_path(folder)
    records = read_records(path) if path.exists() else []
    made = {name: drawn for name, drawn in drawings(report, records, class_names) if not only or name in only}
    if missing := [name for name in only if name not in made]:
        raise _no_plot(report, missing[0], [name for name, _ in drawings(report, records, class_names)])
    places = (folder / "plots", folder) if out is None else (Path(out), Path(out))
    return [_written(*places, name, drawn, form) for name, drawn in made.items()]


def check_format(form: str) -> None:
    """Raise UsageError for a format in which no figure is written."""
    if form not in FORMATS:
        raise UsageError(f"the format is {form!r}; expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}")


def drawings(
    report: Report, records: Sequence[Record], class_names: Sequence[str] = ()
) -> Iterator[tuple[str, Figure | str]]:
    """Name and drawing of everything that can be drawn of a run; a page of Markdown is a text."""
    for asked in (*report.current["section"]["figures"], {"name": EXAMPLES}):
        keys = {key: value for key, value in asked.items() if key != "name"}
        if asked["name"] not in FIGURES:
            log.info("no figure is called %r here: it belongs to a package that is not installed", asked["name"])
            continue
        if asked["name"] in _OF_CLASSES:
            keys.setdefault("class_names", report.view["dataset"].get("class_names") or class_names)
        try:
            drawn = figure(asked["name"])(report, records, **keys)
        except TypeError as error:
            raise ReportError(f"section.figures: {asked['name']} can't be drawn with {keys}: {error}") from error
        if drawn is not None:
            yield asked["name"], drawn


def kinds(report: Report) -> list[str]:
    """The kinds of figures that a run has; `plot` draws one."""
    return [name for name, drawn in drawings(report, _records(report)) if not isinstance(drawn, str)]


def plot(report: Report, kind: str | None = None) -> Figure:
    """One figure of a run; the first for None. Raises ReportError for a kind that it does not have."""
    for name, drawn in drawings(report, _records(report)):
        if not isinstance(drawn, str) and kind in (None, name):
            return drawn
    raise _no_plot(report, kind, kinds(report))


def _records(report: Report) -> Sequence[Record]:
    try:
        return report.records()
    except ReportError:  # some figures need none
        return []


def _no_plot(report: Report, kind: str | None, there_are: Sequence[str]) -> ReportError:
    if kind and there_are:
        return ReportError(f"this run has no plot {kind!r}; it has {', '.join(there_are)}: name one of them")
    return ReportError(f"this run has no plot {kind!r}; it has none: {why_none(report)}" if kind else why_none(report))


def why_none(report: Report) -> str:
    """Why nothing can be drawn of a run, and what helps."""
    if report.path is None or _records(report):
        return "its report names no plot, and no examples were kept (keep=N keeps them)"
    missing = records_path(report.path)
    return f"{missing.parent} has no {missing.name}, from which plots are drawn; name the run's own folder"


def _written(plots: Path, pages: Path, name: str, drawn: Figure | str, form: str) -> Path:
    if isinstance(drawn, str):
        write_atomic(pages / f"{name}.md", drawn.encode())
        return pages / f"{name}.md"
    from advkit.evaluation.figures.plots import save

    return save(drawn, plots / f"{name}.{form}")
