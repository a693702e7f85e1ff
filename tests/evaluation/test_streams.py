"""Streams in the harness: budgets and finality are enforced, and figures follow from the records."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.nn import functional

import advkit
from advkit.attacks.stream.ratios import optimal_policy, virtual_plus_ratio, virtual_ratio
from advkit.attacks.stream.selectors import SELECTORS, select, selector
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Outcome
from advkit.core.rng import RowRng
from advkit.evaluation import api
from advkit.evaluation.execute import run
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.run.speed import planned_passes
from advkit.evaluation.run.store import read_records
from advkit.evaluation.scenarios.stream import (
    Items,
    Submitted,
    Violation,
    candidates_of,
    compare_selectors,
    feed,
    noise_study,
    shuffled,
    stream_metrics,
    streams,
    submit,
    top,
)

ATTACK = "online:inner=[pgd:steps=5],k=5"
SOURCES = "sources=zoo:digits-public-mlp,permutations=100"


def played(case, folder):
    store = open_store(case, folder)
    try:
        run(case, store)
    finally:
        store.close()
    return api.in_order(case, list(store))


def case_of(task, model, attack=ATTACK, threat=f"online:{SOURCES}", **more):
    return api.resolve(attack, "none", task, model, threat, device="cpu", n=more.pop("n", 60), **more)


@pytest.fixture(scope="module")
def items():
    rng = np.random.default_rng(0)
    true = rng.normal(size=80)
    return Items(true + 0.5 * rng.normal(size=80), np.exp(true), true > 0, rng.random(80) < 0.9)


def test_figures_by_hand():
    items = Items(
        np.array([4.0, 3.0, 2.0, 1.0]),
        np.array([2.0, 5.0, 1.0, 3.0]),
        np.array([True, True, False, False]),
        np.array([True, False, True, False]),
    )
    found = Submitted(2, np.array([[0, 1], [3, -1], [-1, -1], [2, 3]]))
    assert found.competitive_ratio(items).tolist() == [0.5, 0.5, 0.0, 0.5]  # the best two are items 1 and 3
    assert found.value_ratio(items).tolist() == [7 / 8, 3 / 8, 0.0, 4 / 8]
    assert found.fooled(items).tolist() == [2, 0, 0, 0]
    assert found.selected().tolist() == [2, 1, 0, 2]
    # untouched, items 0 and 2 are right; item 0 falls, item 1 was wrong before, item 3 turns right
    assert found.accuracy(items).tolist() == [1 / 4, 3 / 4, 2 / 4, 3 / 4]
    assert Submitted(1, np.array([[0]])).value_ratio(replace(items, true_value=np.zeros(4))) is None


def test_ties_go_to_the_first():
    assert top(np.array([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]


def test_orders_are_permutations_and_keep_to_their_seed():
    order = shuffled(streams(3, 50), 30)
    assert (np.sort(order, axis=1) == np.arange(30)).all()
    assert (shuffled(streams(3, 20), 30) == order[:20]).all()
    assert (shuffled(streams(4, 50), 30) != order).any()
    # every item comes first about equally often
    counts = np.bincount(shuffled(streams(0, 6000), 6)[:, 0], minlength=6)
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(6000 * 5 / 36)


@pytest.mark.parametrize("name", [name for name, kind in SELECTORS.items() if kind.online])
def test_playing_item_by_item_gives_the_same(items, name):
    @dataclass(frozen=True)
    class Mine:
        """The same rule, of which the harness knows nothing."""

        rule: Any

        def start(self, length, budget, rng=None):
            return self.rule.start(length, budget, rng)

    rule = selector(name, exhaust=True)
    assert (submit(Mine(rule), items, 6, orders=30).picked == submit(rule, items, 6, orders=30).picked).all()


def test_best_items_do_not_depend_on_the_order(items):
    """Shuffling positions and picks together leaves the ratio of every order as it is."""
    found = submit(selector("offline"), replace(items, value=items.true_value), 7, orders=40)
    assert (found.competitive_ratio(items) == 1).all()
    assert found.value_ratio(items) == pytest.approx(np.ones(40))
    assert {frozenset(row) for row in found.picked.tolist()} == {frozenset(np.flatnonzero(top(items.true_value, 7)))}


@dataclass(frozen=True)
class Cheat:
    """Breaks the rules of streams in some way."""

    needs: ClassVar[Access] = Access.NOTHING
    how: str = "greedy"
    from_order: int = 0
    k: ClassVar[int | None] = None

    def __call__(self, oracle, x, goal, ball, rng, /):
        return ball.project(x + 0.05, x)

    def start(self, length, budget, rng=None):
        fair = rng is not None and float(rng.at("fair").uniform(torch.empty(1, 1))) < self.from_order / 10
        return _Cheating(self, "none" if fair else self.how)


class _Cheating:
    calls = 0

    def __init__(self, attack, how):
        self.how = how

    def select(self, value, t):
        type(self).calls += 1
        if self.how == "greedy":
            return True
        if self.how == "waverer":
            return type(self).calls % 17 == 0
        if self.how == "later":
            return "ask me later"
        return t < 2


@pytest.mark.parametrize(
    ("how", "words"), [("greedy", "more than its 5"), ("waverer", "otherwise"), ("later", "final")]
)
def test_rules_are_enforced(how, words):
    with pytest.raises(Violation, match=words):
        feed(Cheat(how=how).start, np.arange(40.0), 5, streams(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["greedy", "waverer", "later"])
@pytest.mark.parametrize("from_order", [0, 5])
def test_a_cheat_ends_in_error_records_and_wins_nothing(digits, digits_model, tmp_path, how, from_order):
    case = case_of(digits, digits_model, Cheat(how=how, from_order=from_order), f"online:k=5,{SOURCES}", n=40)
    records = played(case, tmp_path)
    handed = [r for r in records if r.stage == "submitted"]
    assert handed or how == "later"
    assert all(r.outcome == Outcome.ERROR and not r.reached and "selector" in r.message for r in handed)
    found = submit(case.attack, Items.of(candidates_of(case, records)), 5, orders=100)
    assert found.void
    assert all((found.picked[m] == -1).all() for m in found.void)
    metrics = stream_metrics(case, records)
    if from_order == 0:
        assert metrics["stream_fool_rate"]["value"] == 0
        assert metrics["stream_selected"]["value"] == 0


@pytest.mark.slow
def test_an_honest_selector_of_ones_own(digits, digits_model, tmp_path):
    case = case_of(digits, digits_model, Cheat(how="honest"), f"online:k=5,{SOURCES}", n=40)
    records = played(case, tmp_path)
    assert sum(r.stage == "submitted" for r in records) == 2
    assert not any(r.outcome == Outcome.ERROR for r in records)
    assert stream_metrics(case, records)["stream_selected"]["value"] == 2


def test_records_hold_values_and_submissions(digits, digits_model, tmp_path):
    case = case_of(digits, digits_model, keep=60)
    records = played(case, tmp_path)
    candidates = [r for r in records if r.made_by == case.label]
    handed = [r for r in records if r.made_by == replace(case.label, stage="submitted")]
    assert len(candidates) == 60
    assert len(handed) == 5

    from advkit.evaluation.run.store import Store, read_examples

    examples = read_examples(tmp_path)
    returned = torch.stack([examples[Store.key(case.label, r.id)][1] for r in candidates])
    labels = torch.tensor([r.label for r in candidates])
    with torch.no_grad():
        seen = functional.cross_entropy(case.surrogates[0][1](returned).double(), labels, reduction="none")
        answer = digits_model(returned)
    true = functional.cross_entropy(answer.double(), labels, reduction="none")
    assert [r.measures["value"] for r in candidates] == pytest.approx(seen.tolist(), rel=1e-4, abs=1e-6)
    assert [r.measures["true_value"] for r in candidates] == pytest.approx(true.tolist(), rel=1e-4, abs=1e-6)
    assert [r.reached for r in candidates] == (answer.argmax(1) != labels).tolist()

    # what was handed in: the picks of the first order, made by hand
    order = shuffled(streams(case.seed, 1), 60)
    value = np.array([r.measures["value"] for r in candidates])
    positions = select("virtual+", value[order], 5, exhaust=True)[0]
    ids = [candidates[order[0, t]].id for t in positions]
    assert {r.id: int(r.measures["position"]) for r in handed} == dict(zip(ids, positions.tolist(), strict=True))
    # and it was attacked and judged once more, bit for bit as the candidate was
    by_id = {r.id: r for r in candidates}
    for record in handed:
        assert record.measures["true_value"] == by_id[record.id].measures["true_value"]
        assert (record.reached, record.distance) == (by_id[record.id].reached, by_id[record.id].distance)
        _, z = examples[Store.key(record.attack, record.id)]
        assert torch.equal(z, examples[Store.key(case.label, record.id)][1])

    # the figures, by asking the target about the submissions of every order
    metrics = stream_metrics(case, records)
    order = shuffled(streams(case.seed, 100), 60)
    picks = np.take_along_axis(order, select("virtual+", value[order], 5, exhaust=True), 1)
    wrong = np.array(
        [(digits_model(returned[row]).argmax(1) != labels[row]).sum().item() for row in torch.from_numpy(picks)]
    )
    assert metrics["stream_fooled"]["value"] == pytest.approx(wrong.mean())
    assert metrics["stream_fool_rate"]["value"] == pytest.approx(wrong.mean() / 5)
    best = set(torch.topk(true, 5).indices.tolist())
    assert metrics["stream_competitive_ratio"]["value"] == pytest.approx(
        np.mean([len(best & set(row)) / 5 for row in picks.tolist()])
    )
    assert metrics["stream_value_ratio"]["value"] == pytest.approx(
        float(np.mean([true[row].sum() / true[list(best)].sum() for row in torch.from_numpy(picks)]))
    )
    assert metrics["stream_naive_fool_rate"]["numerator"] == sum(r.reached for r in candidates)


def test_white_box_is_the_deterministic_setting(digits, digits_model, tmp_path):
    case = case_of(digits, digits_model, threat="online:permutations=50")
    records = played(case, tmp_path)
    items = Items.of(candidates_of(case, records))
    assert (items.value == items.true_value).all()
    assert stream_metrics(case, records)["stream_source_offline_competitive_ratio"]["value"] == 1
    # candidates are pushed on after they fool the model: all rows spend all steps, wrong ones too
    assert {r.backwards for r in records} == {5}


@pytest.mark.parametrize("batch_size", [7, 60])
def test_records_do_not_depend_on_the_batch(digits, digits_model, tmp_path, batch_size):
    one = played(case_of(digits, digits_model, batch_size=16), tmp_path / "a")
    assert played(case_of(digits, digits_model, batch_size=batch_size), tmp_path / "b") == one


@pytest.mark.slow
def test_resumed_is_uninterrupted(digits, digits_model, tmp_path):
    case = case_of(digits, digits_model, batch_size=16)
    whole = played(case, tmp_path / "a")
    lines = (tmp_path / "a" / "records.jsonl").read_text().splitlines(keepends=True)
    for kept in (20, 60, 62):
        folder = tmp_path / str(kept)
        open_store(case, folder).close()
        (folder / "records.jsonl").write_text("".join(lines[:kept]))
        assert played(case, folder) == whole


@dataclass(frozen=True, kw_only=True)
class Escapes:
    """Leaves the ball on every other row."""

    needs: ClassVar[Access] = Access.NOTHING

    def __call__(self, oracle, x, goal, ball, rng, /):
        return x + (torch.arange(len(x)) % 2).view(-1, 1, 1, 1)


def test_inadmissible_candidates_are_never_wins(digits, digits_model, tmp_path):
    from advkit.attacks.stream.online import Online

    case = case_of(digits, digits_model, Online(inner=Escapes(), k=5), n=32, batch_size=32)
    records = played(case, tmp_path)
    invalid = [r for r in records if r.outcome == Outcome.INVALID]
    assert invalid
    found = Items.of(candidates_of(case, records))
    at = {r.id: i for i, r in enumerate(candidates_of(case, records))}
    assert not any(found.fooled[at[r.id]] for r in invalid)


@pytest.mark.slow
def test_report_and_command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from advkit.cli.group import app

    monkeypatch.chdir(tmp_path)
    arguments = [
        "evaluate", "--task", "digits", "--attack", "online:inner=[fgsm],selector=virtual+,k=10", "-n", "100",
        "--threat-model", "online:sources=zoo:digits-public-mlp,permutations=50", "--out", "run", "--json",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["threat_model"]["details"]["k"] == 10
    assert report["threat_model"]["knowledge"] == "transfer"
    metrics = report["metrics"]
    assert metrics["stream_fool_rate"]["value"] * 10 == pytest.approx(metrics["stream_fooled"]["value"])
    assert metrics["stream_selected"]["value"] == 10
    assert metrics["stream_competitive_ratio"]["ci"]["method"] == "bootstrap_percentile"
    assert len(read_records(tmp_path / "run" / "records.jsonl")) == 110
    from advkit.evaluation.report.document import Report

    said = Report.load(tmp_path / "run" / "report.json").verdict()
    assert said.startswith(f"{100 * metrics['stream_fool_rate']['value']:.1f} %")
    assert "If every sample were submitted" in said


@pytest.mark.slow
def test_the_threat_model_may_be_left_out():
    report = advkit.evaluate("online:inner=fgsm,k=3", task="digits", n=40, device="cpu")
    assert report.to_dict()["threat_model"]["name"] == "online"
    assert report.metrics["stream_selected"]["value"] == 3


@pytest.mark.parametrize(
    ("attack", "threat", "goal", "word"),
    [
        ("pgd", "online:k=3", None, "online:inner="),
        ("online:k=3", "linf:eps=0.1", None, "--threat-model online"),
        ("online", "online", None, "name k"),
        ("online:k=3", "online:k=4", None, "say k once"),
        ("online:k=41", None, None, "at most as many as items"),
        ("online:k=20", None, None, "expected budget <= observe"),
        ("online:k=3", None, "targeted:how=next", "another"),
        ("online:k=3", "online:inner=[linf:eps=0.1,access=scores]", None, "needs gradients"),
    ],
)
def test_mistakes_are_said_before_anything_is_spent(attack, threat, goal, word):
    with pytest.raises(UsageError, match=word):
        advkit.evaluate(attack, task="digits", threat_model=threat, goal=goal, n=40, device="cpu")


def test_passes_planned_are_the_inner_attacks():
    from advkit.attacks import ATTACKS

    assert planned_passes(ATTACKS.build("online:inner=[pgd:steps=7,restarts=2],k=1")) == 14


@pytest.mark.slow
def test_noise_study():
    orders = 4000
    # without noise: the exact ratios
    for name, exact in (
        ("virtual+", virtual_plus_ratio(100, 5, 36)),
        ("virtual", virtual_ratio(100, 36)),
        ("optimal-dp", optimal_policy(100, 5).ratio),
    ):
        mean, error = noise_study(selector(name), 5, 0.0, orders=orders)
        assert abs(mean - exact) <= 4 * error
    # measured independently at t = 37: sigma, k -> virtual+, virtual, offline on the noisy values
    for sigma, k, expected in (
        (1, 1, (0.294, 0.292, 0.717)),
        (5, 10, (0.506, 0.348, 0.806)),
        (10, 10, (0.444, 0.307, 0.650)),
    ):
        for name, value in zip(("virtual+", "virtual", "offline"), expected, strict=True):
            settings = {} if name == "offline" else {"observe": 37}
            mean, error = noise_study(selector(name, **settings), k, float(sigma), orders=orders)
            assert abs(mean - value) <= 4 * error + 0.003
    falling = [
        noise_study(selector("virtual+"), 10, sigma, orders=2000)[0] for sigma in (0.0, 1.0, 5.0, 10.0, 20.0, 80.0)
    ]
    assert all(a >= b - 0.005 for a, b in pairwise(falling))
    # values drowned in noise: as many hits as blind picks have
    mean, error = noise_study(selector("virtual+", exhaust=True), 10, 1e7, orders=orders)
    assert abs(mean - 10 / 100) <= 4 * error
    with pytest.raises(UsageError):
        noise_study(selector("virtual"), 1, -1.0)


@pytest.mark.slow
def test_random_picks_k_of_n(items):
    table = compare_selectors(items, 8, orders=4000)
    assert table["random"]["fool_rate"] == pytest.approx(
        items.fooled.mean(), abs=4 * table["random"]["fool_rate_error"]
    )
    assert table["random"]["competitive_ratio"] == pytest.approx(8 / 80, abs=0.01)
    assert {each["selected"] for each in table.values()} == {8.0}
    assert table["optimal-dp"]["competitive_ratio"] > table["virtual+"]["competitive_ratio"] > 3 / 10


def test_an_order_is_the_same_however_many_are_played():
    first, more = RowRng.from_ids(0, ["order-0"]), streams(0, 9)
    assert (shuffled(first, 12)[0] == shuffled(more, 12)[0]).all()
