"""Pictures of a run folder: the figures that its report names, and a strip of broken examples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from advkit.core.protocols import Outcome
from advkit.evaluation.run.case import Case, space_range
from advkit.evaluation.run.store import Store, read_examples, read_records

if TYPE_CHECKING:
    from advkit.evaluation.report import Report

SHOWN = 10


class Resolved(Protocol):
    """A plan, as far as drawing asks: the case, which names the classes and knows the range of its inputs."""

    @property
    def case(self) -> Case: ...


def draw(resolved: Resolved, folder: Path, report: Report) -> list[Path]:
    """The figures that the report names, and a strip of broken examples where the run kept some, into FOLDER/plots."""
    from advkit.evaluation.figures import write_plots
    from advkit.evaluation.figures.plots import save

    made = write_plots(folder, resolved.case.task.class_names())
    figure = strip(resolved.case, folder, title=f"Broken examples, {report.threat}")
    if figure is not None:
        made.append(save(figure, folder / "plots" / "examples.png"))
    return made


def strip(case: Case, folder: Path, title: str = "") -> Any:
    """Clean, adversarial and difference of the first broken rows kept in a run folder; None where there are none."""
    import torch

    from advkit.evaluation.figures.plots import example_grid

    held = read_examples(folder)
    broken = [
        r
        for r in read_records(folder / "records.jsonl")
        if r.outcome == Outcome.BROKEN and Store.key(r.made_by, r.id) in held
    ][:SHOWN]
    images = [held[Store.key(r.made_by, r.id)] for r in broken]
    if not images or images[0][0].ndim != 3 or images[0][0].shape[0] not in (1, 3):
        return None
    names = case.task.class_names()
    low, high = space_range(case.task.space)
    return example_grid(
        torch.stack([a for a, _ in images]),
        torch.stack([b for _, b in images]),
        clean_names=[names[r.clean] for r in broken if r.clean is not None],
        adversarial_names=[names[r.adversarial] for r in broken if r.adversarial is not None],
        bounds=(0.0 if low is None else low, 1.0 if high is None else high),
        title=title,
    )
