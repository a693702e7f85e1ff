"""Suites played stage by stage over a whole evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from advkit.attacks.gradient.apgd import APGDCE
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.gradient.targeted import APGDT
from advkit.attacks.minimal.fab import FABT
from advkit.attacks.query.square import Square
from advkit.attacks.suites import AutoAttack, Lean, Stage, Suite, Thorough
from advkit.benchmark import our_run
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Label, Outcome
from advkit.evaluation import api
from advkit.evaluation.counts import by_label, count
from advkit.evaluation.execute import run
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.scenarios.evasion import taken_by

EPS = "linf:eps=0.1"
MLP = "zoo:fashion-mnist-public-mlp-at"


def stage_of(case, stage):
    return replace(case.label, stage=stage.name)


@dataclass(frozen=True, kw_only=True)
class Small(Suite):
    """A suite short enough for a test, with every kind of stage."""

    needs: ClassVar[Access] = Access.GRADIENTS

    def stages(self):
        return (
            Stage(name="first", attack=APGDCE(steps=5)),
            Stage(name="near", attack=PGD(steps=20, loss="margin"), share=0.3, least=5),
            Stage(name="sentinel", attack=Square(queries=60), share=0.5, by="sample", sentinel=True, least=5),
            Stage(name="last", attack=Square(queries=100), when="escalated"),
        )


class Rounded(nn.Module):
    """Sees its input on nine levels: no gradient passes, random search does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((x * 8).round() / 8)


def play(case, folder):
    store = open_store(case, folder)
    try:
        run(case, store)
    finally:
        store.close()
    return api.in_order(case, list(store))


def case_of(digits, model, **more):
    case = api.resolve("pgd", "none", digits, model, EPS, device="cpu", n=more.pop("n", 150), **more)
    return replace(case, attack=Small(), label=Label("small"))


def test_stages_take_only_rows_still_standing(digits, digits_model, tmp_path):
    records = play(case_of(digits, digits_model), tmp_path)
    groups = by_label(records)
    assert list(groups)[:3] == [Label("small", "first"), Label("small", "near"), Label("small", "sentinel")]
    first = {r.id: r for r in groups[Label("small", "first")]}
    standing = {row for row, r in first.items() if r.outcome == Outcome.ROBUST}
    near = {r.id: r for r in groups[Label("small", "near")]}
    # The fraction in whole calls of 16 rows.
    assert len(near) == 16 * max(1, round(-(-len(standing) * 3 // 10) / 16))
    assert set(near) <= standing
    # the nearest by the first stage's closeness
    rest = standing - set(near)
    assert max(first[row].closeness for row in near) <= min(first[row].closeness for row in rest)
    c = count(records)
    assert c.n == len(first) == 150
    assert c.broken == sum(r.outcome == Outcome.BROKEN for r in records)
    assert c.correct == c.robust + c.broken


@pytest.mark.slow
def test_a_sentinels_find_escalates_and_is_reported(digits, digits_module, tmp_path):
    from advkit.models.torch import TorchModel

    masked = TorchModel(Rounded(digits_module).eval(), space=digits.space, classes=10)
    records = play(case_of(digits, masked), tmp_path)
    groups = by_label(records)
    assert any(r.outcome == Outcome.BROKEN for r in groups[Label("small", "sentinel")])
    assert Label("small", "last") in groups
    survivors = {r.id for r in groups[Label("small", "first")] if r.outcome == Outcome.ROBUST}
    for stage in (Label("small", "near"), Label("small", "sentinel")):
        survivors -= {r.id for r in groups[stage] if r.outcome == Outcome.BROKEN}
    assert {r.id for r in groups[Label("small", "last")]} == survivors


def test_what_alarms_a_sentinel():
    watching = Stage(name="a", attack=None, sentinel=True)
    # One row that stood on the very boundary is luck; one that stood well inside, or about which nothing is known, no.
    assert not watching.alarmed([], 500)
    assert not watching.alarmed([0.0005], 500)
    assert not watching.alarmed([0.0005], 1)
    assert not watching.alarmed([0.001, 0.002], 500)
    assert watching.alarmed([0.2], 500)
    assert watching.alarmed([float("inf")], 500)
    assert watching.alarmed([0.001] * 5, 500)
    assert watching.alarmed([0.001, 0.002], 100)
    assert not Stage(name="b", attack=None).alarmed([0.2, 0.3], 2)


def test_a_stage_is_left_out_where_few_rows_still_stand(digits, digits_model, tmp_path):
    @dataclass(frozen=True, kw_only=True)
    class Watched(Small):
        above: float

        def stages(self):
            first, *_ = super().stages()
            return first, Stage(name="watch", attack=Square(queries=10), above=self.above, sentinel=True)

    case = case_of(digits, digits_model, n=60)
    first = by_label(play(case, tmp_path))[Label("small", "first")]
    share = sum(r.outcome == Outcome.ROBUST for r in first) / 60
    assert 0.1 < share < 0.9
    for above, played in ((share - 0.01, True), (share, False)):
        records = play(replace(case, attack=Watched(above=above)), tmp_path / str(played))
        assert (Label("small", "watch") in by_label(records)) == played


def test_no_find_no_escalation(digits, tmp_path):
    from advkit.models.torch import TorchModel

    # A linear victim far from its boundaries: nothing within reach, so nothing for the sentinel either.
    weights = torch.zeros(10, 64)
    far = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    with torch.no_grad():
        far[1].weight.copy_(weights)
        far[1].bias.copy_(torch.tensor([5.0] + [0.0] * 9))
    records = play(case_of(digits, TorchModel(far, space=digits.space, classes=10), n=60), tmp_path)
    assert Label("small", "last") not in by_label(records)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_batch_size_changes_no_record(digits, digits_model, tmp_path, size):
    reference = play(case_of(digits, digits_model, n=60), tmp_path / "reference")
    assert play(case_of(digits, digits_model, n=60, batch_size=size), tmp_path / "other") == reference


@pytest.mark.slow
def test_resume_in_the_middle_of_a_stage(digits, digits_model, tmp_path):
    case = case_of(digits, digits_model, batch_size=16)
    whole = play(case, tmp_path)
    file = tmp_path / "records.jsonl"
    raw = file.read_bytes()
    for part in (0.5, 0.9):
        file.write_bytes(raw[: int(len(raw) * part)])
        assert play(case, tmp_path) == whole
        assert file.read_bytes() == raw


def test_what_a_stage_takes_depends_on_the_rows_alone():
    standing = {f"row/{i}": float(i % 7) for i in range(100)}
    near = taken_by(Stage(name="a", attack=None, share=0.2, least=1), standing, 0)
    assert len(near) == 16
    shuffled = dict(sorted(standing.items(), key=lambda item: hash(item)))
    assert taken_by(Stage(name="a", attack=None, share=0.2, least=1), shuffled, 0) == near
    drawn = taken_by(Stage(name="a", attack=None, share=0.2, least=1, by="sample"), standing, 0)
    assert drawn != taken_by(Stage(name="a", attack=None, share=0.2, least=1, by="sample"), standing, 1)
    assert taken_by(Stage(name="a", attack=None, share=0.01, least=30), standing, 0) >= set()
    assert len(taken_by(Stage(name="a", attack=None, share=0.01, least=30), standing, 0)) == 32


def test_a_fraction_is_taken_in_whole_calls():
    def takes(share, robust, *, together=1, least=1):
        return Stage(name="a", attack=APGDT(together=together), share=share, least=least).takes(robust)

    assert takes(1.0, 37) == 37
    # One row at a time fills no call of 16 rows: 16 are taken for it, or all there are.
    assert takes(0.01, 300) == 16
    assert takes(0.01, 5) == 5
    # Four restarts side by side: 4 rows fill one call, 8 two.
    assert [takes(0.05, robust, together=4) for robust in (60, 100, 130, 300)] == [4, 4, 8, 16]
    # Nine targets side by side fill no call evenly: 10 rows take 90 of 96 places.
    assert takes(0.15, 66, together=9) == 10
    assert takes(0.01, 100, together=9) == 1
    for together in (1, 2, 4, 8, 9):
        for robust in range(1, 200):
            taken = takes(0.15, robust, together=together)
            assert 1 <= taken <= robust
            # No more rows than a call more or less than the fraction, and never fewer rows of more.
            assert taken == robust or abs(taken * together - math.ceil(0.15 * robust) * together) <= 16
            assert taken >= takes(0.15, max(1, robust - 1), together=together)


@pytest.mark.slow
def test_small_runs_cost_as_much_per_row_as_large_ones():
    """All rows that go through the model, padding and verdicts included; a backward pass costs two forward ones."""
    cost = {}
    for n in (100, 500):
        case = api.resolve("thorough", "none", "fashion-mnist", MLP, EPS, device="cpu", n=n)
        done = our_run(case)
        cost[n] = (done.forwards + 2 * done.backwards) / n
        assert len(done.broken) >= 0.2 * n
    assert cost[100] <= 1.25 * cost[500]


@pytest.mark.slow
def test_a_suites_revision_is_in_the_report_and_names_the_run(digits, digits_model):
    @dataclass(frozen=True, kw_only=True)
    class Later(Small):
        revision: ClassVar[int] = 2

    first, later = (
        api.evaluate(attack, task=digits, model=digits_model, threat_model=EPS, n=20) for attack in (Small(), Later())
    )
    assert first.to_dict()["protocol"]["revision"] == 1
    assert later.to_dict()["protocol"]["revision"] == 2
    assert "revision" not in api.evaluate("fgsm", task=digits, model=digits_model, n=5).to_dict()["protocol"]
    case = case_of(digits, digits_model)
    assert "revision" not in case.config()  # run folders of before are resumed
    assert replace(case, attack=Later()).config() == {**case.config(), "revision": 2}
    assert (Lean.revision, Thorough.revision, AutoAttack.revision) == (2, 2, 1)


@pytest.mark.parametrize("suite", [Lean(), pytest.param(Thorough(), marks=pytest.mark.slow)])
def test_the_shipped_suites(suite, digits, digits_model, tmp_path):
    stages = suite.stages()
    assert len({stage.name for stage in stages}) == len(stages)
    usual = [stage for stage in stages if stage.when == "always"]
    assert stages[: len(usual)] == tuple(usual)
    assert usual[0].share == 1
    # What watches comes after what it watches; the gradients' own watchman walks along the boundary, the others are
    # black boxes.
    watching = [stage.sentinel for stage in usual]
    assert any(watching)
    assert watching == sorted(watching)
    for stage in usual:
        blind = stage.attack.needs == Access.SCORES
        assert stage.sentinel == (blind or isinstance(stage.attack, FABT))
    assert sum(stage.attack.needs == Access.SCORES for stage in usual) == 2
    records = {}
    for size in (7, 1000):
        case = api.resolve(suite, "none", digits, digits_model, EPS, device="cpu", n=60, batch_size=size)
        records[size] = play(case, tmp_path / str(size))
    assert records[7] == records[1000]
    groups = by_label(records[7])
    standing = {r.id for r in groups[stage_of(case, usual[0])]}
    for stage in usual:
        if len(standing) <= stage.above * 60:
            assert stage_of(case, stage) not in groups
            continue
        group = groups[stage_of(case, stage)]
        taken = {r.id for r in group}
        assert taken <= standing
        assert len(taken) == stage.takes(len(standing))
        standing -= {r.id for r in group if r.outcome in (Outcome.WRONG, Outcome.BROKEN)}


def test_thorough_takes_at_least_what_lean_takes():
    lean, thorough = ({stage.name: stage for stage in suite.stages()} for suite in (Lean(), Thorough()))
    for name, stage in lean.items():
        if stage.when == "always" and not stage.sentinel:
            more = thorough[name]
            assert more.share >= stage.share
            assert more.attack.steps * max(1, getattr(more.attack, "targets", 1)) * more.attack.restarts >= (
                stage.attack.steps * max(1, getattr(stage.attack, "targets", 1)) * stage.attack.restarts
            )


def test_suites_refuse_balls_they_do_not_serve(digits, digits_model):
    with pytest.raises(UsageError, match="L0"):
        api.evaluate("lean", task=digits, model=digits_model, threat_model="l0:eps=3", n=5)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["lean", "thorough"])
def test_every_stage_plays_in_l1(digits, digits_model, tmp_path, suite):
    case = api.resolve(suite, "none", digits, digits_model, "l1:eps=1.5", device="cpu", n=50)
    records = play(case, tmp_path)
    groups = by_label(records)
    assert {stage_of(case, stage) for stage in case.attack.stages() if stage.when == "always"} <= set(groups)
    assert not any(r.outcome in (Outcome.ERROR, Outcome.INVALID) for r in records)
    assert not any("outside_threat_model" in r.notes for r in records)
    assert all(r.distance <= 1.5 * (1 + 1e-6) for r in records)
    apgd = play(replace(case, attack=APGDCE(steps=100), label=Label("apgd-ce")), tmp_path / "apgd")
    assert 0 < count(records).robust <= count(apgd).robust


def test_the_report_counts_cumulatively(digits, digits_model):
    report = api.evaluate(Small(), task=digits, model=digits_model, threat_model=EPS, n=80)
    attacks = report.attacks
    falling = [a["cumulative_robust_accuracy"]["numerator"] for a in attacks]
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] == report.metrics["robust_accuracy"]["numerator"]
    assert report.to_dict()["protocol"]["aggregation"] == "worst_case_per_sample"


@pytest.mark.slow
def test_autoattack_agrees_with_the_reference(digits, digits_model, tmp_path):
    reference = pytest.importorskip("pyautoattack")
    case = api.resolve("thorough", "none", digits, digits_model, EPS, device="cpu", n=120)
    records = play(case, tmp_path)
    batch = next(iter(digits.batches(120)))
    peer = reference.AutoAttack(digits_model.module, norm="Linf", eps=0.1, version="standard", seed=0)
    with torch.random.fork_rng(devices=[]):
        found, _ = peer.run_standard_evaluation(batch.x, batch.labels, batch_size=120)
    with torch.no_grad():
        theirs = (digits_model(found).argmax(1) == batch.labels) & (digits_model(batch.x).argmax(1) == batch.labels)
    assert count(records).robust <= int(theirs.sum())


@pytest.mark.slow
def test_gradients_that_mislead_in_l2_lead_from_outside(tmp_path):
    """Trained in Linf; in L2 the reference breaks 24 of 400 rows by FAB and Square after its gradient attacks."""

    @dataclass(frozen=True, kw_only=True)
    class Inside(Thorough):
        def stages(self):
            return tuple(each for each in super().stages() if each.when == "always" and "wide" not in each.name)

    found = {}
    for suite in (Inside(), Thorough()):
        case = api.resolve(suite, task="fashion-mnist", model="zoo:fashion-mnist-cnn-trades", threat_model="l2:eps=1",
                           n=300, device="cpu")  # fmt: skip
        records = play(case, tmp_path / type(suite).__name__)
        groups = by_label(records)
        fell = [r.closeness for r in groups[replace(case.label, stage="near-fab")] if r.outcome == Outcome.BROKEN]
        (watchman,) = [stage for stage in suite.stages() if stage.name == "near-fab"]
        found[type(suite)] = (count(records).robust, len(fell), watchman.alarmed([0.0] * len(fell), 150))
    # Runs from inside leave rows to FAB, which notices; runs from outside leave none.
    assert found[Inside][1] >= 3
    assert found[Inside][2]
    assert not found[Thorough][2]
    assert found[Thorough][0] <= found[Inside][0] - 10


@pytest.mark.slow
def test_a_finished_suite_has_as_many_records_as_were_expected(digits, digits_model, digits_module, tmp_path):
    from advkit.evaluation.run.store import Store
    from advkit.evaluation.scenarios import scenario_of
    from advkit.models.torch import TorchModel

    masked = TorchModel(Rounded(digits_module).eval(), space=digits.space, classes=10)
    for index, model in enumerate((digits_model, masked)):
        case = case_of(digits, model)
        expected = scenario_of(case).expected
        records = play(case, tmp_path / str(index))
        held = {Store.key(r.made_by, r.id): r for r in records}
        assert (Label("small", "last") in by_label(records)) == (model is masked)
        assert expected(case, held) == len(records)
        first = {key: r for key, r in held.items() if r.stage == "first"}
        # before its end a suite is expected to fell no more, so that without an escalation there are never more records
        assert expected(case, {}) >= expected(case, first) > len(first)
        assert model is masked or expected(case, first) >= len(records)
