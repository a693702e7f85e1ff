"""FGSM, PGD and MI-FGSM against closed forms, hand counts and another library."""

from __future__ import annotations

import pytest
import torch

from advkit.attacks.base import Best
from advkit.attacks.gradient.fgsm import FGSM
from advkit.attacks.gradient.mifgsm import MIFGSM
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.wrappers import averaged, momentum
from advkit.core.errors import UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.spaces import Box
from advkit.testing.play import play
from advkit.testing.victims import linear, quantised, uniform
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L2, Linf

WIDE = Box(-1000.0, 1000.0)


def setting(rows=8, eps=0.01):
    victim = linear(space=WIDE)
    x = uniform(0, rows, 8)
    return victim, x, Untargeted(victim(x).argmax(1)), Linf(eps=eps, box=WIDE)


def descent(victim, labels):
    return -(victim.weight[labels] - victim.weight[1 - labels])


@pytest.mark.parametrize("attack", [FGSM(), PGD(), PGD(start="origin", step_size=0.025), MIFGSM()])
def test_linear_model_is_attacked_to_the_corner(attack):
    victim, x, goal, ball = setting()
    z = play(attack, victim, x, goal, ball, decides=False).z
    corner = x + 0.01 * descent(victim, goal.labels).sign()
    torch.testing.assert_close(z, corner, atol=1e-6, rtol=0)


def test_l2_steps_follow_the_weights():
    victim, x, goal, _ = setting()
    ball = L2(eps=0.01, box=WIDE)
    z = play(PGD(start="origin"), victim, x, goal, ball).z
    w = descent(victim, goal.labels)
    torch.testing.assert_close(z, x + 0.01 * w / w.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("attack", "forwards", "backwards"),
    [
        (FGSM(), 1, 1),
        (PGD(steps=7), 8, 7),
        (PGD(steps=7, restarts=3), 24, 21),
        (PGD(steps=7, keep="last"), 7, 7),
        (PGD(steps=7, eot=3), 24, 21),
        (MIFGSM(steps=5), 6, 5),
    ],
)
def test_passes_of_a_row_that_does_not_fall(attack, forwards, backwards):
    victim, x, goal, _ = setting()
    robust = victim.distance(x, goal.labels, "linf") > 1e-3
    meter = play(attack, victim, x[robust], goal.take(robust), Linf(eps=1e-4, box=WIDE)).meter
    assert (meter.forwards == forwards).all()
    assert (meter.backwards == backwards).all()


def test_rows_that_fell_ask_nothing_more_and_the_others_go_on():
    victim, x, goal, _ = setting(16)
    distance = victim.distance(x, goal.labels, "linf")
    eps = float(distance.median())
    played = play(PGD(steps=10, start="origin"), victim, x, goal, Linf(eps=eps, box=WIDE))
    assert (played.reached == (distance < eps)).all()
    # At step k (from 0) the walk has gone k/10 of the way: a row asks until the first point beyond its boundary.
    expected = torch.where(distance < 0.95 * eps, (distance / eps * 10).floor() + 2, played.meter.forwards)
    assert (played.meter.forwards == expected).all()
    assert (played.meter.forwards[~played.reached] == 11).all()


def test_keep_last_returns_the_end_of_the_walk_even_when_it_is_worse():
    victim, x, goal, ball = setting()
    with_last = play(PGD(steps=3, start="origin", step_size=1.0, keep="last"), victim, x, goal, ball, decides=False).z
    torch.testing.assert_close(with_last, x + 0.01 * descent(victim, goal.labels).sign(), atol=1e-6, rtol=0)


def test_trades_start_leaves_the_point_where_divergence_has_no_gradient():
    victim, x, _, ball = setting()
    with torch.no_grad():
        goal = Diverge(victim(x))
    stuck = play(PGD(start="origin", keep="last", stop=False, steps=3), victim, x, goal, ball)
    moved = play(PGD(start="gaussian", keep="last", stop=False, steps=3, step_size=0.5), victim, x, goal, ball)
    # At the origin the gradient is zero up to round-off, whose sign a step follows in a few rows.
    assert torch.equal(stuck.z, x) or (goal.loss(victim(stuck.z)).abs() < 1e-3).all()
    assert (ball.distance(moved.z, x) > 0.009).all()
    assert (goal.loss(victim(moved.z)) < -1e-8).all()


def test_zero_gradients_leave_the_start():
    victim, x, goal, ball = setting()
    dead = quantised(victim)
    origin = play(PGD(start="origin"), dead, x, goal, ball)
    assert torch.equal(origin.z, x)
    assert origin.meter.zero_gradient.all()
    drawn = play(PGD(), dead, x, goal, ball)
    assert not torch.equal(drawn.z, x)


def test_best_prefers_reached_then_lower_loss_and_never_what_is_not_finite():
    x = torch.zeros(4, 1)
    goal = Untargeted(torch.zeros(4, dtype=torch.long), "margin")
    best = Best(x, goal)
    best.offer(x + 1, torch.tensor([[2.0, 0.0]] * 4))
    reached = best.offer(x + 2, torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 1.0], [torch.nan, 1.0]]))
    assert reached.tolist() == [False, False, True, False]
    assert best.x.flatten().tolist() == [1, 2, 2, 1]
    # A point that reached the goal is not given up for one with a lower loss that did not.
    best.offer(x[:2] + 3, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([-9.0, -9.0]), torch.tensor([2, 0]))
    assert best.x.flatten().tolist() == [3, 2, 2, 1]
    assert best.reached.tolist() == [False, False, True, False]
    never = Best(x, goal)
    never.offer(x + 1, torch.full((4, 2), torch.inf))
    assert torch.equal(never.x, x)


def test_momentum_accumulates_mean_normalised_gradients_per_row():
    victim, x, goal, _ = setting(5)
    raw = MeteredOracle(victim, 5)
    wrapped = momentum(MeteredOracle(victim, 5), 0.5)
    expected = torch.zeros_like(x)
    for step in range(3):
        z = x + 0.05 * step
        _, gradient, _ = raw.gradient(z, goal)
        expected = 0.5 * expected + gradient / gradient.abs().mean(1, keepdim=True)
        if step == 2:
            rows = torch.tensor([3, 0])
            raw, wrapped, goal = raw.take(rows), wrapped.take(rows), goal.take(rows)
            expected, z = expected[rows], z[rows]
        _, accumulated, _ = wrapped.gradient(z, goal)
        torch.testing.assert_close(accumulated, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="per row"):
        wrapped.gradient(z, goal, torch.tensor([0, 0]))


def test_averaged_is_the_mean_over_draws_and_costs_them():
    victim, x, goal, _ = setting(4)
    draws = iter([0.0, 0.3, -0.1, 0.5])

    def shifting(z):
        return victim(z * (1 + next(draws)))

    oracle = MeteredOracle(shifting, 4)
    loss, gradient, answer = averaged(oracle, 4).gradient(x, goal)
    each = []
    for shift in (0.0, 0.3, -0.1, 0.5):
        leaf = x.clone().requires_grad_()
        scores = victim(leaf * (1 + shift))
        slope = torch.autograd.grad(goal.loss(scores).sum(), leaf)[0]
        each.append((goal.loss(scores).detach(), slope, scores.detach()))
    for seen, parts in zip((loss, gradient, answer), zip(*each, strict=True), strict=True):
        torch.testing.assert_close(seen, torch.stack(parts).mean(0))
    assert (oracle.meter.forwards == 4).all()
    limited = averaged(MeteredOracle(victim, 4, queries=11), 4)
    assert limited.left == 2


def test_momentum_zero_is_pgd_from_the_origin(digits):
    model, x, y = digits
    ball, goal = Linf(eps=0.1), Untargeted(y[:40])
    a = play(MIFGSM(steps=8, decay=0.0), model, x[:40], goal, ball).z
    b = play(PGD(steps=8, start="origin", step_size=1 / 8), model, x[:40], goal, ball).z
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["FGSM", "PGD", "MIFGSM"])
def test_walks_equal_those_of_another_library(digits, name):
    peers = pytest.importorskip("torchattacks")
    model, x, y = digits
    module = model.module.double()
    try:
        x, y, eps = x[:50].double(), y[:50], 0.1
        ours, theirs = {
            "FGSM": (FGSM(), peers.FGSM(module, eps=eps)),
            "PGD": (
                PGD(steps=9, step_size=0.25, start="origin", keep="last", stop=False),
                peers.PGD(module, eps=eps, alpha=eps / 4, steps=9, random_start=False),
            ),
            "MIFGSM": (
                MIFGSM(steps=10, keep="last", stop=False),
                peers.MIFGSM(module, eps=eps, alpha=eps / 10, steps=10, decay=1.0),
            ),
        }[name]
        z = play(ours, model, x, Untargeted(y), Linf(eps=eps), decides=False).z
        torch.testing.assert_close(z, theirs(x, y), atol=1e-9, rtol=0)
    finally:
        model.module.float()


def test_pgd_breaks_at_least_what_another_library_breaks(digits):
    foolbox = pytest.importorskip("foolbox")
    model, x, y = digits
    x, y = x[:200], y[:200]
    ours = play(PGD(steps=20, step_size=0.2), model, x, Untargeted(y), Linf(eps=0.1)).reached
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        victim = foolbox.PyTorchModel(model.module, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfPGD(rel_stepsize=0.2, steps=20)
        _, _, theirs = attack(victim, x, y, epsilons=0.1)
    assert ours.sum() >= theirs.sum() - 4
    assert (ours != theirs).sum() <= 12


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (PGD, {"steps": 0}),
        (PGD, {"step_size": 0.0}),
        (PGD, {"step_size": float("nan")}),
        (PGD, {"restarts": 0}),
        (PGD, {"start": "corner"}),
        (PGD, {"keep": "worst"}),
        (PGD, {"restarts": 2, "start": "origin"}),
        (PGD, {"restarts": 2, "keep": "last"}),
        (FGSM, {"eot": 0}),
        (MIFGSM, {"steps": 0}),
        (MIFGSM, {"decay": -1.0}),
        (MIFGSM, {"step_size": -1.0}),
    ],
)
def test_settings_out_of_range_are_refused(kind, settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        kind(**settings)


def test_declared_access():
    assert {FGSM.needs, PGD.needs, MIFGSM.needs} == {Access.GRADIENTS}
