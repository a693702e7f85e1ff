"""What the bars say while a run goes on."""

from __future__ import annotations

from types import SimpleNamespace

from advkit.cli.progress import Bars
from advkit.core.protocols import Label, Outcome, Record


def told(bars, title="case"):
    task = bars._progress.tasks[bars._bars[title]]
    return task.completed, task.total, task.fields["far"]


def test_a_row_that_a_stage_fells_stands_no_more_and_counts_once():
    case = SimpleNamespace(label=Label("suite"))
    bars = Bars(hidden=True)
    outcomes = (Outcome.ROBUST, Outcome.ROBUST, Outcome.BROKEN, Outcome.WRONG)
    bars.watch(
        "case", case, [Record(id=str(i), attack="suite", stage="a", outcome=o) for i, o in enumerate(outcomes)], 6
    )
    assert told(bars) == (4, 6, "robust accuracy so far 50.0 %")
    bars.watch("case", case, [Record(id="0", attack="suite", stage="b", outcome=Outcome.BROKEN)], 5)
    assert told(bars) == (5, 5, "robust accuracy so far 25.0 %")
    bars.watch("case", case, [Record(id="0", attack="suite", stage="c", outcome=Outcome.ROBUST)], 6)
    assert told(bars) == (6, 6, "robust accuracy so far 25.0 %")


def test_a_sample_of_a_grid_is_robust_while_no_cell_breaks_it():
    bars = Bars(hidden=True)
    case = SimpleNamespace(label=Label("tapm"))
    made = [("a", Outcome.ROBUST), ("b", Outcome.BROKEN)]
    records = [Record(id=row, attack="fgsm", source="zoo:x", outcome=outcome) for row, outcome in made]
    bars.watch("case", case, records, 4)
    assert told(bars) == (2, 4, "robust accuracy so far 50.0 %")
    bars.watch("case", case, [Record(id="b", attack="fgsm", source="zoo:y", outcome=Outcome.ROBUST)], 4)
    assert told(bars) == (3, 4, "robust accuracy so far 50.0 %")


def test_a_sample_that_is_wrong_when_clean_is_not_robust_under_a_target():
    bars = Bars(hidden=True)
    case = SimpleNamespace(label=Label("pgd"))
    rows = [
        Record(id="a", attack="pgd", outcome=Outcome.ROBUST, label=1, clean=1),
        Record(id="b", attack="pgd", outcome=Outcome.ROBUST, label=1, clean=2, notes=("clean_wrong",)),
        Record(id="c", attack="pgd", outcome=Outcome.WRONG, label=1, clean=1),  # of the target's own class
        Record(id="d", attack="pgd", outcome=Outcome.WRONG, label=1, clean=0),
    ]
    bars.watch("case", case, rows, 4)
    assert told(bars) == (4, 4, "robust accuracy so far 50.0 %")
