"""Statistics of randomized smoothing (Cohen et al., arXiv 1902.02918): bounds on a vote, radii, the test of PREDICT.

A smoothed classifier answers the class that a base classifier gives most often under noise of standard deviation sigma.
Where a class comes with probability p > 1/2, it stays the answer within the L2 radius sigma * Phi^-1(p).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from advkit.core.errors import UsageError

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
_DOWN = 1 - 1e-12
"""What radii are multiplied by, so that round-off of the quantile functions never makes one larger."""


def _counts(k: ArrayLike, n: ArrayLike) -> tuple[Floats, Floats]:
    hits, draws = np.broadcast_arrays(np.asarray(k, dtype=np.float64), np.asarray(n, dtype=np.float64))
    if not bool(np.all((hits >= 0) & (hits <= draws) & (draws >= 1) & (hits == hits.round()))):
        raise UsageError(f"{k!r} of {n!r} votes: expected whole numbers with 0 <= k <= n and n >= 1")
    return hits, draws


def check_alpha(alpha: float) -> None:
    """Raise UsageError unless alpha lies strictly between 0 and 1."""
    if not 0 < alpha < 1:
        raise UsageError(f"alpha is {alpha!r}; expected a number strictly between 0 and 1, such as 0.001")


def lower_bound(k: ArrayLike, n: ArrayLike, alpha: float) -> Any:
    """One-sided Clopper-Pearson lower bound of a probability: it lies above the truth in at most alpha of all cases.

    k: draws that gave the class, whole, 0 <= k <= n; n: draws, >= 1. Both broadcast.
    Float for single counts, else a float64 array: the quantile Beta(alpha; k, n - k + 1); 0 for k = 0, alpha**(1/n) for
    k = n. Raises UsageError for other counts, and for alpha outside (0, 1).
    """
    from scipy import special

    check_alpha(alpha)
    hits, draws = _counts(k, n)
    inner = special.betaincinv(np.maximum(hits, 1), np.maximum(draws - hits, 0) + 1, alpha)
    bound = np.where(hits == 0, 0.0, np.where(hits == draws, alpha ** (1 / draws), inner))
    return float(bound) if bound.ndim == 0 else bound


def upper_bound(k: ArrayLike, n: ArrayLike, alpha: float) -> Any:
    """The one-sided upper bound, 1 - lower_bound(n - k, n, alpha)."""
    hits, draws = _counts(k, n)
    bound = 1.0 - np.asarray(lower_bound(draws - hits, draws, alpha))
    return float(bound) if bound.ndim == 0 else bound


def radius(k: ArrayLike, n: ArrayLike, sigma: float, alpha: float, slack: ArrayLike = 0.0) -> Any:
    """Certified L2 radius in units of the input: sigma * Phi^-1(lower_bound(k, n, alpha) - slack).

    0 where the bound is not above 1/2: CERTIFY abstains there.

    sigma: standard deviation of the noise, > 0; slack: how far the noise that was drawn may be from the noise that the
    theorem is about, in total variation (0 for exact noise). Rounded down by one part in 10**12.
    """
    from scipy import special

    if not sigma > 0:
        raise UsageError(f"sigma is {sigma!r}; expected a standard deviation above 0")
    bound = np.asarray(lower_bound(k, n, alpha)) - np.asarray(slack, dtype=np.float64)
    found = sigma * special.ndtri(np.clip(bound, 0.5, 1 - 2.0**-53)) * _DOWN
    return float(found) if found.ndim == 0 else found


def largest_radius(n: int, sigma: float, alpha: float) -> float:
    """The radius that n draws can certify at most: where all of them agree."""
    return float(radius(n, n, sigma, alpha))


def abstains(first: ArrayLike, second: ArrayLike, alpha: float) -> Bools:
    """Whether PREDICT abstains: the two-sided exact binomial test does not reject a tie of the two classes in front.

    first, second: votes of the class in front and of the next, first >= second >= 0; both broadcast. Votes for other
    classes play no part. Where it answers, the answer is another class than the smoothed classifier's in at most alpha
    of all cases.
    """
    from scipy import special

    check_alpha(alpha)
    ahead, behind = np.broadcast_arrays(np.asarray(first), np.asarray(second))
    if not bool(np.all((behind >= 0) & (ahead >= behind))):
        raise UsageError("the votes of the class in front are fewer than those of the next, or negative")
    value = np.minimum(1.0, 2 * special.betainc(ahead, behind + 1, 0.5))
    return np.asarray(np.where(ahead + behind == 0, 1.0, value) > alpha)


def hopeless(k: int, n: int, alpha: float) -> bool:
    """Whether sampling may end early with an abstention: after n of its draws the upper bound is below 1/2.

    This needs no correction of alpha. Early ends only turn certificates into abstentions: whoever certifies with early
    ends would have certified with all draws, too, so a false certificate is no more likely than alpha. An early
    *certificate* would be another look at the same vote and would have to share alpha with the others; there is none.
    """
    return bool(upper_bound(k, n, alpha) < 0.5)


def high_probability(accuracy: float, n: int, alpha: float, rho: float = 0.001) -> float:
    """Lower bound of the certified accuracy on these n samples that holds with probability 1 - rho over the noise.

    Every certificate fails with probability alpha at most, so some of those counted may be wrong:
    accuracy - alpha - sqrt(alpha (1 - alpha) log(1/rho) / n) - log(1/rho) / (3 n) (arXiv 1902.02918, appendix), >= 0.
    """
    check_alpha(alpha)
    if not 0 < rho < 1:
        raise UsageError(f"rho is {rho!r}; expected a number strictly between 0 and 1")
    unlikely = math.log(1 / rho)
    slack = alpha + math.sqrt(alpha * (1 - alpha) * unlikely / n) + unlikely / (3 * n)
    return max(0.0, accuracy - slack)


def linf_radius(radius: float, features: int) -> float:
    """The Linf radius that lies within an L2 ball of inputs with so many features: radius / sqrt(features)."""
    return radius / math.sqrt(features)
