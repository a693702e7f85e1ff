"""The convex program by ADMM (arXiv 2201.01965), for sizes that no cone solver holds; without an attacker."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from advkit.core.checks import at_least_one, check, positive
from advkit.core.errors import UsageError
from advkit.training.convex.program import Array, Loss, Network, Patterns, Program, recovered

LOOK = 10
"""Iterations between looks at the residuals."""


@dataclass(frozen=True, kw_only=True)
class ADMM:
    """Settings.

    rho:       penalty of the splits, on the sum of losses; a twelfth of the number of samples is a good start
               for the squared loss, half of that for the others
    steps:     iterations at most
    tolerance: of all residuals, root mean square
    relax:     over-relaxation, in (0, 2); 1 is the paper's iteration
    single:    iterate in float32, in half the time; what comes out is measured in float64 all the same
    """

    rho: float = 1.0
    steps: int = 2000
    tolerance: float = 1e-5
    relax: float = 1.6
    single: bool = False

    def __post_init__(self) -> None:
        positive(self, "rho", "tolerance")
        at_least_one(self, "steps")
        check(self, "relax", 0 < self.relax < 2, "a number in (0, 2)")


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

    By Woodbury, with B = I + X^T X of every block: F B^-1 F^T = 2 (X B^-1 X^T) * (D D^T), elementwise, is n x n. Both
    inverses are formed: they are well conditioned, and a product costs less than two triangular solves.
    """

    def __init__(self, x: Array, gates: Array, c: float, kind: Any = np.float64) -> None:
        block = np.linalg.inv(np.eye(x.shape[1]) + x.T @ x)
        spread = x @ block
        outer = np.linalg.inv(np.eye(len(x)) / c + 2 * (spread @ x.T) * (gates @ gates.T))
        self.x, self.block, self.outer = x.astype(kind), block.astype(kind), outer.astype(kind)
        self.columns, self.spread = (np.ascontiguousarray(each.T, dtype=kind) for each in (x, spread))
        self.gates = gates.astype(kind)
        self.count = gates.shape[1]

    def forward(self, moved: Array) -> Array:
        """F u, [n], of X u, [n, 2P]."""
        difference = moved[:, : self.count] - moved[:, self.count :]
        found: Array = np.einsum("ij,ij->i", difference, self.gates)
        return found

    def back(self, f: Array) -> Array:
        """F^T f, [columns, 2P]."""
        half = self.columns @ (self.gates * f[:, None])
        return np.concatenate([half, -half], axis=1)

    def solve(self, b: Array) -> Array:
        """u, [columns, 2P], of b."""
        u: Array = self.block @ b
        half = self.spread @ (self.gates * (self.outer @ self.forward(self.x @ u))[:, None])
        u[:, : self.count] -= half
        u[:, self.count :] += half
        return u


def nearest(loss: Loss, y: Array, z: Array, rho: float) -> Array:
    """argmin_t loss(t, y) + rho/2 (t - z)^2, elementwise; logistic by Newton steps kept inside a bracket."""
    if loss == "squared":
        return np.asarray((y + rho * z) / (1 + rho))
    m = y * z
    if loss == "hinge":
        return np.asarray(y * np.where(m >= 1, m, np.minimum(m + 1 / rho, 1.0)))
    low, high = m, m + 1 / rho  # log(1 + exp(-t)) falls by at most 1
    t = 0.5 * (low + high)
    halvings = max(0, math.ceil(math.log2(4 / rho)))  # Newton's steps go back and forth in a wide bracket
    for turn in range(halvings + 40):
        p = 0.5 * (1 - np.tanh(0.5 * t))  # 1 / (1 + exp(t)), without overflow
        slope = rho * (t - m) - p
        low, high = np.where(slope < 0, t, low), np.where(slope < 0, high, t)
        newton = t - slope / (rho + p * (1 - p))
        inside = (newton >= low) & (newton <= high) & (turn >= halvings)
        step = np.where(inside, newton, 0.5 * (low + high))
        if np.abs(step - t).max(initial=0.0) < 4 * np.finfo(t.dtype).eps * (1 + np.abs(t).max(initial=0.0)):
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
    kind: Any = np.float32 if asked.single else np.float64
    gates = patterns.astype(np.float64)
    n, count, plain = len(program.y), patterns.shape[1], program.loss == "squared"
    rho, relax = asked.rho, kind(asked.relax)
    shrink = program.beta * n / rho
    normal = Normal(program.x, gates, 1 / rho if plain else 1.0, kind)
    signs = np.where(np.concatenate([patterns, patterns], axis=1), 1.0, -1.0).astype(kind)
    y = program.y.astype(kind)
    pull = normal.back(y) / kind(rho)
    # Every split has one variable z, its copy plus its scaled dual; the copy is a proximal step from z.
    z_norm: Array = np.zeros((program.x.shape[1], 2 * count), kind)
    z_sign: Array = np.zeros((n, 2 * count), kind)
    z_loss: Array = np.zeros(n, kind)
    v, s, t = z_norm, z_sign, z_loss
    converged, rounds = False, 0
    for rounds in range(1, asked.steps + 1):
        before = v, s, t
        v, s = _shrunk(z_norm, shrink), np.maximum(z_sign, 0)
        right = 2 * v - z_norm + normal.columns @ (signs * np.abs(z_sign))  # |z| = 2 max(0, z) - z
        if plain:
            right += pull
        else:
            t = nearest(program.loss, y, z_loss, rho)
            right += normal.back(2 * t - z_loss)
        u = normal.solve(right)
        moved = normal.x @ u
        apart, beyond = u - v, signs * moved - s
        z_norm += relax * apart
        z_sign += relax * beyond
        residuals = [(apart, v - before[0]), (beyond, s - before[1])] if rounds % LOOK == 0 else []
        if not plain:
            missed = normal.forward(moved) - t
            z_loss += relax * missed
            residuals += [(missed, t - before[2])]
        if rounds % LOOK == 0 and all(max(_rms(one), rho * _rms(two)) <= asked.tolerance for one, two in residuals):
            converged = True
            break
    last = _shrunk(z_norm, shrink).astype(np.float64)
    found = last[:, :count], last[:, count:]
    return Iterated(
        program,
        *found,
        convex=program.value(patterns, *found),
        violation=program.violation(patterns, *found),
        rounds=rounds,
        converged=converged,
        seconds=time.perf_counter() - began,
    )


def _shrunk(z: Array, by: float) -> Array:
    """Every column shortened by `by`; those that are no longer become zero."""
    norms = np.sqrt(np.einsum("ij,ij->j", z, z))
    found: Array = z * np.maximum(0, 1 - by / np.maximum(norms, 1e-30)).astype(z.dtype)
    return found


def _rms(values: Array) -> float:
    flat = values.reshape(-1)
    return float(np.sqrt(flat @ flat / flat.size))
