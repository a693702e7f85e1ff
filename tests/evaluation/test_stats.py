"""Counts, intervals and paired tests against independent implementations and worked examples."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from scipy import stats as reference

import advkit.evaluation.stats as stats
from advkit.core.errors import UsageError

COUNTS = [(0, 1), (1, 1), (0, 10), (10, 10), (5, 10), (1, 3), (487, 1000), (4567, 10000), (9999, 10000)]


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (487, 1000, 0.4561, 0.5180), (4567, 10000, 0.4470, 0.4665)],
)
def test_wilson_worked_examples(k: int, n: int, low: float, high: float) -> None:
    interval = stats.wilson(k, n)
    assert interval.low == pytest.approx(low, abs=5.1e-5)
    assert interval.high == pytest.approx(high, abs=5.1e-5)


@pytest.mark.parametrize("level", [0.9, 0.95, 0.999])
@pytest.mark.parametrize(("k", "n"), COUNTS)
def test_intervals_equal_scipy(k: int, n: int, level: float) -> None:
    for ours, name in ((stats.wilson, "wilson"), (stats.clopper_pearson, "exact")):
        interval = ours(k, n, level)
        theirs = reference.binomtest(k, n).proportion_ci(level, method=name)
        assert interval.low == pytest.approx(theirs.low, abs=1e-9)
        assert interval.high == pytest.approx(theirs.high, abs=1e-9)
        assert interval.low <= k / n <= interval.high
    assert stats.wilson(0, n, level).low == 0
    assert stats.wilson(n, n, level).high == 1


def test_wilson_limits_solve_the_score_equation() -> None:
    interval = stats.wilson(37, 210, 0.95)
    z = 1.959963984540054
    for p in (interval.low, interval.high):
        assert abs(37 / 210 - p) == pytest.approx(z * math.sqrt(p * (1 - p) / 210), abs=1e-12)


def test_one_sided_clopper_pearson_gives_the_certificates_of_smoothing() -> None:
    low = stats.clopper_pearson(100, 100, 0.999, side="lower").low
    assert low == pytest.approx(0.93325, abs=1e-5)
    assert low == pytest.approx(0.001 ** (1 / 100), abs=1e-12)
    radius = 0.5 * reference.norm.ppf(stats.clopper_pearson(99000, 100000, 0.999, side="lower").low)
    assert radius == pytest.approx(1.14500, abs=1e-4)
    one_sided = stats.clopper_pearson(3, 20, 0.95, side="upper")
    assert one_sided.low == 0
    assert reference.binom.cdf(3, 20, one_sided.high) == pytest.approx(0.05, abs=1e-9)


def test_wilson_covers() -> None:
    rng = np.random.default_rng(5)
    low_high = {k: stats.wilson(k, 500) for k in range(501)}
    draws = rng.binomial(500, 0.02, 4000)
    covered = np.mean([low_high[int(k)].low <= 0.02 <= low_high[int(k)].high for k in draws])
    assert 0.93 <= covered <= 0.99


@pytest.mark.parametrize(("b", "c"), [(0, 1), (3, 10), (10, 3), (7, 7), (0, 25), (130, 171)])
def test_mcnemar_equals_scipy_and_the_sum_by_hand(b: int, c: int) -> None:
    p = stats.mcnemar_exact(b, c)
    assert p == pytest.approx(reference.binomtest(b, b + c, 0.5).pvalue, abs=1e-9)
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    assert p == pytest.approx(float(min(Fraction(1), Fraction(2 * tail, 2 ** (b + c)))), abs=1e-12)
    assert p == stats.mcnemar_exact(c, b)


def test_mcnemar_without_discordant_rows_is_one() -> None:
    assert stats.mcnemar_exact(0, 0) == 1.0


def newcombe_by_solving(e: int, b: int, c: int, d: int, level: float) -> tuple[float, float]:
    """Method 10 written once more from its definition, with Wilson limits as roots of the score quadratic."""
    n = e + b + c + d
    z2 = reference.chi2.ppf(level, 1)

    def limits(k: int) -> tuple[float, float]:
        roots = np.sort(np.roots([n + z2, -(2 * k + z2), k * k / n]).real)
        return float(roots[0]), float(roots[1])

    (l1, u1), (l2, u2) = limits(e + b), limits(e + c)
    p1, p2 = (e + b) / n, (e + c) / n
    product = Fraction((e + b) * (c + d) * (e + c) * (b + d))
    num = Fraction(e * d - b * c)
    if num > 0:
        num = max(num - Fraction(n, 2), Fraction(0))
    phi = float(num) / math.sqrt(product) if product else 0.0
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = p1 - p2 + math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    return low, high


@pytest.mark.parametrize(
    "table",
    [
        (36, 12, 2, 0),  # negative covariance: no correction
        (212, 144, 256, 707),  # large positive: n/2 is taken off
        (20, 12, 2, 16),
        (5, 2, 2, 1),  # 0 <= covariance <= n/2: phi is 0
        (54, 0, 0, 0),  # all agree: the root is 0
        (30, 0, 0, 20),
        (0, 1, 0, 0),
        (0, 0, 0, 1),
    ],
)
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_newcombe_equals_its_definition(table: tuple[int, int, int, int], level: float) -> None:
    interval = stats.newcombe_paired(*table, level=level)
    low, high = newcombe_by_solving(*table, level)
    assert interval.low == pytest.approx(low, abs=1e-7 if 0 in table else 1e-9)
    assert interval.high == pytest.approx(high, abs=1e-7 if 0 in table else 1e-9)
    assert interval.low <= (table[1] - table[2]) / sum(table) <= interval.high


def test_newcombe_by_hand_with_and_without_the_correction() -> None:
    # 10 rows, e=5 b=2 c=2 d=1: e d - b c = 1 <= n/2, so phi = 0 and both marginals are 7/10.
    marginal = reference.binomtest(7, 10).proportion_ci(0.95, method="wilson")
    half = math.hypot(0.7 - marginal.low, marginal.high - 0.7)
    interval = stats.newcombe_paired(5, 2, 2, 1)
    assert interval.low == pytest.approx(-half, abs=1e-9)
    assert interval.high == pytest.approx(half, abs=1e-9)
    # Agreement everywhere but nothing certain: phi = (30*20 - 25) / (30*20), the interval shrinks but keeps 0 inside.
    marginal = reference.binomtest(30, 50).proportion_ci(0.95, method="wilson")
    below, above, phi = 0.6 - marginal.low, marginal.high - 0.6, (600 - 25) / 600
    shrunk = math.sqrt(below**2 - 2 * phi * below * above + above**2)
    interval = stats.newcombe_paired(30, 0, 0, 20)
    assert interval.low == pytest.approx(-shrunk, abs=1e-9)
    assert interval.high == pytest.approx(shrunk, abs=1e-9)


def test_newcombe_published_example() -> None:
    interval = stats.newcombe_paired(36, 12, 2, 0)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.0569, 0.3404)


def test_newcombe_swaps_sign_with_the_systems() -> None:
    one, other = stats.newcombe_paired(36, 12, 2, 9), stats.newcombe_paired(36, 2, 12, 9)
    assert one.low == pytest.approx(-other.high, abs=1e-12)
    assert one.high == pytest.approx(-other.low, abs=1e-12)


def test_rate_is_what_the_schema_asks() -> None:
    path = Path(stats.__file__).parent / "report" / "evaluation_report.schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    validator = jsonschema.Draft202012Validator({"$ref": "#/$defs/rate", "$defs": schema["$defs"]})
    for k, n in [*COUNTS, (0, 0)]:
        for method in ("wilson", "clopper_pearson"):
            validator.validate(stats.rate(k, n, "all_samples", method=method))  # type: ignore[arg-type]
    assert stats.rate(0, 0, "clean_correct") == {
        "value": None,
        "numerator": 0,
        "denominator": 0,
        "denominator_kind": "clean_correct",
        "ci": None,
    }
    assert stats.rate(3, 4, "prompts")["value"] == 0.75
    assert type(stats.rate(np.int64(3), np.int64(4), "prompts")["numerator"]) is int  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.rate(5, 4, "all_samples"),
        lambda: stats.rate(-1, 4, "all_samples"),
        lambda: stats.rate(1, 0, "all_samples"),
        lambda: stats.rate(1, 4, "Every thing"),
        lambda: stats.rate(1, 4, ""),
        lambda: stats.rate(1, 4, "all_samples", method="normal"),
        lambda: stats.wilson(0, 0),
        lambda: stats.wilson(1, 2, 1.0),
        lambda: stats.newcombe_paired(0, 0, 0, 0),
        lambda: stats.newcombe_paired(1, -1, 0, 0),
        lambda: stats.mcnemar_exact(-1, 0),
        lambda: stats.bootstrap_mean([]),
        lambda: stats.bootstrap_mean([1.0, math.inf]),
        lambda: stats.student_t_over_seeds([]),
    ],
)
def test_impossible_requests_are_refused(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError):
        call()


def test_bootstrap_mean_agrees_with_theory_and_repeats() -> None:
    values = np.random.default_rng(1).exponential(2.0, 400)
    interval = stats.bootstrap_mean(values.tolist(), seed=3)
    half = 1.96 * values.std(ddof=1) / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert interval == stats.bootstrap_mean(values.tolist(), seed=3)
    assert interval != stats.bootstrap_mean(values.tolist(), seed=4)
    assert interval.to_dict()["n_resamples"] == 2000
    assert stats.bootstrap_mean([0.25] * 7).low == 0.25


def test_hierarchical_bootstrap_is_wider_than_pooling_when_seeds_differ() -> None:
    rng = np.random.default_rng(0)
    groups = [(rng.random(200) < p).astype(float).tolist() for p in (0.3, 0.5, 0.7)]
    interval = stats.hierarchical_bootstrap(groups, n_resamples=500)
    pooled = stats.bootstrap_mean([v for group in groups for v in group], n_resamples=500)
    assert interval.high - interval.low > 2 * (pooled.high - pooled.low)
    assert interval.low < 0.5 < interval.high


def test_student_t_over_seeds_equals_scipy() -> None:
    values = [0.809, 0.810, 0.806]
    summary = stats.student_t_over_seeds(values)
    low, high = reference.t.interval(0.95, 2, loc=np.mean(values), scale=reference.sem(values))
    assert summary.interval is not None
    assert summary.interval.low == pytest.approx(low, abs=1e-12)
    assert summary.interval.high == pytest.approx(high, abs=1e-12)
    assert summary.sd == pytest.approx(np.std(values, ddof=1))
    alone = stats.student_t_over_seeds([0.5])
    assert (alone.mean, alone.sd, alone.interval) == (0.5, None, None)
    assert summary.to_dict()["n"] == 3


@pytest.mark.parametrize("level", [0.9, 0.95])
@pytest.mark.parametrize("n", [1, 5, 6, 10, 11, 200])
def test_the_interval_of_a_median_is_the_shortest_that_covers_by_the_binomial_distribution(
    n: int, level: float
) -> None:
    interval = stats.median_interval([*range(n, 0, -1)], level)
    covers = {
        rank: reference.binom.cdf(n - rank, n, 0.5) - reference.binom.cdf(rank - 1, n, 0.5) for rank in range(1, n)
    }
    fit = [rank for rank, share in covers.items() if share >= level and rank <= n + 1 - rank]
    expected = (max(fit), n + 1 - max(fit)) if fit else (-math.inf, math.inf)
    assert (interval.low, interval.high) == expected


def test_a_median_interval_counts_what_is_infinite() -> None:
    assert stats.median_interval([1.0] * 2 + [2.0] * 4 + [math.inf] * 4).high == math.inf
    assert stats.median_interval([1.0] * 2 + [2.0] * 7 + [math.inf]).high == 2.0
    for wrong in ([], [math.nan, 1.0]):
        with pytest.raises(UsageError, match="median_interval"):
            stats.median_interval(wrong)
