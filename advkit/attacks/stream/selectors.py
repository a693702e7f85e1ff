"""Online selectors for the k-secretary problem: streaming and over many streams at once (arXiv 2103.02014).

Virtual and optimistic are Babaioff et al.'s (2007), virtual+ is the paper's, single-ref Albers and Ladewig's (2019),
optimal-dp the policy of highest competitive ratio by dynamic programming. Values are only ever compared. All but random
and optimal-dp observe t items first and take none of them; comparisons are strict, equal values rank by arrival.

The released code of the paper observes t + 1 items, drops two references per acceptance of optimistic, pairs c and r of
single-ref from different rows of a table for most k, and ignores the caller's r: its optimistic and single-ref figures
differ from these.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from advkit.attacks.stream.ratios import (
    checked,
    optimal_policy,
    random_ratio,
    single_reference_ratio,
    single_reference_threshold,
    virtual_plus_ratio,
    virtual_ratio,
)
from advkit.core.errors import UnknownName, UsageError
from advkit.core.protocols import Rng

Values = NDArray[np.float64]
Rows = NDArray[np.int64]
Wants = Callable[[float, int, int], bool]  # value, index, submissions left
WantRows = Callable[[Values, int, Rows], Rows]  # values [M], index, submissions left [M] -> the streams that accept


class Running:
    """A selector at work on one stream: asked once per item, in order, and never again.

    length:  items in the stream
    exhaust: takes whatever comes once no more items are left than submissions
    """

    def __init__(self, wants: Wants, length: int, budget: int, exhaust: bool) -> None:
        self.length = length
        self.exhaust = exhaust
        self._wants = wants
        self._left = budget
        self._next = 0

    def select(self, value: float, t: int) -> bool:
        """Whether to submit item t (0-based) of this value; raises UsageError out of order or for NaN."""
        if t != self._next or t >= self.length:
            raise UsageError(f"item {t} of a stream of {self.length} was shown; expected item {self._next}")
        if math.isnan(value):
            raise UsageError(f"the value of item {t} is NaN, which has no rank; leave such items at -inf")
        self._next += 1
        if self._left == 0:
            return False
        taken = self._wants(value, t, self._left)
        taken = taken or (self.exhaust and self.length - t <= self._left)
        self._left -= taken
        return taken


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """A selection rule.

    exhaust: take whatever comes once no more items are left than submissions, observed or not
    """

    online: ClassVar[bool] = True

    exhaust: bool = False

    @abstractmethod
    def one(self, length: int, budget: int, rng: Rng | None) -> Wants:
        """The rule on one stream."""

    @abstractmethod
    def many(self, values: Values, budget: int, rng: Rng | None) -> WantRows:
        """The rule on streams [M, n], asked from item 0 to n - 1."""

    def ratio(self, length: int, budget: int) -> float | None:
        """The exact competitive ratio without `exhaust`; None where no formula is known."""
        return None

    def start(self, length: int, budget: int, rng: Rng | None = None) -> Running:
        """A selector for one stream; rng (one row) is for rules that draw. Raises UsageError where it can't run."""
        checked(length, budget)
        return Running(self.one(length, budget, rng), length, budget, self.exhaust)

    def select(self, values: ArrayLike, budget: int, rng: Rng | None = None) -> Rows:
        """Indices [M, budget] taken of the streams [M, n], in order, padded with -1; just what `start` takes.

        rng: one row per stream, for rules that draw
        """
        streams = _streams(values, budget)
        rows, length = streams.shape
        want = self.many(streams, budget, rng)
        columns = np.ascontiguousarray(streams.T)
        taken = np.full((rows, budget), -1, dtype=np.int64)
        left = np.full(rows, budget, dtype=np.int64)
        for i in range(length):
            accepted = want(columns[i], i, left)
            if self.exhaust and length - i <= budget:
                forced = left >= length - i
                forced[accepted] = True
                accepted = forced.nonzero()[0]
            if len(accepted):
                accepted = accepted[left[accepted] > 0]
                taken[accepted, budget - left[accepted]] = i
                left[accepted] -= 1
        return taken


def _streams(values: ArrayLike, budget: int) -> Values:
    streams = np.asarray(values, dtype=np.float64)
    if streams.ndim != 2 or streams.size == 0:
        raise UsageError(f"values of shape {streams.shape}; expected [streams, items]")
    if np.isnan(streams).any():
        raise UsageError("some values are NaN, which have no rank; leave such items at -inf")
    checked(streams.shape[1], budget)
    return streams


def _largest(values: Values, k: int) -> Values:
    """The k largest of each row, descending; padded with -inf where there are fewer."""
    rows, n = values.shape
    best = np.full((rows, k), -np.inf)
    have = min(n, k)
    if have:
        top = np.partition(values, n - have, axis=1)[:, n - have :]
        best[:, :have] = -np.sort(-top, axis=1)
    return best


def _insert(best: Values, rows: Rows, values: Values, filled: int | None = None) -> Rows:
    """Put a value into each of these rows, behind its equals; what falls off the end is gone. Returns the places.

    filled: entries of best that mean something; all by default
    """
    held = best[rows]
    places: Rows = (held[:, :filled] >= values[:, None]).sum(1)
    _shift(best, rows, places, values)
    return places


def _shift(table: NDArray[np.generic], rows: Rows, places: Rows, new: ArrayLike) -> None:
    """Make room at `places` by moving what is behind one to the right."""
    held = table[rows]
    moved = held.copy()
    behind = np.arange(1, held.shape[1]) > places[:, None]
    moved[:, 1:][behind] = held[:, :-1][behind]
    fits = (places < held.shape[1]).nonzero()[0]
    moved[fits, places[fits]] = np.broadcast_to(np.asarray(new), places.shape)[fits]
    table[rows] = moved


NOBODY: Rows = np.empty(0, dtype=np.int64)
Kept = list[tuple[float, int]]  # (minus the value, index): ascending is largest first, equals by arrival


def _keep(best: Kept, value: float, t: int, k: int) -> None:
    insort(best, (-value, t))
    del best[k:]


@dataclass(frozen=True, kw_only=True)
class Observing(Rule):
    """A rule that watches the first items and takes none of them.

    observe: number of items watched, at least the budget; None takes n/e, rounded down
    """

    observe: int | None = None

    def observed(self, length: int, budget: int) -> int:
        """The number of items watched; raises UsageError where it is less than the budget."""
        t = math.floor(length / math.e) if self.observe is None else self.observe
        if not budget <= t <= length:
            raise UsageError(
                f"{t} of {length} items observed for a budget of {budget}; expected budget <= observe <= items: "
                "set observe=..., or take a selector that observes less (single-ref, optimal-dp)"
            )
        return t


@dataclass(frozen=True, kw_only=True)
class Virtual(Observing):
    """Take what exceeds the k-th largest value so far, where that one came from the observed items."""

    def ratio(self, length: int, budget: int) -> float:
        """The exact competitive ratio, the same for every budget."""
        return virtual_ratio(length, self.observed(length, budget))

    def one(self, length: int, budget: int, rng: Rng | None) -> Wants:
        observed = self.observed(length, budget)
        best: Kept = []

        def wants(value: float, t: int, left: int) -> bool:
            if t < observed:
                _keep(best, value, t, budget)
                return False
            if -value >= best[-1][0]:
                return False
            displaced = best[-1][1]
            _keep(best, value, t, budget)
            return displaced < observed

        return wants

    def many(self, values: Values, budget: int, rng: Rng | None) -> WantRows:
        observed = self.observed(values.shape[1], budget)
        best = _largest(values[:, :observed], budget)
        sampled = np.ones(best.shape, dtype=bool)
        floor = best[:, -1].copy()

        def want(column: Values, i: int, left: Rows) -> Rows:
            if i < observed:
                return NOBODY
            rows = (column > floor).nonzero()[0]
            if len(rows) == 0:
                return NOBODY
            accepted: Rows = rows[sampled[rows, -1]]
            _shift(sampled, rows, _insert(best, rows, column[rows]), False)
            floor[rows] = best[rows, -1]
            return accepted

        return want


@dataclass(frozen=True, kw_only=True)
class VirtualPlus(Observing):
    """Take what exceeds the k-th largest of the observed and the taken."""

    def ratio(self, length: int, budget: int) -> float:
        """The exact competitive ratio."""
        return virtual_plus_ratio(length, budget, self.observed(length, budget))

    def one(self, length: int, budget: int, rng: Rng | None) -> Wants:
        observed = self.observed(length, budget)
        best: Kept = []

        def wants(value: float, t: int, left: int) -> bool:
            if t >= observed and -value >= best[-1][0]:
                return False
            _keep(best, value, t, budget)
            return t >= observed

        return wants

    def many(self, values: Values, budget: int, rng: Rng | None) -> WantRows:
        observed = self.observed(values.shape[1], budget)
        best = _largest(values[:, :observed], budget)
        floor = best[:, -1].copy()

        def want(column: Values, i: int, left: Rows) -> Rows:
            if i < observed:
                return NOBODY
            rows = ((column > floor) & (left > 0)).nonzero()[0]
            if len(rows):
                _insert(best, rows, column[rows])
                floor[rows] = best[rows, -1]
            return rows

        return want


@dataclass(frozen=True, kw_only=True)
class Optimistic(Observing):
    """The k largest observed are references; take what exceeds the smallest one left, and discard that one."""

    def one(self, length: int, budget: int, rng: Rng | None) -> Wants:
        observed = self.observed(length, budget)
        best: Kept = []

        def wants(value: float, t: int, left: int) -> bool:
            if t < observed:
                _keep(best, value, t, budget)
                return False
            if not best or -value >= best[-1][0]:
                return False
            best.pop()
            return True

        return wants

    def many(self, values: Values, budget: int, rng: Rng | None) -> WantRows:
        observed = self.observed(values.shape[1], budget)
        best = _largest(values[:, :observed], budget)
        floor = best[:, -1].copy()

        def want(column: Values, i: int, left: Rows) -> Rows:
            if i < observed:
                return NOBODY
            rows = ((column > floor) & (left > 0)).nonzero()[0]
            if len(rows):
                # One reference goes with every submission.
                floor[rows] = np.where(left[rows] > 1, best[rows, left[rows] - 2], np.inf)
            return rows

        return want


@dataclass(frozen=True, kw_only=True)
class SingleReference(Observing):
    """Take what exceeds one fixed value: the r-th largest observed.

    observe:   number of items watched, at least `reference`; None takes the share that is best for the budget
    reference: r; None takes the rank that is best for the budget
    """

    reference: int | None = None

    def observed(self, length: int, budget: int) -> int:
        """The number of items watched; raises UsageError where it is less than the reference's rank."""
        t = self.observe
        if t is None:
            t = math.floor(single_reference_threshold(budget).alpha * length)
        r = self.rank(budget)
        if not 1 <= r <= t <= length:
            raise UsageError(
                f"reference {r} of {t} observed items of {length}; expected 1 <= reference <= observe <= items"
            )
        return t

    def rank(self, budget: int) -> int:
        """The reference's rank among the observed."""
        return single_reference_threshold(budget).reference if self.reference is None else self.reference

    def ratio(self, length: int, budget: int) -> float:
        """The exact competitive ratio."""
        return single_reference_ratio(length, budget, self.observed(length, budget), self.rank(budget))

    def one(self, length: int, budget: int, rng: Rng | None) -> Wants:
        observed, rank = self.observed(length, budget), self.rank(budget)
        best: Kept = []

        def wants(value: float, t: int, left: int) -> bool:
            if t < observed:
                _keep(best, value, t, rank)
                return False
            return -value < best[-1][0]

        return wants

    def many(self, values: Values, budget: int, rng: Rng | None) -> WantRows:
        observed = self.observed(values.shape[1], budget)
        floor = _largest(values[:, :observed], self.rank(budget))[:, -1]

        def want(column: Values, i: int, left: Rows) -> Rows:
            if i < observed:
                return NOBODY
            rows: Rows = ((column > floor) & (left > 0)).nonzero()[0]
            return rows

        return want


@dataclass(frozen=True, kw_only=True)
class OptimalDP(Rule):
    """Take an item when its chance to be among the final k largest outweighs the submission it costs.

    The highest competitive ratio that comparisons alone allow. Fills its budget by itself: where as many submissions as
    items are left, nothing is lost by taking what comes.
    """

    def ratio(self, length: int, budget: int) -> float:
        """The exact competitive ratio: no ordinal online rule has a higher one."""
        return optimal_policy(length, budget).ratio

    def one(self, length: int, budget: int, rng: Rng | None) -> Wants:
        limits = optimal_policy(length, budget).limits
        best: Kept = []

        def wants(value: float, t: int, left: int) -> bool:
            rank = bisect_right(best, -value, key=lambda kept: kept[0]) + 1
            if rank <= budget:
                _keep(best, value, t, budget)
            return rank <= int(limits[t, left])

        return wants

    def many(self, values: Values, budget: int, rng: Rng | None) -> WantRows:
        rows, length = values.shape
        limits = optimal_policy(length, budget).limits
        first = int(limits.any(1).argmax())  # before it, nothing is taken whatever its rank
        best = _largest(values[:, :first], budget)
        rank = np.full(rows, budget + 1, dtype=np.int64)

        def want(column: Values, i: int, left: Rows) -> Rows:
            if i < first:
                return NOBODY
            filled = min(i, budget)
            near = np.arange(rows) if filled < budget else (column > best[:, -1]).nonzero()[0]
            rank[:] = budget + 1
            if len(near):
                rank[near] = _insert(best, near, column[near], filled) + 1
            accepted: Rows = (rank <= limits[i, left]).nonzero()[0]
            return accepted

        return want


def _drawn(length: int, budget: int, rows: int, rng: Rng | None) -> Rows:
    """Positions [rows, budget], drawn without replacement and sorted."""
    if rng is None:
        raise UsageError("the random selector draws its positions: hand it an rng with one row per stream")
    keys = rng.at("positions").uniform(torch.empty((rows, length), dtype=torch.float64)).cpu().numpy()
    drawn: Rows = np.sort(np.argpartition(keys, budget - 1, axis=1)[:, :budget], axis=1)
    return drawn


@dataclass(frozen=True, kw_only=True)
class Random(Rule):
    """k positions drawn before the stream begins, whatever the values: the naive attacker."""

    def ratio(self, length: int, budget: int) -> float:
        """Budget over items."""
        return random_ratio(length, budget)

    def one(self, length: int, budget: int, rng: Rng | None) -> Wants:
        chosen = frozenset(_drawn(length, budget, 1, rng)[0].tolist())
        return lambda value, t, left: t in chosen

    def many(self, values: Values, budget: int, rng: Rng | None) -> WantRows:
        rows, length = values.shape
        chosen = np.zeros((length, rows), dtype=bool)
        chosen[_drawn(length, budget, rows, rng), np.arange(rows)[:, None]] = True
        return lambda column, i, left: chosen[i].nonzero()[0]


@dataclass(frozen=True, kw_only=True)
class Offline(Rule):
    """The k largest of the whole stream: no online rule, but what online rules are measured against."""

    online: ClassVar[bool] = False

    def ratio(self, length: int, budget: int) -> float:
        """All of them."""
        return 1.0

    def one(self, length: int, budget: int, rng: Rng | None) -> Wants:
        raise UsageError(
            "offline needs the whole stream before it takes anything; reports name its figures beside every "
            "selector's: take virtual+, single-ref, optimal-dp..."
        )

    def many(self, values: Values, budget: int, rng: Rng | None) -> WantRows:
        length = values.shape[1]
        least = np.partition(values, length - budget, axis=1)[:, length - budget, None]
        above, equal = values > least, values == least
        chosen = above | (equal & (np.cumsum(equal, axis=1) <= budget - above.sum(1, keepdims=True)))
        columns = np.ascontiguousarray(chosen.T)
        return lambda column, i, left: columns[i].nonzero()[0]


SELECTORS: dict[str, type[Rule]] = {
    "virtual": Virtual,
    "virtual+": VirtualPlus,
    "optimistic": Optimistic,
    "single-ref": SingleReference,
    "optimal-dp": OptimalDP,
    "random": Random,
    "offline": Offline,
}


def selector(name: str, *, observe: int | None = None, reference: int | None = None, exhaust: bool = False) -> Rule:
    """A rule by name; raises UnknownName, or UsageError for a setting that the rule does not have."""
    if name not in SELECTORS:
        raise UnknownName(f"unknown selector {name!r}; expected one of {', '.join(SELECTORS)}")
    kind = SELECTORS[name]
    given = {key: value for key, value in (("observe", observe), ("reference", reference)) if value is not None}
    for key in given:
        if key not in kind.__dataclass_fields__:
            having = ", ".join(each for each, other in SELECTORS.items() if key in other.__dataclass_fields__)
            raise UsageError(f"the selector {name} has no {key}: leave it out, or take one of {having}")
    return kind(exhaust=exhaust, **given)


def select(
    name: str,
    values: ArrayLike,
    k: int,
    *,
    observe: int | None = None,
    reference: int | None = None,
    exhaust: bool = False,
    rng: Rng | None = None,
) -> Rows:
    """Indices [M, k] that the selector of that name takes of streams [M, n], in order, padded with -1."""
    return selector(name, observe=observe, reference=reference, exhaust=exhaust).select(values, k, rng)


def stream_by_stream(rule: Rule, values: Sequence[Sequence[float]], budget: int, rng: Rng | None = None) -> Rows:
    """What `rule.select` gives, item by item through `rule.start`."""
    taken = np.full((len(values), budget), -1, dtype=np.int64)
    for m, stream in enumerate(values):
        running = rule.start(len(stream), budget, None if rng is None else rng.take(torch.tensor([m])))
        found = [t for t, value in enumerate(stream) if running.select(float(value), t)]
        taken[m, : len(found)] = found
    return taken
