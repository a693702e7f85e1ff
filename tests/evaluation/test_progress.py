"""What progress says while a run goes on, and where it says nothing."""

from __future__ import annotations

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest

import advkit
from advkit.attacks import ATTACKS
from advkit.core.protocols import Label, Outcome, Record
from advkit.core.watching import SearchStep, watcher, watching
from advkit.evaluation import progress, screen
from advkit.evaluation.api import execute, plan
from advkit.evaluation.progress import Bars, CaseProgress, announcement


def case(attack="pgd", size=4):
    return SimpleNamespace(label=Label(attack), attack=ATTACKS.build(attack), size=size)


def record(row, outcome, stage="", **more):
    return Record(id=row, attack="suite", stage=stage, outcome=outcome, **more)


def test_a_row_that_a_stage_fells_stands_no_more_and_counts_once() -> None:
    told = CaseProgress(case("autoattack"))
    outcomes = (Outcome.ROBUST, Outcome.ROBUST, Outcome.BROKEN, Outcome.WRONG)
    told.add([record(str(i), each, "apgd-ce") for i, each in enumerate(outcomes)], 10)
    assert told.standing == "2 of 4 robust"
    assert (told.done, told.total) == (4, 10)
    told.add([record("0", Outcome.BROKEN, "apgd-t"), record("1", Outcome.ROBUST, "apgd-t")], 8)
    assert told.standing == "1 of 4 robust"
    assert told.left["apgd-ce"][:2] == (2, 4)
    # 4 x 100 of the first stage and 2 x 900 of the second; 900 and 5000 passes for the one that still stands
    assert told.share == pytest.approx((400 + 1800) / (400 + 1800 + 900 + 5000))


def test_a_sample_of_a_grid_is_robust_while_no_cell_breaks_it() -> None:
    told = CaseProgress(case())
    told.add([record("a", Outcome.ROBUST, source="zoo:x"), record("b", Outcome.BROKEN, source="zoo:x")], 4)
    assert told.standing == "1 of 2 robust"
    told.add([record("b", Outcome.ROBUST, source="zoo:y")], 4)
    assert told.standing == "1 of 2 robust"
    assert told.share == 3 / 4


def test_a_sample_that_is_wrong_when_clean_is_not_robust_under_a_target() -> None:
    told = CaseProgress(case())
    told.add(
        [
            record("a", Outcome.ROBUST, label=1, clean=1),
            record("b", Outcome.ROBUST, label=1, clean=2, notes=("clean_wrong",)),
            record("c", Outcome.WRONG, label=1, clean=1),  # of the target's own class
            record("d", Outcome.WRONG, label=1, clean=0),
        ],
        4,
    )
    assert told.standing == "2 of 4 robust"
    assert told.seconds_left == 0


def test_time_left_follows_the_passes_of_the_batch_and_leaves_out_what_was_on_record(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    told = CaseProgress(case(size=10))
    told.add([record(str(i), Outcome.ROBUST) for i in range(5)], 10)  # a resumed run
    assert told.seconds_left is None
    bars = Bars(False)
    bars.cases["records"] = told
    bars.begins(Label("pgd"), 5, 100.0)
    bars.passed(5 * 40)
    now[0] += 8
    assert told.share == pytest.approx((5 + 2) / 10)
    assert told.seconds_left == pytest.approx(8 * 3 / 2)


def test_searches_tell_their_step_their_loss_and_the_successes_so_far() -> None:
    bars = Bars(False)
    bars.starts("records", case("gcg", size=3))
    bars.begins(Label("gcg"), 2, 1e6)
    bars.searched([0], SearchStep(250, 250, 0.5, True, over=True))
    bars.searched([1], SearchStep(31, 250, 1.25, False))
    (said,) = [line for line in bars.lines() if "loss" in line]
    assert said == "    step 31 of 250, loss 1.250, success so far on 1 of 2 prompts"
    told = bars.cases["records"]
    assert told.share == pytest.approx((1 + 31 / 250) / 3)
    bars.recorded([record("a", Outcome.BROKEN), record("b", Outcome.ROBUST)], 3)
    bars.begins(Label("gcg"), 1, 1e6)
    bars.searched([0], SearchStep(1, 250, None, False))
    assert bars.lines()[-1] == "    step 1 of 250, success so far on 1 of 3 prompts"


def test_dear_runs_are_announced_and_a_way_out_is_named() -> None:
    said = announcement(case("autoattack"))
    assert "6,900 passes" in said  # 100 + 9 x 100 + 9 x 100 + 5000
    assert "`auto`" in said
    assert "stop_on_success=true" in announcement(case("gcg"))
    assert not announcement(case("gcg:stop_on_success=true"))
    assert not announcement(case("pgd"))


ASKED = {"attack": "pgd:steps=3", "task": "digits", "n": 20, "batch_size": 8, "beside": False}


def test_a_run_tells_its_watcher_of_every_batch_pass_and_record() -> None:
    told: list[tuple[int, float, int, int]] = []

    class Watching(Bars):
        def recorded(self, records, total) -> None:
            batch = self.cases["records"].batch
            told.append((batch.rows, batch.passes, batch.passed, len(records)))
            super().recorded(records, total)

    with Watching(False) as bars, watching(bars):
        report = execute(plan(**ASKED))
    assert watcher() is None
    assert [each[0] for each in told] == [each[3] for each in told] == [8, 8, 4]
    assert {each[1] for each in told} == {3}
    # Three gradients of the right ones, a look at the last point, and the judge: clean answers and verdicts.
    assert all(rows <= passed <= 6 * rows for rows, _, passed, _ in told), told
    assert bars.cases["records"].standing == f"{round(20 * report.robust_accuracy)} of 20 robust"
    assert bars.cases["records"].share == 1


def test_work_that_is_no_case_has_a_line_and_a_rest_of_time(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(screen.time, "monotonic", lambda: now[0])
    bars = Bars(False)
    bars.works("training", 10, 40)  # ten of an earlier run
    assert bars.lines() == ["training [###---------]  25 %  10 of 40"]
    now[0] += 6
    bars.works("training", 20, 40, "epoch 2: loss 1.500")
    assert bars.lines() == ["training [######------]  50 %  about 0:00:12 left  20 of 40  epoch 2: loss 1.500"]
    bars.works("training", 0, 5)  # another one
    assert bars.lines() == ["training [------------]   0 %  0 of 5"]
    now[0] += 2
    bars.works("training", 5, 5)
    assert bars.lines() == ["training [############] 100 %  0:00:02  5 of 5"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "asked", "shown"),
    [(Terminal, None, True), (Terminal, False, False), (io.StringIO, None, False), (io.StringIO, False, False)],
)
def test_progress_is_shown_by_default_on_a_terminal_alone(monkeypatch, stream, asked, shown) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    report = advkit.evaluate(**ASKED, progress=asked)
    said = sys.stderr.getvalue()
    assert bool(said) == shown
    assert not shown or f"{round(20 * report.robust_accuracy)} of 20 robust" in said


MATRIX = {"sources": "zoo:digits-mlp", "attacks": "fgsm", "targets": "zoo:digits-mlp", "task": "digits", "n": 8}


def _matrix(tmp_path, **more) -> None:
    advkit.matrix(**MATRIX, seeds=1, cache=tmp_path / "cache", **more)


def _training(tmp_path, **more) -> None:
    advkit.train_victim("mlp:hidden=4", "none", "digits", recipe="epochs=1", out=tmp_path / "made", **more)


def _grid(tmp_path, **more) -> None:
    cells = {"attacks": ["fgsm"], "tasks": ["digits"], "defenses": ["none", "pgd_at"], "n": 8}
    advkit.sweep({**cells, "exclude": [{"task": "digits"}]}, out=tmp_path / "runs", **more)


@pytest.mark.parametrize(
    ("work", "said"),
    [(_matrix, "4 of 4"), pytest.param(_training, "epoch 1: loss", marks=pytest.mark.slow), (_grid, "2 of 2")],
)
def test_other_long_calls_show_progress_likewise(monkeypatch, tmp_path, work, said) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(tmp_path / "a")
    assert said in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", Terminal())
    work(tmp_path / "b", progress=False)
    assert not sys.stderr.getvalue()
    assert watcher() is None


def test_a_notebook_shows_one_output_that_is_replaced(monkeypatch) -> None:
    written: list[str] = []

    class ZMQInteractiveShell:
        pass

    class Handle:
        def update(self, content, raw) -> None:
            written.append("update")

    def display(content, raw, display_id):
        written.append("display")
        return Handle()

    class Shell(ModuleType):
        get_ipython = staticmethod(ZMQInteractiveShell)

    shell, drawn = Shell("IPython"), ModuleType("IPython.display")
    drawn.display = display
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "IPython.display", drawn)
    assert screen.in_notebook()
    monkeypatch.setattr(screen._Cell, "patience", 0.0)
    monkeypatch.setattr(screen, "_OFTEN", 0.0)
    advkit.evaluate(**ASKED)
    assert written[0] == "display"
    assert set(written[1:]) == {"update"}
    written.clear()
    advkit.evaluate(**ASKED, progress=False)
    assert not written


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["beast:k=2,length=2", "gcg:steps=2,width=4,length=2"])
def test_a_search_for_suffixes_tells_its_steps(attack) -> None:
    told: list[tuple[tuple[int, ...], SearchStep]] = []

    class Watching(Bars):
        def searched(self, rows, step) -> None:
            told.append((tuple(rows), step))

    with watching(Watching(False)):
        report = execute(plan(attack, task="prompts", model="toychat", n=1, beside=False))
    assert {rows for rows, _ in told} == {(0,)}
    assert {step.steps for _, step in told} == {2}
    assert [step.over for _, step in told] == [False] * (len(told) - 1) + [True]
    (record,) = report.records()
    assert [step.loss for _, step in told[:-1]] == [noted["best"] for noted in record.trace]
    assert told[-1][1].step == len(record.trace) - 1
