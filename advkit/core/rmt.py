"""Random matrix theory of sample covariances: Marchenko-Pastur, Tracy-Widom (beta 1) and spiked models.

Everywhere `S = Z^T Z / n` is the sample covariance of n independent rows of d numbers (n is one less than the samples
where their mean was taken off), and `g = d / n` its aspect ratio.

- Noise of variance sigma2 has eigenvalues that fill the bulk `sigma2 (1 -+ sqrt g)^2` (Marchenko and Pastur, 1967).
- Its largest one follows the Tracy-Widom law after centring and scaling (Johnstone, Ann. Statist. 29, 2001; the halves
  in both are those of arXiv math/0609418, by which the error is of order n^(-2/3)).
- A population eigenvalue l > sigma2 (1 + sqrt g), a spike, leaves the bulk, and comes out too large (Baik, Ben Arous
  and Peche, arXiv math/0403022; Paul, Statist. Sinica 17, 2007).
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, special

from advkit.core.errors import UsageError

Floats = np.ndarray[Any, np.dtype[np.float64]]

NODES = 60
"""Points of the quadrature under the Fredholm determinant: twice as many give the same to 1e-13."""
LEAST, MOST = -12.0, 12.0
"""Below and above them the Tracy-Widom law is 0 and 1 to double precision."""


def _check(g: float, sigma2: float) -> None:
    if not (g > 0 and math.isfinite(g)):
        raise UsageError(f"the aspect ratio is {g!r}; expected dimensions over samples, a number above 0")
    if not (sigma2 > 0 and math.isfinite(sigma2)):
        raise UsageError(f"the noise variance is {sigma2!r}; expected a number above 0")


# --- the bulk


def mp_edges(g: float, sigma2: float = 1.0) -> tuple[float, float]:
    """Ends of the Marchenko-Pastur bulk, `sigma2 (1 -+ sqrt g)^2`. UsageError unless g and sigma2 are above 0."""
    _check(g, sigma2)
    return sigma2 * (1 - math.sqrt(g)) ** 2, sigma2 * (1 + math.sqrt(g)) ** 2


def mp_atom(g: float) -> float:
    """Share of the eigenvalues that are 0: 1 - 1/g for g > 1 (fewer samples than dimensions), else 0."""
    _check(g, 1.0)
    return max(0.0, 1 - 1 / g)


def mp_density(x: ArrayLike, g: float, sigma2: float = 1.0) -> Any:
    """Density of the Marchenko-Pastur law at x, 0 outside of the bulk; the atom at 0 (`mp_atom`) is no part of it."""
    low, high = mp_edges(g, sigma2)
    at = np.asarray(x, dtype=np.float64)
    inside = (at > max(low, 0.0)) & (at < high)
    safe = np.where(inside, at, 0.5 * (low + high))
    found = np.sqrt((high - safe) * (safe - low)) / (2 * math.pi * g * sigma2 * safe)
    return _plain(np.where(inside, found, 0.0))


def mp_cdf(x: ArrayLike, g: float, sigma2: float = 1.0) -> Any:
    """Distribution function of the Marchenko-Pastur law at x, atom at 0 included; in closed form.

    With x = sigma2 (1 + g + 2 sqrt(g) cos t) the density becomes (2/pi) sin^2 t / (1 + g + 2 sqrt(g) cos t), whose
    integral is elementary.
    """
    low, high = mp_edges(g, sigma2)
    at = np.asarray(x, dtype=np.float64)
    bulk = _bulk(np.clip(at, low, high) / sigma2, g)
    return _plain(np.where(at < 0, 0.0, np.where(at < low, 0.0, bulk) + mp_atom(g)))


def _bulk(x: Floats, g: float) -> Floats:
    """Mass of the bulk up to x, sigma2 = 1; x lies in the bulk."""
    root = math.sqrt(g)
    t = np.arccos(np.clip((x - 1 - g) / (2 * root), -1.0, 1.0))

    def integral(angle: Floats) -> Floats:
        turned = np.arctan2(abs(1 - root) * np.sin(angle / 2), (1 + root) * np.cos(angle / 2))
        return np.asarray(-np.sin(angle) / (2 * root) + (1 + g) * angle / (4 * g) - abs(1 - g) * turned / (2 * g))

    whole = integral(np.asarray(math.pi))
    return np.asarray(np.clip(2 / math.pi * (whole - integral(t)), 0.0, min(1.0, 1 / g)))


@lru_cache(maxsize=256)
def mp_median(g: float, sigma2: float = 1.0) -> float:
    """Median of the eigenvalues other than 0 under noise of variance sigma2.

    For g <= 1 this is the median of the Marchenko-Pastur law (g = .5: 0.830466). For g > 1 it is that of the bulk
    alone, g times the median at 1/g: the eigenvalues of the n x n Gram matrix, rescaled.
    """
    _check(g, sigma2)
    if g > 1:
        return g * mp_median(1 / g, sigma2)
    low, high = mp_edges(g)
    found: float = optimize.brentq(lambda x: float(_bulk(np.asarray(x), g)) - 0.5, low, high, xtol=1e-14)
    return sigma2 * found


# --- the largest eigenvalue of noise


@cache
def _nodes() -> tuple[Floats, Floats]:
    points, weights = np.polynomial.legendre.leggauss(NODES)
    return np.asarray(points), np.asarray(weights)


@lru_cache(maxsize=1024)
def _fredholm(s: float) -> float:
    points, weights = _nodes()
    length = 16.0 + max(0.0, -2 * s)  # the kernel is nothing where (x + y) / 2 + s is beyond 8 or so
    x, w = length * (points + 1) / 2, length * weights / 2
    kernel = 0.5 * special.airy((x[:, None] + x[None, :]) / 2 + s)[0]
    root = np.sqrt(w)
    return float(np.clip(np.linalg.det(np.eye(NODES) - root[:, None] * kernel * root[None, :]), 0.0, 1.0))


def tracy_widom_cdf(s: ArrayLike) -> Any:
    """Distribution function of the Tracy-Widom law for real matrices (beta = 1), to about 1e-13.

    It is the Fredholm determinant `F1(s) = det(I - T_s)` of the kernel `Ai((x + y)/2 + s) / 2` on (0, inf) (Ferrari and
    Spohn, arXiv math-ph/0505012), by Gauss-Legendre quadrature (Bornemann, arXiv 0804.2543).
    """
    at = np.asarray(s, dtype=np.float64)
    if not bool(np.isfinite(at).all()):
        raise UsageError("the Tracy-Widom law is asked for at a number that is not finite")
    found = [0.0 if one < LEAST else 1.0 if one > MOST else _fredholm(float(one)) for one in at.ravel()]
    return _plain(np.asarray(found).reshape(at.shape))


@lru_cache(maxsize=256)
def tracy_widom_quantile(p: float) -> float:
    """Quantile of the Tracy-Widom law for real matrices (beta = 1): .99 gives 2.023449.

    p: strictly between 0 and 1, at least 1e-12 from both. Raises UsageError otherwise.
    """
    if not 1e-12 <= p <= 1 - 1e-12:
        raise UsageError(f"the level is {p!r}; expected a number between 0 and 1, such as 0.99")
    found: float = optimize.brentq(lambda s: float(tracy_widom_cdf(s)) - p, LEAST, MOST, xtol=1e-10)
    return found


def tracy_widom_scale(n: int, d: int) -> tuple[float, float]:
    """Centre m and scale s by which `(n lam_1 / sigma2 - m) / s` follows the Tracy-Widom law under noise.

    n: independent rows, >= 1; d: their dimensions, >= 1. Raises UsageError otherwise.
    """
    if n < 1 or d < 1:
        raise UsageError(f"{n} rows of {d} dimensions: expected at least 1 of both")
    rows, columns = math.sqrt(n - 0.5), math.sqrt(d - 0.5)
    return (rows + columns) ** 2, (rows + columns) * (1 / rows + 1 / columns) ** (1 / 3)


def tracy_widom_edge(n: int, d: int, level: float = 0.99, sigma2: float = 1.0) -> float:
    """The value that the largest of d sample eigenvalues of noise stays below with probability `level`."""
    centre, scale = tracy_widom_scale(n, d)
    return sigma2 * (centre + scale * tracy_widom_quantile(level)) / n


# --- spikes


def bbp_threshold(g: float, sigma2: float = 1.0) -> float:
    """Population eigenvalue above which a spike leaves the bulk, `sigma2 (1 + sqrt g)`."""
    _check(g, sigma2)
    return sigma2 * (1 + math.sqrt(g))


def spiked(spike: ArrayLike, g: float, sigma2: float = 1.0) -> Any:
    """Where the sample eigenvalue of a population eigenvalue lies in the limit; the bulk's upper edge for hidden ones.

    spike: population eigenvalues, above 0
    """
    _, high = mp_edges(g, sigma2)
    at, seen = _above(spike, g, sigma2)
    return _plain(np.where(seen, at * (1 + g * sigma2 / (at - sigma2)), high))


def overlap(spike: ArrayLike, g: float, sigma2: float = 1.0) -> Any:
    """Squared inner product of a spike's sample and population eigenvectors in the limit; 0 for hidden spikes.

    spike: population eigenvalues, above 0
    """
    at, seen = _above(spike, g, sigma2)
    excess = at - sigma2
    return _plain(np.where(seen, (1 - g * sigma2**2 / excess**2) / (1 + g * sigma2 / excess), 0.0))


def _above(spike: ArrayLike, g: float, sigma2: float) -> tuple[Floats, Floats]:
    """The spikes, hidden ones replaced by any that are not, and which are not."""
    at = np.asarray(spike, dtype=np.float64)
    threshold = bbp_threshold(g, sigma2)
    return np.where(at > threshold, at, 2 * threshold), np.asarray(at > threshold)


def debiased(value: ArrayLike, g: float, sigma2: float = 1.0) -> Any:
    """Population eigenvalue of a sample eigenvalue above the bulk: the inverse of `spiked`.

    value: sample eigenvalues. NaN for those that are not above the bulk's upper edge: any hidden spike may be behind.
    """
    _, high = mp_edges(g, sigma2)
    at = np.asarray(value, dtype=np.float64)
    seen = at > high
    x = np.where(seen, at, 2 * high) / sigma2
    half = x + 1 - g
    return _plain(np.where(seen, sigma2 / 2 * (half + np.sqrt(half**2 - 4 * x)), np.nan))


def _plain(found: Floats) -> Any:
    """A float for a single number, else the array."""
    return float(found) if found.ndim == 0 else found
