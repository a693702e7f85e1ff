"""The square attack against its published schedule and patterns, hand counts and another library."""

from __future__ import annotations

import pytest
import torch

from advkit.attacks.query.square import Layout, Square, bump
from advkit.benchmark import Ops
from advkit.core.errors import UsageError
from advkit.core.lanes import Lanes
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.testing.play import names, play
from advkit.testing.victims import linear, uniform
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0


def test_schedule_is_the_published_one_and_scales():
    absolute, scaled = Square(schedule="published"), Square()
    published = {1: 1, 10: 1, 11: 2, 50: 2, 51: 4, 201: 8, 501: 16, 1001: 32, 2001: 64, 4001: 128, 6001: 256, 8001: 512}
    for step, divisor in published.items():
        assert absolute.share(step, 300) == 0.8 / divisor
        assert scaled.share(step, 10_000) == 0.8 / divisor
    assert scaled.share(1001, 5000) == 0.8 / 64


def test_layouts_and_windows():
    assert Layout.of(torch.zeros(3, 7)) == Layout(1, 1, 7)
    assert Layout.of(torch.zeros(3, 2, 7)) == Layout(2, 1, 7)
    assert Layout.of(torch.zeros(3, 4, 5, 6)) == Layout(4, 5, 6)
    assert Layout.of(torch.zeros(3, 2, 4, 5, 6)) == Layout(8, 5, 6)
    assert Layout(3, 32, 32).window(0.8, odd=False) == (29, 29)
    assert Layout(3, 32, 32).window(0.8 / 512, odd=False) == (1, 1)
    assert Layout(3, 32, 32).window(0.8, odd=True) == (29, 29)
    assert Layout(1, 1, 8).window(0.8 / 4, odd=False) == (1, 2)
    layout = Layout(1, 4, 5)
    assert layout.pixels(torch.tensor([[0.0, 0.0]]), (2, 2)).flatten().tolist() == [0, 1, 5, 6]
    assert layout.pixels(torch.tensor([[0.9999999, 0.9999999]]), (2, 2)).flatten().tolist() == [13, 14, 18, 19]


def test_bumps_have_unit_norm_and_two_signs():
    for shape in ((1, 1), (1, 3), (3, 1), (3, 3), (5, 5), (6, 6), (4, 7)):
        both = bump(*shape)
        torch.testing.assert_close(both.norm(dim=1), torch.ones(2, dtype=torch.float64))
        if max(shape) > 1:
            assert (both.amax(1) > 0).all()
            assert (both.amin(1) < 0).all()
    # By hand, 3 rows of 3: the upper half is one row (1, 1 + 1/4, 1), the lower half two rows of the same kind.
    raw = torch.tensor([[0.25, 1.25, 0.25], [-0.25, -0.25, -0.25], [-0.25, -1.25, -0.25]], dtype=torch.float64)
    torch.testing.assert_close(bump(3, 3)[0], (raw / raw.norm()).flatten())
    torch.testing.assert_close(bump(3, 3)[1].view(3, 3), bump(3, 3)[0].view(3, 3).T)


@pytest.mark.parametrize("ball", [Linf(eps=1e-3), L2(eps=1e-3), L1(eps=1e-3)])
def test_queries_are_counted_by_hand_and_the_budget_cuts_them(digits, ball):
    model, x, y = digits
    goal = Untargeted(y[:10])
    played = play(Square(queries=30, restarts=2), model, x[:10], goal, ball)
    assert (played.meter.queries == 60).all()
    assert (played.meter.backwards == 0).all()
    limited = play(Square(queries=30, restarts=2), model, x[:10], goal, ball, queries=42)
    assert (limited.meter.queries == 42).all()


def test_only_a_patch_changes_between_queries(digits):
    model, x, y = digits
    asked = []

    def listening(z):
        asked.append(z.detach().clone())
        return model(z)

    play(Square(queries=120), listening, x[:6], Untargeted(y[:6]), Linf(eps=0.01), lanes=Lanes(64, 1))
    asked.pop()  # the kit's own question about the returned rows
    assert len(asked) == 120
    attack = Square(queries=120)
    best = asked[0]
    for step, z in enumerate(asked[1:], start=1):
        changed = (z != best).flatten(1).sum(1)
        window = Layout(1, 8, 8).window(attack.share(step, 120), odd=False)
        assert (changed <= window[0] * window[1]).all()
        goal = Untargeted(y[:6], "margin")
        with torch.no_grad():
            better = goal.loss(model(z)) < goal.loss(model(best))
        best = torch.where(better[:, None, None, None], z, best)


def test_every_linf_query_is_a_corner_of_ball_and_box(digits):
    model, x, y = digits
    z = play(Square(queries=50), model, x[:20], Untargeted(y[:20]), Linf(eps=0.05)).z
    upper, lower = (x[:20] + 0.05).clamp(max=1), (x[:20] - 0.05).clamp(min=0)
    assert ((z == upper) | (z == lower)).all()


@pytest.mark.slow
def test_more_queries_of_the_published_schedule_go_on_where_fewer_ended(digits):
    model, x, y = digits
    for ball in (Linf(eps=0.06), L2(eps=0.4), L1(eps=1.5)):
        few, many = (
            play(Square(queries=n, schedule="published"), model, x[:60], Untargeted(y[:60]), ball) for n in (60, 240)
        )
        assert not (few.reached & ~many.reached).any()
        assert (many.margin <= few.margin + 1e-6)[~few.reached].all()
        assert many.reached.sum() > few.reached.sum()


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "kind", "eps"), [("Linf", Linf, 0.1), ("L2", L2, 0.7)])
def test_as_strong_as_another_library(digits, norm, kind, eps):
    peers = pytest.importorskip("torchattacks")
    model, x, y = digits
    x, y = x[:100], y[:100]
    ours = play(Square(queries=400), model, x, Untargeted(y), kind(eps=eps)).reached
    with torch.random.fork_rng(devices=[]):
        attack = peers.Square(model.module, norm=norm, eps=eps, n_queries=400, n_restarts=1, seed=0)
        with torch.no_grad():
            theirs = model(attack(x, y)).argmax(1) != y
    assert 0.1 < theirs.float().mean() < 0.95
    assert ours.sum() >= theirs.sum() - 4


@pytest.mark.slow
def test_l1_as_strong_as_the_reference_in_ball_and_box(digits):
    reference = pytest.importorskip("pyautoattack.square")
    model, x, y = digits
    # The reference's patches reach neither the last row nor the last column: both sides get a blank one to miss.
    x, y = torch.nn.functional.pad(x[:100], (0, 1, 0, 1)), y[:100]
    ball = L1(eps=2.5)

    def victim(z):
        return model(z[..., :8, :8])

    attack = reference.SquareAttack(victim, norm="L1", eps=2.5, n_queries=300, seed=0, device="cpu")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        returned = attack.perturb(x, y)
        theirs = int((victim(returned).argmax(1) != y).sum())
    played = play(Square(queries=300, schedule="published"), victim, x, Untargeted(y), ball)
    ours = int(played.reached.sum())
    assert ball.admits(played.z, x).all()
    # Clipping to the box after scaling to the ball wastes more than half of the reference's budget; the exact
    # projection onto both together spends nearly all of it.
    assert float(ball.distance(returned, x).mean()) < 0.6 * ball.eps
    assert float(ball.distance(played.z, x).mean()) > 0.9 * ball.eps
    assert 15 < theirs < 85
    assert ours >= theirs
    noise = torch.zeros(len(x), dtype=torch.bool)
    for draw in range(20):
        with torch.no_grad():
            noise |= victim(ball.sample(x, RowRng.from_ids(draw, names(100)))).argmax(1) != y
    assert ours > noise.sum() + 10


@pytest.mark.slow
def test_l1_descends_a_linear_victim_towards_the_exact_optimum():
    victim = linear(features=8, classes=2, seed=3, space=Box(-1000.0, 1000.0))
    x = uniform(7, 14, 8)
    with torch.no_grad():
        labels = victim(x).argmax(1)
        clean = Untargeted(labels).margin(victim(x))
    # All the budget on the steepest feature; far too little to cross the boundary.
    steepest = (victim.weight[0] - victim.weight[1]).abs().max()
    eps = float(0.5 * clean.min() / steepest)
    ball = L1(eps=eps, box=victim.space)
    few, many = (
        play(Square(queries=n, schedule="published"), victim, x, Untargeted(labels), ball).margin for n in (10, 400)
    )
    gained = (clean - many) / (eps * steepest)
    assert (many <= few + 1e-6).all()
    assert (gained > 0.5).all()
    assert (gained < 1 + 1e-3).all()


def test_scaled_linf_never_asks_about_the_best_point_again(digits):
    model, x, y = digits
    asked = []

    def listening(z):
        asked.append(z.detach().clone())
        return model(z)

    attack = Square(queries=150)
    play(attack, listening, x[:6], Untargeted(y[:6]), Linf(eps=0.01), lanes=Lanes(64, 1))
    goal, best, touched = Untargeted(y[:6], "margin"), asked[0], torch.zeros_like(x[:6], dtype=torch.bool)
    for step, z in enumerate(asked[1:150], start=1):
        changed = z != best
        assert changed.flatten(1).any(1).all()
        if attack.share(step, 150) <= 0.8 / 128:
            touched |= changed
        with torch.no_grad():
            better = goal.loss(model(z)) < goal.loss(model(best))
        best = torch.where(better[:, None, None, None], z, best)
    # The last 90 patches of a pixel each: evenly spread, they reach most of the 64 pixels (at random, three quarters).
    assert touched.flatten(1).float().mean(1).min() > 0.75


@pytest.mark.parametrize("ball", [Linf(eps=0.08), L2(eps=0.5), L1(eps=1.5)])
def test_rows_do_not_depend_on_their_batch(digits, ball):
    model, x, y = digits
    x, y, ids = x[:40], y[:40], names(40)
    whole = play(Square(queries=150), model, x, Untargeted(y), ball, ids=ids)
    assert 0 < whole.reached.sum() < 40
    some = torch.tensor([31, 3, 17, 8, 22])
    part = play(Square(queries=150), model, x[some], Untargeted(y[some]), ball, ids=[ids[i] for i in some])
    assert torch.equal(part.z, whole.z[some])
    assert torch.equal(part.meter.queries, whole.meter.queries[some])


@pytest.mark.slow
def test_a_query_costs_few_operations(digits):
    model, x, y = digits
    x, goal = x[:64], Untargeted(y[:64])

    def counted(queries):
        with Ops() as ops:
            play(Square(queries=queries), model, x, goal, Linf(eps=1e-6))
        return ops

    with torch.no_grad(), Ops() as bare:
        model(x)
    few, many = counted(50), counted(150)
    assert (many.ops - few.ops) / 100 <= bare.ops + 34
    assert (many.syncs - few.syncs) / 100 <= 1


@pytest.mark.slow
def test_breaks_a_model_that_hides_its_gradients(digits):
    from advkit.attacks.gradient.pgd import PGD
    from advkit.testing.victims import quantised

    model, x, y = digits
    masked = quantised(model, 4)
    with torch.no_grad():
        right = masked(x).argmax(1) == y
    x, y = x[right][:80], y[right][:80]
    goal, ball = Untargeted(y), Linf(eps=0.1)
    white, black = (play(attack, masked, x, goal, ball).reached.sum() for attack in (PGD(), Square(queries=400)))
    assert black > white + 10


def test_refusals(digits):
    model, x, y = digits
    with pytest.raises(UsageError, match=r"L0.*Linf, L2 and L1"):
        play(Square(queries=3), model, x[:2], Untargeted(y[:2]), L0(eps=3))
    for settings in ({"queries": 0}, {"restarts": 0}, {"p_init": 0.0}, {"p_init": 1.5}, {"schedule": "fast"}):
        with pytest.raises(UsageError, match=next(iter(settings))):
            Square(**settings)
