"""The search for the nearest point: what is returned was asked about, is the nearest, and holds once it is rounded."""

from __future__ import annotations

import pytest
import torch

from advkit.attacks.minimal.base import NearestSearch
from advkit.attacks.minimal.ddn import DDN
from advkit.core.errors import UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.testing.play import names, play
from advkit.testing.victims import linear, network, uniform
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L2, Linf
from advkit.threat_models.minimum import MinimumL1, MinimumL2


def searching(rows=6, threat=None):
    victim, x = linear(), uniform(3, rows, 8)
    labels = victim(x).argmax(1)
    oracle = MeteredOracle(victim, rows)
    threat = MinimumL2() if threat is None else threat
    return NearestSearch(oracle, x, Untargeted(labels), threat, RowRng.from_ids(0, names(rows))), victim, x, labels


def test_the_nearest_point_that_reached_the_goal_is_kept_whoever_left():
    search, _victim, x, _labels = searching()
    other = uniform(4, 60, 8)
    of = torch.arange(60) % 6
    _, reached = search.ask(other, of)
    distance = L2(1.0).distance(other, x[of]).float()
    for row in range(6):
        mine = torch.where(reached & (of == row), distance, torch.inf)
        assert search.away[row] == mine.min()
        if mine.min() < torch.inf:
            assert torch.equal(search.nearest[row], other[mine.argmin()])
    before = search.best.clone()
    assert search.leave(torch.tensor([True, False, True, False, False, True])).tolist() == [1, 3, 4]
    assert len(search) == 3
    assert torch.equal(search.x, x[[1, 3, 4]])
    assert torch.equal(search.best, before)
    search.ask(search.x + 0.01 * (search.nearest - search.x))  # nearer, and does not reach the goal
    assert torch.equal(search.best, before)


def test_ddn_is_within_a_third_of_a_percent_of_the_hyperplane_and_counts_its_passes():
    victim, x = linear(), uniform(3, 24, 8) * 0.2 + 0.4
    labels = victim(x).argmax(1)
    exact = victim.distance(x, labels, "l2")
    played = play(DDN(steps=100), victim, x, Untargeted(labels), MinimumL2())
    distance = L2(1.0).distance(played.z, x)
    assert bool(played.reached.all())
    assert bool((distance >= exact - 1e-6).all())
    assert bool((distance <= 1.003 * exact + 1e-6).all())
    assert played.meter.forwards.tolist() == [101] * 24
    assert played.meter.backwards.tolist() == [100] * 24


@pytest.mark.slow
def test_on_a_lattice_the_files_reach_the_goal():
    model, x = network(), uniform(1, 12, 2, 6, 6)
    goal = Untargeted(model(x).argmax(1))
    plain = play(DDN(), model, x, goal, MinimumL2())
    for levels in (15, 255):
        threat = MinimumL2(lattice=levels)
        z = play(DDN(), model, x, goal, threat, decides=False).z
        assert torch.equal(threat.finish(z, x), z)
        assert bool(goal.reached(model(z)).all())
        assert (threat.distance(z, x) >= threat.distance(plain.z, x) * 0.9).all()


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), MinimumL1()])
def test_a_threat_model_that_it_does_not_have_is_refused_in_words(threat):
    victim, x = linear(), uniform(3, 2, 8)
    with pytest.raises(UsageError, match=r"ddn was asked for (Linf|L2|minimum-l1); .*works in minimum-l2"):
        play(DDN(), victim, x, Untargeted(victim(x).argmax(1)), threat)


def test_a_budget_of_queries_ends_the_search():
    victim, x = linear(), uniform(3, 5, 8)
    goal = Untargeted(victim(x).argmax(1))
    for queries in (0, 1, 7):
        played = play(DDN(), victim, x, goal, MinimumL2(), queries=queries)
        assert played.meter.queries.tolist() == [queries] * 5
