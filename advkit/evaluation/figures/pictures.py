"""Pictures of a run folder: the figures that its report names, and examples of what the attack made."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from advkit.core.errors import ReportError
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.report.examples import Examples, Kept, examples_of
from advkit.evaluation.run.case import Case, space_range
from advkit.evaluation.run.store import read_examples, read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from advkit.evaluation.report import Report

SHOWN, _HELD = 10, 3
_ENDED = {Outcome.BROKEN: "broken", Outcome.ROBUST: "held", Outcome.WRONG: "wrong when clean"}


class Resolved(Protocol):
    """A plan, as far as drawing asks: the case, which names the classes and knows the range of its inputs."""

    @property
    def case(self) -> Case: ...


def draw(resolved: Resolved, folder: Path, report: Report, form: str = "png") -> list[Path]:
    """The figures that the report names, and examples where the run kept some, into FOLDER/plots.

    form: png, svg or pdf
    """
    from advkit.evaluation.figures import write_plots

    return write_plots(folder, resolved.case.task.class_names(), form=form)


def strip(case: Case, folder: Path, title: str = "") -> Any:
    """Clean, adversarial and difference of some samples kept in a run folder, broken or held; None without images."""
    try:
        examples = examples_of(Kept(read_records(folder / "records.jsonl"), read_examples(folder)), None)
    except ReportError:
        return None
    low, high = space_range(case.task.space)
    bounds = None if low is None or high is None else (low, high)
    return grid_of(examples, case.task.class_names(), bounds, title)


def examples_figure_of(report: Report, records: Sequence[Record], class_names: Sequence[str] = ()) -> Figure | None:
    """The same of a report; None where no images were kept."""
    try:
        examples = report.adversarial()
    except ReportError:
        return None
    dataset = report.view["dataset"]
    bounds = dataset.get("input_range")
    names = class_names or dataset.get("class_names", ())
    return grid_of(examples, names, None if bounds is None else tuple(bounds), f"Examples, {report.threat}")


def grid_of(
    examples: Examples, names: Sequence[str], bounds: tuple[float, float] | None, title: str = ""
) -> Figure | None:
    """Some examples as a figure; None for what is no image, and where none was attacked.

    names:  of the classes, by their numbers
    bounds: smallest and largest value of a pixel; None takes those of the samples that are drawn
    """
    from advkit.evaluation.figures.plots import example_grid

    if examples.clean.ndim != 4 or examples.clean.shape[1] not in (1, 3) or not examples.clean.is_floating_point():
        return None
    chosen = [i for i in examples.some(SHOWN, _HELD) if examples.outcomes[i] in (Outcome.BROKEN, Outcome.ROBUST)]
    if not chosen:
        return None

    clean, adversarial = examples.clean[chosen], examples.adversarial[chosen]
    if bounds is None:
        low, high = float(min(clean.min(), adversarial.min())), float(max(clean.max(), adversarial.max()))
        bounds = low, high if high > low else low + 1.0

    def named(answers: Sequence[int | None]) -> list[str]:
        kept = [answers[i] for i in chosen]
        return ["-" if k is None else names[k] if 0 <= k < len(names) else str(k) for k in kept]

    return example_grid(
        clean,
        adversarial,
        clean_names=named(examples.clean_answers),
        adversarial_names=named(examples.adversarial_answers),
        notes=[_note(examples, i, len(_common(examples.ids))) for i in chosen],
        bounds=bounds,
        title=f"{title}; margin below 0: the goal is reached" if title else "",
    )


def _common(ids: Sequence[str]) -> str:
    """The folders that all ids begin with."""
    parts = zip(*(row.split("/")[:-1] for row in ids), strict=False)
    return "".join(f"{same[0]}/" for same in takewhile(lambda each: len(set(each)) == 1, parts))


def _note(examples: Examples, i: int, common: int) -> tuple[str, ...]:
    """What stands below an example: its id behind what all have in common, how it ended, the margin that is left."""
    margin = examples.margins[i]
    return (
        examples.ids[i][common:],
        _ENDED[Outcome(examples.outcomes[i])],
        *(() if margin is None else (f"margin {margin:.2g}",)),
    )
