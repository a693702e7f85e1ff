"""Competitive ratios of online selectors by simulation, beside what theory says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from advkit.attacks.stream.selectors import SELECTORS, selector
from advkit.evaluation.scenarios.stream import shuffled, streams


@dataclass(frozen=True)
class RatioCurve:
    """Competitive ratio of one selector against k.

    measured: k -> (mean, standard error), Monte Carlo
    exact:    k -> the ratio that theory gives; empty where no formula is known
    """

    measured: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    exact: Mapping[int, float] = field(default_factory=dict)


def measure_ratios(
    ks: Sequence[int],
    names: Sequence[str] = tuple(SELECTORS),
    *,
    n: int = 100,
    orders: int = 2000,
    seed: int = 0,
    exhaust: bool = False,
) -> dict[str, RatioCurve]:
    """Competitive ratios of selectors over random orders of n distinct values, beside their exact ones.

    Every selector and every k sees the same orders. Exact ratios hold without `exhaust`, which can only add to them.
    """
    rng = streams(seed, orders)
    values = shuffled(rng, n)
    found: dict[str, RatioCurve] = {}
    for name in names:
        rule = selector(name, exhaust=exhaust)
        measured, exact = {}, {}
        for k in ks:
            picked = rule.select(values, k, rng.at("selector", k))
            taken = np.where(picked >= 0, np.take_along_axis(values, np.maximum(picked, 0), 1), -1)
            hits = (taken >= n - k).sum(1) / k
            measured[k] = (float(hits.mean()), float(hits.std(ddof=1) / np.sqrt(orders)))
            ratio = rule.ratio(n, k)
            if ratio is not None:
                exact[k] = ratio
        found[name] = RatioCurve(measured, exact)
    return found
