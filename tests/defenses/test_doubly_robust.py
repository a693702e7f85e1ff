"""Doubly robust training: weights against a convex solver, the barrier and the gradient through it in closed form."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advkit.attacks.gradient.pgd import PGD
from advkit.cli.main import run
from advkit.core.errors import BadModel, UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial import doubly_robust
from advkit.defenses.adversarial.barrier import INSIDE, BarrierAttack, Walls, central, give
from advkit.defenses.adversarial.base import attacked, correct_under
from advkit.defenses.adversarial.doubly_robust import DoublyRobust, divergences, implicit_term, kl, tracked, value
from advkit.defenses.adversarial.pgd_at import PGDAT
from advkit.defenses.adversarial.trades import TRADES, divergence
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf
from advkit.training.loop import Recipe, fit

ROWS = torch.arange(12)
PRICES = [0.05, 0.5, 1.0, 7.0]


def streams(n: int = 12, seed: int = 0) -> RowRng:
    return RowRng.from_ids(seed, [str(row) for row in range(n)])


def drawn(seed: int, n: int = 9, scale: float = 2.0) -> Tensor:
    return scale * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int = 0) -> TorchModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    return TorchModel(module, Box(0.0, 1.0), 3)


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(12, 6, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def solved(losses: Tensor, *, r: float | None = None, rho: float | None = None) -> tuple[float, np.ndarray]:
    """Value and weights of the penalised, or of the constrained problem, by an interior-point solver."""
    n, l = len(losses), losses.numpy()  # noqa: E741
    p = cvxpy.Variable(n)
    apart = math.log(n) - cvxpy.sum(cvxpy.entr(p))
    wanted = p @ l if r is None else p @ l - r * apart
    limits = [cvxpy.sum(p) == 1] + ([apart <= rho] if rho is not None else [])
    problem = cvxpy.Problem(cvxpy.Maximize(wanted), limits)
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return float(problem.value), p.value


# Weights


@pytest.mark.parametrize("r", PRICES)
@pytest.mark.parametrize("seed", [0, 1])
def test_weights_and_value_are_those_of_a_convex_solver(r: float, seed: int) -> None:
    losses = drawn(seed)
    best, p = solved(losses, r=r)
    assert float(value(losses, r)) == pytest.approx(best, abs=1e-5)
    assert np.allclose(doubly_robust.weights(losses, r).numpy(), p, atol=1e-4)


@pytest.mark.parametrize("r", PRICES)
def test_properties_of_weights(r: float) -> None:
    losses = drawn(3)
    p = doubly_robust.weights(losses, r)
    assert (p >= 0).all()
    assert float(p.sum()) == pytest.approx(1)
    order = losses.argsort()
    assert (p[order].diff() > 0).all()
    assert torch.allclose(doubly_robust.weights(losses + 41.0, r), p)
    assert torch.allclose(doubly_robust.weights(losses[order], r), p[order])
    assert torch.allclose(doubly_robust.weights(3.5 * losses, 3.5 * r), p)
    assert not doubly_robust.weights(losses.requires_grad_(), r).requires_grad


def test_large_losses_are_finite_and_the_limits_are_uniform_and_the_largest() -> None:
    losses = torch.tensor([1000.0, 999.0, 0.0, 1000.0])
    p = doubly_robust.weights(losses, 1.0)
    assert torch.allclose(p, torch.tensor([1, math.exp(-1), 0, 1]) / (2 + math.exp(-1)))
    assert torch.isfinite(value(losses, 1.0))
    assert torch.isfinite(doubly_robust.weights(losses, 1e-30)).all()
    assert torch.equal(doubly_robust.weights(losses, math.inf), torch.full((4,), 0.25))
    assert torch.equal(doubly_robust.weights(losses, 0.0), torch.tensor([0.5, 0, 0, 0.5]))
    assert float(value(losses, math.inf)) == float(losses.mean())
    assert float(value(losses, 0.0)) == 1000.0


def test_the_value_lies_between_mean_and_maximum_and_falls_with_the_price() -> None:
    losses = drawn(5)
    found = [float(value(losses, r)) for r in (0.0, 1e-3, 0.1, 0.5, 1.0, 10.0, 1e5, math.inf)]
    assert found == sorted(found, reverse=True)
    assert found[0] == float(losses.max())
    assert found[-1] == float(losses.mean())


@pytest.mark.parametrize("r", PRICES)
def test_the_weights_are_the_gradient_of_the_value(r: float) -> None:
    losses = drawn(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda l: value(l, r), losses)  # noqa: E741
    (found,) = torch.autograd.grad(value(losses, r), losses)
    assert torch.allclose(found, doubly_robust.weights(losses, r))


@pytest.mark.parametrize("r", [-1.0, -math.inf, math.nan])
def test_a_negative_price_is_refused(r: float) -> None:
    with pytest.raises(UsageError, match="expected a number above 0"):
        doubly_robust.weights(drawn(0), r)


# The KL ball


@pytest.mark.parametrize("rho", [1e-6, 0.01, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_solved_price_gives_the_radius(rho: float, scale: float) -> None:
    losses = drawn(7, scale=scale)
    r = doubly_robust.ball(losses, rho)
    assert float(kl(doubly_robust.weights(losses, r))) == pytest.approx(rho, abs=1e-6)


@pytest.mark.parametrize("rho", [0.05, 0.5, 1.5])
def test_the_value_is_that_of_the_constrained_solver(rho: float) -> None:
    losses = drawn(8)
    best, p = solved(losses, rho=rho)
    r = doubly_robust.ball(losses, rho)
    own = doubly_robust.weights(losses, r)
    assert float(value(losses, r)) + r * rho == pytest.approx(best, abs=1e-6)
    assert float(own @ losses) == pytest.approx(best, abs=1e-6)
    assert np.allclose(own.numpy(), p, atol=1e-4)


def test_the_ends_of_the_radius() -> None:
    losses = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert doubly_robust.ball(losses, 0.0) == math.inf
    assert doubly_robust.ball(torch.ones(5), 0.4) == math.inf
    for rho in (math.log(2), math.log(4), 50.0):  # two samples share the maximum
        assert doubly_robust.ball(losses, rho) == 0.0
    assert 0 < doubly_robust.ball(losses, math.log(2) - 1e-3) < 1
    for rho in (-0.1, math.nan):
        with pytest.raises(UsageError, match="radius rho"):
            doubly_robust.ball(losses, rho)


# The moving average


def test_the_average_in_logarithms_is_the_average() -> None:
    u = torch.tensor(1.7, dtype=torch.float64)
    log_u, r, rate = u.log(), 0.8, 0.1
    for seed in range(20):
        losses = drawn(seed)
        u = (1 - rate) * u + rate * (losses / r).exp().mean()
        log_u = tracked(log_u, losses, r, rate)
        assert torch.allclose(log_u, u.log())
    assert torch.isfinite(tracked(torch.tensor(4e5, dtype=torch.float64), 1e6 + drawn(0), 1.0, rate))


def test_equal_losses_keep_the_average() -> None:
    losses = torch.full((5,), 1.3, dtype=torch.float64)
    log_u = torch.tensor(1.3 / 0.5, dtype=torch.float64)
    for _ in range(10):
        log_u = tracked(log_u, losses, 0.5, 0.1)
    assert float(log_u) == pytest.approx(2.6)


def test_shares_follow_the_paper_s_update() -> None:
    objective: Any = DoublyRobust(r=0.7, eta=0.2, q_max=None).objective()
    u = 0.0
    for step in range(1, 9):
        losses = drawn(step)
        rate = max(0.2, 1 / step)
        u = (1 - rate) * u + rate * float((losses / 0.7).exp().mean())
        assert torch.allclose(objective.shares(losses), (losses / 0.7).exp() / (len(losses) * u))


def test_a_rate_of_one_is_the_softmax_of_the_batch() -> None:
    objective: Any = DoublyRobust(r=0.7, q_max=None).objective()
    for step in range(3):
        losses = drawn(step)
        assert torch.allclose(objective.shares(losses), doubly_robust.weights(losses, 0.7))


def test_a_solved_price_within_the_batch() -> None:
    objective: Any = DoublyRobust(rho=0.4, q_max=None).objective()
    for step in range(3):
        losses = drawn(step)
        q = objective.shares(losses)
        assert float(kl(q)) == pytest.approx(0.4, abs=1e-6)
    assert float(objective.shares(torch.tensor([1.0, 2.0, 1.5]))[1]) < 1
    assert torch.allclose(objective.shares(torch.full((4,), 2.0)), torch.full((4,), 0.25))
    assert DoublyRobust(rho=0.4).objective().shares(torch.full((4,), 2.0)) is None  # nothing to solve for yet
    all_on_one: Any = DoublyRobust(rho=9.0, q_max=None).objective()
    assert torch.allclose(all_on_one.shares(torch.tensor([1.0, 2.0, 1.5])), torch.tensor([0.0, 1.0, 0.0]))


def test_a_solved_price_moves_slowly_with_the_average() -> None:
    objective: Any = DoublyRobust(rho=0.4, eta=0.25, q_max=None).objective()
    log_r, level = math.nan, math.nan
    for step in range(1, 8):
        losses = drawn(step)
        rate = max(0.25, 1 / step)
        own = math.log(doubly_robust.ball(losses, 0.4))
        log_r = own if step == 1 else (1 - rate) * log_r + rate * own
        r = math.exp(log_r)
        now = float((losses / r).exp().mean())
        u = now if step == 1 else (1 - rate) * math.exp(level / r) + rate * now
        level = r * math.log(u)
        assert torch.allclose(objective.shares(losses), (losses / r).exp() / (len(losses) * u))


def test_no_sample_weighs_more_than_q_max() -> None:
    objective: Any = DoublyRobust(r=0.05, q_max=2.0).objective()
    losses = drawn(1, n=10)
    q = objective.shares(losses)
    free = doubly_robust.weights(losses, 0.05)
    assert torch.allclose(q, free.clamp(max=0.2))
    assert float(q.max()) == pytest.approx(0.2)
    figures = objective.review(None, ()).figures
    p = q / q.sum()
    assert figures["clipped_weights"] == pytest.approx(float((free > 0.2).double().mean()))
    assert figures["effective_sample_size"] == pytest.approx(float(1 / (10 * p.square().sum())))
    assert figures["weight_kl"] == pytest.approx(float((p * (10 * p).log()).sum()))
    assert figures["price"] == pytest.approx(0.05)
    assert objective.review(None, ()).figures == {}


# The inner problem with a barrier


def test_on_a_linear_loss_the_barrier_s_solution_is_the_closed_form() -> None:
    """Two classes, margin loss: linear in the input, so that any number of steps ends at the solution."""
    weight = torch.tensor([[0.7, -1.0, 0.02, 0.0], [-0.4, 1.5, -0.01, 0.0]], dtype=torch.float64)
    layer = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    model = TorchModel(layer, Box(0.0, 1.0), 2)
    x = torch.full((3, 4), 0.5, dtype=torch.float64)
    y = torch.tensor([0, 1, 0])
    eps, c = 0.15, 0.03
    goal = Untargeted(y).under("margin")
    g = weight[1 - y] - weight[y]
    expected = g * eps**2 / (c + (c**2 + g**2 * eps**2).sqrt())
    for steps in (1, 2, 7):
        attack = BarrierAttack(steps=steps, size=min(1.0, 2.5 / steps), c=c)
        z = attacked(model, attack, x, goal, Linf(eps).bind(model.space), streams(3))
        assert torch.allclose(z - x, expected, atol=1e-6)
    assert (expected[:, 3] == 0).all()


def test_where_the_barrier_holds_a_value_its_derivative_vanishes() -> None:
    half = torch.tensor([0.2, 0.1, 0.03], dtype=torch.float64)
    g = torch.tensor([0.5, -3.0, 0.0], dtype=torch.float64)
    e = central(g, half, 0.02).requires_grad_()
    held = (g * e + 0.02 * ((half - e).log() + (half + e).log())).sum()
    (slope,) = torch.autograd.grad(held, e, create_graph=True)
    assert slope.abs().max() < 1e-9
    (second,) = torch.autograd.grad(slope.sum(), e)
    assert torch.allclose(give(e.detach(), half, 0.02), -1 / second)
    nudged = (central(g + 1e-6, half, 0.02) - central(g - 1e-6, half, 0.02)) / 2e-6
    assert torch.allclose(give(e.detach(), half, 0.02), nudged, rtol=1e-6)


def test_a_smaller_barrier_is_nearer_to_the_corner_and_a_larger_to_the_middle() -> None:
    half, g = torch.tensor([0.2, 0.2]), torch.tensor([0.5, -3.0])
    found = torch.stack([central(g, half, c).abs() for c in (1e-6, 1e-3, 1e-2, 1e-1, 1.0, 1e3)])
    assert (found.diff(dim=0) <= 0).all()
    assert torch.allclose(found[0], INSIDE * half)
    assert torch.allclose(found[-1], g.abs() * half**2 / (2 * 1e3), rtol=1e-3)


class Watching(MeteredOracle):
    """Keeps what it is asked."""

    def gradient(self, x: Any, goal: Any) -> Any:
        self.asked = [*getattr(self, "asked", []), x.clone()]
        return super().gradient(x, goal)


@pytest.mark.parametrize("c", [1e-6, 0.01, 1.0])
def test_every_point_is_strictly_inside_ball_and_box(c: float) -> None:
    x, y = batch()
    x[:, 0], x[:, 1] = 0.0, 1.0
    model, around = network(), Linf(0.15)
    oracle = Watching(model, rows=12, lanes=Lanes(chunk=12, multiple=1))
    z = BarrierAttack(steps=6, size=0.4, c=c)(oracle, x, Untargeted(y), around, streams())
    walls = Walls.around(x, around)
    assert torch.allclose(walls.half[:, 0], torch.tensor(0.075))
    assert torch.allclose(walls.middle[:, 0], torch.tensor(0.075))
    for point in (*oracle.asked, z):
        low, high = torch.maximum(x - 0.15, torch.zeros(())), torch.minimum(x + 0.15, torch.ones(()))
        assert (point > low).all()
        assert (point < high).all()
        assert torch.isfinite((point - low).log() + (high - point).log()).all()
    assert len(oracle.asked) == 6
    assert not torch.equal(oracle.asked[0], walls.middle)


def test_values_that_can_not_move_stay() -> None:
    space = Box(torch.tensor([0.0, 0.3, 0.0]), torch.tensor([1.0, 0.3, 1.0]))
    x = torch.tensor([[0.5, 0.3, 0.0]])
    walls = Walls.around(x, Linf(0.1).bind(space))
    assert walls.half[0].tolist() == pytest.approx([0.1, 0.0, 0.05])
    assert give(torch.zeros_like(x), walls.half, 0.1)[0, 1] == 0
    assert central(torch.ones_like(x), walls.half, 0.1)[0, 1] == 0


def test_under_the_barrier_the_loss_rises() -> None:
    x, y = batch()
    model, defense = network(), DoublyRobust(eps=0.2, steps=4, barrier=1e-4)
    z = attacked(model, defense.inner, x, Untargeted(y), Linf(0.2), streams())
    rise = functional.cross_entropy(model(z), y) - functional.cross_entropy(model(x), y)
    pgd = attacked(model, defense.attack, x, Untargeted(y), Linf(0.2), streams())
    most = functional.cross_entropy(model(pgd), y) - functional.cross_entropy(model(x), y)
    assert rise > 0.8 * most > 0


# The gradient through the inner problem


def objective_of(theta: Tensor, x: Tensor, y: Tensor, eps: float, c: float, r: float) -> tuple[Tensor, Tensor, Tensor]:
    """(value at the inner solution, upper losses, solution) of a linear two-class model, by formula alone."""
    slope = theta[1 - y] - theta[y]
    z = x + slope * eps**2 / (c + (c**2 + slope**2 * eps**2).sqrt())
    losses = functional.cross_entropy(z @ theta.T, y, reduction="none")
    return value(losses, r), losses, z


@pytest.mark.parametrize("r", [0.5, math.inf])
def test_the_hypergradient_of_a_linear_model_is_that_of_finite_differences(r: float) -> None:
    eps, c, n, d = 0.15, 0.02, 6, 5
    draws = torch.Generator().manual_seed(4)
    x = 0.3 + 0.4 * torch.rand(n, d, generator=draws, dtype=torch.float64)
    theta = torch.randn(2, d, generator=draws, dtype=torch.float64)
    y = torch.arange(n) % 2
    around = Linf(eps).bind(Box(0.0, 1.0))

    live = theta.clone().requires_grad_()
    z = objective_of(theta, x, y, eps, c, r)[2].requires_grad_()
    answer = z @ live.T
    upper = functional.cross_entropy(answer, y, reduction="none")
    lower = answer.gather(1, (1 - y)[:, None]).squeeze(1) - answer.gather(1, y[:, None]).squeeze(1)
    p = doubly_robust.weights(upper, r)
    full = (p * (upper + implicit_term(lower, upper, z, x, around, c))).sum()
    (found,) = torch.autograd.grad(full, live, retain_graph=True)
    (without,) = torch.autograd.grad((p * upper).sum(), live)

    expected = torch.zeros_like(theta)
    for place in np.ndindex(*theta.shape):
        nudge = torch.zeros_like(theta)
        nudge[place] = 1e-6
        ends = [objective_of(theta + sign * nudge, x, y, eps, c, r)[0] for sign in (1, -1)]
        expected[place] = (ends[0] - ends[1]) / 2e-6
    assert torch.allclose(found, expected, atol=1e-7, rtol=1e-5)
    assert (without - expected).abs().max() > 1e-3


def test_training_adds_the_term_to_the_gradient_and_not_to_the_loss() -> None:
    x, y = batch()
    model = network()
    with_it = DoublyRobust(eps=0.1, steps=3, r=0.5, barrier=0.01, implicit=True, q_max=None)
    without = DoublyRobust(eps=0.1, steps=3, r=0.5, barrier=0.01, q_max=None)
    parameters = list(model.module.parameters())
    losses, gradients = [], []
    for defense in (with_it, without):
        objective: Any = defense.objective()
        losses.append(objective.loss(model, x, y, ROWS, streams()))
        gradients.append(torch.autograd.grad(losses[-1], parameters))
    assert torch.allclose(losses[0], losses[1])
    z = attacked(model, with_it.inner, x, Untargeted(y), Linf(0.1), streams().at("attack")).requires_grad_()
    rows = functional.cross_entropy(model(z), y, reduction="none")
    p = doubly_robust.weights(rows, 0.5)
    term = (p * implicit_term(rows, rows, z, x, Linf(0.1), 0.01)).sum()
    expected = torch.autograd.grad(term, parameters, allow_unused=True)
    for one, other, added in zip(*gradients, expected, strict=True):
        assert torch.allclose(one - other, torch.zeros_like(one) if added is None else added, atol=1e-6)
    assert max(float((a - b).abs().max()) for a, b in zip(*gradients, strict=True)) > 1e-4


@pytest.mark.parametrize("outer", ["trades", "alp"])
def test_the_term_exists_for_every_outer_loss(outer: str) -> None:
    x, y = batch()
    model = network()
    found = []
    for implicit in (True, False):
        objective: Any = DEFENSES.build(
            f"doubly_robust:eps=0.1,steps=3,barrier=0.01,outer={outer},implicit={str(implicit).lower()}"
        ).objective()
        loss = objective.loss(model, x, y, ROWS, streams())
        found.append((loss.detach(), torch.autograd.grad(loss, list(model.module.parameters()))))
    assert torch.allclose(found[0][0], found[1][0])
    assert any(not torch.allclose(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_a_model_that_differentiates_once_is_refused() -> None:
    x, y = batch()
    model = TorchModel(nn.Sequential(nn.Linear(6, 3), Doubled()), Box(0.0, 1.0), 3)
    objective: Any = DoublyRobust(eps=0.1, steps=2, barrier=0.01, implicit=True).objective()
    with pytest.raises(BadModel, match="differentiates the model twice"):
        objective.prepare(model, Data(x, y, model.space, 3), streams(1))
    objective.prepare(network(), Data(x, y, model.space, 3), streams(1))


# Training


def test_the_weights_are_constant_for_the_gradient() -> None:
    x, y = batch()
    model, defense = network(), DoublyRobust(eps=0.1, steps=2, r=0.3, q_max=None)
    objective: Any = defense.objective()
    parameters = list(model.module.parameters())
    found = torch.autograd.grad(objective.loss(model, x, y, ROWS, streams()), parameters)
    z = attacked(model, defense.attack, x, Untargeted(y), Linf(0.1), streams().at("attack"))
    rows = functional.cross_entropy(model(z), y, reduction="none")
    p = doubly_robust.weights(rows, 0.3)
    apart = [torch.autograd.grad(row, parameters, retain_graph=True) for row in rows]
    for place, gradient in enumerate(found):
        expected = sum(share * row[place] for share, row in zip(p, apart, strict=True))
        assert torch.allclose(gradient, expected, atol=1e-6)


def test_outer_losses_are_their_formulas() -> None:
    x, y = batch()
    model = network()

    def losses_of(spec: str) -> tuple[Tensor, Tensor, Tensor, Any]:
        defense: Any = DEFENSES.build(f"doubly_robust:eps=0.1,steps=2,r=0.3,q_max=none,{spec}")
        found = defense.objective().loss(model, x, y, ROWS, streams())
        z = defense.objective().examples(model, x, y, ROWS, streams())
        return found, model(x), model(z), defense

    found, clean, adversarial, defense = losses_of("outer=trades,beta=2")
    rows, plain = divergences(clean, adversarial), functional.cross_entropy(clean, y, reduction="none")
    assert torch.allclose(rows.mean(), divergence(clean, adversarial))
    assert torch.allclose(found, plain.mean() + 2 * (doubly_robust.weights(rows, 0.3) * rows).sum())
    assert defense.attack == TRADES(eps=0.1, steps=2).attack
    found, clean, adversarial, _ = losses_of("outer=trades,weight_clean=true")
    rows, p = divergences(clean, adversarial), doubly_robust.weights(divergences(clean, adversarial), 0.3)
    assert torch.allclose(
        found, (p * functional.cross_entropy(clean, y, reduction="none")).sum() + 6 * (p * rows).sum()
    )
    found, clean, adversarial, _ = losses_of("outer=alp,beta=0.7")
    rows = functional.cross_entropy(adversarial, y, reduction="none") + 0.7 * (clean - adversarial).square().mean(1)
    assert torch.allclose(found, (doubly_robust.weights(rows, 0.3) * rows).sum())
    found, clean, _, _ = losses_of("outer=trades,beta=0")
    assert torch.allclose(found, functional.cross_entropy(clean, y))


def digits(rows: int = 400) -> Data:
    data = TASKS.build("digits").training()
    return Data(data.x[:rows], data.y[:rows], data.space, data.classes, data.name)


def trained(defense: Any, recipe: Recipe, spec: str = "mlp:hidden=16") -> Any:
    data = digits()
    model = MODELS.build(spec)((1, 8, 8), 10, streams(1), space=data.space)
    return fit(model, data, defense.objective(), recipe, streams(1), progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reference", "spec"),
    [
        ("pgd_at:eps=0.15,steps=3", "doubly_robust:eps=0.15,steps=3,r=inf"),
        ("pgd_at:eps=0.15,steps=3", "doubly_robust:eps=0.15,steps=3,r=inf,eta=0.1,q_max=1"),
        ("pgd_at:eps=0.15,steps=3", "doubly_robust:eps=0.15,steps=3,rho=0"),
        ("trades:eps=0.15,steps=3,beta=4", "doubly_robust:eps=0.15,steps=3,r=inf,outer=trades,beta=4"),
    ],
)
@pytest.mark.parametrize("model", ["mlp:hidden=16", "cnn:width=4"])
def test_without_weights_it_is_the_method_that_it_weights_to_the_bit(reference: str, spec: str, model: str) -> None:
    for steps in (1, 5):  # optimiser steps
        recipe = Recipe(epochs=steps, batch_size=400, validation=0.0)
        one, other = (trained(DEFENSES.build(each), recipe, model) for each in (reference, spec))
        assert one.last.state_sha256() == other.last.state_sha256()
    recipe = Recipe(epochs=2, batch_size=64)
    one, other = (trained(DEFENSES.build(each), recipe, model) for each in (reference, spec))
    assert one.last.state_sha256() == other.last.state_sha256()


def test_a_very_high_price_is_no_weight_to_round_off() -> None:
    recipe = Recipe(epochs=1, batch_size=80, validation=0.0, optimizer="sgd", lr=0.1)  # five steps
    one = trained(PGDAT(eps=0.15, steps=3), recipe)
    other = trained(DoublyRobust(eps=0.15, steps=3, r=1e9), recipe)
    for a, b in zip(one.last.module.parameters(), other.last.module.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert trained(DoublyRobust(eps=0.15, steps=3, r=0.5), recipe).last.state_sha256() != one.last.state_sha256()


@pytest.mark.slow
def test_the_log_says_how_many_samples_count(tmp_path: Path) -> None:
    task = ["--task", "digits", "--recipe", "epochs=2,batch_size=64", "--model", "mlp:hidden=16"]
    for name, spec in (
        ("full", "doubly_robust:eps=0.15,steps=2,eta=0.1,barrier=0.01,implicit=true,r=0.5"),
        ("even", "doubly_robust:eps=0.15,steps=2,r=inf"),
    ):
        assert run(["train", *task, "--defense", spec, "--out", str(tmp_path / name)]) == 0
    full, even = (json.loads((tmp_path / name / "training" / "log.json").read_text()) for name in ("full", "even"))
    for entry in full:
        figures = entry["figures"]
        assert 0.1 < figures["effective_sample_size"] < 0.99
        assert figures["weight_kl"] > 0
        assert figures["price"] == pytest.approx(0.5)
        assert 0 <= figures["tail_30_score"] <= entry["score"]
    for entry in even:
        assert entry["figures"]["effective_sample_size"] == pytest.approx(1)
        assert entry["figures"]["price"] is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("r=0", "r is 0.0; expected a price in nats above 0"),
        ("r=-0.5", "r is -0.5"),
        ("r=nan", "r expects"),
        ("rho=-1", "rho is -1.0"),
        ("r=1,rho=0.5", "give one of them"),
        ("eta=0", "eta is 0.0"),
        ("eta=1.5", "eta is 1.5"),
        ("barrier=-1", "barrier is -1.0"),
        ("barrier=inf", "barrier is inf"),
        ("implicit=true", "say barrier=0.001"),
        ("barrier=0.01,norm=l2", "linf alone"),
        ("outer=mart", "outer expects"),
        ("beta=2", "outer=ce has none"),
        ("outer=alp,beta=-2", "beta is -2.0"),
        ("q_max=0.5", "q_max is 0.5"),
    ],
)
def test_nonsense_ends_with_one_line_and_status_2(
    settings: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = run(["train", "--task", "digits", "--defense", f"doubly_robust:{settings}", "--out", str(tmp_path)])
    shown = " ".join(capsys.readouterr().err.split())
    assert status == 2
    assert said in shown
    assert "Traceback" not in shown


def shares_right(model: TorchModel, eps: float) -> tuple[float, float]:
    """Accuracy under PGD-20 on the test digits, and its mean over the three weakest classes."""
    test = next(iter(TASKS.build("digits").batches(360)))
    right = correct_under(model, PGD(steps=20, step_size=0.25), test.x, test.labels, Linf(eps), streams(360))
    by_class = sorted(float(right[test.labels == label].float().mean()) for label in range(10))
    return float(right.float().mean()), sum(by_class[:3]) / 3


@pytest.mark.exhaustive
def test_the_weakest_classes_of_imbalanced_digits_gain() -> None:
    """benchmarks/reweighting.py has five seeds and more settings; docs/doubly_robust.json its figures."""
    data = TASKS.build("digits:imbalance=0.2").training()
    recipe = Recipe(epochs=25, batch_size=64, validation=0.0, select="last")
    tails, means = [], []
    for seed in (0, 1, 2):
        figures = []
        for r in (math.inf, 0.5):
            defense = DoublyRobust(eps=0.15, steps=4, r=r, recipe=recipe)
            rng = RowRng.from_ids(seed, ["training"]).at("train")
            model = MODELS.build("mlp:hidden=128+128")((1, 8, 8), 10, rng.at("init"), space=data.space)
            done = fit(model, data, defense.objective(), recipe, rng, progress=False)
            figures.append(shares_right(done.last, 0.15))
        means.append(figures[1][0] - figures[0][0])
        tails.append(figures[1][1] - figures[0][1])
    assert all(gain > 0 for gain in tails)
    assert sum(tails) / 3 >= 0.05
    assert sum(means) / 3 >= -0.01
