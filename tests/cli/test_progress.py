"""What the bars say while a run goes on."""

from __future__ import annotations

from types import SimpleNamespace

from advkit.cli.progress import Bars
from advkit.core.protocols import Outcome, Record


def told(bars, title="case"):
    task = bars._progress.tasks[bars._bars[title]]
    return task.completed, task.total, task.fields["far"]


def test_a_row_that_a_stage_fells_stands_no_more_and_counts_once():
    case = SimpleNamespace(label="suite", attack=object())
    bars = Bars(hidden=True)
    outcomes = (Outcome.ROBUST, Outcome.ROBUST, Outcome.BROKEN, Outcome.WRONG)
    bars.watch("case", case, [Record(id=str(i), attack="suite/a", outcome=o) for i, o in enumerate(outcomes)], 6)
    assert told(bars) == (4, 6, "robust accuracy so far 50.0 %")
    bars.watch("case", case, [Record(id="0", attack="suite/b", outcome=Outcome.BROKEN)], 5)
    assert told(bars) == (5, 5, "robust accuracy so far 25.0 %")
    bars.watch("case", case, [Record(id="0", attack="suite/c", outcome=Outcome.ROBUST)], 6)
    assert told(bars) == (6, 6, "robust accuracy so far 25.0 %")


def test_a_grid_counts_every_image():
    case = SimpleNamespace(
        label="grid", attack=None, threat=SimpleNamespace(scenario="grid"), specs={"threat_model": "tapm"}
    )
    bars = Bars(hidden=True)
    cells = (("a", 1), ("b", 0))
    records = [Record(id="0", attack=name, outcome=Outcome.ROBUST, label=1, adversarial=said) for name, said in cells]
    bars.watch("case", case, records, 2)
    assert told(bars) == (2, 2, "accuracy on transferred images so far 50.0 %")
