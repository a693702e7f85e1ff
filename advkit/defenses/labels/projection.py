"""Euclidean projection onto the feasible set of the SVM dual, {a: y^T a = 0, 0 <= a <= C}, in O(n log n)."""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from advkit.core.errors import BadInput

Array = NDArray[np.float64]
Method = Literal["exact", "fpi"]

_FPI_ROUNDS: Final = 1000
_FPI_STOP: Final = 1e-21
_FPI_RESIDUAL: Final = 1e-12


class LabelInputError(BadInput, ValueError):
    """Data, labels or settings that a learner of labels can't use; a ValueError, too, as scikit-learn expects."""


def project(z: ArrayLike, y: ArrayLike, C: ArrayLike, *, method: Method = "exact") -> Array:
    """The point of {a: y^T a = 0, 0 <= a_i <= C_i} nearest to z, float64 [n].

    The solution is a = clip(z - mu y, 0, C) for the root mu of phi(mu) = y^T clip(z - mu y, 0, C), which is continuous,
    piecewise linear and never rises. Its 2n breakpoints are sorted, a binary search finds the two around the root, and
    the root between them is exact. Where all labels are equal the answer is 0.

    z: what is projected, [n], finite
    y: labels -1 and +1, [n]
    C: upper bounds, a number or [n], each of at least 0 and finite
    method: exact, or fpi, the fixed-point iteration of FLORAL's released code (arXiv 2502.17121): at most 1,000 rounds;
        where it ends off the constraint (y^T a above 1e-12 of the sum of all C), the exact answer is returned instead

    Raises LabelInputError (a ValueError) for shapes that do not match, labels other than -1 and +1, bounds below 0 and
    values that are not finite.
    """
    point, signs = np.asarray(z, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if point.ndim != 1 or signs.shape != point.shape:
        raise LabelInputError(f"z has shape {point.shape} and y {signs.shape}; expected two vectors of one length")
    if not np.isin(signs, (-1.0, 1.0)).all():
        raise LabelInputError(f"y holds {np.unique(signs)[:5].tolist()}; expected labels -1 and +1")
    if np.shape(C) not in ((), point.shape):
        raise LabelInputError(f"C has shape {np.shape(C)}; expected a number, or one for each of {len(point)} values")
    upper = np.array(np.broadcast_to(np.asarray(C, dtype=np.float64), point.shape))
    if not np.isfinite(point).all():
        raise LabelInputError("z holds values that are not finite")
    if not (np.isfinite(upper).all() and (upper >= 0).all()):
        raise LabelInputError("C holds values below 0 or not finite; expected bounds of at least 0")
    if method not in ("exact", "fpi"):
        raise LabelInputError(f"method is {method!r}; expected exact or fpi")
    return projected(point, signs, upper, method)


def projected(z: Array, y: Array, upper: Array, method: Method = "exact") -> Array:
    """`project` on vectors that are known to be fine."""
    return _exact(z, y, upper) if method == "exact" else _fixed_point(z, y, upper)


def _at(mu: float, z: Array, y: Array, upper: Array) -> Array:
    a: Array = np.minimum(np.maximum(z - mu * y, 0.0), upper)
    return a


def _exact(z: Array, y: Array, upper: Array) -> Array:
    if not len(z):
        return np.zeros(0)
    enters, leaves = y * z, y * (z - upper)
    breaks = np.sort(np.concatenate((enters, leaves)))
    low, high = 0, len(breaks) - 1
    above = float(y @ _at(breaks[low], z, y, upper))
    if above <= 0:  # no positive label has room: phi is at its largest here, so it is 0 up to round-off
        return _at(breaks[low], z, y, upper)
    while high - low > 1:  # phi(low) > 0 >= phi(high)
        middle = (low + high) // 2
        value = float(y @ _at(breaks[middle], z, y, upper))
        if value > 0:
            low, above = middle, value
        else:
            high = middle
    start, end = float(breaks[low]), float(breaks[high])
    between = (np.minimum(enters, leaves) <= start) & (np.maximum(enters, leaves) >= end) & (upper > 0)
    free = int(np.count_nonzero(between))
    return _at(min(start + above / free, end) if free else end, z, y, upper)


def _fixed_point(z: Array, y: Array, upper: Array) -> Array:
    mu = 0.0
    for _ in range(_FPI_ROUNDS):
        moved = z - mu * y
        capped = moved >= upper
        free = (moved > 0) & ~capped
        count = int(np.count_nonzero(free))
        damping = max(2 * count, 1)
        pull = float(upper[capped] @ y[capped] + z[free] @ y[free])
        mu, before = (1 - count / damping) * mu + pull / damping, mu
        if abs(mu - before) <= _FPI_STOP:
            break
    a = _at(mu, z, y, upper)
    return a if abs(y @ a) <= _FPI_RESIDUAL * upper.sum() else _exact(z, y, upper)
