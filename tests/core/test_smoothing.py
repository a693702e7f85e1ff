"""Statistics of smoothing: against scipy, closed forms, the published table, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from advkit.core.errors import UsageError
from advkit.core.smoothing import (
    abstains,
    high_probability,
    hopeless,
    largest_radius,
    linf_radius,
    lower_bound,
    radius,
    upper_bound,
)


@pytest.mark.parametrize(
    ("k", "n", "sigma", "alpha", "expected"),
    [
        (100, 100, 0.5, 0.001, 0.75024),
        (99_000, 100_000, 0.5, 0.001, 1.14500),
        (60_000, 100_000, 0.25, 0.001, 0.06024),
        (10_000, 10_000, 0.12, 0.01, 0.39764),
    ],
)
def test_radii_for_given_counts(k, n, sigma, alpha, expected):
    assert radius(k, n, sigma, alpha) == pytest.approx(expected, abs=1e-5)


def test_the_bound_of_all_and_of_none_is_in_closed_form():
    assert lower_bound(100, 100, 0.001) == pytest.approx(0.93325, abs=1e-5)
    for n in (1, 7, 1000):
        assert lower_bound(n, n, 0.01) == pytest.approx(0.01 ** (1 / n), rel=1e-14)
        assert lower_bound(0, n, 0.01) == 0.0


def test_the_bound_is_scipys_exact_one_sided_interval():
    rng = np.random.default_rng(0)
    for _ in range(50):
        n = int(rng.integers(1, 5000))
        k, alpha = int(rng.integers(0, n + 1)), float(10 ** rng.uniform(-4, -0.5))
        low = stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, "exact").low
        high = stats.binomtest(k, n, alternative="less").proportion_ci(1 - alpha, "exact").high
        assert lower_bound(k, n, alpha) == pytest.approx(low, abs=1e-9)
        assert upper_bound(k, n, alpha) == pytest.approx(high, abs=1e-9)


def test_bounds_come_for_arrays_and_grow_with_the_votes():
    k = np.arange(0, 501)
    bounds = lower_bound(k, 500, 0.001)
    assert bounds.shape == (501,)
    assert bool((np.diff(bounds) > 0).all())
    assert bounds[137] == lower_bound(137, 500, 0.001)
    radii = radius(k, 500, 0.25, 0.001)
    assert bool((np.diff(radii) >= 0).all())
    assert radii[0] == radii[250] == 0


@pytest.mark.parametrize("p", [0.6, 0.9, 0.99])
def test_the_bound_lies_above_the_truth_as_rarely_as_it_says(p):
    reps, alpha = 10_000, 0.05
    k = np.random.default_rng(int(p * 100)).binomial(1000, p, reps)
    wrong = float((lower_bound(k, 1000, alpha) > p).mean())
    assert wrong <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / reps)
    assert wrong > alpha / 3  # and is no looser than it has to be


def test_ten_thousand_models_certified_with_early_ends_are_wrong_in_no_more_than_alpha_of_cases():
    """CERTIFY of models of known vote, with looks at 1, 10 and 50 %: a certificate beyond the truth is false."""
    rng, models, n, alpha = np.random.default_rng(5), 10_000, 2000, 0.05
    p = rng.uniform(0.3, 0.9, models)
    true = np.where(p > 0.5, stats.norm.ppf(p), 0.0)
    ends, k, drawn = (20, 200, 1000, n), np.zeros(models, dtype=int), 0
    alive = np.ones(models, dtype=bool)
    for end in ends:
        k, drawn = k + rng.binomial(end - drawn, p), end
        if end < n:
            alive &= upper_bound(k, end, alpha) >= 0.5
    proven = radius(k, n, 1.0, alpha)
    early = np.where(alive, proven, 0.0)
    assert bool((early[p <= 0.5] > 0).mean() <= alpha)
    assert float((early > true).mean()) <= alpha
    # Early ends take certificates away and give none: this is why alpha needs no correction.
    assert bool((early <= proven).all())
    # and they hardly ever take one away that the votes would have earned
    assert float(((early == 0) & (proven > 0)).mean()) < 0.01
    assert (~alive).mean() > 0.2


def test_hopeless_is_a_look_at_the_upper_bound():
    assert hopeless(10, 100, 0.001)
    assert not hopeless(45, 100, 0.001)
    assert upper_bound(10, 100, 0.001) < 0.5 < upper_bound(45, 100, 0.001)


def test_predict_abstains_where_a_binomial_test_sees_a_tie():
    assert abstains(500, 500, 0.001)
    assert not abstains(100, 0, 0.001)
    assert abstains(10, 0, 0.001)  # 2 ** -9 is more than 0.001: ten draws always abstain
    assert not abstains(11, 0, 0.001)
    assert abstains(0, 0, 0.5)
    rng = np.random.default_rng(1)
    for _ in range(100):
        a, b = sorted(map(int, rng.integers(0, 300, 2)), reverse=True)
        expected = stats.binomtest(a, max(1, a + b), 0.5).pvalue > 0.01 if a + b else True
        assert bool(abstains(a, b, 0.01)) == expected


@pytest.mark.parametrize(("n", "cap"), [(100, 1.5005), (1000, 2.4633), (10_000, 3.1986), (100_000, 3.8115)])
def test_what_so_many_draws_can_certify_at_most(n, cap):
    assert largest_radius(n, 1.0, 0.001) == pytest.approx(cap, abs=1e-4)
    assert largest_radius(n, 0.25, 0.001) == pytest.approx(cap / 4, abs=1e-4)
    assert largest_radius(n, 0.25, 0.001) == radius(n, n, 0.25, 0.001)


def test_slack_is_taken_from_the_bound():
    bound = lower_bound(900, 1000, 0.001)
    assert radius(900, 1000, 0.5, 0.001, slack=0.01) == pytest.approx(0.5 * stats.norm.ppf(bound - 0.01), rel=1e-9)
    assert radius(900, 1000, 0.5, 0.001, slack=bound) == 0


def test_the_bound_that_allows_for_false_certificates():
    expected = 0.6 - 0.001 - math.sqrt(0.001 * 0.999 * math.log(1000) / 500) - math.log(1000) / 1500
    assert high_probability(0.6, 500, 0.001) == pytest.approx(expected)
    assert high_probability(0.0, 500, 0.001) == 0
    assert linf_radius(1.0, 784) == pytest.approx(1 / 28)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(UsageError, match="alpha is"):
        lower_bound(1, 2, alpha)


@pytest.mark.parametrize(("k", "n"), [(-1, 5), (6, 5), (0, 0), (1.5, 3)])
def test_counts_that_are_none_are_refused(k, n):
    with pytest.raises(UsageError, match="votes"):
        lower_bound(k, n, 0.01)
    with pytest.raises(UsageError, match="sigma"):
        radius(1, 2, 0.0, 0.01)
