"""Exact competitive ratios of online selectors in uniformly random order (arXiv 2103.02014; Babaioff et al. 2007;
Albers and Ladewig 2019), and the best ordinal policy by dynamic programming.

The competitive ratio is E|S n S*| / k: how many of the k truly largest of n values a selector takes, on average.
n items, t of them observed before anything is taken, budget k; alpha = t / n where n goes to infinity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special, stats

from advkit.core.errors import UsageError


@dataclass(frozen=True)
class Threshold:
    """The best length of the observation phase, and what it comes to.

    alpha:     fraction of the stream to observe
    ratio:     competitive ratio there
    reference: rank of the observed value that later ones must exceed, 1 the largest (single-ref alone)
    """

    alpha: float
    ratio: float
    reference: int = 1


@dataclass(frozen=True)
class Policy:
    """The ordinal policy with the highest competitive ratio for n items and budget k.

    limits: [n, k + 1]; item i (0-based) with c submissions left is taken when its rank among the items so far (1 is the
            largest) is at most limits[i, c]; k + 1 takes any rank
    ratio:  its competitive ratio
    """

    ratio: float
    limits: NDArray[np.int32] = field(repr=False, compare=False)


def checked(n: int, k: int, t: int | None = None) -> None:
    """Raise UsageError unless 1 <= k <= n and, where t is given, k <= t <= n."""
    if not 1 <= k <= n:
        raise UsageError(f"a budget of {k} of {n} items; expected 1 <= k <= n")
    if t is not None and not k <= t <= n:
        raise UsageError(f"{t} of {n} items observed for a budget of {k}; expected k <= t <= n")


def random_ratio(n: int, k: int) -> float:
    """k positions drawn blindly."""
    checked(n, k)
    return k / n


def virtual_ratio(n: int, t: int) -> float:
    """virtual on n items; the same for every budget up to t."""
    checked(n, 1, t)
    return t / n * math.fsum(1 / (i - 1) for i in range(t + 1, n + 1))


def virtual_limit(alpha: float) -> float:
    """virtual for n to infinity: -alpha ln alpha, at most 1/e."""
    _fraction(alpha)
    return -alpha * math.log(alpha)


def virtual_plus_ratio(n: int, k: int, t: int) -> float:
    """virtual+ on n items: item i is met with budget left and is among the k best so far.

    Item j > t exceeds the k-th largest of the references with probability k/j whatever happened before, so the number
    taken is a sum of independent coins; a chain over 0..k-1 taken gives the chance that budget is left.
    """
    checked(n, k, t)
    taken = np.zeros(k)
    taken[0] = 1.0
    open_at = []
    for i in range(t + 1, n + 1):
        open_at.append(float(taken.sum()))
        up = taken * min(1.0, k / i)
        taken -= up
        taken[1:] += up[:-1]
    return math.fsum(open_at) / n


def virtual_plus_limit(k: int, alpha: float) -> float:
    """virtual+ for n to infinity: the integral of P(Poisson(k ln(x / alpha)) < k) over x from alpha to 1.

    By parts it is Q(k, u) - alpha + alpha (k/(k-1))^k P(k, u (k-1)/k) with u = -k ln alpha and the regularised
    incomplete gamma functions P = 1 - Q: the paper's alternating sum without its cancellation.
    """
    checked(k, k)
    _fraction(alpha)
    if k == 1:
        return virtual_limit(alpha)
    u = -k * math.log(alpha)
    grown = (k / (k - 1)) ** k * float(special.gammainc(k, u * (k - 1) / k))
    return float(special.gammaincc(k, u)) - alpha + alpha * grown


def single_reference_limit(k: int, alpha: float, reference: int) -> float:
    """single-ref for n to infinity, with the observed value of that rank as its reference.

    When the s-th largest of all is the reference, f = s - reference larger ones lie in the rest of the stream, and f is
    negative-binomial.
    """
    checked(k, k)
    _fraction(alpha)
    if reference < 1:
        raise UsageError(f"reference {reference}; expected a rank of at least 1")
    most = int(stats.nbinom.isf(1e-16, reference, alpha)) + 1
    larger = np.arange(1, most + 1)
    return float((stats.nbinom.pmf(larger, reference, alpha) * _found(k, larger, reference)).sum()) / k


def single_reference_ratio(n: int, k: int, t: int, reference: int) -> float:
    """single-ref on n items, t observed: as in the limit, with a negative hypergeometric number of larger items."""
    checked(n, k)
    if not 1 <= reference <= t <= n:
        raise UsageError(f"reference {reference} of {t} observed of {n} items; expected 1 <= reference <= observed")
    larger = np.arange(1, n - t + 1)
    s = larger + reference
    logs = _log_choose(s - 1, reference - 1) + _log_choose(n - s, t - reference) - _log_choose(np.array(n), t)
    return float((np.exp(logs) * _found(k, larger, reference)).sum()) / k


def _found(k: int, larger: NDArray[np.int64], reference: int) -> NDArray[np.float64]:
    """Expected hits where `larger` items of the rest exceed the reference and the first k of them are taken."""
    above = larger + reference - 1
    hits: NDArray[np.float64] = np.minimum(k, larger) * np.minimum(1.0, k / above)
    return hits


@lru_cache(maxsize=4096)
def virtual_plus_threshold(k: int) -> Threshold:
    """The alpha that is best for virtual+ as n goes to infinity."""
    return Threshold(*_highest(lambda alpha: virtual_plus_limit(k, alpha)))


@lru_cache(maxsize=1024)
def virtual_plus_observed(n: int, k: int) -> int:
    """The number of observed items that is best for virtual+ on n items."""
    checked(n, k)
    low, high = k, n
    while high - low > 2:  # the ratio rises and then falls with t
        third = (high - low) // 3
        left, right = low + third, high - third
        if virtual_plus_ratio(n, k, left) < virtual_plus_ratio(n, k, right):
            low = left + 1
        else:
            high = right
    return max(range(low, high + 1), key=lambda t: (virtual_plus_ratio(n, k, t), -t))


@lru_cache(maxsize=4096)
def single_reference_threshold(k: int) -> Threshold:
    """The alpha and the reference that are best for single-ref as n goes to infinity, computed for any k."""
    checked(k, k)
    most = 2 * math.isqrt(k) + 2
    found = [
        Threshold(*_highest(lambda alpha, r=r: single_reference_limit(k, alpha, r)), r)  # type: ignore[misc]
        for r in range(1, most + 1)
    ]
    return max(found, key=lambda threshold: threshold.ratio)


@lru_cache(maxsize=32)
def optimal_policy(n: int, k: int) -> Policy:
    """The best ordinal policy: backward induction over the items, for every number of submissions left.

    p(i, rank) is the chance that an item of that rank among the first i is among the final k largest. The next item is
    of a uniformly drawn rank, which gives p(i, .) as averages of p(i + 1, .): exact to rounding, where the binomials of
    the closed form (`final_chance`) overflow.
    """
    checked(n, k)
    worth = np.zeros(k + 1)  # expected hits among the items after i, by submissions left
    limits = np.zeros((n, k + 1), dtype=np.int32)
    ranks = np.arange(1, k + 1)
    chance = np.ones(k)
    for i in range(n, 0, -1):
        seen = min(i, k)
        if i < n:
            share = ranks / (i + 1)
            chance = share * np.append(chance[1:], 0.0) + (1 - share) * chance
            chance[seen:] = 0.0
        price = np.diff(worth)  # what a submission is worth if it is kept
        takes = np.searchsorted(-chance[:seen], -price, side="right")
        limits[i - 1, 1:] = takes
        # As many submissions as items left: nothing is lost by taking what comes.
        limits[i - 1, n - i + 1 :] = k + 1
        sums = np.append(0.0, np.cumsum(chance[:seen]))
        worth[1:] += (sums[takes] - takes * price) / i
    limits[:, 0] = 0
    limits.flags.writeable = False
    return Policy(float(worth[k]) / k, limits)


def final_chance(n: int, k: int, i: int, rank: int) -> float:
    """P(an item of this rank among the first i is among the k largest of n), by binomials in log-gamma."""
    checked(n, k)
    if not 1 <= rank <= i <= n:
        raise UsageError(f"rank {rank} among {i} of {n} items; expected 1 <= rank <= i <= n")
    places = np.arange(rank, min(k, n - i + rank) + 1)
    if len(places) == 0:
        return 0.0
    logs = _log_choose(places - 1, rank - 1) + _log_choose(n - places, i - rank) - _log_choose(np.array(n), i)
    return float(np.exp(logs).sum())


def _log_choose(n: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
    return found


def _highest(ratio: Callable[[float], float]) -> tuple[float, float]:
    """Where in (0, 1) a function that rises and then falls is highest, and how high."""
    best = optimize.minimize_scalar(
        lambda alpha: -ratio(alpha), bounds=(1e-4, 1 - 1e-4), method="bounded", options={"xatol": 1e-9}
    )
    return float(best.x), -float(best.fun)


def _fraction(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise UsageError(f"alpha {alpha}: expected a fraction of the stream, strictly between 0 and 1")
