"""Minimum-norm attacks against exact distances: hyperplanes within the box, greedy counts, proximal steps by search."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.optimize import linprog, minimize

from advkit.attacks import ATTACKS
from advkit.attacks.minimal.pdpgd import halved, proximal
from advkit.attacks.minimal.radius import largest, threshold, within
from advkit.core.errors import UsageError
from advkit.core.spaces import Box
from advkit.testing.play import play
from advkit.testing.victims import Linear, linear, network, normal, quantised, uniform
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.ordered_topk import OrderedTopK, OutOfTopK
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L1
from advkit.threat_models.minimum import MinimumL0, MinimumL1, MinimumL2, MinimumLinf

NAMES = ("deepfool", "superdeepfool", "trust_region", "ddn", "fmn", "alma", "pdpgd")
PAIRS = [(name, norm) for name in NAMES for norm in ATTACKS.build(name).norms]


def shortest(x, weight, gap, norm):
    """The least distances [B] within [0, 1] to where <weight, x> has fallen by gap, weights [B, D]; inf for nowhere."""
    x, weight, gap = x.flatten(1).double(), weight.double(), gap.double()
    size, room = weight.abs(), torch.where(weight > 0, x, 1 - x)
    out_of_reach = (size * room).sum(1) < gap
    if norm == "l1":
        order = size.argsort(1, descending=True)
        steep, space = size.gather(1, order), room.gather(1, order)
        before = (steep * space).cumsum(1) - steep * space
        taken = torch.minimum(((gap[:, None] - before) / steep).clamp_min(0), space).sum(1)
        return torch.where(out_of_reach, torch.inf, taken)
    unit = size if norm == "l2" else torch.ones_like(size)
    low, high = torch.zeros_like(gap), torch.full_like(gap, 1e4)
    for _ in range(100):
        middle = (low + high) / 2
        enough = (size * torch.minimum(middle[:, None] * unit, room)).sum(1) >= gap
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    move = torch.minimum(high[:, None] * unit, room)
    return torch.where(out_of_reach, torch.inf, move.norm(dim=1) if norm == "l2" else move.amax(1))


def across(played):
    """Whether all rows are, up to the round-off of a margin: a matrix product of other rows may end in other bits."""
    return bool((played.margin < 1e-6).all())


def rivals(victim, x, labels, norm):
    """The least distances to the nearest other class of a linear victim."""
    logits = x.flatten(1) @ victim.weight.T + victim.bias
    rows, found = torch.arange(len(x)), torch.full((len(x),), torch.inf, dtype=torch.double)
    for other in range(len(victim.weight)):
        gap = logits[rows, labels] - logits[:, other]
        away = shortest(x, victim.weight[labels] - victim.weight[other], gap, norm)
        found = torch.where(labels == other, found, torch.minimum(found, away))
    return found


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("classes", [2, 6])
def test_deepfool_is_exact_in_one_step_on_linear_victims_within_the_box(norm, classes):
    victim, x = linear(20, classes, seed=1, space=Box()), uniform(5, 30, 20)
    x[::2] = x[::2].round()  # corners: half of the ways lead outside
    labels = victim(x).argmax(1)
    exact = rivals(victim, x, labels, norm)
    threat = THREAT_MODELS.build(f"minimum-{norm}")
    attack = ATTACKS.build("deepfool:rivals=9,polish=0,overshoot=0.0001")
    played = play(attack, victim, x, Untargeted(labels), threat)
    distance = threat.distance(played.z, x)
    assert bool(played.reached.all())
    assert bool((distance >= exact - 1e-5).all())
    assert float((distance / exact).quantile(0.9)) < 1.001
    # One look at every boundary, one at the point across; corners of the box may take a step or two more.
    assert float(played.meter.backwards.float().median()) == classes
    assert int(played.meter.backwards.max()) <= classes + 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "threat"), [pair for pair in PAIRS if pair[1] != "minimum-l0"])
def test_near_the_hyperplane_in_any_shape_and_batch(name, threat):
    norm, attack = threat.removeprefix("minimum-"), ATTACKS.build(name)
    attack = replace(attack, steps=min(attack.steps, 60))
    for shape, rows, seed in (((8,), 1, 0), ((3, 4), 3, 1), ((2, 2, 3), 8, 2)):
        victim = linear(int(torch.tensor(shape).prod()), seed=seed)
        x = uniform(30 + seed, rows, *shape) * 0.4 + 0.3
        labels = victim(x).argmax(1)
        exact = rivals(victim, x, labels, norm)
        for goal in (Untargeted(labels), Targeted(1 - labels)):
            played = play(attack, victim, x, goal, THREAT_MODELS.build(threat))
            distance = THREAT_MODELS.build(threat).distance(played.z, x)
            assert across(played)
            assert bool((distance >= exact * (1 - 1e-4) - 1e-6).all())
            assert bool((distance <= 1.1 * exact + 1e-4).all()), (shape, distance / exact)


@pytest.mark.parametrize(("name", "threat"), [pair for pair in PAIRS if pair[1] != "minimum-l0"])
def test_near_the_nearest_of_several_classes(name, threat):
    norm, victim, x = threat.removeprefix("minimum-"), linear(10, 5, seed=3), uniform(8, 12, 10) * 0.4 + 0.3
    labels = victim(x).argmax(1)
    exact = rivals(victim, x, labels, norm)
    played = play(ATTACKS.build(name), victim, x, Untargeted(labels), THREAT_MODELS.build(threat))
    distance = THREAT_MODELS.build(threat).distance(played.z, x)
    assert across(played)
    assert bool((distance >= exact * (1 - 1e-4)).all())
    # One row in ten may lie before two boundaries about as near and end at the other one. The cross-entropy that DDN
    # descends mixes the classes.
    assert float((distance / exact).quantile(0.5 if name == "ddn" else 0.9)) <= 1.1


def polytope(victim, x, target, norm):
    """The least distances to where a linear victim answers the target: programs with a constraint per class."""
    found = []
    for row, aim in zip(x.double(), target.tolist(), strict=True):
        others = [k for k in range(len(victim.weight)) if k != aim]
        slope = (victim.weight[others] - victim.weight[aim]).double().numpy()
        limit = (victim.bias[aim] - victim.bias[others]).double().numpy() - slope @ row.numpy()
        if norm == "linf":
            d = len(row)
            wide = torch.cat([torch.eye(d), -torch.eye(d)]).numpy()
            a = [[*each, 0.0] for each in slope.tolist()] + [[*each, -1.0] for each in wide.tolist()]
            bounds = [(-float(v), 1 - float(v)) for v in row] + [(0, None)]
            found.append(linprog([0] * d + [1], a, [*limit, *[0.0] * (2 * d)], bounds=bounds).fun)
        else:
            fits = {"type": "ineq", "fun": lambda m, s=slope, e=limit: e - s @ m, "jac": lambda m, s=slope: -s}
            bounds = [(-float(v), 1 - float(v)) for v in row]
            start = torch.zeros(len(row)).numpy()
            done = minimize(lambda m: m @ m, start, jac=lambda m: 2 * m, bounds=bounds, constraints=fits)
            found.append(done.fun**0.5)
    return torch.tensor(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "norm"),
    [("ddn", "l2"), ("fmn", "l2"), ("fmn", "linf"), ("alma", "l2"), ("pdpgd", "l2"), ("pdpgd", "linf")],
)
def test_a_target_among_several_classes_is_a_polytope(name, norm):
    victim, x = linear(10, 4, seed=5), uniform(8, 8, 10) * 0.4 + 0.3
    target = (victim(x).argmax(1) + 1) % 4
    exact = polytope(victim, x, target, norm)
    threat = THREAT_MODELS.build(f"minimum-{norm}")
    played = play(replace(ATTACKS.build(name), steps=200), victim, x, Targeted(target), threat)
    distance = threat.distance(played.z, x)
    assert across(played)
    assert bool((distance >= exact * (1 - 1e-3)).all())
    assert float((distance / exact).median()) <= 1.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fmn", "pdpgd"])
@pytest.mark.parametrize("per", ["pixel", "feature"])
def test_few_positions_are_changed(name, per):
    victim, x = linear(12, seed=7), uniform(9, 16, 3, 2, 2)
    labels = victim(x).argmax(1)
    flat, pair = x.flatten(1).double(), victim.weight[labels] - victim.weight[1 - labels]
    gain = (pair.abs() * torch.where(pair > 0, flat, 1 - flat)).view(16, 3, 4)
    gain = gain.sum(1) if per == "pixel" else gain.flatten(1)
    logits = victim(x).double()
    gap = (logits.gather(1, labels[:, None]) - logits.gather(1, 1 - labels[:, None])).squeeze(1)
    fewest = (gain.sort(1, descending=True)[0].cumsum(1) <= gap[:, None]).sum(1) + 1
    threat = MinimumL0(per=per)
    played = play(ATTACKS.build(name), victim, x, Untargeted(labels), threat)
    assert bool(played.reached.all())
    count = threat.distance(played.z, x)
    assert bool((count >= fewest).all())
    assert bool((count <= fewest + 1).all()), (count - fewest).tolist()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "threat"), PAIRS)
def test_without_gradients_it_ends_and_returns_the_rows(name, threat):
    victim = quantised(linear(), levels=4)
    x = uniform(3, 4, 8)
    played = play(ATTACKS.build(name), victim, x, Untargeted(victim(x).argmax(1)), THREAT_MODELS.build(threat))
    assert torch.equal(played.z[~played.reached], x[~played.reached])
    if name in ("deepfool", "superdeepfool", "trust_region"):
        assert int(played.meter.backwards.max()) <= 6


@pytest.mark.slow
@pytest.mark.parametrize(("name", "threat"), PAIRS)
def test_orders_of_classes_and_true_classes_out_of_the_first_are_reached(name, threat):
    model, x = linear(24, 6, seed=2), uniform(1, 6, 24)
    labels = model(x).argmax(1)
    order = torch.stack([(labels + 1) % 6, (labels + 3) % 6], 1)
    attack = ATTACKS.build(name)
    attack = replace(attack, steps=min(attack.steps, 80))
    for goal in (OrderedTopK(order), OutOfTopK(labels, 2)):
        played = play(attack, model, x, goal, THREAT_MODELS.build(threat))
        assert across(played), (type(goal).__name__, played.margin)


@pytest.mark.parametrize(("name", "threat"), PAIRS)
def test_a_budget_of_queries_is_kept(name, threat):
    victim, x = linear(classes=3), uniform(3, 5, 8)
    goal = Untargeted(victim(x).argmax(1))
    for queries in (0, 1, 2, 3, 4, 5, 9):
        played = play(ATTACKS.build(name), victim, x, goal, THREAT_MODELS.build(threat), queries=queries)
        assert int(played.meter.queries.max()) <= queries


@pytest.mark.parametrize(("name", "threat"), PAIRS)
def test_on_a_lattice_the_files_reach_the_goal(name, threat):
    model, x = network(), uniform(1, 6, 2, 6, 6)
    goal = Untargeted(model(x).argmax(1))
    attack = ATTACKS.build(name)
    coarse = THREAT_MODELS.build(f"{threat}:lattice=15")
    z = play(replace(attack, steps=min(attack.steps, 40)), model, x, goal, coarse, decides=False).z
    assert torch.equal(coarse.finish(z, x), z)
    assert bool(goal.reached(model(z)).all())


@pytest.mark.parametrize("name", NAMES)
def test_threat_models_it_does_not_have_are_refused(name):
    attack, victim, x = ATTACKS.build(name), linear(), uniform(3, 2, 8)
    for threat in ("minimum-l0", "minimum-l1", "minimum-l2", "minimum-linf", "l2:eps=0.5"):
        if threat not in attack.norms:
            with pytest.raises(UsageError, match=f"{name} was asked for .*works in {', '.join(attack.norms)}"):
                play(attack, victim, x, Untargeted(victim(x).argmax(1)), THREAT_MODELS.build(threat))


@pytest.mark.slow
def test_saturated_logits_and_their_scale_change_little():
    weight = normal(0, 4, 8)
    x = uniform(2, 4, 8) * 0.4 + 0.3
    for name, threat in PAIRS:
        found = []
        for scale in (1.0, 1e4):
            victim = Linear(weight, -0.5 * weight.sum(1), scale=scale)
            attack = ATTACKS.build(name)
            attack = replace(attack, steps=min(attack.steps, 40))
            played = play(attack, victim, x, Untargeted(victim(x).argmax(1)), THREAT_MODELS.build(threat))
            assert bool((played.margin < 1e-6 * scale).all()), (name, threat, scale)
            found.append(THREAT_MODELS.build(threat).distance(played.z, x))
        assert float((found[1] / found[0] - 1).abs().median()) < 0.05, (name, threat)


def test_perturbations_are_cut_to_lengths_of_their_own():
    move, radius = normal(4, 9, 2, 3, 4), torch.linspace(0.2, 8, 9)
    box = Box(-1e6, 1e6)
    zero = torch.zeros_like(move[:1])
    for row in range(9):
        cut = within(move, radius, MinimumL1())[row : row + 1]
        projected = L1(float(radius[row]), box=box).project(move[row : row + 1], zero)
        assert torch.allclose(cut, projected, atol=1e-5)
    assert torch.allclose(
        within(move, radius, MinimumL2()).flatten(1).norm(dim=1), torch.minimum(radius, move.flatten(1).norm(dim=1))
    )
    assert torch.equal(
        within(move, radius, MinimumLinf()), move.clamp(-radius.view(-1, 1, 1, 1), radius.view(-1, 1, 1, 1))
    )
    for per, positions in (("pixel", 12), ("feature", 24)):
        kept = (within(move, radius, MinimumL0(per=per)) != 0).view(9, 2, 12)
        count = kept.any(1).sum(1) if per == "pixel" else kept.flatten(1).sum(1)
        assert torch.equal(count, radius.ceil().clamp_max(positions).long())
    assert torch.equal(
        largest(torch.tensor([[1.0, 3.0, 0.0]]), torch.tensor([9.0])), torch.tensor([[True, True, False]])
    )


def test_the_threshold_is_that_of_weighted_masses():
    size, weight = uniform(5, 7, 6), uniform(6, 7, 6) + 0.1
    for total in (0.0, 0.05, 0.5, 9.0):
        level = threshold(size, torch.full((7,), total), weight)
        mass = (weight * (size - level[:, None]).clamp_min(0)).sum(1)
        assert torch.allclose(mass[level > 0], torch.full_like(mass[level > 0], total), atol=1e-5)
        assert bool((mass <= total + 1e-5).all())


@pytest.mark.parametrize("threat", [MinimumL0(per="feature"), MinimumL1(), MinimumL2(), MinimumLinf()])
def test_a_proximal_step_has_no_better_neighbour(threat):
    move, weight, by = normal(7, 6, 5), uniform(8, 6, 5) + 0.2, torch.tensor([0.01, 0.1, 0.3, 1.0, 3.0, 0.0])

    def worth(d):
        change = d.abs().sqrt().sum(1) if threat.least == "l0" else threat.distance(d, torch.zeros_like(d))
        return by * change + (weight * (d - move).square()).sum(1) / 2

    best = proximal(move, weight, by, threat).double()
    for seed in range(200):
        scale = 10.0 ** -(seed % 5)
        other = best + scale * normal(seed, 6, 5) * (uniform(seed + 500, 6, 5) < 0.5)
        assert bool((worth(other) >= worth(best) - 1e-6).all())
        assert bool((worth(best * (1 - scale * seed / 200)) >= worth(best) - 1e-6).all())


def test_the_half_power_has_its_minimum_where_a_grid_has():
    size, by = torch.linspace(0, 3, 31), torch.linspace(0.05, 2, 31)
    grid = torch.linspace(0, 3, 30001)
    value = by[:, None] * grid.sqrt() + (grid - size[:, None]).square() / 2
    found = halved(size, by)
    reached = by * found.sqrt() + (found - size).square() / 2
    assert bool((reached <= value.amin(1) + 1e-5).all())
