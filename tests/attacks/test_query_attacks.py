"""Attacks by scores against closed forms, exhaustive search, their papers' rules and counts by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import scipy.fft
import torch
from torch import Tensor, nn

import advkit
from advkit.attacks import ATTACKS
from advkit.attacks.query.nes import NES
from advkit.attacks.query.one_pixel import OnePixel
from advkit.attacks.query.pixels import Positions, first_of_each
from advkit.attacks.query.pixle import Pixle
from advkit.attacks.query.simba import SimBA, _cosines, _Steps
from advkit.attacks.query.spsa import SPSA
from advkit.attacks.query.square import Layout, Square
from advkit.core.errors import UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.core.zeroth_order import pair_gradient, pair_queries
from advkit.models.torch import TorchModel
from advkit.testing.play import names, play
from advkit.testing.victims import Linear, linear, network, uniform
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

WIDE = Box(-1000.0, 1000.0)
KINDS: dict[str, Any] = {"linf": Linf, "l2": L2, "l1": L1}
BY_SCORES = [
    name
    for name in ATTACKS.names()
    if not name.endswith(":") and ATTACKS.target(name).startswith("advkit.attacks.query.")
    and Access(ATTACKS.build(name).needs) == Access.SCORES
]  # fmt: skip


class Listening:
    """A model that keeps all that it is asked about."""

    def __init__(self, model: Any) -> None:
        self.model, self.asked = model, list[Tensor]()

    def __call__(self, z: Tensor) -> Tensor:
        self.asked.append(z.detach().clone())
        answer: Tensor = self.model(z)
        return answer


def labels_of(model: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        decided: Tensor = model(x).argmax(1)
    return decided


# --- linear victims: distances in closed form


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("attack", "norm", "slack"),
    [
        (NES(queries=1000), "linf", 1.05),
        (NES(queries=1000), "l2", 1.05),
        (NES(queries=1000), "l1", 1.05),
        (SPSA(queries=500), "linf", 1.05),
        (SPSA(queries=500), "l2", 1.15),
        (SimBA(queries=500), "linf", 1.05),
        (SimBA(queries=500), "l2", 1.15),
        (SimBA(queries=500, basis="dct"), "l2", 1.15),
        (Square(queries=500), "linf", 1.15),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, (NES, SPSA, SimBA, Square)) else None,
)
def test_a_linear_victim_falls_at_its_distance_within_the_stated_queries(attack, norm, slack, targeted):
    for shape in ((12,), (2, 6), (1, 3, 4))[int(targeted) :: 2]:
        # Of two classes: with more, descent may lead to one that is near in score and out of reach.
        victim = linear(features=12, seed=5, space=WIDE)
        x = uniform(21, 20, 12)
        labels = labels_of(victim, x)
        exact = victim.distance(x, labels, norm)
        eps = float(exact.median())
        goal = Targeted(1 - labels) if targeted else Untargeted(labels)
        played = play(attack, victim, x.view(-1, *shape), goal, KINDS[norm](eps=eps, box=WIDE))
        assert not (played.reached & (exact > eps * 1.0001)).any()
        assert played.reached[exact * slack <= eps].all()
        assert (played.meter.queries <= attack.queries).all()
        assert (played.meter.backwards == 0).all()


@pytest.mark.slow
def test_one_pixel_needs_the_exact_count_plus_one_and_never_less_than_the_count():
    victim = linear(features=16, seed=2)
    x = uniform(22, 40, 16)
    labels = labels_of(victim, x)
    exact = victim.distance_l0(x, labels)
    for count in (1, 2, 3, 4):
        for shape in ((16,), (2, 8), (1, 4, 4)):
            played = play(OnePixel(queries=3000), victim, x.view(-1, *shape), Untargeted(labels), L0(eps=count))
            assert not (played.reached & (exact > count)).any()
            assert played.reached[exact + 1 <= count].all()


# --- estimates


@pytest.mark.parametrize(("directions", "spread"), [("normal", 1), ("signs", -1)])
def test_the_estimate_is_unbiased_on_a_linear_score(directions, spread):
    rows, d, pairs = 4000, 6, 3
    slope = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -0.25], dtype=torch.float64)
    rng = RowRng.from_ids(3, names(rows))
    z = torch.full((rows, d), 0.5, dtype=torch.float64)
    found = pair_gradient(lambda p, of: p @ slope + 7, z, rng, pairs=pairs, mu=0.01, directions=directions)
    assert found.queries == pair_queries(pairs) == 6
    error = found.gradient - slope
    assert (error.mean(0).abs() <= 4 * error.std(0) / math.sqrt(rows)).all()
    variance = float(error.square().sum(1).mean())
    assert variance == pytest.approx((d + spread) * float(slope.square().sum()) / pairs, rel=0.1)


def test_points_stay_legal_and_a_feature_at_a_bound_counts_half():
    rows = 4000
    slope = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    asked = []

    def value(points, of):
        asked.append(points)
        return points @ slope

    z = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64).repeat(rows, 1)
    rng = RowRng.from_ids(0, names(rows))
    found = pair_gradient(
        value, z, rng, pairs=2, mu=0.01, low=torch.zeros(3).double(), high=torch.ones(3).double()
    ).gradient
    assert all(((points >= 0) & (points <= 1)).all() for points in asked)
    expected = slope * torch.tensor([0.5, 1.0, 0.5], dtype=torch.float64)
    assert ((found.mean(0) - expected).abs() <= 4 * found.std(0) / math.sqrt(rows)).all()


def test_an_estimate_depends_on_its_row_alone_and_values_that_are_no_numbers_count_nothing():
    z, ids = uniform(4, 9, 50), names(9)

    def value(points, of):
        return torch.where(of == 3, torch.nan, points.square().sum(1))

    def estimate(rows, chunk):
        rng = RowRng.from_ids(0, [ids[row] for row in rows])
        chosen = torch.tensor(rows)
        return pair_gradient(
            lambda p, of: value(p, chosen[of]), z[chosen], rng, pairs=70, mu=0.01, chunk=chunk
        ).gradient

    whole = estimate(list(range(9)), 4096)
    assert torch.equal(estimate([7, 2], 5), whole[[7, 2]])
    assert (whole[3] == 0).all()
    assert (whole[[0, 1, 2]] != 0).all()
    for settings, word in (({"pairs": 0, "mu": 0.1}, "pairs"), ({"pairs": 1, "mu": 0.0}, "mu")):
        with pytest.raises(UsageError, match=word):
            pair_gradient(value, z, RowRng.from_ids(0, ids), **settings)


# --- SimBA


def test_the_cosines_are_the_orthonormal_dct():
    for size in (1, 2, 7, 28):
        waves = _cosines(size).numpy()
        assert waves == pytest.approx(scipy.fft.idct(torch.eye(size).double().numpy(), axis=1, norm="ortho"), abs=1e-12)


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_simba_asks_one_step_along_one_direction_from_the_best_point_and_never_loses(digits, basis):
    model, x, y = digits
    x, y = x[:6], y[:6]
    listening = Listening(model)
    # A ball so large that no step is projected.
    attack, ball = SimBA(queries=150, basis=basis, step_size=0.001), L2(eps=20.0)
    played = play(attack, listening, x, Untargeted(y), ball, lanes=Lanes(64, 1))
    asked, goal = listening.asked[:-1], Untargeted(y, "margin")  # the last question is the kit's own
    assert len(asked) == 150
    best = asked[0]
    assert torch.equal(best, x)
    with torch.no_grad():
        loss = goal.loss(model(best))
        for z in asked[1:]:
            move = (z - best)[:, 0].double().numpy()
            coefficients = torch.from_numpy(scipy.fft.dctn(move, axes=(1, 2), norm="ortho") if basis == "dct" else move)
            ordered = coefficients.abs().flatten(1).sort(1, descending=True).values
            inside = ((z > 0) & (z < 1)).flatten(1).all(1) if basis == "dct" else torch.ones(6, dtype=torch.bool)
            assert (ordered[:, 0] > 0).all()
            assert (ordered[:, 0] <= 0.02 * (1 + 1e-4)).all()
            assert (ordered[inside, 1] < 1e-5).all()
            there = goal.loss(model(z))
            wins = there < loss
            best, loss = torch.where(wins[:, None, None, None], z, best), torch.minimum(loss, there)
    assert torch.equal(played.z, best)


def test_simba_takes_every_direction_once_before_any_twice():
    victim = linear(features=20, seed=1, space=WIDE)
    x = uniform(1, 8, 20)
    listening = Listening(victim)
    attack = SimBA(queries=1 + 2 * 20, step_size=0.4)
    play(attack, listening, x, Untargeted(labels_of(victim, x)), Linf(eps=0.01, box=WIDE), lanes=Lanes(64, 1))
    best, seen = listening.asked[0], torch.zeros(8, 20)
    with torch.no_grad():
        goal = Untargeted(labels_of(victim, x), "margin")
        for z in listening.asked[1:-1]:
            wins = (goal.loss(victim(z)) < goal.loss(victim(best))).unsqueeze(1)
            # The score is linear: of a direction's two ways exactly one helps.
            seen += (z != best) * (wins & (seen.sum(1, keepdim=True) < 20))
            best = torch.where(wins, z, best)
    assert (seen == 1).all()


def test_low_frequencies_come_first():
    x = torch.zeros(5, 3, 16, 16)
    order = _Steps(Layout.of(x), "dct", 1.0, False, x).order(RowRng.from_ids(0, names(5)), 0.25)
    assert (order.sort(1).values == torch.arange(3 * 16 * 16)).all()
    first = order[:, : 3 * 4 * 4] % 256
    assert (first // 16 < 4).all()
    assert (first % 16 < 4).all()
    assert not torch.equal(order[0], order[1])


# --- positions: exhaustive search


def test_positions_read_and_write_what_the_ball_counts():
    for shape, per, channels, height in (
        ((5,), "pixel", 1, 1),
        ((2, 5), "pixel", 1, 2),
        ((3, 4, 5), "pixel", 3, 4),
        ((3, 4, 5), "feature", 1, 12),
        ((2, 3, 4, 5), "pixel", 3, 8),
    ):
        x, ball = uniform(0, 4, *shape), L0(eps=3, per=per)
        positions = Positions.of(x, ball)
        assert (positions.channels, positions.height, positions.width) == (channels, height, 5)
        read = positions.read(x)
        assert torch.equal(positions.written(read), x)
        changed = read.clone()
        changed[:, :, [0, len(positions) - 1]] += 0.5
        assert (ball.distance(positions.written(changed), x) == 2).all()


def test_only_the_first_of_equal_places_counts():
    places = torch.tensor([[4, 4, 2, 4], [1, 2, 3, 1]])
    counted = torch.tensor([[False, True, True, True], [True, True, False, True]])
    assert first_of_each(places, counted).tolist() == [[False, True, True, False], [True, True, False, False]]


def exhaustively(model: Any, x: Tensor, goal: Any, changes: int) -> Tensor:
    """The lowest margin [B] with so many pixels set to 0 or 1 in each of two channels."""
    best = torch.full((len(x),), torch.inf)
    with torch.no_grad():
        for places in itertools.combinations(range(9), changes):
            for values in itertools.product((0.0, 1.0), repeat=2 * changes):
                z = x.flatten(2).clone()
                for k, place in enumerate(places):
                    z[:, :, place] = torch.tensor(values[2 * k : 2 * k + 2])
                best = torch.minimum(best, goal.margin(model(z.view_as(x))))
    return best


@pytest.mark.parametrize("changes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_pixel_breaks_a_linear_victim_where_exhaustive_search_over_levels_does(changes):
    x = uniform(31, 120, 2, 3, 3)
    victim = linear(18, seed=3)
    x = x[labels_of(victim, x) == 0][:40]
    goal = Untargeted(torch.zeros(len(x), dtype=torch.long), "margin")
    # As sure of its class as to lose half of the rows.
    bias = victim.bias.clone()
    bias[0] -= exhaustively(victim, x, goal, changes).median()
    victim = Linear(victim.weight, bias)
    best = exhaustively(victim, x, goal, changes)
    played = play(OnePixel(queries=4000 * changes**2, population=10 * changes), victim, x, goal, L0(eps=changes))
    # Its lowest margins lie at the ends of the box: those are the two levels.
    assert 10 < (best < 0).sum() < 30
    assert not (played.reached & (best > 1e-6)).any()
    assert played.reached[best < -0.03 * best.std()].all()


@pytest.mark.slow
def test_one_pixel_breaks_what_exhaustive_search_breaks_of_a_network():
    model = network((2, 3, 3), 3, seed=1)
    x = uniform(31, 60, 2, 3, 3)
    goal = Untargeted(labels_of(model, x), "margin")
    best = exhaustively(model, x, goal, 1)
    assert 10 < (best < 0).sum() < 60
    assert play(OnePixel(queries=4000), model, x, goal, L0(eps=1)).reached[best < 0].all()


@pytest.mark.slow
def test_pixle_finds_the_best_of_all_rearrangements_of_one_pixel():
    shape = (2, 3, 3)
    for model in (network(shape, 3, seed=1), network(shape, 3, seed=2)):
        x = (uniform(32, 50, *shape) * 3).floor() / 2  # three levels
        labels = labels_of(model, x)
        goal, ball = Untargeted(labels, "margin"), L0(eps=1)
        with torch.no_grad():
            best = goal.margin(model(x))
            for source, target in itertools.product(range(9), repeat=2):
                z = x.flatten(2).clone()
                z[:, :, target] = x.flatten(2)[:, :, source]
                best = torch.minimum(best, goal.margin(model(z.view_as(x))))
        played = play(Pixle(queries=1000), model, x, goal, ball, decides=False)
        assert torch.allclose(played.margin, best, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"tries": 5}, {"patch": 2}])
def test_pixle_moves_pixels_and_makes_none(digits, settings):
    model, x, y = digits
    x, y, ball = x[:30], y[:30], L0(eps=6)
    played = play(Pixle(queries=150, **settings), model, x, Untargeted(y), ball)
    assert ball.admits(played.z, x).all()
    assert played.reached.any()
    for row in range(30):
        assert torch.isin(played.z[row], x[row]).all()


# --- counts


BUDGETS = [
    (NES(queries=500), Linf(eps=1e-6), 500),
    (NES(queries=500), Linf(eps=1e-6), 102),  # 51 and 51; of 103 one would be left
    (SPSA(queries=500), L2(eps=1e-6), 500),
    (SimBA(queries=500), Linf(eps=1e-6), 500),
    (SimBA(queries=500, basis="dct"), L2(eps=1e-6), 77),
    (OnePixel(queries=500), L0(eps=1), 500),
    (OnePixel(queries=500), L0(eps=1), 130),
    (Pixle(queries=500), L0(eps=1), 500),
    (Square(queries=500), Linf(eps=1e-6), 500),
]


@pytest.mark.parametrize(("attack", "ball", "budget"), BUDGETS, ids=lambda value: type(value).__name__)
def test_every_query_of_the_budget_is_used_and_counted(attack, ball, budget):
    model = linear(features=9, seed=3)
    model.module.bias.data[0] += 100.0  # nothing breaks it
    sent = 0

    def counting(z):
        nonlocal sent
        sent += len(z)
        return model(z)

    x = uniform(2, 5, 1, 3, 3)
    played = play(attack, counting, x, Untargeted(labels_of(model, x)), ball, queries=budget, lanes=Lanes(7, 1))
    assert played.meter.queries.tolist() == [budget] * 5
    assert sent == 5 * budget + 5  # the kit asks about what came back


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "ball"),
    [
        (SimBA(queries=400), Linf(eps=0.1)),
        (SimBA(queries=400, basis="dct"), L2(eps=0.7)),
        (Pixle(queries=400), L0(eps=3)),
        (Square(queries=400), Linf(eps=0.1)),
        (Square(queries=400), L2(eps=0.7)),
        (Square(queries=400), L1(eps=2.0)),
        (NES(queries=400), L2(eps=0.7)),
        (SPSA(queries=400), Linf(eps=0.15)),
        (OnePixel(queries=400), L0(eps=3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_queries_of_a_broken_row_are_those_up_to_the_one_that_broke_it(digits, attack, ball):
    model, x, y = digits
    seen = 0
    for row in range(12):
        listening = Listening(model)
        one, goal = x[row : row + 1], Untargeted(y[row : row + 1])
        played = play(attack, listening, one, goal, ball, lanes=Lanes(64, 1))
        if not played.reached[0]:
            continue
        seen += 1
        asked = torch.cat(listening.asked[:-1])
        assert int(played.meter.queries[0]) == len(asked)
        where = (asked == played.z).flatten(1).all(1).nonzero().flatten()
        # The point that is returned was asked about in the last question: for one_pixel, a generation.
        last = attack.population if isinstance(attack, OnePixel) else 1
        assert int(where[-1]) >= len(asked) - last
        if isinstance(attack, (SimBA, Pixle, Square)):
            hits = model(asked).argmax(1) != y[row]
            assert int(hits.nonzero()[0]) == len(asked) - 1
    assert seen > 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "ball", "budgets"),
    [
        (SimBA, Linf(eps=0.1), (20, 100)),
        (Pixle, L0(eps=2), (20, 100)),
        (OnePixel, L0(eps=3), (60, 200)),
        (lambda queries: Square(queries=queries, schedule="published"), Linf(eps=0.1), (20, 100)),
    ],
    ids=["simba", "pixle", "one_pixel", "square"],
)
def test_the_curve_of_one_run_is_what_runs_with_smaller_budgets_break(digits, attack, ball, budgets):
    model, x, y = digits
    goal = Untargeted(y)
    whole = play(attack(queries=400), model, x, goal, ball)
    for budget in budgets:
        short = play(attack(queries=budget), model, x, goal, ball)
        assert torch.equal(short.reached, whole.reached & (whole.meter.queries <= budget))


# --- no gradients, and what is refused


class NoGradients(nn.Module):
    """A network that raises where a gradient could be asked for."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.requires_grad:
            raise RuntimeError("asked for a gradient")
        answer: Tensor = self.inner(x)
        return answer


@pytest.mark.parametrize("access", ["scores", "gradients"])
@pytest.mark.parametrize("name", BY_SCORES)
def test_no_gradient_is_asked_for(digits, tmp_path, name, access):
    model, x, y = digits
    attack = ATTACKS.build(f"{name}:queries=120")
    norm = "l0:eps=3" if isinstance(attack, (OnePixel, Pixle)) else "linf:eps=0.1"
    guarded = TorchModel(NoGradients(model.module).eval(), Box(shape=(1, 8, 8)), 10)
    report = advkit.evaluate(
        attack, "none", (x[:30], y[:30]), guarded, f"{norm},access={access}", device="cpu", out=tmp_path / "run"
    )
    data = report.to_dict()
    assert data["threat_model"]["knowledge"] == "black_box_score"
    assert data["attacks"][0]["cost"]["backward"] == 0
    assert data["metrics"]["attack_success_rate"]["value"] > 0


@pytest.mark.parametrize("name", BY_SCORES)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
def test_a_norm_that_an_attack_lacks_is_refused_with_those_it_has_and_an_attack_for_it(digits, name, norm):
    model, x, y = digits
    attack, ball = ATTACKS.build(f"{name}:queries=2"), (KINDS | {"l0": L0})[norm](eps=1)
    try:
        play(attack, model, x[:2], Untargeted(y[:2]), ball)
    except UsageError as refused:
        said = str(refused)
    else:
        return
    assert f"{name} was asked for {type(ball).__name__}; it works in " in said
    other = next(each for each in BY_SCORES if each in said.partition("for other norms use")[2] and each != name)
    offered = [each for each in BY_SCORES if each in said.partition("for other norms use")[2]]
    assert other
    served = False
    for each in offered:
        try:
            play(ATTACKS.build(f"{each}:queries=2"), model, x[:2], Untargeted(y[:2]), ball)
        except UsageError:
            continue
        served = True
    assert served


@pytest.mark.parametrize(
    ("attack", "threat", "words"),
    [
        ("nes", "linf:eps=0.1,access=scores,queries=20", "takes 51 queries of a sample; the threat model grants 20"),
        ("nes:queries=20", "linf:eps=0.1,access=scores", "takes 51 queries of a sample; it has queries=20"),
        ("spsa:samples=8", "linf:eps=0.1,access=scores,queries=8", "takes 9 queries"),
        ("simba", "l2:eps=0.1,access=scores,queries=2", "takes 3 queries"),
        ("one_pixel:population=10", "l0:eps=1,access=scores,queries=19", "takes 20 queries"),
        ("pixle", "l0:eps=1,access=scores,queries=1", "takes 2 queries"),
        ("nes", "linf:eps=0.1,access=labels", "needs scores; the threat model grants labels"),
        ("pgd", "linf:eps=0.1,access=scores", "needs gradients; the threat model grants scores"),
    ],
)
def test_what_a_step_cannot_afford_is_refused_before_the_run(digits, tmp_path, attack, threat, words):
    model, x, y = digits
    with pytest.raises(UsageError, match=words):
        advkit.evaluate(attack, "none", (x[:4], y[:4]), model, threat, device="cpu", out=tmp_path / "run")
    assert not list(tmp_path.rglob("records.jsonl"))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (NES, {"samples": 3}), (NES, {"samples": 0}), (NES, {"sigma": 0.0}), (NES, {"momentum": 1.0}),
        (NES, {"step_size": 0.0}), (NES, {"queries": 0}), (SPSA, {"samples": 1}), (SPSA, {"sigma": -1.0}),
        (SPSA, {"step_size": 0.0}), (SimBA, {"basis": "wavelet"}), (SimBA, {"frequencies": 0.0}),
        (SimBA, {"step_size": 0.0}), (SimBA, {"queries": 0}), (OnePixel, {"population": 3}), (OnePixel, {"scale": 0.0}),
        (OnePixel, {"queries": 0}), (Pixle, {"patch": 0}), (Pixle, {"tries": 0}), (Pixle, {"queries": 0}),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name(kind, settings):
    with pytest.raises(UsageError, match=next(iter(settings))):
        kind(**settings)
