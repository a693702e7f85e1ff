"""The convex program by ADMM (arXiv 2201.01965), for more samples and patterns than a cone solver holds; no attacker."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.linalg import cho_factor, cho_solve

from advkit.core.checks import at_least_one, check, positive
from advkit.core.errors import UsageError
from advkit.training.convex.program import Array, Loss, Network, Patterns, Program, recovered


@dataclass(frozen=True, kw_only=True)
class ADMM:
    """Settings.

    rho:       penalty of the splits, on the sum of losses
    steps:     iterations at most
    tolerance: of all residuals, per coordinate
    relax:     length of the dual steps, in (0, 1.6]
    balance:   iterations between changes of rho that hold primal and dual residuals together; 0 keeps rho. The paper
               keeps it; with a fixed rho of 1 some data sets need ten times as many iterations
    """

    rho: float = 1.0
    steps: int = 2000
    tolerance: float = 1e-4
    relax: float = 1.0
    balance: int = 0

    def __post_init__(self) -> None:
        positive(self, "rho", "tolerance")
        at_least_one(self, "steps")
        check(self, "relax", 0 < self.relax <= 1.6, "a number in (0, 1.6]")
        check(self, "balance", self.balance >= 0, "a number of iterations, or 0 for none")


@dataclass(frozen=True)
class Iterated:
    """Where ADMM ended.

    v, w:      [columns, P], blocks that are zero included
    network:   their network
    objective: of the network, with the units as they are: no sign constraint takes part
    convex:    of the convex program at v and w
    violation: by how much its constraints are missed there; approximate, unlike a cone solver's
    rounds:    iterations
    converged: whether all residuals came below the tolerance
    seconds:   wall time
    """

    program: Program
    v: Array
    w: Array
    convex: float
    violation: float
    rounds: int
    converged: bool
    seconds: float

    @cached_property
    def network(self) -> Network:
        """One unit per block that is not zero: ADMM's zeros are exact."""
        return recovered(self.v, self.w, 0.0)

    @property
    def objective(self) -> float:
        return self.program.of(self.network)


class Normal:
    """Solves (I + c F^T F + I_2P kron X^T X) u = b, F = [D_1 X, ..., D_P X, -D_1 X, ..., -D_P X] never formed.

    By Woodbury, with B = I + X^T X of every block: F B^-1 F^T = 2 (X B^-1 X^T) * (D D^T), elementwise, is n x n.
    """

    def __init__(self, x: Array, gates: Array, c: float) -> None:
        self.x, self.gates = x, gates
        self.block = cho_factor(np.eye(x.shape[1]) + x.T @ x)
        self.inner = 2 * (x @ cho_solve(self.block, x.T)) * (gates @ gates.T)
        self.weigh(c)

    def weigh(self, c: float) -> None:
        """Take another c: one factorisation, n x n."""
        self.outer = cho_factor(np.eye(len(self.x)) / c + self.inner)

    def forward(self, u: Array) -> Array:
        """F u, [n], of u [2, P, columns] as [columns, 2P]."""
        count = self.gates.shape[1]
        found: Array = (self.gates * (self.x @ (u[:, :count] - u[:, count:]))).sum(1)
        return found

    def back(self, f: Array) -> Array:
        """F^T f, [columns, 2P]."""
        half = self.x.T @ (self.gates * f[:, None])
        return np.concatenate([half, -half], axis=1)

    def solve(self, b: Array) -> Array:
        first = cho_solve(self.block, b)
        found: Array = first - cho_solve(self.block, self.back(cho_solve(self.outer, self.forward(first))))
        return found


def nearest(loss: Loss, y: Array, z: Array, rho: float) -> Array:
    """argmin_t loss(t, y) + rho/2 (t - z)^2, elementwise; logistic by Newton steps kept inside a bracket."""
    if loss == "squared":
        found: Array = (y + rho * z) / (1 + rho)
        return found
    m = y * z
    if loss == "hinge":
        return np.asarray(y * np.where(m >= 1, m, np.minimum(m + 1 / rho, 1.0)))
    low, high = m, m + 1 / rho  # log(1 + exp(-t)) falls by at most 1
    t = np.clip(m + 0.5 / rho, low, high)
    for _ in range(60):
        p = 0.5 * (1 - np.tanh(0.5 * t))  # 1 / (1 + exp(t)), without overflow
        slope = rho * (t - m) - p
        low, high = np.where(slope < 0, t, low), np.where(slope < 0, high, t)
        newton = t - slope / (rho + p * (1 - p))
        step = np.where((newton >= low) & (newton <= high), newton, 0.5 * (low + high))
        if np.abs(step - t).max(initial=0.0) < 1e-13 * (1 + np.abs(t).max(initial=0.0)):
            break
        t = step
    return np.asarray(y * t)


def iterate(program: Program, patterns: Patterns, settings: ADMM | None = None) -> Iterated:
    """ADMM on the convex program over these patterns.

    u is split from its copy v (norms) and from s = G u >= 0 (signs); for hinge and logistic also from t = F u (losses),
    whose step is one scalar problem per sample. The papers take coordinate steps on u there; with the split every
    iteration solves the same factored system as for the squared loss.

    Raises UsageError for a program with an attacker.
    """
    asked = settings or ADMM()
    if program.moves is not None:
        raise UsageError("ADMM trains without an attacker; leave eps out, or take the cone solver")
    began = time.perf_counter()
    x, y, n = program.x, program.y, len(program.y)
    gates, signs = patterns.astype(np.float64), np.where(patterns, 1.0, -1.0)
    signs = np.concatenate([signs, signs], axis=1)
    beta, rho, plain = program.beta * n, asked.rho, program.loss == "squared"
    shape = (x.shape[1], 2 * patterns.shape[1])
    normal = Normal(x, gates, 1 / rho if plain else 1.0)
    v, lam = np.zeros(shape), np.zeros(shape)
    s, nu = np.zeros_like(signs), np.zeros_like(signs)
    t, mu = np.zeros(n), np.zeros(n)
    data = normal.back(y)
    converged, rounds = False, 0
    for rounds in range(1, asked.steps + 1):
        right = v - lam + x.T @ (signs * (s - nu)) + (data / rho if plain else normal.back(t - mu))
        u = normal.solve(right)
        sides = signs * (x @ u)
        before = v, s, t
        v = _shrunk(u + lam, beta / rho)
        s = np.maximum(0.0, sides + nu)
        lam += asked.relax * (u - v)
        nu += asked.relax * (sides - s)
        primal, dual = max(_rms(u - v), _rms(sides - s)), rho * max(_rms(v - before[0]), _rms(s - before[1]))
        if not plain:
            fitted = normal.forward(u)
            t = nearest(program.loss, y, fitted + mu, rho)
            mu += asked.relax * (fitted - t)
            primal, dual = max(primal, _rms(fitted - t)), max(dual, rho * _rms(t - before[2]))
        if primal <= asked.tolerance and dual <= asked.tolerance:
            converged = True
            break
        if asked.balance and rounds % asked.balance == 0 and not 0.2 < primal / max(dual, 1e-300) < 5:
            factor = 2.0 if primal > dual else 0.5
            rho *= factor
            lam, nu, mu = lam / factor, nu / factor, mu / factor
            if plain:
                normal.weigh(1 / rho)
    half = shape[1] // 2
    found = v[:, :half], v[:, half:]
    return Iterated(
        program,
        *found,
        convex=program.value(patterns, *found),
        violation=program.violation(patterns, *found),
        rounds=rounds,
        converged=converged,
        seconds=time.perf_counter() - began,
    )


def _shrunk(u: Array, by: float) -> Array:
    """Every column shortened by `by`, those that are no longer become zero."""
    norms = np.sqrt(np.einsum("ij,ij->j", u, u))
    return u * np.maximum(0.0, 1 - by / np.maximum(norms, 1e-300))


def _rms(values: Array) -> float:
    flat = values.reshape(-1)
    return float(np.sqrt(flat @ flat / flat.size))
