"""Online selectors: streaming against vectorised, Monte Carlo against exact ratios, these against the literature."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise, permutations

import numpy as np
import pytest
import torch

from advkit.attacks.stream.ratios import (
    final_chance,
    optimal_policy,
    random_ratio,
    single_reference_limit,
    single_reference_ratio,
    single_reference_threshold,
    virtual_limit,
    virtual_plus_limit,
    virtual_plus_observed,
    virtual_plus_ratio,
    virtual_plus_threshold,
    virtual_ratio,
)
from advkit.attacks.stream.selectors import SELECTORS, select, selector, stream_by_stream
from advkit.core.errors import UnknownName, UsageError
from advkit.core.rng import RowRng

ONLINE = [name for name, kind in SELECTORS.items() if kind.online]
WATCHING = ("virtual", "virtual+", "optimistic", "single-ref")


def streams(orders, seed=0):
    return RowRng.from_ids(seed, [f"stream-{m}" for m in range(orders)])


@cache
def orders(count, n, seed=0):
    return np.argsort(streams(count, seed).uniform(torch.empty((count, n), dtype=torch.float64)).numpy(), axis=1)


def hits(picked, values, k):
    """Of distinct values 0..n-1, the share of the k largest that each stream's picks hold."""
    taken = np.where(picked >= 0, np.take_along_axis(values, np.maximum(picked, 0), 1), -1)
    return (taken >= values.shape[1] - k).sum(1) / k


def within(measured, exact, errors=4):
    """Whether a Monte Carlo mean lies within four standard errors of the exact value."""
    error = measured.std(ddof=1) / math.sqrt(len(measured))
    return abs(measured.mean() - exact) <= errors * error + 1e-12


@pytest.mark.parametrize("name", ONLINE)
def test_streaming_and_vectorised_agree_index_by_index(name):
    rng = np.random.default_rng(7)
    for k in range(1, 11):
        for exhaust in (False, True):
            count, n = 60, int(rng.integers(k + 12, 40))
            values = rng.integers(0, 18, (count, n)).astype(float)  # many ties
            values[::5] = rng.normal(size=values[::5].shape)
            values[1::7, ::3] = -np.inf
            settings = {"observe": int(rng.integers(k, n))} if name in WATCHING else {}
            rule = selector(name, exhaust=exhaust, **settings)
            fast = rule.select(values, k, streams(count))
            slow = stream_by_stream(rule, values, k, streams(count))
            assert (fast == slow).all()
            found = fast >= 0
            assert (np.diff(np.where(found, fast, n + np.arange(k)), axis=1) > 0).all()  # increasing, padding last
            assert not exhaust or found.all()
            first = settings.get("observe", 0)
            assert (fast[found & (fast < n - k)] >= first).all()  # before t only what exhaust forces


def test_optimal_dp_keeps_step_with_a_budget_beyond_the_stream_start():
    """More submissions than items seen so far: ranks among few."""
    values = np.random.default_rng(1).integers(0, 6, (200, 8)).astype(float)
    for k in range(1, 9):
        rule = selector("optimal-dp")
        assert (rule.select(values, k) == stream_by_stream(rule, values, k)).all()


@pytest.mark.slow
@pytest.mark.parametrize("k", range(1, 11))
def test_monte_carlo_is_exact(k):
    n, count = 100, 20_000
    values = orders(count, n)
    for t in (37, 50):
        virtual = hits(select("virtual", values, k, observe=t), values, k)
        assert within(virtual, virtual_ratio(n, t))
    plus = hits(select("virtual+", values, k, observe=37), values, k)
    assert within(plus, virtual_plus_ratio(n, k, 37))
    for t, r in ((30, 1), (37, 3)):
        single = hits(select("single-ref", values, k, observe=t, reference=r), values, k)
        assert within(single, single_reference_ratio(n, k, t, r))
    best = hits(select("optimal-dp", values, k), values, k)
    assert within(best, optimal_policy(n, k).ratio)
    blind = hits(select("random", values, k, rng=streams(count)), values, k)
    assert within(blind, random_ratio(n, k))
    assert (hits(select("offline", values, k), values, k) == 1).all()
    for name in WATCHING:
        other = hits(select(name, values, k), values, k)
        assert other.mean() <= optimal_policy(n, k).ratio + 4 * other.std() / math.sqrt(count)


def test_monte_carlo_of_the_specification():
    """n = 100, no exhaust: single-ref and optimistic as measured independently (standard errors up to .0024)."""
    values = orders(20_000, 100)
    for k, optimistic, single in ((2, 0.4211, 0.4152), (5, 0.4807, 0.5083), (10, 0.5154, 0.5779)):
        assert hits(select("optimistic", values, k, observe=37), values, k).mean() == pytest.approx(
            optimistic, abs=0.01
        )
        t = math.floor(single_reference_threshold(k).alpha * 100 + 1) + 1
        assert hits(select("single-ref", values, k, observe=t), values, k).mean() == pytest.approx(single, abs=0.01)


def test_no_ordinal_rule_beats_the_optimal_one():
    for n, k in ((100, 1), (100, 3), (100, 10), (60, 20)):
        best = optimal_policy(n, k).ratio
        for t in range(k, n + 1):
            assert virtual_ratio(n, t) <= best + 1e-12
            assert virtual_plus_ratio(n, k, t) <= best + 1e-12
            assert all(single_reference_ratio(n, k, t, r) <= best + 1e-12 for r in range(1, k + 1))


ASYMPTOTIC = {
    1: (0.36788, 0.36788, 0.36788, 0.36788),
    2: (0.38240, 0.42737, 0.42696, 0.41195),
    3: (0.38673, 0.45760, 0.45675, 0.44497),
    4: (0.38836, 0.47691, 0.47575, 0.47855),
    5: (0.38898, 0.49070, 0.48931, 0.49998),
    6: (0.38913, 0.50120, 0.49966, 0.51483),
    7: (0.38906, 0.50957, 0.50792, 0.53087),
    8: (0.38888, 0.51645, 0.51471, 0.54533),
    9: (0.38863, 0.52225, 0.52044, 0.55678),
    10: (0.38835, 0.52722, 0.52536, 0.56606),
    20: (0.38561, 0.55526, 0.55328, 0.63062),
}


@pytest.mark.parametrize("k", ASYMPTOTIC)
def test_asymptotic_table(k):
    alpha, best, at_e, single = ASYMPTOTIC[k]
    plus = virtual_plus_threshold(k)
    assert plus.alpha == pytest.approx(alpha, abs=1e-4)
    assert plus.ratio == pytest.approx(best, abs=1e-4)
    assert virtual_plus_limit(k, 1 / math.e) == pytest.approx(at_e, abs=1e-4)
    assert single_reference_threshold(k).ratio == pytest.approx(single, abs=1e-4)
    assert virtual_plus_ratio(4000, k, round(4000 * alpha)) == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("k", range(2, 11))
def test_closed_form_of_virtual_plus_is_the_papers_sum(k):
    for alpha in (0.2, 1 / math.e, 0.6):
        terms = [
            float(Fraction(k**k, (k - 1) ** (k - m)) - k**m)
            * (-1) ** (m + 1)
            / math.factorial(m)
            * math.log(alpha) ** m
            for m in range(k)
        ]
        first = float(Fraction(k**k, (k - 1) ** k) - 1) * -1
        assert virtual_plus_limit(k, alpha) == pytest.approx(alpha**k * math.fsum(terms) - alpha * first, abs=1e-9)


def test_virtual_limit():
    assert virtual_limit(1 / math.e) == pytest.approx(1 / math.e, abs=1e-12)
    assert virtual_plus_limit(1, 0.3) == virtual_limit(0.3)
    assert virtual_ratio(20_000, 7358) == pytest.approx(1 / math.e, abs=1e-4)


@pytest.mark.slow
def test_single_reference_constants():
    """(c, r) as published by Albers and Ladewig."""
    published = {
        1: (0.3678, 1), 2: (0.2545, 1), 3: (0.3475, 2), 4: (0.2928, 2), 5: (0.2525, 2), 6: (0.2217, 2), 7: (0.2800, 3),
        8: (0.2549, 3), 9: (0.2338, 3), 10: (0.2159, 3), 20: (0.1959, 5), 50: (0.1537, 9), 100: (0.1331, 15),
    }  # fmt: skip
    for k, (c, r) in published.items():
        found = single_reference_threshold(k)
        assert found.alpha == pytest.approx(c, abs=1e-3)
        assert found.reference == r
    # for a k in no table: no other rank does better at any fraction
    found = single_reference_threshold(37)
    for r in range(1, 20):
        for alpha in np.linspace(0.02, 0.9, 45):
            assert single_reference_limit(37, float(alpha), r) <= found.ratio + 1e-9


def test_single_reference_of_long_streams():
    for k, t, r in ((4, 30_000, 2), (20, 20_000, 5)):
        exact = single_reference_ratio(100_000, k, t, r)
        assert exact == pytest.approx(single_reference_limit(k, t / 100_000, r), abs=1e-3)
    # k = 1 with one reference is the classical rule
    assert single_reference_ratio(100, 1, 37, 1) == pytest.approx(virtual_ratio(100, 37), abs=1e-12)


def test_optimal_dp_values():
    for k, value in ((1, 0.3710), (2, 0.4939), (3, 0.5651), (5, 0.6482), (10, 0.7452)):
        assert optimal_policy(100, k).ratio == pytest.approx(value, abs=5e-5)
    for k, value in ((1, 0.3682), (2, 0.4892), (3, 0.5588)):
        assert optimal_policy(1000, k).ratio == pytest.approx(value, abs=5e-5)
    # the classical secretary: the best of all "take the first record after t"
    assert optimal_policy(100, 1).ratio == pytest.approx(max(virtual_ratio(100, t) for t in range(1, 100)), abs=1e-12)


def by_induction(n, k):
    """V(1, k) / k in rational numbers, straight from the definition."""

    def chance(i, rank):
        ways = sum(math.comb(s - 1, rank - 1) * math.comb(n - s, i - rank) for s in range(rank, k + 1))
        return Fraction(ways, math.comb(n, i))

    @cache
    def worth(i, left):
        if i > n or left == 0:
            return Fraction(0)
        taken, passed = worth(i + 1, left - 1), worth(i + 1, left)
        return sum(max(chance(i, rank) + taken, passed) for rank in range(1, i + 1)) / i

    return worth(1, k) / k


def test_optimal_dp_against_rational_arithmetic():
    for n in (1, 2, 5, 12):
        for k in range(1, n + 1):
            assert optimal_policy(n, k).ratio == pytest.approx(float(by_induction(n, k)), abs=1e-12)


def test_optimal_policy_reaches_its_value_over_all_permutations():
    for n, k in ((5, 1), (6, 2), (6, 4)):
        values = np.array(list(permutations(range(n))), dtype=float)
        picked = selector("optimal-dp").select(values, k)
        assert hits(picked, values.astype(int), k).mean() == pytest.approx(optimal_policy(n, k).ratio, abs=1e-12)


def test_final_chance_by_log_gamma():
    for n, k, i, rank in ((10, 3, 4, 2), (100, 10, 37, 5), (12, 12, 3, 3), (9, 2, 9, 3)):
        exact = Fraction(
            sum(math.comb(s - 1, rank - 1) * math.comb(n - s, i - rank) for s in range(rank, k + 1)), math.comb(n, i)
        )
        assert final_chance(n, k, i, rank) == pytest.approx(float(exact), rel=1e-9)
    assert final_chance(10_000, 100, 5_000, 40) == pytest.approx(
        float(np.mean(np.random.default_rng(0).negative_binomial(40, 0.5, 200_000) + 40 <= 100)), abs=0.02
    )


@pytest.mark.parametrize("name", ["virtual", "virtual+", "single-ref"])
def test_shapes_of_streams(name):
    n, k, t = 60, 4, 20
    rising, falling, flat = np.arange(n)[None], -np.arange(n)[None], np.zeros((1, n))
    settings = {"observe": t, **({"reference": 1} if name == "single-ref" else {})}
    assert select(name, rising, k, **settings).tolist() == [list(range(t, t + k))]
    for quiet in (falling, flat):
        assert select(name, quiet, k, **settings).tolist() == [[-1] * k]
        assert select(name, quiet, k, exhaust=True, **settings).tolist() == [list(range(n - k, n))]


def test_optimistic_discards_one_reference_per_acceptance():
    # observed 1, 2, 3; then 1.5 beats reference 1, 1.7 beats nothing left below 2, 2.5 beats 2, 9 beats 3
    assert select("optimistic", [[1, 2, 3, 1.5, 1.7, 2.5, 2.9, 9, 9]], 3, observe=3).tolist() == [[3, 5, 7]]


def test_virtual_counts_what_it_did_not_take():
    # 5 displaces the observed 1, 6 displaces the observed 2, 7 displaces the taken 5: seen and not taken
    assert select("virtual", [[1, 2, 5, 6, 7, 8]], 2, observe=2).tolist() == [[2, 3]]
    # 9 displaces the taken 0.5, and 3 the taken 1.5: virtual passes them by, and 8 displaces the observed 2
    stream = [[1, 2, 0, 0.5, 9, 1.5, 3, 8]]
    assert select("virtual", stream, 3, observe=3).tolist() == [[3, 5, 7]]
    assert select("virtual+", stream, 3, observe=3).tolist() == [[3, 4, 5]]


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("transform", [np.exp, lambda v: v**3 + 5 * v, lambda v: np.searchsorted(np.sort(v[0]), v)])
def test_only_comparisons_count(name, transform):
    values = np.random.default_rng(2).permuted(np.tile(np.linspace(-3, 3, 50), (40, 1)), axis=1)
    rule = selector(name, exhaust=True)
    assert (rule.select(values, 5, streams(40)) == rule.select(transform(values), 5, streams(40))).all()


@pytest.mark.parametrize("name", ONLINE)
def test_the_future_changes_no_decision(name):
    generator = np.random.default_rng(3)
    values = generator.normal(size=(50, 40))
    rule = selector(name, exhaust=True)
    whole = rule.select(values, 6, streams(50))
    for cut in (10, 20, 33, 39):
        other = values.copy()
        other[:, cut:] = 10 * generator.normal(size=other[:, cut:].shape)
        changed = rule.select(other, 6, streams(50))
        for before, after in zip(whole, changed, strict=True):
            assert [i for i in before if 0 <= i < cut] == [i for i in after if 0 <= i < cut]


def test_a_lower_reference_accepts_no_later():
    values = orders(500, 100)
    first = [
        np.where(picked[:, 0] < 0, 100, picked[:, 0])
        for r in (1, 2, 3, 5)
        for picked in [select("single-ref", values, 5, observe=20, reference=r)]
    ]
    for harder, easier in pairwise(first):
        assert (easier <= harder).all()


@pytest.mark.slow
def test_thresholds():
    assert selector("virtual+").observed(100, 10) == 36
    assert selector("single-ref").observed(100, 10) == 21
    assert selector("single-ref").observed(10_000, 1000) < 1000  # needs its reference, not k, among the observed
    best = virtual_plus_observed(100, 10)
    assert virtual_plus_ratio(100, 10, best) == max(virtual_plus_ratio(100, 10, t) for t in range(10, 101))
    for name in SELECTORS:
        exact = selector(name).ratio(1000, 5)
        assert (exact is None) == (name == "optimistic")
        assert exact is None or 0 < exact <= 1


def test_refusals():
    for wrong in (
        lambda: select("virtual+", np.zeros((1, 20)), 5, observe=4),
        lambda: select("single-ref", np.zeros((1, 20)), 5, observe=4, reference=5),
        lambda: select("virtual+", np.zeros((1, 20)), 0),
        lambda: select("optimal-dp", np.zeros((1, 20)), 21),
        lambda: select("optimal-dp", np.zeros((1, 20)), 2, observe=3),
        lambda: select("virtual+", np.zeros((1, 20)), 2, reference=1),
        lambda: select("random", np.zeros((1, 20)), 2),
        lambda: select("virtual+", np.full((1, 20), np.nan), 2),
        lambda: select("virtual+", np.zeros(20), 2),
        lambda: selector("offline").start(20, 2),
        lambda: virtual_plus_ratio(10, 5, 4),
        lambda: virtual_plus_limit(5, 1.0),
    ):
        with pytest.raises(UsageError):
            wrong()
    with pytest.raises(UnknownName, match="virtual"):
        selector("virtual++")


def test_a_running_selector_is_asked_in_order_and_once():
    running = selector("virtual+").start(20, 2)
    running.select(0.0, 0)
    for wrong in (0, 2):
        with pytest.raises(UsageError, match="expected item 1"):
            running.select(0.0, wrong)
    with pytest.raises(UsageError, match="NaN"):
        running.select(float("nan"), 1)
