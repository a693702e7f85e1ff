"""Sampled convex programs (SCP, arXiv 2201.01965): hidden weights are drawn, the output weights are a lasso."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from advkit.core.errors import UsageError
from advkit.training.convex.program import Array, Network, Program


@dataclass(frozen=True)
class Drawn:
    """A network of drawn hidden weights.

    network:   rescaled so that its penalty is the lasso's
    objective: of the network, an upper bound of the exact optimum that does not rise with more units
    lasso:     what the solver minimised, at its weights
    drawn:     units drawn; the network has those whose weight is not zero
    seconds:   wall time
    """

    network: Network
    objective: float
    lasso: float
    drawn: int
    seconds: float


def directions(columns: int, units: int, rng: np.random.Generator) -> Array:
    """Points on the unit sphere, uniform, [columns, units]; the first ones stay when more are drawn."""
    drawn = rng.standard_normal((units, columns)).T
    return np.asarray(drawn / np.linalg.norm(drawn, axis=0))


def fit_output(program: Program, hidden: Array) -> Drawn:
    """The output weights that a lasso finds for these hidden weights [columns, units], of length 1 each.

    Squared loss by coordinate descent, logistic by liblinear (both scikit-learn), hinge as a linear program (HiGHS).
    Raises UsageError for a program with an attacker.
    """
    if program.moves is not None:
        raise UsageError("SCP trains without an attacker; leave eps out, or take the cone solver")
    began = time.perf_counter()
    features = np.maximum(program.x @ hidden, 0.0)
    weights = {"squared": _squared, "logistic": _logistic, "hinge": _hinge}[program.loss](program, features)
    kept = weights != 0
    roots = np.sqrt(np.abs(weights[kept]))
    network = Network(hidden[:, kept] * roots, np.sign(weights[kept]) * roots)
    plain = Program(program.x, program.y, program.loss, program.beta)
    lasso = plain.of(network) - program.beta * (network.penalty() - float(np.abs(weights).sum()))
    return Drawn(network, plain.of(network), lasso, hidden.shape[1], time.perf_counter() - began)


def _squared(program: Program, features: Array) -> Array:
    from sklearn.linear_model import Lasso

    model = Lasso(alpha=program.beta, fit_intercept=False, max_iter=200_000, tol=1e-9)
    return np.asarray(model.fit(features, program.y).coef_, dtype=np.float64)


def _logistic(program: Program, features: Array) -> Array:
    from sklearn.linear_model import LogisticRegression

    # C weighs the sum of the losses against the l1 norm
    scale = 1 / (program.beta * len(program.y))
    model = LogisticRegression(
        l1_ratio=1.0, C=scale, solver="liblinear", fit_intercept=False, tol=1e-9, max_iter=20_000, random_state=0
    )
    return np.asarray(model.fit(features, program.y).coef_[0], dtype=np.float64)


def _hinge(program: Program, features: Array) -> Array:
    """min 1/n sum xi + beta sum (p + m) with xi >= 1 - y H (p - m), all at least 0."""
    from scipy import sparse
    from scipy.optimize import linprog

    n, units = features.shape
    signed = program.y[:, None] * features
    above = sparse.csr_matrix(np.hstack([-np.eye(n), -signed, signed]))
    cost = np.concatenate([np.full(n, 1 / n), np.full(2 * units, program.beta)])
    done = linprog(cost, A_ub=above, b_ub=-np.ones(n), bounds=(0, None), method="highs")
    if done.status != 0:
        raise UsageError(f"the linear program of {n} samples x {units} units ended with: {done.message}; take fewer")
    return np.asarray(done.x[n : n + units] - done.x[n + units :])
