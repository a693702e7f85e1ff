"""From samples to a trained network: columns, patterns, one solve, the network that a torch module holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from advkit.core.errors import BadInput, UsageError
from advkit.training.convex import admm, cones, patterns, sampled
from advkit.training.convex.program import Array, Loss, Moves, Network, Patterns, Program, dual

log = logging.getLogger("advkit")

Method = Literal["cone", "admm", "scp"]
FEW = 2
"""Usable patterns up to which the network is little more than an affine classifier."""
TRIVIAL = 1e-3
"""The share of the loss of f = 0 by which an optimum is better, at least, where the data was learned at all."""


@dataclass(frozen=True)
class Columns:
    """How a sample becomes a row of X: standardised, on principal components where asked for, and a one.

    mean, scale: [features]; scale is 1 / standard deviation, 0 for features that never vary
    basis:       [features, k], of the standardised features; the identity keeps them
    """

    mean: Array
    scale: Array
    basis: Array

    @classmethod
    def of(cls, x: Array, components: int = 0) -> Columns:
        """Those of training samples [n, features]; 0 components keep all features that vary."""
        deviation = x.std(axis=0)
        alive = deviation > 1e-6 * max(1e-300, float(deviation.max(initial=0.0)))
        if not alive.any():
            raise BadInput(f"all {len(x)} training samples are the same; expected features that vary")
        scale = np.where(alive, 1 / np.where(alive, deviation, 1.0), 0.0)
        basis = np.eye(x.shape[1])[:, alive]
        if components:
            if components > min(len(x), int(alive.sum())):
                raise UsageError(
                    f"components is {components}; expected at most {min(len(x), int(alive.sum()))}, which the data has"
                )
            from sklearn.decomposition import PCA

            basis = PCA(components, svd_solver="full").fit((x - x.mean(axis=0)) * scale).components_.T
        return cls(x.mean(axis=0), scale, basis)

    def __call__(self, x: Array) -> Array:
        """[n, k + 1], the last column of ones."""
        return np.hstack([((x - self.mean) * self.scale) @ self.basis, np.ones((len(x), 1))])

    def moves(self, eps: float | Array, p: float) -> Moves:
        """What an attacker of radius eps in the features' own units may do to the columns; the ones stay.

        eps: one for all features, or one per feature
        """
        radii = np.broadcast_to(np.asarray(eps, dtype=np.float64), self.scale.shape)
        lift = (radii * self.scale)[:, None] * self.basis
        used = (lift != 0).any(axis=1)
        return Moves(np.hstack([lift, np.zeros((len(lift), 1))])[used], dual(p))

    def unfolded(self, network: Network) -> tuple[Array, Array]:
        """The hidden layer on features as they are: weights [units, features] and biases [units]."""
        weights = (self.scale[:, None] * (self.basis @ network.u[:-1])).T
        return weights, network.u[-1] - weights @ self.mean


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a program is solved.

    method:   "cone" (exact), "admm", "scp"
    patterns: activation patterns that are sampled, or units of SCP; 0 enumerates all patterns
    solver:   of the cone program
    """

    loss: Loss = "hinge"
    beta: float = 1e-3
    patterns: int = 40
    method: Method = "cone"
    solver: cones.Solver = "clarabel"


@dataclass(frozen=True)
class Trained:
    """A trained network on columns and what is known of it.

    told: JSON values for reports
    """

    network: Network
    told: Mapping[str, Any] = field(default_factory=dict)


def candidates(x: Array, wanted: int, rng: np.random.Generator, moves: Moves | None) -> Patterns:
    """The patterns to train with: all, or a sample. With an attacker half of them are chosen for their distance.

    The last column of X is ones, so that "active on all samples" and its opposite are patterns: they are always in.
    """
    if wanted == 0:
        return patterns.enumerated(x)
    found = patterns.Collected(len(x))
    found.take(np.ones((len(x), 1), dtype=bool), wanted)
    found.take(np.zeros((len(x), 1), dtype=bool), wanted)
    if moves is not None:
        found.take(patterns.spaced(x, wanted, rng, moves), 2 + wanted // 2)
    found.take(patterns.sampled(x, wanted, rng), wanted)
    return found.matrix()


def train(program: Program, way: Way, rng: np.random.Generator) -> Trained:
    """Train on labels -1 and 1 (or real ones, with the squared loss); X's last column is ones.

    Warns where no more than two patterns are usable under the attack, and where the optimum is no better than f = 0.
    """
    moves = program.moves
    if way.method != "cone" and moves is not None:
        raise UsageError(f"method={way.method} trains without an attacker (eps=0); with one take method=cone")
    if way.method == "scp":
        return _by_lasso(program, way, rng)
    if way.method == "cone" and moves is None and way.patterns:
        cones.check_size(len(program.x), way.patterns, robust=False)
    drawn = candidates(program.x, way.patterns, rng, moves)
    kept = drawn
    if moves is not None:
        kept = drawn[:, patterns.usable(program.x, drawn, moves)]
        # a unit that is active on no sample has no part in any loss
        kept = kept[:, kept.any(axis=0)]
        if kept.shape[1] == 0:
            raise BadInput(
                f"none of {drawn.shape[1]} activation patterns keeps the attack's distance from all samples; expected "
                "at least that of an affine classifier: take a smaller eps, or more patterns"
            )
    told: dict[str, Any] = {"patterns_sampled": drawn.shape[1], "patterns_usable": kept.shape[1]}
    if moves is not None and kept.shape[1] <= FEW:
        log.warning(
            "%d of %d activation patterns are usable under the attack: the network is little more than an affine "
            "classifier; a smaller eps, fewer components or more patterns leave it more",
            kept.shape[1],
            drawn.shape[1],
        )
    if way.method == "cone":
        done = cones.solve(program, kept, way.solver)
        told |= {
            "optimum": done.objective,
            "gap": done.gap,
            "violation": done.violation,
            "status": done.status,
            "solver": done.solver,
            "seconds": done.seconds,
        }
        network = done.network
    else:
        rho = len(program.x) / (12 if program.loss == "squared" else 27)
        ended = admm.iterate(program, kept, admm.ADMM(rho=rho, steps=5000))
        told |= {
            "optimum": ended.objective,
            "gap": None,
            "violation": ended.violation,
            "status": "converged" if ended.converged else f"stopped after {ended.rounds} iterations",
            "solver": "ADMM of advkit",
            "seconds": ended.seconds,
        }
        network = ended.network
    return _told(program, network, told)


def _by_lasso(program: Program, way: Way, rng: np.random.Generator) -> Trained:
    if way.patterns == 0:
        raise UsageError("patterns is 0 (all of them), which SCP has no use for; say how many units it draws")
    done = sampled.fit_output(program, sampled.directions(program.x.shape[1], way.patterns, rng))
    told = {
        "patterns_sampled": way.patterns,
        "patterns_usable": way.patterns,
        "optimum": done.objective,
        "gap": None,
        "violation": 0.0,
        "status": "optimal of the drawn units",
        "solver": {"squared": "coordinate descent", "logistic": "liblinear", "hinge": "HiGHS"}[program.loss],
        "seconds": done.seconds,
    }
    return _told(program, done.network, told)


def _told(program: Program, network: Network, told: dict[str, Any]) -> Trained:
    nothing = float(program.of(Network(np.zeros((program.x.shape[1], 1)), np.zeros(1))))
    if told["optimum"] > (1 - TRIVIAL) * nothing:
        log.warning(
            "the optimum, %.6g, is no better than that of a network that always answers 0 (%.6g): take a smaller beta "
            "or a smaller eps",
            told["optimum"],
            nothing,
        )
    margins = program.margins(network) if program.loss != "squared" or set(program.y.tolist()) == {-1.0, 1.0} else None
    told |= {
        "network_objective": program.of(network),
        "units": len(network.alpha),
        "samples": len(program.y),
        "certified": None if margins is None else int((margins > 0).sum()),
        "fitted": None if margins is None else int((program.y * network(program.x) > 0).sum()),
    }
    return Trained(network, told)
