"""The training problem of a two-layer ReLU network, its convex form, and the network that a solution stands for.

All losses are means over samples; the papers' sums have beta_sum = n * beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from advkit.core.errors import BadInput, UsageError

Array = npt.NDArray[np.float64]
Patterns = npt.NDArray[np.bool_]
Loss = Literal["squared", "hinge", "logistic"]
LOSSES: tuple[Loss, ...] = ("squared", "hinge", "logistic")
ZEROS = (1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 0.0)
"""Shares of the largest block's norm up to which a block may count as zero: solvers leave noise there."""
SAME = 5e-7
"""Relative change of the objective that leaving such blocks out may make."""


def losses(loss: Loss, f: Array, y: Array, reach: Array | float = 0.0) -> Array:
    """Per sample, the largest loss where f may move by up to `reach` either way.

    squared: 0.5 (f - y)^2; hinge: max(0, 1 - y f); logistic: log(1 + exp(-y f))
    """
    if loss == "squared":
        worst: Array = 0.5 * (np.abs(f - y) + reach) ** 2
    elif loss == "hinge":
        worst = np.maximum(0.0, 1.0 - y * f + reach)
    else:
        worst = np.logaddexp(0.0, -y * f + reach)
    return worst


def dual(p: float) -> float:
    """The q with 1/p + 1/q = 1."""
    return 1.0 if math.isinf(p) else math.inf if p == 1 else p / (p - 1)


@dataclass(frozen=True)
class Moves:
    """What an attacker may add to a sample: anything whose l_p norm is at most 1, mapped to the columns of X.

    lift: [features, columns]; a weight vector v changes its product with a sample by at most ||lift v||_q
    q:    dual of the norm's p: 1 for l_inf, 2 for l_2, infinity for l_1

    The column of ones (the bias) is not moved: its column in `lift` is zero.
    """

    lift: Array
    q: float

    @classmethod
    def box(cls, eps: Any) -> Moves:
        """|delta_j| <= eps_j for every column of X; 0 for the bias."""
        return cls.ball(eps, math.inf)

    @classmethod
    def ball(cls, eps: Any, p: float) -> Moves:
        """The l_p norm of delta_j / eps_j is at most 1; columns with eps_j = 0 stay.

        Raises UsageError for a radius below 0 or no number, and for p < 1.
        """
        radii = np.asarray(eps, dtype=np.float64)
        if radii.ndim != 1 or not np.isfinite(radii).all() or (radii < 0).any():
            raise UsageError(f"eps is {eps!r:.60}; expected one finite radius of at least 0 for every column of X")
        if not p >= 1:
            raise UsageError(f"p is {p!r}; expected a norm's exponent, at least 1")
        return cls(np.diag(radii)[radii > 0], dual(p))

    def reach(self, v: Array) -> Array:
        """||lift v||_q of a vector [columns], or of each column of a matrix [columns, k]."""
        moved = self.lift @ v
        if not len(moved):
            return np.zeros(v.shape[1:])
        found: Array = np.asarray(np.linalg.norm(moved, self.q, axis=0))
        return found


@dataclass(frozen=True)
class Network:
    """f(x) = sum_j alpha_j max(0, u_j^T x).

    u:     [columns, units]
    alpha: [units]
    """

    u: Array
    alpha: Array

    def __call__(self, x: Array) -> Array:
        """Outputs [n] of samples [n, columns]."""
        found: Array = np.maximum(x @ self.u, 0.0) @ self.alpha
        return found

    def penalty(self) -> float:
        """Half the sum of all squared weights."""
        return 0.5 * float((self.u**2).sum() + (self.alpha**2).sum())

    def reach(self, x: Array, moves: Moves, sign: Array) -> Array:
        """How far sign * f may fall, at most, when the attacker moves each sample; signs are +1 or -1, [n].

        Exact where no unit changes sign in the ball: f is affine there, and this is the dual norm of its gradient. A
        unit that may change sign adds what it may deviate from that affine function.
        """
        before = x @ self.u
        slopes = (self.u * self.alpha) @ (before >= 0).T.astype(np.float64)
        crossing = np.maximum(0.0, moves.reach(self.u) - np.abs(before))
        harm = np.maximum(0.0, -np.outer(sign, self.alpha)) * crossing
        found: Array = moves.reach(slopes) + harm.sum(1)
        return found


@dataclass(frozen=True)
class Program:
    """min over networks of mean loss + beta/2 (||U||^2 + ||alpha||^2), or of the mean of each sample's worst loss.

    x:     [n, columns], a column of ones among them where a bias is wanted
    y:     [n], -1 or 1 for hinge and logistic
    loss:  "squared", "hinge" or "logistic"
    beta:  weight of the penalty, above 0
    moves: what the attacker may add to a sample; None trains without one

    Raises BadInput for data that is not finite, labels of one class, or others than -1 and 1; UsageError for beta.
    """

    x: Array
    y: Array
    loss: Loss = "squared"
    beta: float = 1e-3
    moves: Moves | None = None

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or self.y.shape != self.x.shape[:1] or not len(self.y):
            raise BadInput(f"x is {list(self.x.shape)} and y {list(self.y.shape)}; expected [n, columns] and [n]")
        if not (np.isfinite(self.x).all() and np.isfinite(self.y).all()):
            raise BadInput("x or y holds NaN or infinity; expected finite numbers")
        if self.loss not in LOSSES:
            raise UsageError(f"loss is {self.loss!r}; expected one of {', '.join(LOSSES)}")
        if not (self.beta > 0 and math.isfinite(self.beta)):
            raise UsageError(f"beta is {self.beta!r}; expected a number above 0")
        if self.loss != "squared":
            seen = sorted(set(self.y.tolist()))
            if len(seen) == 1:
                raise BadInput(f"all {len(self.y)} labels are {seen[0]:g}; expected samples of both classes, -1 and 1")
            if seen != [-1.0, 1.0]:
                raise BadInput(f"labels are {', '.join(f'{each:g}' for each in seen[:4])}; expected -1 and 1")
        if self.moves is not None and self.moves.lift.shape[1] != self.x.shape[1]:
            raise UsageError(
                f"eps is for {self.moves.lift.shape[1]} columns and x has {self.x.shape[1]}; give one radius per column"
            )

    def value(self, patterns: Patterns, v: Array, w: Array) -> float:
        """The convex objective at v and w [columns, P], whatever a solver said of it."""
        gates = patterns.astype(np.float64)
        f = (gates * (self.x @ (v - w))).sum(1)
        reach = 0.0 if self.moves is None else self.moves.reach((v - w) @ gates.T)
        norms = np.linalg.norm(v, axis=0).sum() + np.linalg.norm(w, axis=0).sum()
        return float(losses(self.loss, f, self.y, reach).mean() + self.beta * norms)

    def violation(self, patterns: Patterns, v: Array, w: Array) -> float:
        """By how much the sign constraints are missed at most, 0 where they hold."""
        signs = np.where(patterns, 1.0, -1.0)
        least = 0.0
        for each in (v, w):
            room = signs * (self.x @ each) - (0.0 if self.moves is None else self.moves.reach(each))
            least = min(least, float(room.min(initial=0.0)))
        return -least

    def of(self, network: Network) -> float:
        """The objective of a network: not convex in its weights.

        With an attacker it is an upper bound, exact where no unit changes sign in a sample's ball.
        """
        f = network(self.x)
        reach: Array | float = 0.0
        if self.moves is not None and self.loss == "squared":
            up, down = (network.reach(self.x, self.moves, np.full(len(f), sign)) for sign in (-1.0, 1.0))
            over, under = losses("squared", f + up, self.y), losses("squared", f - down, self.y)
            return float(np.maximum(over, under).mean() + self.beta * network.penalty())
        if self.moves is not None:
            reach = network.reach(self.x, self.moves, self.y)
        return float(losses(self.loss, f, self.y, reach).mean() + self.beta * network.penalty())

    def margins(self, network: Network) -> Array:
        """y f less what the attacker may take of it, [n]: a sample with a positive one can't be broken."""
        reach = 0.0 if self.moves is None else network.reach(self.x, self.moves, self.y)
        return self.y * network(self.x) - reach


def recovered(v: Array, w: Array, tolerance: float) -> Network:
    """The network of a solution: one unit per block that is not zero.

    u = v_i / sqrt(||v_i||) with alpha = sqrt(||v_i||), and the same of w with -alpha. Its objective is the convex one.

    tolerance: share of the largest block's norm up to which a block is zero
    """
    blocks = np.concatenate([v, w], axis=1)
    norms = np.linalg.norm(blocks, axis=0)
    kept = norms > tolerance * norms.max(initial=0.0)
    signs = np.repeat([1.0, -1.0], [v.shape[1], w.shape[1]])
    roots = np.sqrt(norms[kept])
    return Network(blocks[:, kept] / roots, signs[kept] * roots)


def thinned(program: Program, objective: float, v: Array, w: Array) -> Network:
    """The recovered network with the fewest units whose objective is the solution's, within 5e-7 of it.

    A fixed tolerance of 1e-6 changed a hinge objective by 5e-6 of it; none keeps a solver's noise as units.
    """
    for tolerance in ZEROS[:-1]:
        found = recovered(v, w, tolerance)
        if abs(program.of(found) - objective) <= SAME * abs(objective):
            return found
    return recovered(v, w, ZEROS[-1])
