"""C&W, EAD, JSMA, sigma-zero and Brendel & Bethge: closed forms, exact solvers and Jacobians worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from advkit.attacks import ATTACKS
from advkit.attacks.minimal.brendel_bethge import BrendelBethge, nearest_on_plane
from advkit.attacks.minimal.cw import CW, without_least
from advkit.attacks.minimal.ead import EAD, shrunk
from advkit.attacks.minimal.jsma import JSMA, Scores, saliency
from advkit.attacks.minimal.sigma_zero import SigmaZero, sparsity_gradient
from advkit.attacks.optimiser import Bracket, RowAdam
from advkit.core.errors import UsageError
from advkit.testing.play import play
from advkit.testing.victims import linear, network, normal, uniform
from advkit.threat_models.goals.ordered_topk import OrderedTopK, OutOfTopK
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.minimum import MinimumL0, MinimumL1, MinimumL2, MinimumLinf

THREATS = {"l0": MinimumL0, "l1": MinimumL1, "l2": MinimumL2, "linf": MinimumLinf}
LENGTHS = [
    (CW(budget="4x60"), "l2"),
    (CW(budget="4x60"), "linf"),
    (EAD(budget="4x60"), "l1"),
    (BrendelBethge(steps=50), "l1"),
    (BrendelBethge(steps=50), "l2"),
    (BrendelBethge(steps=50), "linf"),
]
COUNTS = [CW(budget="4x60"), JSMA(), SigmaZero(steps=100), BrendelBethge(steps=50)]


def named(value):
    return value if isinstance(value, str) else value.name


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "norm"), LENGTHS, ids=named)
def test_points_are_within_a_tenth_of_the_closed_form(attack, norm):
    victim = linear(classes=3)
    for rows, shape in ((1, (8,)), (3, (2, 4)), (8, (2, 2, 2))):
        x = 0.4 + 0.2 * uniform(3, rows, *shape)
        labels = victim(x).argmax(1)
        exact = victim.distance(x, labels, norm)
        played = play(attack, victim, x, Untargeted(labels), THREATS[norm]())
        distance = THREATS[norm]().distance(played.z, x)
        assert bool(played.reached.all())
        assert bool((distance >= exact - 1e-5).all())
        inside = exact < 0.35  # further away the box may stand in the way
        assert bool(inside.any())
        assert bool((distance[inside] <= 1.1 * exact[inside] + 1e-3).all())


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "norm"), LENGTHS, ids=named)
def test_targets_are_within_a_tenth_of_the_closed_form(attack, norm):
    victim = linear(classes=2)
    x = 0.4 + 0.2 * uniform(5, 8, 2, 4)
    labels = victim(x).argmax(1)
    played = play(attack, victim, x, Targeted(1 - labels), THREATS[norm]())
    exact, distance = victim.distance(x, labels, norm), THREATS[norm]().distance(played.z, x)
    assert bool(played.reached.all())
    inside = exact < 0.35
    assert int(inside.sum()) >= 4
    assert bool((distance[inside] <= 1.1 * exact[inside] + 1e-3).all())


@pytest.mark.slow
@pytest.mark.parametrize("attack", COUNTS, ids=named)
def test_counts_are_the_exact_ones_or_one_more(attack):
    victim = linear()
    for rows, shape in ((1, (8,)), (8, (2, 4))):
        x = uniform(7, rows, *shape)
        labels = victim(x).argmax(1)
        exact = victim.distance_l0(x, labels)
        for goal in (Untargeted(labels), Targeted(1 - labels)):
            played = play(attack, victim, x, goal, MinimumL0())
            distance = MinimumL0().distance(played.z, x)
            assert bool(played.reached.all())
            assert bool((distance >= exact).all())
            assert bool((distance <= exact + 1).all())


@pytest.mark.slow
@pytest.mark.parametrize("threat", [MinimumL0(), MinimumL0(per="feature")], ids=["pixels", "values"])
@pytest.mark.parametrize("attack", COUNTS, ids=named)
def test_a_pixel_counts_once_and_every_goal_is_served(attack, threat):
    model, x = network(), uniform(1, 4, 2, 6, 6)
    order = model(x).argsort(1, descending=True)
    swapped = OrderedTopK(order[:, [1, 0]])
    goals = (Untargeted(order[:, 0]), swapped) if threat.per == "pixel" else (OutOfTopK(order[:, 0], k=2),)
    for goal in goals:
        played = play(attack, model, x, goal, threat)
        assert bool(played.reached.all())
        assert bool((threat.distance(played.z, x) <= (36 if threat.per == "pixel" else 72)).all())


@pytest.mark.parametrize("name", ["cw", "ead", "jsma", "sigma_zero", "brendel_bethge"])
def test_a_budget_of_queries_ends_the_search_and_other_norms_are_refused(name):
    attack, victim, x = ATTACKS.build(name), linear(), uniform(3, 5, 8)
    goal = Untargeted(victim(x).argmax(1))
    for norm, threat in THREATS.items():
        if f"minimum-{norm}" not in attack.norms:
            with pytest.raises(UsageError, match=f"{name} was asked for minimum-{norm}"):
                play(attack, victim, x, goal, threat())
            continue
        for queries in (0, 1, 5):
            assert play(attack, victim, x, goal, threat(), queries=queries).meter.queries.max() <= queries


@pytest.mark.slow
@pytest.mark.parametrize(("attack", "norm"), [*LENGTHS[:4], *((attack, "l0") for attack in COUNTS)], ids=named)
def test_on_a_lattice_the_files_reach_the_goal(attack, norm):
    model, x = network(), uniform(1, 4, 2, 6, 6)
    goal, threat = Untargeted(model(x).argmax(1)), THREATS[norm](lattice=255)
    played = play(attack, model, x, goal, threat)
    assert torch.equal(threat.finish(played.z, x), played.z)
    assert bool(played.reached.all())


def test_rows_restart_adam_alone_and_otherwise_walk_as_torch_does():
    start, gradients = normal(1, 3, 4), [normal(seed, 3, 4) for seed in range(2, 9)]
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([theirs], lr=0.1, eps=0.0)
    ours, value = RowAdam.of(start), start
    for gradient in gradients:
        theirs.grad = gradient
        optimizer.step()
        value = value + ours.move(gradient, torch.full((3,), 0.1))
    torch.testing.assert_close(value, theirs.detach())
    ours.restart(torch.tensor([False, True, False]))
    moved = ours.move(gradients[0], torch.full((3,), 0.1))
    torch.testing.assert_close(moved[1], -0.1 * gradients[0][1].sign())
    assert not torch.allclose(moved[0], -0.1 * gradients[0][0].sign())


def test_a_bracket_grows_after_failures_and_narrows_after_success_row_by_row():
    bracket = Bracket.of(torch.tensor([1.0, 1.0]))
    reached = torch.tensor([True, False])
    for step in range(4):
        ended = bracket.after(torch.tensor([1.0, 1.0]) / (step + 1), reached, 4)
    assert ended.tolist() == [True, True]
    assert bracket.weight.tolist() == [0.25, 10.0]
    for step in range(4):
        bracket.after(torch.tensor([1.0, 1.0]) / (step + 1), ~reached, 4)
    assert bracket.weight.tolist() == pytest.approx([0.5, math.sqrt(10.0)])
    assert (bracket.low.tolist(), bracket.high.tolist()) == ([0.25, 1.0], [1.0, 10.0])
    assert bracket.finished(9).tolist() == [False, False]
    assert bracket.finished(2).tolist() == [True, True]


def test_eads_step_minimises_the_proximal_problem():
    z, x, by = normal(1, 3, 40).double(), normal(2, 3, 40).double(), torch.tensor([0.1, 0.5, 2.0]).double()
    ours = shrunk(z, x, by)
    grid = torch.linspace(-5, 5, 20001, dtype=torch.float64)[
        :, None, None
    ]  # of delta: by |delta| + (delta - (z - x))^2 / 2
    cost = by[:, None] * grid.abs() + (grid - (z - x)).square() / 2
    best = grid.squeeze()[cost.argmin(0)]
    torch.testing.assert_close(ours - x, best, atol=2.6e-4, rtol=0)
    assert bool((ours == x)[(z - x).abs() < by[:, None]].all())


def test_the_smooth_counts_gradient_is_its_derivative():
    move = normal(1, 2, 6).requires_grad_()
    count = (move.square() / (move.square() + 1e-3)).sum()
    (exact,) = torch.autograd.grad(count, move)
    torch.testing.assert_close(sparsity_gradient(move.detach(), move.detach().square(), 1e-3), exact)


def test_the_saliency_map_is_that_of_the_jacobian_worked_out_by_hand():
    # Logits weight x: the Jacobian is the weight. Target 1: rises by row 1, falls by rows 0 and 2.
    victim = linear(features=5, classes=3, seed=4)
    x = torch.full((1, 5), 0.5)
    up, down = victim.weight[1], victim.weight[0] + victim.weight[2]
    for wanted, expected in ((True, up), (False, down)):
        leaf = x.clone().requires_grad_()
        Scores(Targeted(torch.tensor([1])), wanted).loss(victim(leaf)).sum().backward()
        torch.testing.assert_close(leaf.grad[0], expected)
    move = torch.where(down - up > 0, -0.5, 0.5)
    by_hand = torch.zeros(5)
    for place in range(5):
        rise, fall = float(up[place] * move[place]), float(down[place] * move[place])
        by_hand[place] = rise * abs(fall) if rise > 0 and fall < 0 else 0.0
    torch.testing.assert_close(saliency((up * move)[None], (down * move)[None])[0], by_hand)
    assert bool((by_hand > 0).any())
    first = play(JSMA(steps=1, saliency="scores"), victim, x, Targeted(torch.tensor([1])), MinimumL0())
    changed = (first.z != x).flatten()
    assert int(changed.sum()) in (0, 1)  # the clean row where one position is not enough
    if bool(changed.any()):
        assert int(changed.nonzero()) == int(by_hand.argmax())


def test_what_contributes_least_is_dropped():
    worth, open_ = torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([[True, True, True, False]])
    assert without_least(worth, open_, torch.tensor([0.3])).tolist() == [[True, False, True, False]]
    assert without_least(worth, open_, torch.tensor([0.7])).tolist() == [[True, False, False, False]]


@pytest.mark.slow
@pytest.mark.parametrize(("threat", "power"), [(MinimumL1(), 1), (MinimumL2(), 2), (MinimumLinf(), "inf")], ids=str)
def test_the_step_along_the_boundary_is_that_of_a_convex_solver(threat, power):
    cvxpy = pytest.importorskip("cvxpy")
    x, z, normals = uniform(1, 12, 10), uniform(2, 12, 10), normal(3, 12, 10)
    change, low, high = z - x, -x, 1 - x
    radius, value = torch.linspace(0.3, 1.2, 12), torch.linspace(0.2, -0.2, 12)
    found = nearest_on_plane(change, normals, value, radius, threat, low, high, rounds=30)
    coarse = nearest_on_plane(change, normals, value, radius, threat, low, high)
    met = 0
    for row in range(12):
        u = cvxpy.Variable(10)
        away = u - change[row].numpy()
        rules = [normals[row].numpy() @ away == -float(value[row]), cvxpy.norm(away, 2) <= float(radius[row])]
        rules += [u >= low[row].numpy(), u <= high[row].numpy()]
        problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.norm(u, power)), rules)
        problem.solve()
        assert problem.status == "optimal"
        order = float(power)
        for ours, most in ((found, 1.01), (coarse, 1.25)):
            step = ours[row] - change[row]
            assert float(step.norm()) <= float(radius[row]) * (1 + 1e-5)
            assert bool(((ours[row] >= low[row] - 1e-6) & (ours[row] <= high[row] + 1e-6)).all())
            gap = abs(float(normals[row] @ step + value[row])) / float(normals[row].norm() * radius[row])
            assert gap <= 0.0101
            met += float(torch.linalg.vector_norm(ours[row], ord=order)) <= most * problem.value + 1e-3
    assert met >= 22  # of 24: the plane may be missed by a hundredth of the radius, and L1 shrinks up to a bound
