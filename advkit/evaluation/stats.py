"""Intervals and paired tests for counts: no rate leaves the harness without its counts and its uncertainty.

Wilson (1927), Clopper and Pearson (1934), McNemar (1947), Newcombe (Statistics in Medicine 17, 1998, method 10).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from advkit.core.errors import UsageError

DenominatorKind = str
"""What a denominator counts, a plain word: all_samples, clean_correct, clean_not_target, triggered_not_target,
source_class, prompts, episodes, attacked_and_judged, or a goal's own."""
PLAIN_WORD = re.compile(r"[a-z][a-z0-9_]{0,59}")
Side = Literal["two-sided", "lower", "upper"]
_USUAL, _USUAL_Z = 0.95, 1.959963984540054
"""The level of nearly every interval and its normal quantile: a run would otherwise import scipy for one number."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    low, high:   limits, in the unit of the estimate (fractions for rates)
    level:       confidence in (0, 1)
    method:      the report's word for how it was made
    n_resamples, seed: of a bootstrap, else None
    """

    low: float
    high: float
    level: float
    method: str
    n_resamples: int | None = None
    seed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The report's `ci` object."""
        entry: dict[str, Any] = {"low": self.low, "high": self.high, "level": self.level, "method": self.method}
        if self.n_resamples is not None:
            entry["n_resamples"] = self.n_resamples
        if self.seed is not None:
            entry["seed"] = self.seed
        return entry


@dataclass(frozen=True)
class SeedSummary:
    """A figure over several training seeds: never one pooled binomial.

    values:   one per seed, in the order given
    mean:     their mean
    sd:       standard deviation with ddof=1; None for a single seed
    interval: Student-t interval of the mean; None for a single seed
    """

    values: tuple[float, ...]
    mean: float
    sd: float | None
    interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """A scalar metric of the report."""
        return {
            "value": self.mean,
            "ci": None if self.interval is None else self.interval.to_dict(),
            "n": len(self.values),
            "sd": self.sd,
            "values": list(self.values),
        }


def check_level(level: float) -> None:
    """Raise UsageError for anything but a level in (0, 1)."""
    if not 0 < level < 1:
        raise UsageError(f"confidence level {level}: expected a number strictly between 0 and 1, such as 0.95")


def _normal_quantile(level: float) -> float:
    """How many standard deviations around the mean hold a share `level` of a normal distribution."""
    if level == _USUAL:
        return _USUAL_Z
    from scipy import special

    return float(-special.ndtri((1 - level) / 2))


def _check_counts(k: int, n: int) -> None:
    if k != int(k) or n != int(n) or not 0 <= k <= n:
        raise UsageError(f"{k} of {n}: expected whole counts with 0 <= numerator <= denominator")
    if n == 0:
        raise UsageError("an interval for 0 of 0 does not exist; report the value as null (`rate` does)")


def wilson(k: int, n: int, level: float = 0.95) -> Interval:
    """Wilson score interval of k successes in n > 0 trials."""
    _check_counts(k, n)
    check_level(level)
    z = _normal_quantile(level)
    share = k / n
    stretch = 1 + z * z / n
    center = (share + z * z / (2 * n)) / stretch
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / stretch
    # Round-off leaves a center - half of 1e-18 where the limit is 0 by algebra.
    low = 0.0 if k == 0 else max(0.0, center - half)
    high = 1.0 if k == n else min(1.0, center + half)
    return Interval(low, high, level, "wilson")


def clopper_pearson(k: int, n: int, level: float = 0.95, side: Side = "two-sided") -> Interval:
    """Exact interval of k successes in n > 0 trials; one-sided ("lower", "upper") for certificates."""
    from scipy import special

    _check_counts(k, n)
    check_level(level)
    alpha = 1 - level if side != "two-sided" else (1 - level) / 2
    low, high = 0.0, 1.0
    if side != "upper" and k > 0:
        low = float(special.betaincinv(k, n - k + 1, alpha))
    if side != "lower" and k < n:
        high = float(special.betainccinv(k + 1, n - k, alpha))
    return Interval(low, high, level, "clopper_pearson")


def finite_values(values: Sequence[float], what: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The values as float64 [n]; UsageError where there are none or one is not finite. `what` names them there."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise UsageError(f"{what}: expected a non-empty list of numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise UsageError(f"{what}: {int((~np.isfinite(array)).sum())} values are not finite; use a median instead")
    return array


def bootstrap_mean(values: Sequence[float], level: float = 0.95, n_resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap of a mean; one value per sample, so that a sample's restarts stay together."""
    check_level(level)
    array = finite_values(values, "bootstrap_mean")
    rng = np.random.default_rng(seed)
    # One resample at a time: a (2000, n) index table of a large run would cost more memory than the run itself.
    means = [float(array[rng.integers(0, array.size, array.size)].mean()) for _ in range(n_resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, "bootstrap_percentile", n_resamples, seed)


def bootstrap_ratio(
    above: Sequence[float], below: Sequence[float], level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of sum(above) / sum(below), a pair of values per sample; UsageError where below is 0."""
    return bootstrap_mean_ratio([(above, below)], level, n_resamples, seed)


def bootstrap_mean_ratio(
    groups: Sequence[tuple[Sequence[float], Sequence[float]]],
    level: float = 0.95,
    n_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap of the mean over groups of sum(above) / sum(below); samples are drawn anew in each group.

    groups: (above, below), a pair of values per sample. Raises UsageError without groups and where a below is 0.
    """
    check_level(level)
    arrays = [tuple(finite_values(values, "bootstrap_ratio") for values in pair) for pair in groups]
    for over, under in arrays:
        if over.size != under.size or not under.sum() > 0:
            raise UsageError(
                f"bootstrap_ratio of {over.size} and {under.size} values: expected pairs with a positive sum"
            )
    if not arrays:
        raise UsageError("bootstrap_mean_ratio: expected at least one group of values")
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(n_resamples):
        ratios = []
        for over, under in arrays:
            drawn = rng.integers(0, over.size, over.size)
            total = float(under[drawn].sum())
            ratios.append(float(over[drawn].sum()) / total if total > 0 else 1.0)
        means.append(sum(ratios) / len(ratios))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, "bootstrap_percentile", n_resamples, seed)


def median_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Interval of a median between two of the values in order, exact for any distribution; infinite values count too.

    Its coverage is at least the level, by the binomial distribution. Infinite where there are too few values.
    """
    from scipy import special

    check_level(level)
    array = np.sort(np.asarray(values, dtype=np.float64))
    if array.ndim != 1 or not array.size or np.isnan(array).any():
        raise UsageError(f"median_interval: expected a non-empty list of numbers without NaN, got {len(array)}")
    within = special.bdtr(np.arange(array.size + 1), array.size, 0.5)
    place = int(np.searchsorted(within, (1 - level) / 2))
    if place == 0:
        return Interval(-math.inf, math.inf, level, "order_statistics")
    return Interval(float(array[place - 1]), float(array[-place]), level, "order_statistics")


def graded_entry(values: Sequence[float]) -> dict[str, Any]:
    """A report's entry for the mean of one value per sample, with its interval."""
    return {"value": float(np.mean(values)), "n": len(values), "ci": bootstrap_mean(values).to_dict()}


def hierarchical_bootstrap(
    groups: Sequence[Sequence[float]], level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean of group means: resamples groups (training seeds), then values inside each."""
    check_level(level)
    if not groups:
        raise UsageError("hierarchical_bootstrap: expected at least one group of values")
    arrays = [finite_values(group, "hierarchical_bootstrap") for group in groups]
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(n_resamples):
        drawn = [arrays[g] for g in rng.integers(0, len(arrays), len(arrays))]
        means.append(float(np.mean([a[rng.integers(0, a.size, a.size)].mean() for a in drawn])))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high), level, "hierarchical_bootstrap", n_resamples, seed)


def student_t_over_seeds(values: Sequence[float], level: float = 0.95) -> SeedSummary:
    """Mean, standard deviation and Student-t interval of one figure measured once per training seed."""
    from scipy import special

    check_level(level)
    array = finite_values(values, "student_t_over_seeds")
    mean = float(array.mean())
    if array.size == 1:
        return SeedSummary((mean,), mean, None, None)
    sd = float(array.std(ddof=1))
    half = float(-special.stdtrit(array.size - 1, (1 - level) / 2)) * sd / math.sqrt(array.size)
    interval = Interval(mean - half, mean + half, level, "student_t_over_seeds")
    return SeedSummary(tuple(float(v) for v in array), mean, sd, interval)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value of b rows only A won against c rows only B won; 1 when no row differs."""
    from scipy import special

    if b < 0 or c < 0:
        raise UsageError(f"discordant counts {b} and {c}: expected whole numbers >= 0")
    if b + c == 0:
        return 1.0
    return min(1.0, 2 * float(special.betainc(max(b, c), min(b, c) + 1, 0.5)))


def newcombe_paired(e: int, b: int, c: int, d: int, level: float = 0.95) -> Interval:
    """Newcombe's method 10 for the difference (b - c) / n of two paired proportions.

    e: rows both won; b: only A; c: only B; d: neither. Needs e + b + c + d > 0.
    """
    if min(e, b, c, d) < 0:
        raise UsageError(f"paired counts {e}, {b}, {c}, {d}: expected whole numbers >= 0")
    n = e + b + c + d
    first, second = wilson(e + b, n, level), wilson(e + c, n, level)
    share_a, share_b = (e + b) / n, (e + c) / n
    covariance: float = e * d - b * c
    if covariance > n / 2:
        covariance -= n / 2
    elif covariance >= 0:
        covariance = 0.0
    root = math.sqrt((e + b) * (c + d) * (e + c) * (b + d))
    phi = covariance / root if root > 0 else 0.0

    def length(of_a: float, of_b: float) -> float:
        return math.sqrt(max(0.0, of_a * of_a - 2 * phi * of_a * of_b + of_b * of_b))

    difference = (b - c) / n
    low = difference - length(share_a - first.low, second.high - share_b)
    high = difference + length(first.high - share_a, share_b - second.low)
    return Interval(low, high, level, "newcombe_paired")


def rate(
    k: int,
    n: int,
    kind: DenominatorKind,
    level: float = 0.95,
    method: Literal["wilson", "clopper_pearson"] = "wilson",
) -> dict[str, Any]:
    """The report's `rate` object for k of n; 0 of 0 has neither value nor interval."""
    if not PLAIN_WORD.fullmatch(kind):
        raise UsageError(
            f"denominator kind {kind!r}: expected a plain word such as all_samples (a-z, 0-9, _; at most 60 characters)"
        )
    if method not in ("wilson", "clopper_pearson"):
        raise UsageError(f"interval method {method!r}: expected wilson or clopper_pearson")
    k, n = int(k), int(n)
    value: float | None = None
    ci: dict[str, Any] | None = None
    if n == 0 and k == 0:
        check_level(level)
    else:
        ci = (wilson if method == "wilson" else clopper_pearson)(k, n, level).to_dict()
        value = k / n
    return {"value": value, "numerator": k, "denominator": n, "denominator_kind": kind, "ci": ci}
