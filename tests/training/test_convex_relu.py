"""Two-layer ReLU networks by convex programs, against cvxpy, closed forms, grids, corners and gradient descent."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from advkit.core.errors import AdvkitError, BadInput, MissingExtra, UsageError
from advkit.training.convex import cones, fit, patterns
from advkit.training.convex.admm import ADMM, Normal, iterate, nearest
from advkit.training.convex.cones import Solution, solve
from advkit.training.convex.program import (
    LOSSES,
    Array,
    Loss,
    Moves,
    Network,
    Patterns,
    Program,
    losses,
    recovered,
)
from advkit.training.convex.sampled import directions, fit_output

cvxpy = pytest.importorskip("cvxpy", reason="the exact programs need the extra convex: pip install 'advkit[convex]'")
pytest.importorskip("clarabel", reason="the exact programs need the extra convex: pip install 'advkit[convex]'")

ANY: Any = None


HINGE_FIRST = [pytest.param(each, marks=[pytest.mark.slow] if each != "hinge" else []) for each in LOSSES]


def toy(n: int = 8, d: int = 3, seed: int = 0) -> tuple[Array, Array]:
    """Normal points with signs for labels, both of them."""
    drawn = np.random.default_rng(seed)
    x, y = drawn.standard_normal((n, d)), np.sign(drawn.standard_normal(n))
    y[:2] = (-1, 1)
    return x, y


@cache
def exact(loss: Loss, beta: float = 0.05) -> tuple[Program, Patterns, Solution]:
    """The toy's optimum over all its patterns."""
    program = Program(*toy(), loss, beta)
    every = patterns.enumerated(program.x)
    return program, every, solve(program, every)


def planar(n: int = 10, seed: int = 3, eps: float = 0.08) -> tuple[Array, Array, Moves]:
    """Points of the plane that stand apart by more than two radii, random labels, and a column of ones."""
    drawn = np.random.default_rng(seed)
    points: list[Array] = []
    while len(points) < n:
        point = drawn.uniform(-1, 1, 2)
        if all(np.abs(point - other).max() > 3 * eps for other in points):
            points.append(point)
    y = np.sign(drawn.standard_normal(n))
    y[:2] = (-1, 1)
    return np.hstack([np.array(points), np.ones((n, 1))]), y, Moves.box([eps, eps, 0.0])


@cache
def robust(loss: Loss, eps: float = 0.08) -> tuple[Program, Patterns, Solution]:
    """A robust optimum over the usable ones of all patterns."""
    x, y, moves = planar(eps=eps)
    program = Program(x, y, loss, 1e-3, moves)
    every = patterns.enumerated(x)
    kept = every[:, patterns.usable(x, every, moves)]
    return program, kept, solve(program, kept)


def ball(x: Array, eps: float, points: int = 41) -> Array:
    """The square around every sample as a grid, [n, points^2, 3]; its border belongs to it."""
    side = np.linspace(-eps, eps, points)
    grid = np.stack([*np.meshgrid(side, side), np.zeros((points, points))], axis=-1).reshape(-1, 3)
    return np.asarray(x[:, None] + grid[None])


# --- patterns


@pytest.mark.parametrize(("n", "d"), [(5, 2), pytest.param(6, 3, marks=pytest.mark.slow)])
def test_points_in_general_position_have_as_many_patterns_as_the_formula_says(n: int, d: int) -> None:
    x, _ = toy(n, d, seed=n)
    every = patterns.enumerated(x)
    assert every.shape == (n, 2 * sum(math.comb(n - 1, k) for k in range(d)))
    drawn = patterns.sampled(x, every.shape[1], np.random.default_rng(0))
    assert {column.tobytes() for column in drawn.T} <= {column.tobytes() for column in every.T}
    assert drawn.shape[1] >= 0.9 * every.shape[1]  # thin cells are seldom met


def test_sampling_ends_where_there_are_fewer_patterns_than_asked_for() -> None:
    x = np.array([[1.0, 0.0], [2.0, 0.0]])  # both points on one ray: two patterns
    assert patterns.sampled(x, 100, np.random.default_rng(0)).shape == (2, 2)


def test_equal_rows_and_rows_of_zeros_are_enumerated() -> None:
    x = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    every = patterns.enumerated(x)
    assert every.shape[1] == 4
    assert every[1].all()
    assert (every[0] == every[2]).all()


def test_too_many_patterns_are_refused() -> None:
    x, _ = toy(12, 4)
    with pytest.raises(BadInput, match=r"12 samples in 4 dimensions have more than 50 activation patterns: sample"):
        patterns.enumerated(x, most=50)


@pytest.mark.slow
def test_spaced_patterns_are_of_the_data_and_mostly_usable() -> None:
    x, _, moves = planar(10)
    every = {column.tobytes() for column in patterns.enumerated(x).T}
    assert {column.tobytes() for column in patterns.spaced(x, 30, np.random.default_rng(0), moves).T} <= every
    drawn = np.random.default_rng(0)
    x = np.hstack([drawn.standard_normal((40, 20)), np.ones((40, 1))])
    moves = Moves.box([0.15] * 20 + [0.0])
    assert patterns.usable(x, patterns.spaced(x, 12, drawn, moves), moves).mean() > 0.9
    assert patterns.usable(x, patterns.sampled(x, 12, drawn), moves).mean() < 0.6


# --- property 1: the network has the convex value


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_the_network_has_the_convex_optimum(loss: Loss) -> None:
    program, every, found = exact(loss)
    assert found.status == "optimal"
    assert found.solver.startswith("CLARABEL ")
    assert found.gap < 1e-6
    assert found.violation < 1e-8
    assert program.of(found.network) == pytest.approx(found.objective, rel=1e-6)
    assert program.value(every, found.v, found.w) == found.objective
    # cvxpy's own word, from a program written pattern by pattern
    assert found.objective == pytest.approx(by_hand(program, every), rel=1e-6)
    assert len(found.network.alpha) <= 2 * every.shape[1]


def by_hand(program: Program, every: Patterns) -> float:
    """The program of the paper, with a loop over the patterns; its fitted values are kept."""
    n, d = program.x.shape
    v = [(cvxpy.Variable(d), cvxpy.Variable(d)) for _ in range(every.shape[1])]
    gates = every.astype(float)
    f = sum(cvxpy.multiply(gates[:, i], program.x @ (one - two)) for i, (one, two) in enumerate(v))
    limits = [cvxpy.multiply(2 * gates[:, i] - 1, program.x @ each) >= 0 for i, pair in enumerate(v) for each in pair]
    shapes = {
        "squared": lambda: 0.5 * cvxpy.sum_squares(f - program.y),
        "hinge": lambda: cvxpy.sum(cvxpy.pos(1 - cvxpy.multiply(program.y, f))),
        "logistic": lambda: cvxpy.sum(cvxpy.logistic(-cvxpy.multiply(program.y, f))),
    }
    penalty = sum(cvxpy.norm(each) for pair in v for each in pair)
    problem = cvxpy.Problem(cvxpy.Minimize(shapes[program.loss]() / n + program.beta * penalty), limits)
    problem.solve(solver="CLARABEL")
    FITTED[program.loss] = np.asarray(f.value)
    return float(problem.value)


FITTED: dict[str, Array] = {}


@pytest.mark.slow
def test_fitted_values_of_the_squared_loss_are_unique() -> None:
    program, every, found = exact("squared")
    by_hand(program, every)
    fitted = (every * (program.x @ (found.v - found.w))).sum(1)
    assert fitted == pytest.approx(FITTED["squared"], abs=1e-5)
    assert found.network(program.x) == pytest.approx(FITTED["squared"], abs=1e-5)


def test_recovery_of_one_block_is_its_closed_form() -> None:
    v, w = np.array([[3.0, 1e-9], [4.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 9.0]])
    found = recovered(v, w, 1e-6)
    root = math.sqrt(5)
    assert found.u == pytest.approx(np.array([[3 / root, 0.0], [4 / root, 3.0]]))
    assert found.alpha == pytest.approx(np.array([root, -3.0]))
    assert found.penalty() == pytest.approx(5 + 9)


# --- property 2: what bounds what


@pytest.mark.parametrize("loss", HINGE_FIRST)
def test_bounds_come_in_order(loss: Loss) -> None:
    program, every, found = exact(loss)
    gated = solve(program, every, gated=True)
    assert gated.objective <= found.objective + 1e-8
    fewer = solve(program, patterns.sampled(program.x, 12, np.random.default_rng(0)))
    assert fewer.objective >= found.objective - 1e-8
    drawn = directions(3, 200, np.random.default_rng(1))
    lassos = [fit_output(program, drawn[:, :units]) for units in (20, 50, 200)]
    values = [each.objective for each in lassos]
    assert values == sorted(values, reverse=True)
    assert values[-1] >= found.objective - 1e-8
    for each in lassos:
        assert each.objective == pytest.approx(each.lasso, rel=1e-9)


def test_the_lasso_is_cvxpys() -> None:
    for loss in LOSSES:
        program, _, _ = exact(loss)
        hidden = directions(3, 30, np.random.default_rng(2))
        features, alpha = np.maximum(program.x @ hidden, 0), cvxpy.Variable(30)
        f = features @ alpha
        cost = {
            "squared": 0.5 * cvxpy.sum_squares(f - program.y),
            "hinge": cvxpy.sum(cvxpy.pos(1 - cvxpy.multiply(program.y, f))),
            "logistic": cvxpy.sum(cvxpy.logistic(-cvxpy.multiply(program.y, f))),
        }[loss]
        problem = cvxpy.Problem(cvxpy.Minimize(cost / len(program.y) + program.beta * cvxpy.norm1(alpha)))
        problem.solve(solver="CLARABEL")
        assert fit_output(program, hidden).objective == pytest.approx(problem.value, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_larger_ball_costs_more(loss: Loss) -> None:
    x, y, _ = planar()
    every = patterns.enumerated(x)
    values = [solve(Program(x, y, loss, 1e-3), every).objective]
    for eps in (0.02, 0.05, 0.08):
        moves = Moves.box([eps, eps, 0.0])
        kept = every[:, patterns.usable(x, every, moves)]
        values.append(solve(Program(x, y, loss, 1e-3, moves), kept).objective)
    assert values == sorted(values)
    assert values[-1] > values[0] + 1e-3


# --- property 3: gradient descent


def descended(program: Program, restarts: int, neurons: int, steps: int, seed: int = 0) -> Array:
    """Objectives that Adam reaches from `restarts` starting points, all at once; the best of each run."""
    drawn = torch.Generator().manual_seed(seed)
    x, y = torch.from_numpy(program.x), torch.from_numpy(program.y)
    u = torch.randn(restarts, x.shape[1], neurons, generator=drawn, dtype=torch.float64) / 2
    alpha = torch.randn(restarts, neurons, generator=drawn, dtype=torch.float64) / 2
    u.requires_grad_()
    alpha.requires_grad_()
    optimizer = torch.optim.Adam([u, alpha], lr=0.03)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    best = torch.full((restarts,), math.inf, dtype=torch.float64)
    for _ in range(steps):
        f = torch.einsum("rnm,rm->rn", torch.relu(x @ u), alpha)
        loss = {
            "squared": lambda f: 0.5 * (f - y) ** 2,
            "hinge": lambda f: (1 - y * f).clamp_min(0),
            "logistic": lambda f: torch.nn.functional.softplus(-y * f),
        }[program.loss](f).mean(1)
        value = loss + program.beta / 2 * (u.square().sum((1, 2)) + alpha.square().sum(1))
        best = torch.minimum(best, value.detach())
        optimizer.zero_grad()
        value.sum().backward()
        optimizer.step()
        schedule.step()
    return np.asarray(best)


@pytest.mark.parametrize("loss", HINGE_FIRST)
def test_no_gradient_run_is_better(loss: Loss) -> None:
    program, _, found = exact(loss)
    reached = descended(program, restarts=20, neurons=10, steps=200)
    assert reached.min() >= found.objective - 1e-7
    assert reached.min() <= 1.1 * found.objective  # descent was no straw man


# --- property 4: the worst case


@pytest.mark.slow
@pytest.mark.parametrize("loss", HINGE_FIRST)
def test_the_robust_objective_is_the_grids_worst_case(loss: Loss) -> None:
    program, kept, found = robust(loss)
    assert found.violation < 1e-8
    network = found.network
    around = ball(program.x, 0.08)
    f = network(around.reshape(-1, 3)).reshape(len(program.y), -1)
    worst = losses(loss, f, program.y[:, None]).max(1).mean() + program.beta * network.penalty()
    assert found.objective == pytest.approx(worst, rel=1e-6)
    assert program.of(network) == pytest.approx(worst, rel=1e-6)
    assert program.value(kept, found.v, found.w) == found.objective


def pgd(network: Network, x: Array, y: Array, eps: float, steps: int = 100) -> Array:
    """Points of PGD in the l_inf ball that raise -y f, the last column left alone."""
    u, alpha = torch.from_numpy(network.u), torch.from_numpy(network.alpha)
    clean, labels = torch.from_numpy(x), torch.from_numpy(y)
    free = torch.ones_like(clean)
    free[:, -1] = 0
    drawn = torch.Generator().manual_seed(0)
    z = clean + eps * free * (2 * torch.rand(clean.shape, generator=drawn, dtype=torch.float64) - 1)
    best, least = clean.clone(), torch.full((len(y),), math.inf, dtype=torch.float64)
    for _ in range(steps + 1):
        z.requires_grad_()
        margin = labels * (torch.relu(z @ u) @ alpha)
        (gradient,) = torch.autograd.grad(margin.sum(), z)
        better = margin.detach() < least
        best[better], least[better] = z.detach()[better], margin.detach()[better]
        z = (z.detach() - 0.25 * eps * free * gradient.sign()).clamp(clean - eps * free, clean + eps * free)
    return np.asarray(best)


# --- property 5: certificates


@pytest.mark.parametrize("loss", HINGE_FIRST)
def test_no_certified_point_is_broken(loss: Loss) -> None:
    program, _, found = robust(loss)
    network, eps = found.network, 0.08
    margins = program.margins(network)
    certified = margins > 0
    assert certified.sum() >= 4
    grid = ball(program.x, eps, 81)
    corners = program.x[:, None] + np.array([(*s, 0.0) for s in itertools.product((-eps, eps), repeat=2)])
    attacked = pgd(network, program.x, program.y, eps)[:, None]
    for points in (grid, corners, attacked):
        held = program.y[:, None] * network(points.reshape(-1, 3)).reshape(len(program.y), -1)
        assert (held[certified] > 0).all()
        assert (held >= margins[:, None] - 1e-9).all()
        assert losses(loss, held * program.y[:, None], program.y[:, None]).max(1).mean() <= (
            found.objective - program.beta * network.penalty() + 1e-7
        )
    # and it is exact: the corner that is worst has that margin
    held = program.y[:, None] * network(corners.reshape(-1, 3)).reshape(len(program.y), -1)
    assert held.min(1) == pytest.approx(margins, abs=1e-6)


def test_the_bound_holds_for_networks_that_change_sign_in_the_ball() -> None:
    drawn = np.random.default_rng(5)
    x, y, _ = planar(20, eps=0.06)
    network = Network(drawn.standard_normal((3, 9)), drawn.standard_normal(9))
    for p, q in ((math.inf, 1.0), (2.0, 2.0), (1.0, math.inf)):
        moves = Moves.ball([0.3, 0.2, 0.0], p)
        assert moves.q == q
        lower = y * network(x) - network.reach(x, moves, y)
        steps = drawn.standard_normal((4000, 2))
        steps /= np.linalg.norm(steps, p, axis=1, keepdims=True)
        around = x[:, None] + np.hstack([steps * (0.3, 0.2), np.zeros((4000, 1))])
        seen = (y[:, None] * network(around.reshape(-1, 3)).reshape(20, -1)).min(1)
        assert (seen >= lower - 1e-12).all()
        assert (lower > seen - 2).all()


@pytest.mark.parametrize("p", [1.0, *(pytest.param(each, marks=pytest.mark.slow) for each in (2.0, 3.0))])
def test_other_norms_and_radii_per_feature(p: float) -> None:
    x, y, _ = planar()
    moves = Moves.ball([0.08, 0.04, 0.0], p)
    every = patterns.enumerated(x)
    kept = every[:, patterns.usable(x, every, moves)]
    assert 0 < kept.shape[1] < every.shape[1]
    program = Program(x, y, "hinge", 1e-3, moves)
    found = solve(program, kept)
    turns = np.linspace(0, 2 * np.pi, 2001)
    rim = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    rim = np.hstack([rim / np.linalg.norm(rim, p, axis=1, keepdims=True) * (0.08, 0.04), np.zeros((2001, 1))])
    f = found.network((x[:, None] + rim).reshape(-1, 3)).reshape(len(y), -1)
    worst = losses("hinge", f, y[:, None]).max(1).mean() + 1e-3 * found.network.penalty()
    assert worst <= found.objective + 1e-7
    assert worst == pytest.approx(found.objective, rel=1e-3)  # the rim has 2001 points


# --- property 6: patterns that are of use


@pytest.mark.slow
def test_more_patterns_never_cost_and_unusable_ones_change_nothing() -> None:
    x, y, moves = planar(8)
    every = patterns.enumerated(x)
    keep = patterns.usable(x, every, moves)
    assert 0.2 * len(keep) < keep.sum() < 0.9 * len(keep)
    program = Program(x, y, "hinge", 1e-3, moves)
    used, few = solve(program, every[:, keep]), solve(program, every[:, keep][:, ::3])
    assert few.objective >= used.objective - 1e-8
    whole = solve(program, every)
    assert whole.objective == pytest.approx(used.objective, abs=1e-7)
    # the linear program's word is the solver's: no weight on what it calls useless, and the others can have some
    weight = np.linalg.norm(np.concatenate([whole.v, whole.w]), axis=0)
    assert weight[~keep].max() < 1e-5 * weight.max()
    for pattern, usable in zip(every.T, keep, strict=True):
        assert possible(x, pattern, moves) == usable


def possible(x: Array, pattern: Patterns, moves: Moves) -> bool:
    """Whether some v other than 0 fits the pattern's constraints, asked of cvxpy directly."""
    v = cvxpy.Variable(x.shape[1])
    rows = np.where(pattern, 1.0, -1.0)[:, None] * x
    inside = [rows @ v >= cvxpy.norm1(moves.lift @ v), cvxpy.norm_inf(v) <= 1]
    problem = cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(rows @ v)), inside)
    problem.solve(solver="CLARABEL")
    return bool(problem.value > 1e-6)


# --- property 7: ADMM


@pytest.mark.parametrize(("loss", "rho"), [("squared", 1.0), ("hinge", 0.3), ("logistic", 1.0)])
def test_admm_reaches_the_optimum(loss: Loss, rho: float) -> None:
    program, every, found = exact(loss)
    ended = iterate(program, every, ADMM(rho=rho, steps=2000, tolerance=1e-6))
    assert ended.rounds <= 2000
    assert ended.objective == pytest.approx(found.objective, rel=1e-4)
    assert ended.convex == pytest.approx(found.objective, rel=1e-3)
    assert ended.violation < 1e-3
    short = iterate(program, every, ADMM(rho=rho, steps=20))
    assert not short.converged
    assert abs(short.objective - found.objective) > abs(ended.objective - found.objective)


def test_admm_in_float32_is_that_in_float64() -> None:
    program, every, _ = exact("hinge")
    one, two = (iterate(program, every, ADMM(steps=300, single=single)) for single in (False, True))
    assert one.objective == pytest.approx(two.objective, rel=1e-4)


def test_the_factored_system_is_the_dense_one() -> None:
    drawn = np.random.default_rng(0)
    x, c = drawn.standard_normal((9, 4)), 0.7
    gates = (drawn.standard_normal((9, 5)) > 0).astype(float)
    blocks = [gates[:, [i]] * x for i in range(5)]
    f = np.hstack([*blocks, *(-each for each in blocks)])
    signs = np.tile(2 * gates - 1, 2)
    g = np.zeros((90, 40))
    for i in range(10):
        g[9 * i : 9 * i + 9, 4 * i : 4 * i + 4] = signs[:, [i]] * x
    b = drawn.standard_normal(40)
    dense = np.linalg.solve(np.eye(40) + c * f.T @ f + g.T @ g, b)
    normal = Normal(x, gates, c)
    found = normal.solve(b.reshape(10, 4).T)
    assert found.T.reshape(-1) == pytest.approx(dense, abs=1e-8)
    fitted = drawn.standard_normal(9)
    assert normal.back(fitted).T.reshape(-1) == pytest.approx(f.T @ fitted, abs=1e-12)
    assert normal.forward(x @ found) == pytest.approx(f @ dense, abs=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rho", [0.01, 1.0, 50.0])
def test_the_proximal_step_is_a_minimum(loss: Loss, rho: float) -> None:
    drawn = np.random.default_rng(1)
    y, z = np.sign(drawn.standard_normal(40)), 6 * drawn.standard_normal(40)
    found = nearest(loss, y, z, rho)

    def value(t: Array) -> Array:
        return np.asarray(losses(loss, t, y) + rho / 2 * (t - z) ** 2)

    for step in (-1.0, -1e-3, -1e-6, 1e-6, 1e-3, 1.0):
        assert (value(found) <= value(found + step) + 1e-12 * (1 + np.abs(value(found)))).all()


# --- property 8: invariances


@pytest.mark.slow
@pytest.mark.parametrize("loss", HINGE_FIRST)
def test_a_radius_of_zero_is_standard_training(loss: Loss) -> None:
    x, y, _ = planar(8)
    every = patterns.enumerated(x)
    plain, still = (solve(Program(x, y, loss, 1e-2, moves), every) for moves in (None, Moves.box([0.0, 0.0, 0.0])))
    assert still.objective == pytest.approx(plain.objective, rel=1e-7)
    tiny = solve(Program(x, y, loss, 1e-2, Moves.box([1e-9, 1e-9, 0.0])), every)
    assert tiny.objective == pytest.approx(plain.objective, rel=1e-6)


def test_the_bias_is_not_moved() -> None:
    _, _, moves = planar()
    assert moves.reach(np.array([0.0, 0.0, 5.0])) == 0
    assert moves.reach(np.array([1.0, -2.0, 5.0])) == pytest.approx(0.08 * 3)


@pytest.mark.slow
def test_the_order_of_features_and_patterns_does_not_matter() -> None:
    x, y, moves = planar(8)
    every = patterns.enumerated(x)
    kept = every[:, patterns.usable(x, every, moves)]
    program = Program(x, y, "logistic", 1e-3, moves)
    value = solve(program, kept).objective
    assert solve(program, kept[:, ::-1]).objective == pytest.approx(value, rel=1e-6)
    order = [1, 2, 0]
    turned = Program(x[:, order], y, "logistic", 1e-3, Moves.box(np.array([0.08, 0.08, 0.0])[order]))
    assert solve(turned, kept).objective == pytest.approx(value, rel=1e-6)


# --- property 9: protocol B, small enough for a test: docs/convex_relu_at.md has all of it


def on_the_balls(network: Network, x: Array, y: Array, eps: float) -> float:
    """The share of samples that are right on all of a 21 x 21 grid of their ball."""
    f = network(ball(x, eps, 21).reshape(-1, 3)).reshape(len(y), -1)
    return float((y[:, None] * f > 0).all(1).mean())


@pytest.mark.slow
def test_convex_training_is_robust_on_all_training_samples_and_standard_training_is_not() -> None:
    for seed in (0, 1):
        x, y, moves = planar(24, seed=seed)
        program = Program(x, y, "hinge", 1e-4, moves)
        drawn = patterns.sampled(x, 500, np.random.default_rng(seed))
        kept = drawn[:, patterns.usable(x, drawn, moves)]
        found = solve(program, kept)
        assert on_the_balls(found.network, x, y, 0.08) == 1.0
        assert (program.margins(found.network) > 0).all()
        # PGD training mostly gets there, too, without a certificate: docs/convex_relu_at.md
        plain = solve(Program(x, y, "hinge", 1e-4), drawn[:, :200])
        assert (y * plain.network(x) > 0).all()
        assert on_the_balls(plain.network, x, y, 0.08) < 1.0


# --- from samples to a network


def test_columns_fold_back_into_the_first_layer() -> None:
    drawn = np.random.default_rng(0)
    x = drawn.uniform(0, 1, (30, 6)) * (1, 2, 3, 0, 1, 5)
    for components in (0, 3):
        columns = fit.Columns.of(x, components)
        rows = columns(x)
        assert rows.shape == (30, (components or 5) + 1)
        network = Network(drawn.standard_normal((rows.shape[1], 4)), drawn.standard_normal(4))
        weights, bias = columns.unfolded(network)
        assert np.maximum(x @ weights.T + bias, 0) @ network.alpha == pytest.approx(network(rows), abs=1e-10)
        for p in (1.0, 2.0, math.inf):
            # the reach of a unit is the dual norm of its weights on the features themselves
            assert columns.moves(0.1, p).reach(network.u) == pytest.approx(
                0.1 * np.linalg.norm(weights, {1.0: np.inf, 2.0: 2, math.inf: 1}[p], axis=1), rel=1e-9
            )
    with pytest.raises(UsageError, match="components is 6; expected at most 5"):
        fit.Columns.of(x, 6)
    with pytest.raises(BadInput, match="all 4 training samples are the same"):
        fit.Columns.of(np.ones((4, 3)))


@pytest.mark.slow
def test_training_says_what_it_did(caplog: pytest.LogCaptureFixture) -> None:
    x, y, moves = planar()
    done = fit.train(Program(x, y, "hinge", 1e-3, moves), fit.Way(patterns=80), np.random.default_rng(0))
    told = done.told
    assert 2 < told["patterns_usable"] < told["patterns_sampled"] <= 80
    assert told["status"] == "optimal"
    assert told["gap"] < 1e-6
    assert told["optimum"] == pytest.approx(told["network_objective"], rel=1e-6)
    assert told["certified"] == int((Program(x, y, "hinge", 1e-3, moves).margins(done.network) > 0).sum())
    assert not caplog.records
    everything = Moves.box([2.0, 2.0, 0.0])
    done = fit.train(Program(x, y, "hinge", 2.0, everything), fit.Way(patterns=80), np.random.default_rng(0))
    assert done.told["patterns_usable"] == 1
    assert "1 of 80 activation patterns are usable under the attack" in caplog.text
    assert "is no better than that of a network that always answers 0" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("loss", HINGE_FIRST)
def test_other_methods_come_near_the_same_optimum(loss: Loss) -> None:
    x, y, _ = planar()
    program, drawn = Program(x, y, loss, 1e-2), np.random.default_rng
    values = {
        method: fit.train(program, fit.Way(loss=loss, method=method, patterns=count), drawn(0)).told["optimum"]
        for method, count in (("cone", 60), ("admm", 60), ("scp", 400))
    }
    assert values["admm"] == pytest.approx(values["cone"], rel=1e-3)
    assert 1 - 1e-6 < values["scp"] / values["cone"] < 1.15


# --- bad input


def test_bad_input_gets_one_clear_line() -> None:
    x, y = toy()
    cases: list[tuple[Any, type[AdvkitError], str]] = [
        (lambda: Program(x, np.ones(8), "hinge"), BadInput, "all 8 labels are 1; expected samples of both classes"),
        (lambda: Program(x, y * 2, "logistic"), BadInput, "labels are -2, 2; expected -1 and 1"),
        (lambda: Program(x, y[:3]), BadInput, r"x is \[8, 3\] and y \[3\]; expected"),
        (lambda: Program(x * np.nan, y), BadInput, "NaN or infinity"),
        (lambda: Program(x, y, "hinge", 0.0), UsageError, "beta is 0.0; expected a number above 0"),
        (lambda: Program(x, y, ANY or "mse"), UsageError, "loss is 'mse'; expected one of squared, hinge, logistic"),
        (lambda: Moves.box([-0.1, 0.1]), UsageError, r"eps is \[-0.1, 0.1\]; expected one finite radius of at least 0"),
        (lambda: Moves.ball([0.1], 0.5), UsageError, "p is 0.5; expected a norm's exponent, at least 1"),
        (lambda: Program(x, y, moves=Moves.box([0.1])), UsageError, "eps is for 1 columns and x has 3"),
        (
            lambda: cones.check_size(600, 100, False),
            BadInput,
            "600 samples x 100 .* method=admm or method=scp",
        ),
        (lambda: cones.check_size(600, 100, True), BadInput, r"ADMM and SCP train without an attacker \(eps=0\) alone"),
        (lambda: patterns.sampled(x, 0, ANY), UsageError, "patterns is 0; expected at least 1"),
        (lambda: ADMM(rho=0), UsageError, "rho is 0; expected"),
        (lambda: ADMM(relax=2.0), UsageError, r"relax is 2.0; expected a number in \(0, 2\)"),
    ]
    for make, kind, says in cases:
        with pytest.raises(kind, match=says) as caught:
            make()
        assert "\n" not in str(caught.value)
    attacked = Program(x, y, "hinge", 1e-3, Moves.box([0.1, 0.1, 0.1]))
    for call in (lambda: iterate(attacked, x > 0), lambda: fit_output(attacked, x.T)):
        with pytest.raises(UsageError, match="without an attacker"):
            call()


def test_a_solver_that_is_missing_or_finds_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    program, every, _ = exact("hinge")
    with monkeypatch.context() as held:
        held.setitem(__import__("sys").modules, "cvxpy", None)
        with pytest.raises(MissingExtra, match=r"pip install 'advkit\[convex\]'"):
            solve(program, every)
    with monkeypatch.context() as held:
        held.setattr(cones, "_tight", lambda solver: {"max_iter": 1})
        with pytest.raises(cones.SolveFailed, match=r"clarabel .* on 8 samples x \d+ patterns, expected an optimum"):
            solve(program, every)
    with monkeypatch.context() as held:
        held.setattr(cvxpy, "installed_solvers", list)
        with pytest.raises(MissingExtra, match="the solver clarabel is not installed"):
            solve(program, every)
