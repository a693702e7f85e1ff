"""Activation patterns: which samples a hidden unit is active on. Sampled, enumerated, and those that are of no use."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from advkit.core.errors import BadInput, UsageError
from advkit.training.convex.program import Array, Moves, Patterns

MOST = 20_000
"""Patterns that are enumerated at most."""
FIT = 1e-7
"""Tolerance of the linear programs."""


class Collected:
    """Distinct patterns in the order in which they came."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen: dict[bytes, Patterns] = {}

    def __len__(self) -> int:
        return len(self.seen)

    def take(self, columns: Patterns, wanted: int) -> None:
        """Columns [n, k] not seen before, up to `wanted` in all."""
        for column in columns.T:
            if len(self.seen) >= wanted:
                return
            self.seen.setdefault(np.packbits(column).tobytes(), column)

    def matrix(self) -> Patterns:
        """Bool [n, P]."""
        return np.stack(list(self.seen.values()), axis=1) if self.seen else np.zeros((self.n, 0), dtype=bool)


def sampled(x: Array, wanted: int, rng: np.random.Generator) -> Patterns:
    """Distinct patterns 1[X a >= 0] of normally distributed a, bool [n, P] with P <= wanted.

    It ends after 200 * wanted + 10,000 draws: where fewer patterns exist the public code's loop never does.
    """
    if wanted < 1:
        raise UsageError(f"patterns is {wanted}; expected at least 1")
    found, left = Collected(len(x)), 200 * wanted + 10_000
    while len(found) < wanted and left > 0:
        drawn = min(left, max(64, 2 * (wanted - len(found))))
        found.take(x @ rng.standard_normal((x.shape[1], drawn)) >= 0, wanted)
        left -= drawn
    return found.matrix()


def spaced(x: Array, wanted: int, rng: np.random.Generator, moves: Moves) -> Patterns:
    """Patterns that keep their distance from the samples, as robust training needs them; bool [n, P], P <= wanted.

    Directions are drawn, normal or differences of two samples. Along each, thresholds lie in the middle of the gaps
    between samples, and gaps are ranked by their width over the attacker's reach. X has a column of ones (the last
    one), which sets the threshold. An own addition: patterns drawn as in the paper mostly pass a sample closely.
    """
    found, n = Collected(len(x)), len(x)
    ranked: list[tuple[float, int, int]] = []
    directions = rng.standard_normal((x.shape[1], 20 + wanted))
    pairs = rng.integers(n, size=(2, directions.shape[1]))
    differences = (x[pairs[0]] - x[pairs[1]]).T
    directions = np.where(np.arange(directions.shape[1]) % 2 == 0, directions, differences)
    directions[-1] = 0.0
    reach = moves.reach(directions)
    places = x @ directions
    order = np.argsort(places, axis=0)
    gaps = np.diff(np.take_along_axis(places, order, axis=0), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = np.where(gaps > 0, gaps / (2 * reach), 0.0)
    for direction in range(directions.shape[1]):
        best = np.argsort(-scores[:, direction])[:8]
        ranked += [(-float(scores[gap, direction]), int(gap), direction) for gap in best if scores[gap, direction] > 0]
    for _, gap, direction in sorted(ranked):
        column = np.zeros((n, 1), dtype=bool)
        column[order[gap + 1 :, direction]] = True
        found.take(column, wanted)
        found.take(~column, wanted)
        if len(found) >= wanted:
            break
    return found.matrix()


def enumerated(x: Array, most: int = MOST) -> Patterns:
    """All patterns of open cells, bool [n, P]: sample after sample, both signs are kept where a linear program allows.

    P <= 2 sum_{k<r} C(n - 1, k) with r the rank of X. Samples that are zero count as active. BadInput for more than
    `most`.
    """
    rows = np.flatnonzero((x != 0).any(axis=1))
    if not len(rows):
        return np.ones((len(x), 1), dtype=bool)
    # -a has the complement's pattern: half of the cells will do
    cells: list[tuple[list[float], Array]] = [([1.0], x[rows[0]] / (x[rows[0]] @ x[rows[0]]))]
    for k in range(1, len(rows)):
        grown: list[tuple[list[float], Array]] = []
        for signs, inside in cells:
            side = 1.0 if x[rows[k]] @ inside >= 0 else -1.0
            for sign in (side, -side):
                longer = [*signs, sign]
                if sign * (x[rows[k]] @ inside) > FIT:
                    grown.append((longer, inside))
                    continue
                point = _inside(np.array(longer)[:, None] * x[rows[: k + 1]])
                if point is not None:
                    grown.append((longer, point))
        cells = grown
        if 2 * len(cells) > most:
            raise BadInput(
                f"{len(x)} samples in {x.shape[1]} dimensions have more than {most} activation patterns: sample some "
                "(patterns=200), or take fewer samples or components"
            )
    half = np.array([signs for signs, _ in cells]).T > 0
    both = np.ones((len(x), 2 * half.shape[1]), dtype=bool)
    both[rows] = np.concatenate([half, ~half], axis=1)
    return both


def _inside(rows: Array) -> Array | None:
    """A point with rows @ a >= 1, or None."""
    from scipy.optimize import linprog

    n, d = rows.shape
    done = linprog(np.zeros(d), A_ub=-rows, b_ub=-np.ones(n), bounds=(None, None), method="highs")
    return np.asarray(done.x) if done.status == 0 else None


def least_reach(x: Array, pattern: Patterns, moves: Moves) -> float:
    """The smallest ||lift v||_q of a v with this pattern at distance 1 from every sample; infinity where there is none.

    A linear program for l_inf and l_1 attackers, a cone program for others.
    """
    from scipy.optimize import linprog

    rows = np.where(pattern, 1.0, -1.0)[:, None] * x
    n, d = rows.shape
    lift = moves.lift
    if not len(lift):
        return 0.0 if _inside(rows) is not None else math.inf
    if moves.q not in (1.0, math.inf):
        return _least_cone(rows, moves)
    extra = len(lift) if moves.q == 1 else 1
    spread = np.eye(len(lift)) if moves.q == 1 else np.ones((len(lift), 1))
    above = np.block([[-rows, np.zeros((n, extra))], [lift, -spread], [-lift, -spread]])
    right = np.concatenate([-np.ones(n), np.zeros(2 * len(lift))])
    cost = np.concatenate([np.zeros(d), np.ones(extra)])
    done = linprog(cost, A_ub=above, b_ub=right, bounds=(None, None), method="highs")
    return float(done.fun) if done.status == 0 else math.inf


def _least_cone(rows: Array, moves: Moves) -> float:
    from advkit.training.convex.cones import cvxpy

    cp = cvxpy()
    v = cp.Variable(rows.shape[1])
    problem = cp.Problem(cp.Minimize(cp.norm(moves.lift @ v, moves.q)), [rows @ v >= 1])
    problem.solve(solver="CLARABEL")
    return float(problem.value) if problem.status in ("optimal", "optimal_inaccurate") else math.inf


def usable(x: Array, patterns: Patterns, moves: Moves) -> Patterns:
    """Bool [P]: patterns that a unit can have on all of every sample's ball; all others force v_i = w_i = 0.

    A pattern and its complement are usable together: one program for both.
    """
    known: dict[bytes, bool] = {}
    return np.array([_usable(x, column, moves, known) for column in _columns(patterns)], dtype=bool)


def _columns(patterns: Patterns) -> Iterator[Patterns]:
    yield from patterns.T


def _usable(x: Array, pattern: Patterns, moves: Moves, known: dict[bytes, bool]) -> bool:
    key = (pattern if pattern[0] else ~pattern).tobytes()
    if key not in known:
        known[key] = least_reach(x, pattern, moves) <= 1 + FIT
    return known[key]
