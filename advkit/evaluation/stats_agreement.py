"""How far judges agree (Krippendorff's alpha), and whether a ranking is the same by each of them.

Krippendorff, Content Analysis (2004), chapter 11; nominal verdicts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from advkit.core.errors import UsageError
from advkit.evaluation.stats import Interval, check_level

Verdicts = Sequence[Hashable | None]
"""What each judge says of one reply, in the order of the judges; None where one says nothing."""


def krippendorff_alpha(replies: Sequence[Verdicts]) -> float | None:
    """Krippendorff's alpha of nominal verdicts: 1 - observed disagreement / disagreement expected by chance.

    1 where judges always agree, 0 where they agree as chance would have it, below 0 where they disagree
    systematically. A reply that fewer than two judges read counts for nothing.

    replies: per reply, the verdict of each judge

    None where it has no value: no reply has two verdicts, or there is one verdict alone, of which nobody can tell
    agreement from habit. Raises UsageError where replies have different numbers of judges.
    """
    return _alpha(_coincidences([replies])[0])


def alpha_entry(
    clusters: Sequence[Sequence[Verdicts]], level: float = 0.95, n_resamples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """A report's entry for Krippendorff's alpha, with a percentile bootstrap over the prompts.

    clusters: per prompt, per reply, the verdict of each judge; replies to one prompt are drawn together

    A resample in which all verdicts are alike counts as alpha = 1, so that rare verdicts widen the interval. `n` says
    how many replies have two verdicts. No interval with fewer than two prompts.
    """
    check_level(level)
    parts = _coincidences(clusters)
    told = [reply for replies in clusters for reply in replies if sum(each is not None for each in reply) > 1]
    value = _alpha(parts.sum(0))
    entry: dict[str, Any] = {"value": value, "n": len(told), "prompts": len(clusters), "ci": None}
    if value is None or len(clusters) < 2:
        return entry
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(n_resamples):
        times = np.bincount(rng.integers(0, len(parts), len(parts)), minlength=len(parts))
        drawn = _alpha(np.tensordot(times, parts, 1))
        found.append(1.0 if drawn is None else drawn)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    ci = Interval(float(low), float(high), level, "bootstrap_over_prompts", n_resamples, seed)
    return entry | {"ci": ci.to_dict()}


def _coincidences(clusters: Sequence[Sequence[Verdicts]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """[clusters, verdicts, verdicts]: pairs of verdicts on one reply, each weighted by 1 / (its verdicts - 1)."""
    widths = {len(reply) for replies in clusters for reply in replies}
    if len(widths) > 1:
        raise UsageError(
            f"replies have verdicts of {sorted(widths)} judges; expected one per judge, None for no verdict"
        )
    known: dict[Hashable, int] = {}
    for replies in clusters:
        for reply in replies:
            for verdict in reply:
                if verdict is not None:
                    known.setdefault(verdict, len(known))
    table = np.zeros((max(1, len(clusters)), len(known), len(known)))
    for place, replies in enumerate(clusters):
        for reply in replies:
            counts = np.zeros(len(known))
            for verdict in reply:
                if verdict is not None:
                    counts[known[verdict]] += 1
            if counts.sum() > 1:
                table[place] += (np.outer(counts, counts) - np.diag(counts)) / (counts.sum() - 1)
    return table


def _alpha(coincidences: np.ndarray[Any, np.dtype[np.float64]]) -> float | None:
    margins = coincidences.sum(0)
    n = margins.sum()
    expected = n * n - (margins**2).sum()
    if expected <= 0:
        return None
    observed = n - np.trace(coincidences)
    return float(1 - (n - 1) * observed / expected)


@dataclass(frozen=True)
class Flip:
    """Two systems that two judges put in opposite orders.

    first, second: names of the systems; the first judge gives `first` the lower figure, the second judge `second`
    judges:        names of the two judges
    figures:       what the first judge gives first and second, then what the second judge does
    """

    first: str
    second: str
    judges: tuple[str, str]
    figures: tuple[float, float, float, float]

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        return {
            "first": self.first,
            "second": self.second,
            "judges": list(self.judges),
            "figures": list(self.figures),
        }

    def __str__(self) -> str:
        one, two, three, four = (f"{100 * figure:.1f} %" for figure in self.figures)
        return (
            f"{self.first} and {self.second}: {one} and {two} by {self.judges[0]}, {three} and {four} by "
            f"{self.judges[1]}"
        )


def ranking_flips(figures: Mapping[str, Mapping[str, float | None]]) -> list[Flip]:
    """The pairs of systems whose order one judge reverses against another; empty where the ranking survives them all.

    figures: judge -> system (a victim, an attack) -> its success rate by that judge, None where it has none

    Ties reverse nothing. Small differences flip by chance: `advkit compare` tests a pair on the same prompts. Raises
    UsageError for judges that did not see the same systems.
    """
    judges = list(figures)
    systems = list(figures[judges[0]]) if judges else []
    if any(set(figures[judge]) != set(systems) for judge in judges):
        raise UsageError("ranking_flips: expected the same systems for every judge")
    found = []
    for one, two in combinations(judges, 2):
        for a, b in combinations(systems, 2):
            told = [figures[judge][name] for judge in (one, two) for name in (a, b)]
            if None in told:
                continue
            a1, b1, a2, b2 = (float(each or 0) for each in told)
            if (a1 - b1) * (a2 - b2) < 0:
                found.append(
                    Flip(a, b, (one, two), (a1, b1, a2, b2)) if a1 < b1 else Flip(b, a, (one, two), (b1, a1, b2, a2))
                )
    return found
