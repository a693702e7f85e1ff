"""FAB: its projection against solvers, its distances against closed forms, its flags against the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from advkit.attacks.minimal.fab import FAB, FABT
from advkit.attacks.minimal.hyperplane import close_gap, dual_length, length, project
from advkit.core.errors import UsageError
from advkit.core.spaces import Box
from advkit.testing.play import names, play
from advkit.testing.victims import linear, uniform
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

BALLS = {"Linf": Linf, "L2": L2, "L1": L1}


def solved(normal, value, low, high, norm):
    """The shortest length of a move v in [low, high] with <normal, v> = -value, by a solver; None if there is none."""
    if norm == "L2":
        cvxpy = pytest.importorskip("cvxpy")
        v = cvxpy.Variable(len(normal))
        problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(v)), [normal @ v == -value, v >= low, v <= high])
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        return None if v.value is None else float(np.sqrt(problem.value))
    linprog = pytest.importorskip("scipy.optimize").linprog
    n = len(normal)
    eye = np.eye(n)
    if norm == "Linf":  # variables v, t; minimise t >= |v|
        cost, wall = np.r_[np.zeros(n), 1], np.ones((n, 1))
        equal = np.r_[normal, 0][None]
        bounds = [*zip(low, high, strict=True), (0, None)]
    else:  # variables v, u; minimise sum u, u >= |v|
        cost, wall = np.r_[np.zeros(n), np.ones(n)], eye
        equal = np.r_[normal, np.zeros(n)][None]
        bounds = [*zip(low, high, strict=True), *[(0, None)] * n]
    found = linprog(
        cost, np.block([[eye, -wall], [-eye, -wall]]), np.zeros(2 * n), equal, [-value], bounds, method="highs"
    )
    return float(found.fun) if found.status == 0 else None


@pytest.mark.parametrize("norm", BALLS)
def test_projection_is_the_solvers(norm):
    draw = np.random.default_rng(0)
    rows, features, reachable = 25, 12, 0
    low, high = draw.uniform(-1, 0, features), draw.uniform(0.2, 1, features)
    point = draw.uniform(low, high, (rows, features))
    point[::3, :4] = low[:4]  # on the box's walls
    normal = draw.normal(size=(rows, features)) * 10.0 ** draw.integers(-2, 3, (rows, 1))
    normal[::4, 5] = 0
    value = np.abs(normal).sum(1) * draw.uniform(-0.5, 0.5, rows)
    offset = value - (normal * point).sum(1)
    args = [torch.tensor(a) for a in (point, normal, offset, low, high)]
    delta = project(*args, norm)
    assert (point + delta.numpy() >= low - 1e-12).all()
    assert (point + delta.numpy() <= high + 1e-12).all()
    for row in range(rows):
        best = solved(normal[row], value[row], low - point[row], high - point[row], norm)
        left = value[row] + normal[row] @ delta[row].numpy()
        if best is None:
            # No point of the box is on the hyperplane: the corner nearest to it.
            corner = np.where(normal[row] * value[row] > 0, low, high) - point[row]
            used = normal[row] != 0
            assert np.allclose(delta[row].numpy()[used], corner[used], atol=1e-12)
            continue
        reachable += 1
        assert abs(left) <= 1e-9 * np.abs(normal[row]).sum()
        assert abs(float(length(delta[row : row + 1], norm)) - best) < 1e-6
    assert 8 <= reachable < rows


@pytest.mark.parametrize("norm", BALLS)
def test_projection_without_a_box_is_the_closed_form(norm):
    point, normal, value = uniform(0, 9, 3, 5), uniform(1, 9, 3, 5) - 0.5, uniform(2, 9) - 0.5
    delta = close_gap(point, normal, value, -torch.inf, torch.inf, norm)
    assert torch.allclose(length(delta, norm), value.abs() / dual_length(normal, norm), rtol=1e-5)
    assert torch.allclose((normal * delta).flatten(1).sum(1), -value, atol=1e-6)


@pytest.mark.parametrize("norm", BALLS)
def test_rows_that_cannot_be_projected_do_not_move(norm):
    point = uniform(0, 3, 4)
    normal = torch.stack([torch.zeros(4), torch.ones(4), 1e-30 * torch.ones(4)])
    value = torch.tensor([1.0, torch.inf, 1e-31])
    delta = close_gap(point, normal, value, 0.0, 1.0, norm)
    assert (delta[:2] == 0).all()
    assert torch.isfinite(delta).all()
    assert torch.allclose((delta[2]).sum(), torch.tensor(-0.1), atol=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_eight_rounds_are_enough_in_many_dimensions(norm):
    point, normal = uniform(0, 20, 3072), uniform(1, 20, 3072) - 0.5
    value = 0.3 * normal.abs().sum(1)
    delta = close_gap(point.double(), normal.double(), value.double(), 0.0, 1.0, norm, rounds=8)
    exact = close_gap(point.double(), normal.double(), value.double(), 0.0, 1.0, norm)
    assert (length(delta, norm) / length(exact, norm) - 1).abs().max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("box", [False, True], ids=["free", "box"])
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("attack", [FAB, FABT])
def test_distances_on_linear_victims(attack, norm, box):
    space = Box() if box else Box(-1000.0, 1000.0)
    victim = linear(features=8, classes=4, seed=3, space=space)
    x = uniform(7, 14, 8)
    with torch.no_grad():
        labels = victim(x).argmax(1)
    weight = victim.weight.double().numpy()
    logits = x.double().numpy() @ weight.T + victim.bias.double().numpy()
    exact = []
    for row, label in enumerate(labels.tolist()):
        low, high = (float(side) - x[row].double().numpy() for side in (space.low, space.high))
        ways = [
            solved(weight[label] - weight[other], logits[row, label] - logits[row, other], low, high, norm)
            for other in range(4)
            if other != label
        ]
        exact.append(min((way for way in ways if way is not None), default=np.inf))
    exact = torch.tensor(exact)
    ball = BALLS[norm](eps=100.0, box=space)
    played = play(attack(steps=30, stop=False), victim, x, Untargeted(labels), ball)
    ratio = ball.distance(played.z, x)[exact.isfinite()] / exact[exact.isfinite()]
    assert (played.reached == exact.isfinite()).all()
    assert exact.isfinite().sum() > 8
    assert (ratio > 0.9999).all()
    assert (ratio < 1.05).all()
    assert ratio.median() < 1.01


@pytest.mark.slow
# The final search tries the edge of the ball, so ours breaks a few rows more than the reference.
@pytest.mark.parametrize(("norm", "eps"), [("Linf", 0.1), ("L2", 0.5), ("L1", 1.8)])
@pytest.mark.parametrize("attack", [FAB, FABT])
def test_flags_and_passes_against_the_reference(digits, attack, norm, eps):
    reference = pytest.importorskip("pyautoattack.fab_pt")
    model, x, y = digits
    x, y = x[:100], y[:100]
    passes = {"forward": 0, "backward": 0}

    def counting(z):
        passes["forward"] += len(z)
        answer = model.module(z)
        if answer.requires_grad:
            answer.register_hook(lambda g: passes.__setitem__("backward", passes["backward"] + len(g)))
        return answer

    theirs = reference.FABAttack_PT(
        counting, norm=norm, n_iter=25, eps=eps, targeted=attack is FABT, n_target_classes=9, seed=0, device="cpu"
    )
    with torch.random.fork_rng(devices=[]):
        found = theirs.perturb(x, y)
    with torch.no_grad():
        broken = model(found).argmax(1) != y
    ours = play(attack(steps=25), model, x, Untargeted(y), BALLS[norm](eps=eps))
    assert 0.15 < broken.float().mean() < 0.85
    assert (broken & ~ours.reached).sum() <= 1
    assert (ours.reached & ~broken).sum() <= 4
    assert ours.meter.forwards.sum() <= passes["forward"]
    assert ours.meter.backwards.sum() <= passes["backward"]


@pytest.mark.slow
def test_every_boundary_at_every_step_finds_no_more(digits):
    model, x, y = digits
    x, goal, ball = x[:100], Untargeted(y[:100]), Linf(eps=0.1)
    lazy, published = (play(FAB(steps=30, refresh=k), model, x, goal, ball) for k in (10, 1))
    assert (lazy.reached != published.reached).sum() <= 1
    assert lazy.meter.backwards.sum() < 0.3 * published.meter.backwards.sum()
    assert (published.meter.backwards[~published.reached] == 9 * 30).all()


@pytest.mark.slow
def test_asking_about_every_point_finds_no_more(digits):
    model, x, y = digits
    x, goal = x[:100], Untargeted(y[:100])
    for ball in (Linf(eps=0.1), L2(eps=0.5), L1(eps=1.8)):
        trusting, asking = (play(FABT(steps=20, targets=4, confirm=c), model, x, goal, ball) for c in (False, True))
        assert (trusting.reached != asking.reached).sum() <= 1
        assert trusting.meter.forwards.sum() < 0.6 * asking.meter.forwards.sum()
        # An answer per step, one at first, three in the search and one about the projection.
        stood = ~asking.reached
        assert (asking.meter.backwards[stood] == 4 * 20).all()
        assert (asking.meter.forwards[stood] == 2 * 4 * 20 + 5).all()
        assert (trusting.meter.forwards[~trusting.reached] >= 4 * 20 + 3).all()


def test_more_is_not_asked_without_need(digits):
    model, x, y = digits
    meter = play(FABT(steps=20, targets=4), model, x[:20], Untargeted(y[:20]), Linf(eps=1e-4)).meter
    assert (meter.forwards == 4 * 20 + 3).all()
    transferred = play(FABT(steps=5, targets=4), model, x[:20], Untargeted(y[:20]), Linf(eps=0.1), decides=False)
    assert (transferred.meter.forwards == 2 * 4 * 5 + 5).all()


@pytest.mark.slow
def test_rows_do_not_depend_on_their_batch(digits):
    model, x, y = digits
    x, y, ids = x[:40], y[:40], names(40)
    for attack in (FAB(steps=8, restarts=2), FABT(steps=6, restarts=2, targets=3)):
        for ball in (Linf(eps=0.08), L1(eps=1.2)):
            whole = play(attack, model, x, Untargeted(y), ball, ids=ids)
            assert 0 < whole.reached.sum() < 40
            some = torch.tensor([31, 3, 17, 8, 22])
            part = play(attack, model, x[some], Untargeted(y[some]), ball, ids=[ids[i] for i in some])
            assert torch.equal(part.z, whole.z[some])
            assert torch.equal(part.meter.forwards, whole.meter.forwards[some])


def test_restarts_begin_elsewhere_and_find_as_much(digits):
    model, x, y = digits
    x, goal, ball = x[:60], Untargeted(y[:60]), L2(eps=0.5)
    one, three = (play(FAB(steps=10, restarts=k), model, x, goal, ball) for k in (1, 3))
    assert not (one.reached & ~three.reached).any()
    stood = ~three.reached
    assert (three.meter.backwards[stood] == 3 * (10 + 8)).all()


@pytest.mark.slow
def test_goals_without_rivals_are_walked_by_their_margin(digits):
    model, x, y = digits
    x, y = x[:40], y[:40]
    with torch.no_grad():
        reference = model(x)
    ball = Linf(eps=0.35)
    targeted = play(FABT(steps=40), model, x, Targeted((y + 1) % 10), ball)
    assert targeted.reached.float().mean() > 0.8
    assert (targeted.meter.backwards <= 40).all()
    diverged = play(FAB(steps=40), model, x, Diverge(reference), Linf(eps=0.1))
    untargeted = play(FAB(steps=40), model, x, Untargeted(y), Linf(eps=0.1))
    assert (diverged.reached != untargeted.reached).sum() <= 1


def test_refusals(digits):
    model, x, y = digits
    with pytest.raises(UsageError, match=r"L0.*Linf, L2 and L1"):
        play(FABT(), model, x[:2], Untargeted(y[:2]), L0(eps=3))
    for settings in ({"eta": 0.9}, {"beta": 1.0}, {"alpha_max": 1.5}, {"steps": 0}, {"refresh": 0}):
        with pytest.raises(UsageError, match=next(iter(settings))):
            FAB(**settings)
    with pytest.raises(UsageError, match="targets"):
        FABT(targets=0)
