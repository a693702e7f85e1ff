"""Attacks that see decisions alone: boundary, HopSkipJump, Sign-OPT and GeoDA."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from advkit.attacks import ATTACKS
from advkit.attacks.minimal.base import NearestSearch
from advkit.attacks.query.courses import Courses, marks_until
from advkit.attacks.query.decisions import Decisions
from advkit.attacks.query.normals import LowFrequencies, estimated_normal
from advkit.attacks.query.starts import from_mosaics, from_samples, wins_of
from advkit.core.errors import UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.testing.play import names, play
from advkit.testing.victims import Linear, linear, normal, uniform
from advkit.threat_models.goals.ordered_topk import OrderedTopK
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.minimum import MinimumL1, MinimumL2, MinimumLinf

THREATS = {"minimum-l1": MinimumL1, "minimum-l2": MinimumL2, "minimum-linf": MinimumLinf}
NAMES = ("boundary", "hopskipjump", "sign_opt", "geoda")
PAIRS = [(name, norm) for name in NAMES for norm in ATTACKS.load(name).norms]
WIDE = Box(-1000.0, 1000.0)
QUERIES = 1000
"""The budget at which linear victims of 8 values fall within 1.1 times the closed form."""


def attack(name, **settings):
    return replace(ATTACKS.build(name), **settings)


def images(rows, *shape, classes=2, seed=0, space=WIDE):
    """A linear victim on rows of a shape, with rows inside the box and their classes."""
    victim = linear(math.prod(shape), classes, seed, space=space)
    x = uniform(7 + seed, rows, *shape)
    return victim, x, victim(x).argmax(1).detach()


@pytest.mark.parametrize(("shape", "rows"), [((8,), 8), ((2, 4), 3), ((2, 2, 2), 1)], ids=["1d-8", "2d-3", "3d-1"])
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize(("name", "norm"), PAIRS)
@pytest.mark.slow
def test_linear_victims_fall_near_the_closed_form(name, norm, targeted, shape, rows):
    victim, x, labels = images(rows, *shape)
    goal = Targeted(1 - labels) if targeted else Untargeted(labels)
    threat = THREATS[norm](box=WIDE, access=Access.LABELS)
    played = play(attack(name, queries=QUERIES), victim, x, goal, threat)
    exact = victim.distance(x, labels, norm.removeprefix("minimum-"))
    away = threat.distance(played.z, x)
    # As the harness judges: in calls of the attack's shapes, since points end within round-off of the boundary.
    answer = MeteredOracle(victim, rows, Access.LABELS, lanes=Lanes.fitting(x))(played.z)
    assert goal.reached(answer).all()
    assert (away >= exact * (1 - 1e-5) - 1e-6).all()
    assert (away <= 1.1 * exact + 0.02).all()


class Decider:
    """A victim that answers decisions, and cannot be differentiated."""

    def __init__(self, victim):
        self.victim, self.asked = victim, []

    def modules(self):
        return iter(())

    def __call__(self, x):
        if x.requires_grad or torch.is_grad_enabled():
            raise AssertionError("a gradient was asked for")
        self.asked.append(x.clone())
        return self.victim(x).detach().argmax(1)


@pytest.mark.parametrize("name", NAMES)
def test_a_victim_of_decisions_alone_is_enough(name):
    victim, x, labels = images(3, 8)
    decider = Decider(victim)
    oracle = MeteredOracle(decider, 3, Access.LABELS, lanes=Lanes(64, 1))
    threat = MinimumL2(box=WIDE, access=Access.LABELS)
    z = attack(name, queries=150)(oracle, x, Untargeted(labels), threat, RowRng.from_ids(0, names(3)))
    assert (victim(z).argmax(1) != labels).all()
    assert sum(map(len, decider.asked)) == int(oracle.meter.queries.sum())
    assert all(threat.box.contains(z).all() for z in decider.asked)


@pytest.mark.parametrize("budget", [0, 1, 2, 7, 60])
@pytest.mark.parametrize("name", NAMES)
def test_budgets_are_used_up_and_never_exceeded(name, budget):
    victim, x, labels = images(5, 8)
    for granted, own in ((budget, 5000), (None, max(1, budget))):
        counted = torch.zeros(5, dtype=torch.long)
        oracle = MeteredOracle(victim, 5, Access.LABELS, granted, lanes=Lanes(64, 1))
        ask = oracle.model
        oracle.model = lambda z, ask=ask: ask(z)
        z = attack(name, queries=own)(oracle, x, Untargeted(labels), MinimumL2(box=WIDE), RowRng.from_ids(0, names(5)))
        counted = oracle.meter.queries
        most = budget if granted is not None else own
        assert counted.max() <= most
        changed = (z != x).flatten(1).any(1)
        assert (victim(z).argmax(1) != labels)[changed].all()
        if budget >= 60:
            assert (counted == most).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_without_a_start_is_unchanged_and_says_so(name):
    # The second class wins nowhere: its rival is larger by a constant.
    victim = Linear(torch.zeros(2, 8), torch.tensor([1.0, 0.0]))
    x, labels = uniform(1, 3, 8), torch.zeros(3, dtype=torch.long)
    oracle = MeteredOracle(victim, 3, Access.LABELS)
    z = attack(name)(oracle, x, Untargeted(labels), MinimumL2(), RowRng.from_ids(0, names(3)))
    assert torch.equal(z, x)
    for row in range(3):
        assert oracle.meter.noted(row) == ({"start": "none found", "queries": int(oracle.meter.queries[row])},)


@pytest.mark.parametrize("name", NAMES)
def test_targets_start_from_the_attackers_data(name):
    victim = linear(8, 6, 3)
    held = uniform(3, 400, 8)
    data = Data(held, victim(held).argmax(1).detach(), victim.space, 6)
    x = uniform(4, 4, 8)
    targets = torch.full((4,), int(data.y.bincount(minlength=6).clamp_min(1).argmin()))
    targets[:] = data.y[0]
    oracle = MeteredOracle(victim, 4, Access.LABELS, data=data)
    search = NearestSearch(oracle, x, Targeted(targets), MinimumL2(), RowRng.from_ids(0, names(4)))
    asks = Decisions(search, 500)
    z = from_samples(asks, x, wins_of(asks, oracle(x)), search.rng)
    assert (victim(z).argmax(1) == targets).all()
    # The nearest of the class: as far as any sample of it, or nearer.
    fit = held[data.y == targets[0]]
    assert torch.allclose((z - x).norm(dim=1), torch.cdist(x, fit).amin(1), rtol=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_goals_beyond_the_top_class_are_refused(name):
    victim = linear(8, 4)
    x = uniform(1, 2, 8)
    with pytest.raises(UsageError, match="class on top"):
        play(attack(name), victim, x, OrderedTopK(torch.tensor([[0, 1], [1, 2]])), MinimumL2(access=Access.LABELS))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_files_of_few_levels_are_asked_about_as_they_are(name):
    victim, x, labels = images(4, 8, space=Box())
    x = (x * 255).round() / 255
    threat = MinimumL2(lattice=255, access=Access.LABELS)
    played = play(attack(name, queries=300), victim, x, Untargeted(labels), threat)
    assert played.meter.queries.max() <= 300
    assert torch.equal(threat.finish(played.z, x), played.z)
    exact = victim.distance(x, labels, "l2")
    found = threat.distance(played.z, x)[played.reached]
    assert played.reached.sum() >= 3
    assert (found >= exact[played.reached] - 1e-6).all()


@pytest.mark.parametrize("number", [10, 40, 160, 640])
def test_the_normals_cosine_grows_as_known(number):
    """For decisions of a plane and n directions in d dimensions: cos^2 = 1 / (1 + (d - 1) pi / (2 n))."""
    d, rows = 64, 40
    weight = normal(3, d)
    victim = Linear(torch.stack([torch.zeros(d), weight]), torch.zeros(2), WIDE)
    z = normal(4, rows, d)
    z = z - (z @ weight / weight.dot(weight))[:, None] * weight  # on the boundary
    z = z + 1e-7 * weight
    oracle = MeteredOracle(victim, rows, Access.LABELS)
    goal = Untargeted(torch.zeros(rows, dtype=torch.long))
    search = NearestSearch(oracle, z, goal, MinimumL2(box=WIDE), RowRng.from_ids(0, names(rows)))
    asks = Decisions(search, 10_000)
    found = estimated_normal(asks, z, torch.full((rows,), 0.1), torch.full((rows,), number), search.rng)
    cosine = torch.cosine_similarity(found, weight.expand_as(found))
    # Directions have length 1: E|u.w| = c / sqrt(d), with c^2 = 2 / pi up to 1 / d.
    known = 1 / math.sqrt(1 + (d - 1) * math.pi / (2 * number))
    assert float(cosine.mean()) == pytest.approx(known, abs=0.06)
    # Unbiased: the mean over rows points at the normal itself.
    assert (
        torch.cosine_similarity(found.mean(0), weight, dim=0)
        > 1 / math.sqrt(1 + (d - 1) * math.pi / (2 * number * rows)) - 0.06
    )
    assert (oracle.meter.queries == number).all()


def test_low_frequencies_are_orthonormal_and_whole():
    z = torch.zeros(1, 2, 6, 5, dtype=torch.float64)
    whole, low = LowFrequencies(z, 6), LowFrequencies(z, 3)
    assert whole.like.shape == z.shape
    assert low.like.shape == (1, 2, 3, 3)
    for waves in (*whole.waves, *low.waves):
        assert torch.allclose(waves @ waves.T, torch.eye(len(waves), dtype=torch.float64))
    drawn = low(torch.ones(1, 1, 2, 3, 3, dtype=torch.float64))
    assert drawn.shape == (1, 1, 2, 6, 5)
    assert float(drawn.norm()) == pytest.approx(1)
    assert LowFrequencies(torch.zeros(2, 7), 3).like.shape == (2, 7)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_more_queries_come_nearer(name):
    victim, x, labels = images(6, 8)
    threat = MinimumL2(box=WIDE, access=Access.LABELS)
    away = [
        threat.distance(play(attack(name, queries=queries), victim, x, Untargeted(labels), threat).z, x).median()
        for queries in (20, 100, 400)
    ]
    assert away[0] > away[1] > away[2]


@pytest.mark.parametrize("name", NAMES)
def test_a_radius_is_refused(name):
    from advkit.threat_models.lp import L2

    victim, x, labels = images(2, 8)
    with pytest.raises(UsageError, match="robust accuracy at every radius"):
        play(attack(name), victim, x, Untargeted(labels), L2(0.5))


def test_marks_are_even_in_their_logarithm_and_end_with_the_budget():
    assert marks_until(25) == [2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25]
    assert marks_until(1) == [1]
    assert len(marks_until(5000)) < 40


def test_a_mark_inside_a_call_gets_what_was_known_before_it():
    courses = Courses.of(torch.zeros(2, 3), 10)  # marks 2, 3, 4, 5, 6, 8, 10
    away = torch.tensor([torch.inf, torch.inf])
    for spent, now in (
        ((2, 1), (4.0, torch.inf)),
        ((5, 1), (3.0, torch.inf)),
        ((9, 6), (2.0, 5.0)),
        ((10, 6), (2.0, 5.0)),
    ):
        after = torch.tensor(now)
        courses.extend(torch.tensor(spent), away, after)
        away = after
    first, second = courses.told(0), courses.told(1)
    assert [(step["queries"], step["distance"]) for step in first] == [(2, 4.0), (5, 3.0), (10, 2.0)]
    assert second == [{"queries": 6, "distance": 5.0}]
    assert courses.take(torch.tensor([1])).told(0) == second


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_records_tell_the_least_distance_by_queries(name):
    victim, x, labels = images(3, 8)
    threat, asked = MinimumL2(box=WIDE, access=Access.LABELS), [[] for _ in range(3)]
    oracle = MeteredOracle(victim, 3, Access.LABELS, 200, lanes=Lanes(64, 1))
    ask = NearestSearch.ask

    def listening(search, z, of=None):
        answer, reached = ask(search, z, of)
        rows = torch.arange(len(z)) if of is None else of
        index = search._active.index
        away = torch.where(reached, threat.distance(z, search.x[rows]), torch.inf)
        for row, value in zip((rows if index is None else index[rows]).tolist(), away.tolist(), strict=True):
            asked[row].append(value)
        return answer, reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NearestSearch, "ask", listening)
        z = attack(name)(oracle, x, Untargeted(labels), threat, RowRng.from_ids(0, names(3)))
    alone = MeteredOracle(victim, 1, Access.LABELS, 200, lanes=Lanes(64, 1))
    attack(name)(alone, x[1:2], Untargeted(labels[1:2]), threat, RowRng.from_ids(0, names(3)[1:2]))
    assert alone.meter.noted(0) == oracle.meter.noted(1)  # whatever the batch
    for row, away in enumerate(threat.distance(z, x).tolist()):
        told = [(step["queries"], step["distance"]) for step in oracle.meter.noted(row)]
        assert told[-1] == (200, pytest.approx(away, rel=1e-5))
        assert len(told) < 25
        for (queries, distance), (_, later) in pairwise(told):
            assert later <= distance
            assert distance >= min(asked[row][:queries]) * (1 - 1e-5)
            # A call asks about 64 points of a row at the most.
            assert distance <= min(asked[row][: max(2, queries - 64)]) * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(8,), (2, 8), (1, 8, 8)], ids=["1d", "2d", "3d"])
def test_where_fine_noise_is_one_class_mosaics_find_a_start(shape):
    """A victim of even images: class 1 where nearly all values are high, class 0 everywhere else, noise included."""
    size = math.prod(shape)
    victim = Linear(torch.stack([torch.zeros(size), torch.ones(size)]), torch.tensor([0.7 * size, 0.0]))
    x, labels = torch.full((6, *shape), 0.2), torch.zeros(6, dtype=torch.long)
    oracle = MeteredOracle(victim, 6, Access.LABELS, 100, lanes=Lanes(64, 1))
    search = NearestSearch(oracle, x, Untargeted(labels), MinimumL2(), RowRng.from_ids(0, names(6)))
    asks = Decisions(search, 100)
    z = from_mosaics(asks, x, search.rng)
    assert asks.found.sum() >= 5
    assert (victim(z).argmax(1) == 1)[asks.found].all()
    assert set(z[asks.found].unique().tolist()) == {0.0, 1.0}
    tiles = z.view(6, *shape)[asks.found]
    if len(shape) == 3:  # at most four tiles a side: few changes from a value to its neighbour
        assert (tiles.diff(dim=-1) != 0).any(dim=-2).sum(-1).max() <= 3
