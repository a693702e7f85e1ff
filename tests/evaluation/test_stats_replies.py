"""hit@k, intervals over prompts and corrected rates: closed forms, exhaustive counts, simulation with known truth."""

from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest

from advkit.core.errors import UsageError
from advkit.evaluation.stats import clopper_pearson
from advkit.evaluation.stats_replies import Card, clustered_interval, corrected_rate, hit_at_k, hit_rate, usual_ks


def test_hit_at_k_is_the_share_of_all_choices_of_k_replies_with_a_hit() -> None:
    for replies in range(1, 7):
        for hits in range(replies + 1):
            outcomes = [True] * hits + [False] * (replies - hits)
            for k in range(1, replies + 1):
                chosen = [any(each) for each in combinations(outcomes, k)]
                assert hit_at_k(hits, replies, k) == pytest.approx(sum(chosen) / len(chosen), abs=1e-15)


def test_hit_at_k_is_unbiased_and_the_usual_formula_is_not() -> None:
    replies, p = 8, 0.3
    weights = [math.comb(replies, c) * p**c * (1 - p) ** (replies - c) for c in range(replies + 1)]
    for k in (1, 3, 8):
        truth = 1 - (1 - p) ** k
        expected = sum(w * hit_at_k(c, replies, k) for c, w in enumerate(weights))
        assert expected == pytest.approx(truth, abs=1e-12)
        if k > 1:
            assert sum(w * (1 - (1 - c / replies) ** k) for c, w in enumerate(weights)) < truth - 0.01


def test_hit_at_1_is_the_mean_and_at_n_the_share_of_prompts_with_a_hit() -> None:
    assert hit_rate([0, 2, 5], 5, 1)["value"] == pytest.approx(7 / 15)
    assert hit_rate([0, 2, 5], 5, 5)["value"] == pytest.approx(2 / 3)
    assert hit_rate([], 5, 1) == {"value": None, "unit": "fraction", "n": 0, "replies": 5, "ci": None}
    assert (usual_ks(1), usual_ks(5), usual_ks(25)) == ((1,), (1, 2, 5), (1, 2, 5, 10, 20, 25))


@pytest.mark.parametrize(("hits", "replies", "k"), [(3, 2, 1), (-1, 2, 1), (1, 2, 3), (1, 2, 0)])
def test_impossible_counts_are_refused(hits: int, replies: int, k: int) -> None:
    with pytest.raises(UsageError, match=f"hit@{k} of {hits} hits in {replies} replies"):
        hit_at_k(hits, replies, k)


def test_values_that_are_no_fractions_are_refused() -> None:
    for values in ([0.5, 1.2], [-0.1], [], [float("nan")]):
        with pytest.raises(UsageError):
            clustered_interval(values)


def test_the_interval_is_that_of_student_over_the_prompts_and_one_more() -> None:
    from scipy import stats

    values = [0.2, 0.6, 0.4, 1.0, 0.0, 0.8]
    found = clustered_interval(values, 0.9)
    for limit, more, side in ((found.low, 0.0, 0), (found.high, 1.0, 1)):
        both = [*values, more]
        student = stats.t.interval(0.9, len(both) - 1, np.mean(both), stats.sem(both))
        assert limit == pytest.approx(student[side], abs=1e-12)
    turned = clustered_interval([1 - value for value in values], 0.9)
    assert (turned.low, turned.high) == pytest.approx((1 - found.high, 1 - found.low))
    assert clustered_interval([1.0] * 40).low == pytest.approx(clopper_pearson(40, 40).low, abs=0.02)


def interval_limits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`clustered_interval` of many runs at once; the first ones are held against the function itself."""
    from scipy import special

    reach = -special.stdtrit(values.shape[1], 0.025)
    limits = []
    for more, side in ((0.0, -1), (1.0, 1)):
        both = np.concatenate([values, np.full((len(values), 1), more)], 1)
        limits.append(np.clip(both.mean(1) + side * reach * both.std(1, ddof=1) / math.sqrt(both.shape[1]), 0, 1))
    for low, high, own in zip(*limits, values[:5], strict=False):
        found = clustered_interval(own.tolist())
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)
    return limits[0], limits[1]


@pytest.mark.parametrize("prompts", [5, 10, *(pytest.param(many, marks=pytest.mark.slow) for many in (3, 24, 100))])
def test_intervals_over_prompts_cover(prompts: int) -> None:
    """Prompts of every degree of likeness, many of one kind and few of another among them."""
    rng = np.random.default_rng(prompts)
    runs = 2000
    covered = {}
    for replies, rate, likeness in product((5, 25), (0.02, 0.1, 0.5, 0.95), (0.0, 0.1, 0.4, 0.8, 1.0)):
        for kind in ("beta", "mixture"):
            if kind == "mixture":  # a share `likeness` of the prompts always or never falls
                p = np.where(rng.random((runs, prompts)) < likeness, rng.random((runs, prompts)) < rate, rate)
            elif 0 < likeness < 1:
                odds = (1 - likeness) / likeness
                p = rng.beta(rate * odds, (1 - rate) * odds, (runs, prompts))
            else:
                continue
            hits = rng.binomial(replies, p)
            for k in (1, 2, replies):
                if kind == "mixture":
                    truth = likeness * rate + (1 - likeness) * (1 - (1 - rate) ** k)
                else:
                    a, b = rate * odds, (1 - rate) * odds
                    truth = 1 - math.prod((b + i) / (a + b + i) for i in range(k))
                table = np.array([hit_at_k(c, replies, k) for c in range(replies + 1)])
                low, high = interval_limits(table[hits])
                inside = (low <= truth + 1e-12) & (truth <= high + 1e-12)
                covered[replies, rate, likeness, kind, k] = inside.mean()
    least = min(covered, key=lambda case: covered[case])
    assert covered[least] >= 0.94, (least, covered[least])


def test_a_corrected_rate_by_hand() -> None:
    card = Card(answers=20, others=20, false_negatives=2, false_positives=4)
    assert (card.sensitivity, card.specificity) == (0.9, 0.8)
    entry = corrected_rate([1.0] * 6 + [0.0] * 6, card)
    assert entry["value"] == pytest.approx((0.5 + 0.8 - 1) / 0.7)
    assert entry["ci"]["low"] < entry["value"] < entry["ci"]["high"]
    assert corrected_rate([0.0] * 12, card)["value"] == 0.0  # fewer than the false positives alone
    assert corrected_rate([1.0] * 12, card)["value"] == 1.0
    assert corrected_rate([], card)["value"] is None
    guesser = Card(answers=10, others=10, false_negatives=5, false_positives=5)
    assert corrected_rate([1.0, 0.0], guesser)["value"] is None


def test_a_judge_who_never_errs_changes_no_rate_and_a_large_card_leaves_the_prompts_interval() -> None:
    values = [1.0] * 15 + [0.0] * 25
    entry = corrected_rate(values, Card(10**6, 10**6, 0, 0))
    plain = clustered_interval(values)
    assert entry["value"] == pytest.approx(15 / 40)
    assert (entry["ci"]["low"], entry["ci"]["high"]) == pytest.approx((plain.low, plain.high), abs=0.01)
    small = corrected_rate(values, Card(8, 8, 0, 0))["ci"]
    assert small["high"] - small["low"] > entry["ci"]["high"] - entry["ci"]["low"] + 0.05


@pytest.mark.parametrize("counts", [(0, 5, 0, 0), (5, 0, 0, 0), (5, 5, 6, 0), (5, 5, 0, -1)])
def test_impossible_cards_are_refused(counts: tuple[int, int, int, int]) -> None:
    with pytest.raises(UsageError, match="a card with"):
        Card(*counts)


def coverage(prompts: int, labelled: int, truth: float, errors: tuple[float, float], replies: int, runs: int) -> float:
    """How often the corrected interval holds the true rate of judges whose errors are known."""
    rng = np.random.default_rng([prompts, labelled, int(1000 * truth), replies])
    sensitivity, specificity = errors
    inside = 0
    for run in range(runs):
        p = rng.beta(1.5 * truth, 1.5 * (1 - truth), prompts)
        gave = rng.binomial(replies, p)
        said = (rng.binomial(gave, sensitivity) + rng.binomial(replies - gave, 1 - specificity)) / replies
        missed, invented = rng.binomial(labelled, 1 - sensitivity), rng.binomial(labelled, 1 - specificity)
        ci = corrected_rate(said.tolist(), Card(labelled, labelled, int(missed), int(invented)), seed=run)["ci"]
        inside += ci is None or ci["low"] <= truth <= ci["high"]
    return inside / runs


def test_a_corrected_rate_covers_where_the_judges_own_rate_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advkit.evaluation.stats_replies.DRAWS", 1000)
    assert coverage(100, 100, 0.3, (0.8, 0.9), 1, 200) >= 0.94
    rng = np.random.default_rng(0)  # what the judge alone says is .31 * .8 + .7 * .1 = .31 of .1 of truth
    inside = 0
    for _ in range(200):
        gave = rng.random(100) < 0.1
        ci = clustered_interval(np.where(gave, rng.random(100) < 0.8, rng.random(100) < 0.3).astype(float).tolist())
        inside += ci.low <= 0.1 <= ci.high
    assert inside / 200 < 0.2


@pytest.mark.slow
def test_corrected_rates_cover_for_judges_good_and_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advkit.evaluation.stats_replies.DRAWS", 1000)
    settings = product((24,), (10, 22, 100), (0.02, 0.3, 0.9), ((0.8, 0.9), (0.98, 0.7)), (1, 5))
    covered = {each: coverage(*each, runs=300) for each in settings}
    least = min(covered, key=lambda each: covered[each])
    assert covered[least] >= 0.94, (least, covered[least])
