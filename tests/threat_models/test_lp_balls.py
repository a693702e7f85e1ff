"""Linf, L2 and L1 balls: exact projections against a convex solver, and the laws of a ball."""

from __future__ import annotations

import pickle
from dataclasses import replace

import cvxpy as cp
import numpy as np
import pytest
import torch
from scipy import stats

from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.spaces import Box, Tokens
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.lp import L1, L2, Linf, NormBall, eps_text, row_sum
from advkit.threat_models.sparse import L0

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BALLS = [Linf(0.1), L2(0.5), L1(2.0), L0(5), L0(9, per="feature")]
SHAPE = (3, 6, 6)


def named(ball: NormBall) -> str:
    return f"{type(ball).__name__}-{ball.eps:g}-{getattr(ball, 'per', '')}"


every_ball = pytest.mark.parametrize("ball", BALLS, ids=named)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def streams(n: int, seed: int = 0, device: str = "cpu") -> RowRng:
    return RowRng.from_ids(seed, [f"row-{i}" for i in range(n)], device)


def origins(n: int = 16, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images with many saturated values, as real ones have."""
    x = torch.rand(n, *shape, generator=generator(), dtype=dtype)
    return (x * 1.6 - 0.3).clamp(0, 1)


def far_points(x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    steps = torch.logspace(-3, 1, len(x), dtype=x.dtype).view(-1, *(1 for _ in x.shape[1:]))
    return x + scale * steps * torch.randn(x.shape, generator=generator(1), dtype=x.dtype)


def per_feature_box(features: int) -> Box:
    low = -torch.rand(features, generator=generator(2), dtype=torch.float64)
    high = low + 0.05 + torch.rand(features, generator=generator(3), dtype=torch.float64)
    high[:3] = low[:3]  # features that can't move
    return Box(low, high, shape=(features,))


def inside(box: Box, n: int, features: int) -> torch.Tensor:
    low, high = box.bounds_like(torch.empty(0, dtype=torch.float64))
    x = low + (high - low) * torch.rand(n, features, generator=generator(4), dtype=torch.float64)
    x[:, 5], x[:, 6] = (low + 0 * x[:, :1])[:, 5 % low.numel()], (high + 0 * x[:, :1])[:, 6 % high.numel()]
    return x


@pytest.mark.parametrize("eps", [0.01, 0.4, 1.5])
@pytest.mark.parametrize(("kind", "p"), [(Linf, "inf"), (L2, 2), (L1, 1)])
@pytest.mark.parametrize("box", [Box(0, 1), per_feature_box(20), Box(float("-inf"), 0.9)], ids=["unit", "own", "open"])
def test_projection_agrees_with_a_convex_solver(kind, p, eps, box):
    low, high = (np.broadcast_to(bound.numpy(), 20) for bound in box.bounds_like(torch.empty(0, dtype=torch.float64)))
    x = inside(box if box.bounded else Box(-1, 0.9), 6, 20)
    z = far_points(x, 0.3)
    got = kind(eps, box=box).project(z, x)
    for row in range(len(x)):
        # in units of eps, or the solver's absolute tolerances cost it digits
        v = cp.Variable(20)
        bounds = [v <= (high - x[row].numpy()) / eps]
        if box.bounded:
            bounds.append(v >= (low - x[row].numpy()) / eps)
        away = (z[row] - x[row]).numpy() / eps
        problem = cp.Problem(cp.Minimize(cp.sum_squares(v) - 2 * away @ v), [cp.norm(v, p) <= 1, *bounds])
        digits = 1e-9 if kind is L2 else 1e-11
        problem.solve(solver=cp.CLARABEL, tol_gap_abs=digits, tol_gap_rel=digits, tol_feas=digits)
        mine = (got[row] - x[row]).numpy() / eps
        # on a curved boundary an interior-point method knows the optimum's value better than its place
        np.testing.assert_allclose(mine * eps, v.value * eps, atol=1e-4 if kind is L2 else 1e-6)
        assert np.linalg.norm(mine, float(p)) <= 1 + 1e-9
        assert ((mine - away) ** 2).sum() <= ((v.value - away) ** 2).sum() * (1 + 1e-8) + 1e-8


@pytest.mark.parametrize("kind", [L2, L1])
def test_projection_meets_the_optimality_conditions(kind):
    """To machine precision: one multiplier explains every coordinate that neither bound stops."""
    x = origins(40, (300,), torch.float64)
    z = far_points(x)
    eps = 1.5
    v, d = kind(eps).project(z, x) - x, z - x
    room = torch.where(d > 0, 1 - x, x)
    length = torch.linalg.vector_norm(v, ord=2 if kind is L2 else 1, dim=1)
    clipped = torch.minimum(d.abs(), room)
    binding = torch.linalg.vector_norm(clipped, ord=2 if kind is L2 else 1, dim=1) > eps
    assert 10 < binding.sum() < 40
    torch.testing.assert_close(length[binding], torch.full_like(length[binding], eps), rtol=1e-12, atol=0)
    torch.testing.assert_close(v[~binding].abs(), clipped[~binding], rtol=1e-12, atol=1e-15)
    assert (v * d >= 0).all()
    for row in binding.nonzero().flatten().tolist():
        free = (v[row].abs() < room[row] - 1e-12) & (v[row].abs() > 1e-12)
        multiplier = (v[row] / d[row])[free] if kind is L2 else (d[row].abs() - v[row].abs())[free]
        assert free.sum() > 0
        torch.testing.assert_close(multiplier, multiplier.mean().expand_as(multiplier), rtol=1e-9, atol=1e-9)


@every_ball
def test_projection_beats_every_other_admitted_point(ball):
    x = origins(8)
    z = far_points(x)
    nearest = (ball.project(z, x) - z).flatten(1).norm(dim=1)
    for seed in range(30):
        other = ball.sample(x, streams(8, seed))
        assert (nearest <= (other - z).flatten(1).norm(dim=1) + 1e-5).all()


@every_ball
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("device", DEVICES)
def test_projected_points_are_admitted_and_stay(ball, dtype, device):
    x = origins(dtype=dtype).to(device)
    z = far_points(x.cpu()).to(device)
    once = ball.project(z, x)
    assert ball.admits(once, x).all()
    assert torch.equal(ball.project(once, x), once)
    assert (once != x).flatten(1).any(1).all()
    assert once.dtype == dtype


@every_ball
def test_admitted_points_are_left_bit_for_bit(ball):
    x = origins()
    start = ball.sample(x, streams(16))
    halfway = ball.project(x + 0.5 * (start - x), x)
    for z in (x, start, halfway):
        assert torch.equal(ball.project(z, x), z)


@every_ball
def test_no_eps_no_move(ball):
    x, z = origins(), far_points(origins())
    none = replace(ball, eps=0)
    assert torch.equal(none.project(z, x), x)
    assert torch.equal(none.sample(x, streams(16)), x)
    assert none.steepest(z - x, x).abs().max() == 0
    assert none.admits(x, x).all()
    moved = x.clone()
    moved[:, 0, 0, 0] += torch.where(x[:, 0, 0, 0] > 0.5, -0.01, 0.01)
    assert not none.admits(moved, x).any()


@every_ball
def test_an_origin_that_round_off_left_outside_is_admitted_and_kept(ball):
    x = torch.full((2, *SHAPE), 1 + 5e-7)
    assert ball.admits(x, x).all()
    torch.testing.assert_close(ball.project(x, x), x, rtol=0, atol=6e-7)
    assert torch.equal(replace(ball, eps=0).project(torch.zeros_like(x), x), x)
    assert ball.admits(ball.project(torch.zeros_like(x), x), x).all()


def test_tiny_moves_of_many_features_do_not_round_their_way_out():
    """Each of 150,528 coordinates of 0.7 moves by about a thousand float32 spacings, all rounded the same way."""
    x = torch.full((2, 150_528), 0.7)
    for ball in (L1(12.0), L2(0.5), Linf(1e-4)):
        z = ball.project(x + 0.05, x)
        assert ball.admits(z, x).all()
        assert (ball.distance(z, x) > 0.999 * ball.eps).all()
        assert torch.equal(ball.project(z, x), z)


@every_ball
def test_one_step_moves(ball):
    x = origins()
    gradient = torch.randn(x.shape, generator=generator(5))
    for step_size in (0.1, 1.0):
        z = ball.project(x + step_size * ball.steepest(gradient, x), x)
        assert ball.admits(z, x).all()
        assert ((z - x) * gradient).flatten(1).sum(1).min() > 0


@every_ball
def test_steepest_has_no_answer_to_no_gradient(ball):
    x = origins(4)
    assert ball.steepest(torch.zeros_like(x), x).abs().max() == 0
    gradient = torch.zeros_like(x)
    gradient[0], gradient[1], gradient[2, 0, 0, 0] = float("nan"), float("inf"), float("nan")
    gradient[2, 0, 0, 1] = 1.0
    got = ball.steepest(gradient, torch.full_like(x, 0.5))
    assert torch.isfinite(got).all()
    assert got[[0, 1, 3]].abs().max() == 0
    assert got[2, 0, 0, 1] > 0
    assert (got[2] != 0).sum() == 1


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1.0, 1e30])
def test_steepest_does_not_depend_on_the_gradients_scale(size):
    x = torch.full((4, 30), 0.5)
    gradient = torch.randn(4, 30, generator=generator())
    for ball in (Linf(0.1), L2(0.5), L1(2.0), L0(3)):
        torch.testing.assert_close(ball.steepest(gradient * size, x), ball.steepest(gradient, x), rtol=1e-4, atol=1e-6)
    minute = torch.full((1, 4), 1e-200, dtype=torch.float64)
    torch.testing.assert_close(L2(0.5).steepest(minute, minute).norm(), torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5), L1(2.0, sparsity=0)], ids=named)
def test_steepest_is_steepest(ball):
    """No other direction of the ball gains more, and the gain is eps times the dual norm."""
    x = torch.full((16, *SHAPE), 0.5)
    open_ball = replace(ball, box=Box(float("-inf"), float("inf")))
    gradient = torch.randn(x.shape, generator=generator(6))
    gain = (ball.steepest(gradient, x) * gradient).flatten(1).sum(1)
    dual = {"Linf": 1, "L2": 2, "L1": float("inf")}[ball.norm]
    torch.testing.assert_close(gain, ball.eps * torch.linalg.vector_norm(gradient.flatten(1), ord=dual, dim=1))
    for seed in range(20):
        other = open_ball.sample(x, streams(16, seed)) - x
        assert ((other * gradient).flatten(1).sum(1) <= gain + 1e-5).all()
    assert open_ball.admits(x + ball.steepest(gradient, x), x).all()


def test_l1_steps_skip_features_without_room():
    ball = L1(1.0, sparsity=0)
    gradient = torch.tensor([[3.0, -2.0, 1.0]])
    at = torch.tensor([[1.0, 0.5, 0.5]])
    assert ball.steepest(gradient, at).tolist() == [[0.0, -1.0, 0.0]]
    assert ball.steepest(-gradient, at).tolist() == [[-1.0, 0.0, 0.0]]
    closed = torch.tensor([[1.0, 0.0, 1.0]])
    assert ball.steepest(gradient, closed).abs().sum() == 0


def test_l1_steps_are_shared():
    x = torch.full((5, 400), 0.5)
    gradient = torch.randn(5, 400, generator=generator())
    for sparsity, sharing in ((0.0, 1), (0.01, 4), (0.011, 5), (1.0, 400)):
        step = L1(2.0, sparsity=sparsity).steepest(gradient, x)
        assert ((step != 0).sum(1) == sharing).all()
        torch.testing.assert_close(step.abs().sum(1), torch.full((5,), 2.0))
        moved = step != 0
        assert (gradient.abs().where(moved, torch.inf).amin(1) >= gradient.abs().where(~moved, 0.0).amax(1)).all()
    few = torch.zeros(1, 400)
    few[0, :2] = 1.0
    assert L1(2.0, sparsity=1.0).steepest(few, x[:1])[0, :3].tolist() == [1.0, 1.0, 0.0]


@every_ball
@pytest.mark.parametrize("device", DEVICES)
def test_samples(ball, device):
    x = origins(24).to(device)
    rng = streams(24, device=device)
    z = ball.sample(x, rng)
    assert ball.admits(z, x).all()
    assert (z != x).flatten(1).any(1).all()
    assert torch.equal(ball.sample(x, rng), z)
    assert not torch.equal(ball.sample(x, streams(24, 1, device)), z)
    assert not torch.equal(ball.sample(x, rng.at("restart", 1)), z)


@every_ball
def test_every_method_treats_rows_alone(ball):
    """Bits of a row do not depend on its batch, also where rows are long enough to be worked on in pieces."""
    x = origins(14, (3, 60, 60))
    g = torch.randn(x.shape, generator=generator(7))
    quantised = replace(ball, lattice=255)

    def outcome(rows: torch.Tensor) -> list[torch.Tensor]:
        at, rng = x[rows], streams(14).take(rows)
        z = ball.sample(at, rng)
        step = ball.steepest(g[rows], z)
        return [z, step, ball.project(z + step, at), quantised.finish(z, at), ball.distance(z, at)]

    whole = outcome(torch.arange(14))
    for rows in (torch.tensor([3]), torch.tensor([13, 3]), torch.arange(14).flip(0)):
        for got, expected in zip(outcome(rows), whole, strict=True):
            assert torch.equal(got, expected[rows])


def test_sums_of_a_row_do_not_depend_on_batch_or_threads():
    values = torch.rand(4, 70_000, generator=generator(), dtype=torch.float64)
    whole = row_sum(values)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(row_sum(values), whole)
        for row in range(4):
            assert torch.equal(row_sum(values[row : row + 1]), whole[row : row + 1])
    finally:
        torch.set_num_threads(threads)


def test_samples_are_uniform_in_the_ball():
    n, d = 4000, 5
    x = torch.full((n, d), 0.5)
    rng = streams(n)
    for ball in (L2(0.3), L1(0.3)):
        radius = ball.distance(ball.sample(x, rng), x) / 0.3
        assert stats.kstest((radius**d).numpy(), "uniform").pvalue > 1e-3
        signs = (ball.sample(x, rng) > x).double().mean(0)
        assert (signs - 0.5).abs().max() < 0.05
    flat = ((Linf(0.3).sample(x, rng) - x) / 0.6 + 0.5).flatten()
    assert stats.kstest(flat.numpy(), "uniform").pvalue > 1e-3
    # first coordinate of a uniform point of the L1 ball: density proportional to (1 - |t|)**(d - 1)
    first = (L1(0.3).sample(x, rng) - x)[:, 0].abs() / 0.3
    assert stats.kstest((1 - (1 - first.double()) ** d).numpy(), "uniform").pvalue > 1e-3


@every_ball
def test_distances(ball):
    x = origins(6)
    z = ball.sample(x, streams(6))
    move = (z.double() - x.double()).numpy()
    if ball.norm == "L0":
        changed = move != 0 if ball.per == "feature" else (move != 0).any(1)
        expected = changed.reshape(6, -1).sum(1)
    else:
        expected = np.linalg.norm(move.reshape(6, -1), ord={"Linf": np.inf, "L2": 2, "L1": 1}[ball.norm], axis=1)
    np.testing.assert_allclose(ball.distance(z, x).numpy(), expected, rtol=1e-12)
    with pytest.raises(BadInput, match="shape"):
        ball.distance(z[:, :1], x)


@every_ball
def test_what_is_not_admitted(ball):
    x = torch.full((2, *SHAPE), 0.5)
    z = ball.sample(x, streams(2))
    for bad in (float("nan"), float("inf"), 1.1, -0.1):
        broken = z.clone()
        broken[1, 0, 0, 0] = bad
        assert ball.admits(broken, x).tolist() == [True, False]
    assert ball.admits(z[:, :, :3], x).tolist() == [False, False]
    assert not ball.admits(1 - x + 0.4, x).any()
    assert ball.admits(z[:0], x[:0]).shape == (0,)


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.5), L1(2.0)], ids=named)
def test_the_tolerance_is_the_documented_one(ball):
    x = torch.full((1, 40), 0.5, dtype=torch.float64)
    move = torch.zeros_like(x)
    move[0, 7] = 1.0
    wide_box = replace(ball, box=Box(-10, 10))
    limit = ball.eps * (1 + 1e-5) + 1e-7
    assert wide_box.admits(x + move * limit * (1 - 1e-12), x).all()
    assert not wide_box.admits(x + move * limit * (1 + 1e-8), x).any()


EIGHT_BITS = [
    Linf(8 / 255),
    Linf(1 / 255),
    Linf(0.05),
    L2(0.5),
    L2(0.02),
    L1(2.0),
    L1(0.03),
    L0(5),
    L0(9, per="feature"),
]


@pytest.mark.parametrize("ball", EIGHT_BITS, ids=named)
def test_finished_rows_are_files(ball):
    x = (origins(24) * 255).round() / 255
    ball = replace(ball, lattice=255)
    levels = set((torch.arange(256).float() / 255).tolist())
    for z in (ball.sample(x, streams(24)), far_points(x), x):
        done = ball.finish(z, x)
        assert ball.admits(done, x).all()
        assert set(done.flatten().tolist()) <= levels
        assert torch.equal(ball.finish(done, x), done)
    assert torch.equal(ball.finish(x, x), x)


def test_finish_without_a_lattice_is_the_identity():
    x = origins(4)
    z = far_points(x)
    for ball in BALLS:
        assert ball.finish(z, x) is z


def test_linf_keeps_all_its_levels():
    """8/255 is eight levels, in floats too: for every origin both extreme levels survive."""
    x = (torch.arange(256).float() / 255)[:, None]
    for levels in range(1, 20):
        ball = Linf(levels / 255, lattice=255)
        up, down = ball.finish(ball.project(x + 1, x), x), ball.finish(ball.project(x - 1, x), x)
        index = torch.arange(256)[:, None]
        assert torch.equal((up * 255).round().long(), (index + levels).clamp(max=255))
        assert torch.equal((down * 255).round().long(), (index - levels).clamp(min=0))
        assert ball.admits(up, x).all()
        assert ball.admits(down, x).all()


@pytest.mark.parametrize(
    "box", [Box(0, 1), Box(-1, 1), Box(torch.tensor([0.0, -2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0]))]
)
def test_linf_finds_the_nearest_lattice_point(box):
    low, high = (bound.double().expand(3) for bound in box.bounds_like(torch.empty(0)))
    x = (low + (high - low) * torch.rand(50, 3, generator=generator(), dtype=torch.float64)).float()
    ball = Linf(0.07, lattice=15, box=box)
    z = ball.sample(x, streams(50))
    done = ball.finish(z, x)
    assert ball.admits(done, x).all()
    lattice = torch.stack([low + (high - low) * k / 15 for k in range(16)])  # [16, 3]
    for i in range(50):
        for j in range(3):
            allowed = [v.item() for v in lattice[:, j] if abs(v.item() - x[i, j].item()) <= 0.07 + 1e-6]
            nearest = min(allowed, key=lambda v: abs(v - z[i, j].item())) if allowed else x[i, j].item()
            assert abs(done[i, j].item() - nearest) < 1e-6


@pytest.mark.parametrize(("kind", "eps"), [(L1, 0.55), (L2, 0.33)])
def test_l1_and_l2_lattice_points_against_exhaustive_search(kind, eps):
    """Four features with four levels around: L1 must find the optimum, L2's greedy choice may lose a little."""
    x = (torch.rand(15, 4, generator=generator(8)) * 10).round() / 10
    ball = kind(eps, lattice=10)
    z = ball.sample(x, streams(15))
    done = ball.finish(z, x)
    grid = torch.cartesian_prod(*[torch.arange(11) / 10] * 4)
    for i in range(15):
        admitted = grid[ball.admits(grid, x[i].expand_as(grid))]
        best = (admitted - z[i]).norm(dim=1).min().item()
        got = (done[i] - z[i]).norm().item()
        assert ball.admits(done[i : i + 1], x[i : i + 1]).all()
        assert got <= best + (1e-6 if kind is L1 else 0.05)


@every_ball
def test_origins_off_the_lattice_stay_admitted(ball):
    x = origins(12)
    done = replace(ball, lattice=7).finish(far_points(x), x)
    assert ball.admits(done, x).all()
    off = (done * 7 - (done * 7).round()).abs() > 1e-4
    assert torch.equal(done[off], x[off])


@pytest.mark.parametrize("ball", [Linf(0.1), L2(0.3), L1(0.5), L0(4)], ids=named)
def test_per_feature_boxes(ball):
    box = per_feature_box(30)
    bound = ball.bind(box)
    assert bound.box == box
    x = inside(box, 12, 30).float()
    z = bound.sample(x, streams(12))
    step = bound.steepest(torch.randn(12, 30, generator=generator()), z)
    for moved in (z, bound.project(z + step, x), bound.project(far_points(x), x)):
        assert bound.admits(moved, x).all()
        low, _ = box.bounds_like(x)
        torch.testing.assert_close(moved[:, :3], low.expand(12, 30)[:, :3])


@pytest.mark.parametrize(
    ("ball", "box", "words"),
    [
        (Linf(8), Box(0, 1), "did you mean 8/255"),
        (Linf(1.5), Box(0, 1), "further apart than 1 in Linf"),
        (Linf(300), Box(0, 255), "255"),
        (L2(2.0), Box(0, 1, shape=(3,)), "1.73205"),
        (L1(3.5), Box(torch.zeros(3), 1.0), "further apart than 3 in L1"),
        (L0(37), Box(0, 1, shape=SHAPE), "36"),
        (L0(3), Box(0, float("inf")), "unbounded"),
        (Linf(0.1, lattice=255), Box(0, float("inf")), "lattice"),
    ],
)
def test_bind_refuses_what_does_not_fit(ball, box, words):
    with pytest.raises(UsageError, match=words):
        ball.bind(box)


def test_bind_takes_what_fits():
    assert Linf(1.0).bind(Box(0, 1)).box == Box(0, 1)
    assert Linf(8).bind(Box(0, 255)).eps == 8
    assert L2(50.0).bind(Box(0, 1)).eps == 50  # the box has no shape, so its diagonal is not known
    assert L0(36).bind(Box(0, 1, shape=SHAPE)).eps == 36
    assert L0(108, per="feature").bind(Box(0, 1, shape=SHAPE)).eps == 108
    with pytest.raises(UsageError, match="Tokens"):
        Linf(0.1).bind(Tokens(10))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linf(-0.1),
        lambda: L2(float("nan")),
        lambda: L1(float("inf")),
        lambda: L0(1.5),
        lambda: Linf(0.1, lattice=-1),
        lambda: Linf(0.1, queries=-5),
        lambda: L1(0.1, sparsity=2),
        lambda: L0(3, per="channel"),
    ],
)
def test_senseless_balls_are_refused(make):
    with pytest.raises(UsageError):
        make()


def test_describe_fills_the_reports_block():
    block = Linf(8 / 255, lattice=255, queries=500, access=Access.SCORES).describe()
    assert block["name"] == "linf"
    assert (block["norm"], block["eps"], block["eps_string"]) == ("Linf", 8 / 255, "8/255")
    assert (block["knowledge"], block["query_budget"], block["phase"]) == ("black_box_score", 500, "test_time")
    assert block["details"]["lattice"] == 255
    assert [L2(0.5).describe()["norm"], L1(12).describe()["norm"], L0(3).describe()["norm"]] == ["L2", "L1", "L0"]
    assert L2(0.5).describe()["knowledge"] == "white_box"
    assert [eps_text(v) for v in (8 / 255, 0.5, 12.0, 0.031, 0.0, 1 / 7)] == [
        "8/255",
        "0.5",
        "12",
        "0.031",
        "0",
        "0.14285714285714285",
    ]


def test_balls_by_name():
    ball = THREAT_MODELS.build("linf:eps=8/255,lattice=255,access=scores,queries=100")
    assert ball == Linf(8 / 255, lattice=255, access=Access.SCORES, queries=100)
    assert ball.scenario == "evasion"
    assert THREAT_MODELS.build("l0:eps=3,per=feature") == L0(3, per="feature")
    for spec in ("l2:eps=0.5", "l1:eps=12.0,sparsity=0.05", "l0:eps=20.0"):
        assert THREAT_MODELS.spec(THREAT_MODELS.build(spec)) == spec


def test_walls_follow_the_rows():
    """Linf keeps the walls of the rows asked for last, until these change or go."""
    ball = Linf(0.1)
    x, far = torch.full((2, 3), 0.5), torch.full((2, 3), 5.0)
    assert torch.equal(ball.project(far, x), x + 0.1)
    assert torch.equal(ball.project(far, x + 0.2), (x + 0.2) + 0.1)
    assert torch.equal(ball.project(-far, x), x - 0.1)
    x[0] = 0.25
    assert torch.equal(ball.project(far, x), x + 0.1)
    assert ball._last._kept is not None
    other = pickle.loads(pickle.dumps(ball))
    assert other == ball
    assert hash(other) == hash(ball)
    assert other._last._kept is None
    assert replace(ball, eps=0.2)._last._kept is None
    del x
    assert ball._last._kept is None
    with torch.inference_mode():
        held = torch.full((1, 3), 0.5)
        assert torch.equal(ball.project(far[:1], held), held + 0.1)
        held.fill_(0.25)
        assert torch.equal(ball.project(far[:1], held), held + 0.1)


@pytest.mark.parametrize("eps", [0.0, 0.1, 2.0])
def test_linf_projection_is_box_then_ball(eps):
    """Also around origins that round-off or a mistake left outside the box."""
    torch.manual_seed(0)
    box = Box(torch.tensor([0.0, -1.0, 0.3]), torch.tensor([1.0, 2.0, 0.3]))
    x = torch.randn(500, 3)
    z = 3 * torch.randn(500, 3)
    expected = torch.minimum(torch.maximum(z, box.low), box.high)
    expected = torch.minimum(torch.maximum(expected, x - eps), x + eps)
    assert torch.equal(Linf(eps, box=box).project(z, x), expected)


@pytest.mark.parametrize("ball", [ball for ball in BALLS if not isinstance(ball, L0)], ids=named)
def test_descending_is_stepping_and_projecting(ball):
    x = origins(6)
    z = ball.sample(x, RowRng.from_ids(0, [str(i) for i in range(6)]))
    gradient = torch.randn(x.shape, generator=generator(8))
    sizes = torch.tensor([0.1, 0.5, 1.0, 1.5, 2.0, 0.0]).view(-1, *(1 for _ in x.shape[1:]))
    for size in (0.25, sizes):
        expected = ball.project(z + size * ball.steepest(-gradient, z), x)
        torch.testing.assert_close(ball.descend(z, gradient, x, size), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ball", [ball for ball in BALLS if isinstance(ball, L0)], ids=named)
def test_descending_in_l0_chooses_the_positions_anew(ball):
    """Row by row: the positions that promise most from the origin move on from z, all others are the origin's."""
    x = origins(6)
    z = ball.sample(x, streams(6))
    gradient = torch.randn(x.shape, generator=generator(8))
    new = ball.descend(z, gradient, x, 0.25)
    for row in range(6):
        edge = torch.where(gradient[row] < 0, 1.0, 0.0)
        promise = gradient[row] * (x[row] - edge)
        promise = promise.sum(0) if ball.per == "pixel" else promise
        best = promise.flatten().topk(int(ball.eps)).indices
        chosen = torch.zeros(promise.numel(), dtype=torch.bool).index_fill(0, best, True).view(promise.shape)
        stepped = (z[row] + 0.25 * (edge - x[row])).clamp(0, 1)
        # A channel that is at its edge already has nowhere to go and goes back.
        torch.testing.assert_close(new[row], torch.where(chosen & (edge != x[row]), stepped, x[row]))
    assert bool(((new != x) & (z == x)).any()), "some position was exchanged"
