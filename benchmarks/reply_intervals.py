"""How often intervals over prompts hold the true rate of several replies: `python benchmarks/reply_intervals.py`.

Prompts fall with a chance of their own: beta-distributed, or a mixture in which some always or never fall. Printed per
interval and number of prompts: the least coverage of all settings (rates .02 to .95, every degree of likeness, 5 and
25 replies, hit@1, hit@2 and hit@n), the share of settings below 94 %, and the mean width.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from itertools import product
from typing import Any

import numpy as np
from scipy import special

from advkit.evaluation.stats_replies import clustered_interval, hit_at_k

PROMPTS, REPLIES, RATES, LIKENESS = (3, 5, 10, 24, 100), (5, 25), (0.02, 0.1, 0.5, 0.8, 0.95), (0.0, 0.1, 0.4, 0.8, 1.0)


def student(values: Any, side: int, degrees: int) -> Any:
    """A limit of Student's t over the columns."""
    reach = -special.stdtrit(degrees, 0.025) / math.sqrt(values.shape[1])
    return values.mean(1) + side * reach * values.std(1, ddof=1)


def exact(share: Any, trials: Any) -> tuple[Any, Any]:
    """Clopper and Pearson's limits for shares of any positive numbers of trials."""
    hits = share * trials
    low = np.where(hits > 0, special.betaincinv(np.maximum(hits, 1e-9), trials - hits + 1, 0.025), 0)
    high = special.betaincinv(hits + 1, np.maximum(trials - hits, 1e-9), 0.975)
    return low, np.where(hits < trials, high, 1)


def korn_graubard(values: Any, replies: int) -> tuple[Any, Any]:
    """Exact limits at the effective number of trials."""
    n, share = values.shape[1], values.mean(1)
    variance = values.var(1, ddof=1) / n
    ratio = (special.stdtrit(n * replies - 1, 0.025) / special.stdtrit(n - 1, 0.025)) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        trials = np.where(variance > 0, share * (1 - share) / variance * ratio, n)
    return exact(share, np.clip(trials, n, n * replies))


def intervals(values: Any, replies: int, rng: Any) -> dict[str, tuple[Any, Any]]:
    """Limits of every kind for runs [runs, prompts]; the bootstrap for the first 200 runs."""
    runs, n = values.shape
    low, high = (np.concatenate([values, np.full((runs, 1), more)], 1) for more in (0.0, 1.0))
    ours = np.clip(student(low, -1, n), 0, 1), np.clip(student(high, 1, n), 0, 1)
    told = clustered_interval(values[0].tolist())
    assert np.allclose((told.low, told.high), (ours[0][0], ours[1][0]))
    drawn = values[:200][:, rng.integers(0, n, (400, n))].mean(2)
    return {
        "percentile bootstrap": tuple(np.quantile(drawn, [0.025, 0.975], axis=1)),
        "Student's t": (student(values, -1, n - 1), student(values, 1, n - 1)),
        "Korn and Graubard": korn_graubard(values, replies),
        "Clopper-Pearson over prompts": exact(values.mean(1), float(n)),
        "Student's t, one prompt more (ours)": ours,
    }


def chances(kind: str, rate: float, likeness: float, shape: tuple[int, int], rng: Any) -> Any:
    """Of every prompt of every run to fall."""
    if kind == "mixture":
        return np.where(rng.random(shape) < likeness, rng.random(shape) < rate, rate)
    odds = (1 - likeness) / likeness
    return rng.beta(rate * odds, (1 - rate) * odds, shape)


def truth(kind: str, rate: float, likeness: float, k: int) -> float:
    """hit@k of all prompts there are."""
    if kind == "mixture":
        return likeness * rate + (1 - likeness) * (1 - (1 - rate) ** k)
    a, b = (share * (1 - likeness) / likeness for share in (rate, 1 - rate))
    return 1 - math.prod((b + i) / (a + b + i) for i in range(k))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    runs = parser.parse_args().runs
    rng = np.random.default_rng(0)
    print("| interval | prompts | least coverage | settings below 94 % | mean width |\n|---|---|---|---|---|")
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for n, replies, rate, likeness, kind in product(PROMPTS, REPLIES, RATES, LIKENESS, ("beta", "mixture")):
        if kind == "beta" and likeness in (0, 1):
            continue
        hits = rng.binomial(replies, chances(kind, rate, likeness, (runs, n), rng))
        for k in (1, 2, replies):
            target = truth(kind, rate, likeness, k)
            values = np.array([hit_at_k(c, replies, k) for c in range(replies + 1)])[hits]
            for name, (low, high) in intervals(values, replies, rng).items():
                inside = (low <= target + 1e-9) & (target - 1e-9 <= high)
                found[name, n].append((inside.mean(), (np.minimum(high, 1) - np.maximum(low, 0)).mean()))
    for (name, n), told in sorted(found.items(), key=lambda each: list(dict(found)).index(each[0]) % 5):
        covered, widths = (np.array(each) for each in zip(*told, strict=True))
        print(f"| {name} | {n} | {covered.min():.3f} | {(covered < 0.94).mean():.0%} | {widths.mean():.2f} |")


if __name__ == "__main__":
    main()
