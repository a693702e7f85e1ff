"""Which gaps of a ranking are real: victims of one table tested pair by pair.

Where both have records of the same samples the pairs of samples are tested (McNemar, exact); where the score is a rate
without them, the two rates (z-test of pooled proportions, Campbell's correction, Statistics in Medicine 26,
2007); else a gap is real where the intervals do not overlap. A table's p-values are corrected together (Holm, 1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from advkit.evaluation.report.board import Gap, Score, Victim
from advkit.evaluation.report.paired import Rows

LEVEL = 0.05
PAIRED, RATES, INTERVALS = "the same samples, paired", "two rates", "intervals"


def with_gaps(victims: Sequence[Victim]) -> tuple[Victim, ...]:
    """The victims of a table in their order, each ranked one with the ranked ones from which no gap is shown."""
    at = [i for i, victim in enumerate(victims) if victim.rank is not None]
    if len(at) < 2:
        return tuple(victims)
    scores, own = [victims[i].score for i in at], [victims[i].rows for i in at]
    p, how = _tested(scores, own)
    real = _holm(p) | _apart(scores, how)
    made = list(victims)
    for k, i in enumerate(at):
        # Those beside it in the order of the table; equal scores are no gap whatever a test says.
        same = tuple(at[j] for j in range(len(at)) if j != k and not real[k, j])
        above = sum(bool(real[k, j]) for j in range(k))
        below = sum(bool(real[k, j]) for j in range(k + 1, len(at)))
        nearest = k + 1 if k + 1 < len(at) else k - 1
        value = p[k, nearest]
        made[i] = replace(
            victims[i],
            gap=Gap(above, below, same, at[nearest], None if np.isnan(value) else float(value), how[k][nearest]),
        )
    return tuple(made)


def _tested(scores: Sequence[Score], rows: Sequence[Rows | None]) -> tuple[Any, list[list[str]]]:
    """p-values [m, m], NaN where there is no test; and which test it was."""
    m = len(scores)
    p, how = np.full((m, m), np.nan), [[INTERVALS] * m for _ in range(m)]
    rates = [i for i, score in enumerate(scores) if score.counts is not None and score.counts[1] > 1]
    if len(rates) > 1:
        k, n = (np.array([(scores[i].counts or (0, 0))[part] for i in rates], dtype=float) for part in (0, 1))
        _put(p, how, rates, _two_rates(k, n), RATES)
    by_ids: dict[tuple[str, ...], list[int]] = {}
    for i, each in enumerate(rows):
        if each is not None:
            by_ids.setdefault(each.ids, []).append(i)
    for members in by_ids.values():
        if len(members) > 1:
            table = np.array([each.bits for i in members if (each := rows[i]) is not None], dtype=float)
            _put(p, how, members, _mcnemar(table), PAIRED)
    return p, how


def _put(p: Any, how: list[list[str]], at: Sequence[int], found: Any, name: str) -> None:
    p[np.ix_(at, at)] = found
    for i in at:
        for j in at:
            how[i][j] = name


def _two_rates(k: Any, n: Any) -> Any:
    """Two-sided p-values of all pairs of k of n."""
    from scipy import special

    total = n[:, None] + n[None]
    pooled = (k[:, None] + k[None]) / total
    spread = pooled * (1 - pooled) * (1 / n[:, None] + 1 / n[None])
    difference = (k / n)[:, None] - (k / n)[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        squared = np.where(spread > 0, difference**2 / spread * (total - 1) / total, 0.0)
    return special.erfc(np.sqrt(squared / 2))


def _mcnemar(table: Any) -> Any:
    """Exact two-sided p-values of all pairs of rows [m, n], as `stats.mcnemar_exact` gives each."""
    from scipy import special

    only = table @ (1 - table).T
    most, least = np.maximum(only, only.T), np.minimum(only, only.T)
    found = np.ones_like(only)
    differ = most + least > 0
    found[differ] = np.minimum(1.0, 2 * special.betainc(most[differ], least[differ] + 1, 0.5))
    return found


def _holm(p: Any) -> Any:
    """Which pairs are significant, all of them corrected together: bool [m, m]."""
    m = len(p)
    rows, columns = np.triu_indices(m, 1)
    tested = ~np.isnan(p[rows, columns])
    rows, columns = rows[tested], columns[tested]
    values = p[rows, columns]
    order = np.argsort(values, kind="stable")
    fails = np.flatnonzero(values[order] > LEVEL / np.arange(len(order), 0, -1))
    kept = order[: fails[0] if len(fails) else len(order)]
    real = np.zeros((m, m), dtype=bool)
    real[rows[kept], columns[kept]] = real[columns[kept], rows[kept]] = True
    return real


def _apart(scores: Sequence[Score], how: Sequence[Sequence[str]]) -> Any:
    """Pairs without a test whose intervals do not overlap."""
    none = float("nan")
    low = np.array([none if score.low is None else score.low for score in scores])
    high = np.array([none if score.high is None else score.high for score in scores])
    apart = (low[:, None] > high[None]) | (low[None] > high[:, None])
    return apart & (np.array(how, dtype=object) == INTERVALS)
