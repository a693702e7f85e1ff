"""The exact convex program, solved as a cone program by cvxpy (extra `convex`)."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Literal

import numpy as np

from advkit.core.errors import AdvkitError, BadInput, MissingExtra, UsageError
from advkit.training.convex.program import Array, Network, Patterns, Program, thinned

Solver = Literal["clarabel", "scs"]
ROWS = 50_000
"""Samples times patterns that a cone solver holds in a few minutes and a few GB."""
GOOD = ("optimal", "optimal_inaccurate")


class SolveFailed(AdvkitError):
    """A solver ended without an optimum."""


@dataclass(frozen=True)
class Solution:
    """What a solver returned, measured again.

    program:   what was solved
    patterns:  bool [n, P]
    v, w:      [columns, P]
    objective: of the convex program at v and w, computed here
    violation: by how much the constraints are missed at most
    gap:       between the solver's primal and dual objectives, relative; NaN where it has no dual one
    status:    the solver's word
    solver:    its name and version
    seconds:   wall time, building the program included
    rounds:    steps that it took
    """

    program: Program
    patterns: Patterns
    v: Array
    w: Array
    objective: float
    violation: float
    gap: float
    status: str
    solver: str
    seconds: float
    rounds: int

    @cached_property
    def network(self) -> Network:
        """The two-layer network that the solution stands for."""
        return thinned(self.program, self.objective, self.v, self.w)


def cvxpy() -> Any:
    """The package; MissingExtra where it is not installed."""
    try:
        import cvxpy as cp
    except ImportError as error:
        raise MissingExtra("convex training needs cvxpy and clarabel: pip install 'advkit[convex]'") from error
    return cp


def check_size(n: int, patterns: int, robust: bool) -> None:
    """BadInput where a cone solver can't hold the program."""
    if n * patterns <= ROWS:
        return
    ways = "patterns= or samples" if robust else "patterns= or samples, or take method=admm or method=scp"
    limit = "; ADMM and SCP train without an attacker (eps=0) alone" if robust else ""
    raise BadInput(
        f"{n} samples x {patterns} patterns are {n * patterns:,} rows; a cone solver holds about {ROWS:,}: fewer {ways}"
        + limit
    )


def solve(program: Program, patterns: Patterns, solver: Solver = "clarabel", *, gated: bool = False) -> Solution:
    """The optimum of the convex program over these patterns.

    gated: leave the sign constraints out. That is a group lasso whose optimum is a lower bound of the exact one; it
           trains gated units, and its weights are no weights of a ReLU network

    Raises MissingExtra without cvxpy or the solver, BadInput for more than fits, SolveFailed without an optimum.
    """
    cp = cvxpy()
    n, d = program.x.shape
    count = patterns.shape[1]
    if patterns.shape[0] != n or count < 1:
        raise UsageError(f"patterns are {list(patterns.shape)}; expected [{n}, P] with P of at least 1")
    if solver.upper() not in cp.installed_solvers():
        raise MissingExtra(f"the solver {solver} is not installed: pip install 'advkit[convex]' brings clarabel")
    if gated and program.moves is not None:
        raise UsageError("the gated bound is for training without an attacker; leave moves out")
    check_size(n, count, program.moves is not None)
    began = time.perf_counter()
    gates, signs = patterns.astype(np.float64), np.where(patterns, 1.0, -1.0)
    v, w = cp.Variable((d, count)), cp.Variable((d, count))
    moves, limits, reach = program.moves, [], 0.0
    f = cp.sum(cp.multiply(gates, program.x @ (v - w)), axis=1)
    robust = moves is not None and len(moves.lift) > 0
    for each in () if gated else (v, w):
        least: Any = 0.0
        if moves is not None and robust:
            room = cp.Variable((1, count))
            limits.append(_reach(cp, moves.lift @ each, moves.q) <= room[0])
            least = np.ones((n, 1)) @ room
        limits.append(cp.multiply(signs, program.x @ each) >= least)
    if moves is not None and robust:
        # samples that the same units are active on share their worst case
        distinct, place = np.unique(gates, axis=0, return_inverse=True)
        worst = cp.Variable(len(distinct), nonneg=True)
        limits.append(_reach(cp, moves.lift @ (v - w) @ distinct.T, moves.q) <= worst)
        reach = worst[place.reshape(-1)]
    penalty = cp.sum(cp.norm(v, 2, axis=0)) + cp.sum(cp.norm(w, 2, axis=0))
    cost = _loss(cp, program, f, reach) / n + program.beta * penalty
    problem = cp.Problem(cp.Minimize(cost), limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inaccurate ends are said by the status below
        try:
            # in three parts, since cvxpy keeps back what the solver says of its dual objective
            data, chain, inverse = problem.get_problem_data(solver.upper(), solver_opts=_tight(solver))
            told = chain.solve_via_data(problem, data, solver_opts=_tight(solver))
            problem.unpack_results(told, chain, inverse)
        except cp.error.SolverError as error:
            raise SolveFailed(_advice(f"{solver} gave up ({error})", n, count)) from error
    if problem.status not in GOOD or v.value is None:
        raise SolveFailed(_advice(f"{solver} ended with status {problem.status}", n, count))
    found = np.asarray(v.value), np.asarray(w.value)
    return Solution(
        program,
        patterns,
        *found,
        objective=program.value(patterns, *found),
        violation=0.0 if gated else program.violation(patterns, *found),
        gap=_gap(told),
        status=problem.status,
        solver=f"{solver.upper()} {version(solver)}, cvxpy {cp.__version__}",
        seconds=time.perf_counter() - began,
        rounds=int(problem.solver_stats.num_iters or 0),
    )


def _advice(what: str, n: int, patterns: int) -> str:
    return (
        f"{what} on {n} samples x {patterns} patterns, expected an optimum: standardise the features, take a smaller "
        "eps, a larger beta or the other solver (clarabel, scs)"
    )


def _tight(solver: Solver) -> dict[str, Any]:
    """Tolerances, and the way to factor: Clarabel's own choice took twice to five times the CPU time of QDLDL here."""
    if solver == "scs":
        return {"eps_abs": 1e-7, "eps_rel": 1e-7, "max_iters": 100_000}
    return {"direct_solve_method": "qdldl", "tol_gap_abs": 1e-10, "tol_gap_rel": 1e-9, "tol_feas": 1e-9}


def _reach(cp: Any, moved: Any, q: float) -> Any:
    if q == 1:
        return cp.sum(cp.abs(moved), axis=0)
    if math.isinf(q):
        return cp.max(cp.abs(moved), axis=0)
    if q == 2:
        return cp.norm(moved, 2, axis=0)
    return cp.hstack([cp.pnorm(moved[:, column], q) for column in range(moved.shape[1])])


def _loss(cp: Any, program: Program, f: Any, reach: Any) -> Any:
    y = program.y
    if program.loss == "squared":
        return 0.5 * cp.sum_squares(cp.abs(f - y) + reach) if program.moves is not None else 0.5 * cp.sum_squares(f - y)
    short = -cp.multiply(y, f) + reach
    return cp.sum(cp.pos(1 + short)) if program.loss == "hinge" else cp.sum(cp.logistic(short))


def _gap(told: Any) -> float:
    """The gap between the objectives that a solver ended with, over the primal one."""
    ends = told.get("info", {}) if isinstance(told, dict) else {"pobj": told.obj_val, "dobj": told.obj_val_dual}
    primal, dual = ends.get("pobj"), ends.get("dobj")
    if primal is None or dual is None:
        return math.nan
    return float(abs(primal - dual) / max(1e-12, abs(primal)))
