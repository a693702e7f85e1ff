"""Auto-PGD against the published schedule and the reference implementation."""

from __future__ import annotations

import pytest
import torch

from advkit.attacks.gradient.apgd import APGD, APGDCE, APGDMargin, checkpoints
from advkit.attacks.gradient.targeted import APGDT
from advkit.core.errors import UsageError
from advkit.core.spaces import Box
from advkit.models.torch import TorchModel
from advkit.testing.play import play
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

# Kind of ball, radius, rows of 150 on which two random starts may disagree (as many as two seeds of the reference).
RADII = {"Linf": (Linf, 0.08, 3), "L2": (L2, 0.45, 3), "L1": (L1, 1.6, 8)}


def test_checkpoints_are_the_published_ones():
    assert checkpoints(100) == (22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(10) == (3, 5, 6, 7, 8, 9, 10)
    # The recurrence of the paper in exact rationals.
    from fractions import Fraction
    from math import ceil

    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)) <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    for steps in (1, 7, 33, 50, 250):
        assert checkpoints(steps) == tuple(sorted({ceil(q * steps) for q in p[1:]}))


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_robust_flags_agree_with_the_reference(digits, norm):
    reference = pytest.importorskip("pyautoattack.autopgd_base")
    model, x, y = digits
    x, y = x[:150], y[:150]
    kind, eps, starts = RADII[norm]
    ours = play(APGDCE(steps=50), model, x, Untargeted(y), kind(eps=eps))
    with torch.random.fork_rng(devices=[]):
        theirs = reference.APGDAttack(
            model.module, n_iter=50, norm=norm, eps=eps, n_restarts=1, seed=0, loss="ce", device="cpu", verbose=False
        )
        with torch.no_grad():
            broken = model(theirs.perturb(x, y)).argmax(1) != y
    assert 0.15 < broken.float().mean() < 0.85
    assert (ours.reached != broken).sum() <= starts
    assert ours.reached.sum() >= broken.sum() - 2


def test_margin_loss_sees_through_the_scale_of_the_logits(digits):
    model, x, y = digits
    x, y = x[:100], y[:100]

    class Scaled(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, z):
            return 1e6 * self.inner(z)

    scaled = TorchModel(Scaled(model.module).eval(), model.space, 10)
    goal, ball = Untargeted(y), Linf(eps=0.1)
    plain = play(APGDMargin(steps=30), model, x, goal, ball).reached
    margin = play(APGDMargin(steps=30), scaled, x, goal, ball).reached
    cross_entropy = play(APGDCE(steps=30), scaled, x, goal, ball).reached
    assert (plain != margin).sum() <= 2
    assert margin.sum() > cross_entropy.sum() + 20


def test_passes_of_a_row_that_does_not_fall(digits):
    model, x, y = digits
    meter = play(APGD(steps=12, restarts=2), model, x[:20], Untargeted(y[:20]), Linf(eps=1e-4)).meter
    assert (meter.backwards == 2 * 12).all()
    assert (meter.forwards == 2 * 13).all()


def test_steps_below_the_first_checkpoint_and_one_step_work(digits):
    model, x, y = digits
    for steps in (1, 2):
        z = play(APGD(steps=steps), model, x[:10], Untargeted(y[:10]), Linf(eps=0.05)).z
        assert (z != x[:10]).flatten(1).any(1).all()


def test_targets_are_reached(digits):
    model, x, y = digits
    targets = (y[:60] + 1) % 10
    strong = play(APGD(steps=60, loss="margin"), model, x[:60], Targeted(targets), Linf(eps=0.35))
    assert strong.reached.float().mean() > 0.9
    weak = play(APGD(steps=60, loss="margin"), model, x[:60], Targeted(targets), Linf(eps=0.08))
    assert weak.reached.sum() < strong.reached.sum()


def test_at_least_as_strong_as_pgd_with_as_many_steps(digits):
    from advkit.attacks.gradient.pgd import PGD

    model, x, y = digits
    goal, ball = Untargeted(y[:200]), Linf(eps=0.08)
    apgd = play(APGD(steps=40), model, x[:200], goal, ball).reached.sum()
    pgd = play(PGD(steps=40), model, x[:200], goal, ball).reached.sum()
    assert apgd >= pgd - 2


class Moat(torch.nn.Module):
    """Score of class 1 over class 0: flat, until the first coordinate is further than .9 from a half."""

    def forward(self, x):
        far = torch.relu((x[:, 0] - 0.5).abs() - 0.9)
        return torch.stack([torch.full_like(far, 0.05), far], 1)


@pytest.mark.parametrize("attack", [APGDMargin, lambda **more: APGDT(targets=0, loss="margin", together=2, **more)])
def test_runs_from_outside_the_ball_leave_a_flat_neighbourhood(attack):
    """Where a point of the unit ball's surface in 8 dimensions lies, inside it is flat to 99.9 %; at three times the
    distance the slope begins at a first coordinate of .3, beyond which 43 % of the sphere lie."""
    victim = TorchModel(Moat(), space=Box(-5.0, 5.0), classes=2)
    x = torch.full((200, 8), 0.5)
    ball = L2(eps=1.0, box=Box(-5.0, 5.0))
    goal = Untargeted(torch.zeros(200, dtype=torch.long))
    inside = play(attack(steps=20), victim, x, goal, ball)
    outside = play(attack(steps=20, wider=3.0), victim, x, goal, ball)
    assert inside.reached.float().mean() < 0.02
    assert 0.25 < outside.reached.float().mean() < 0.55
    assert ball.admits(outside.z, x).all()


def test_a_run_from_outside_costs_two_answers_more(digits):
    model, x, y = digits
    x, y = x[:20], y[:20]
    for norm in (Linf, L2, L1):
        hopeless = play(APGDCE(steps=20, wider=3.0), model, x, Untargeted(y), norm(eps=1e-4))
        assert not hopeless.reached.any()
        assert (hopeless.meter.backwards == 20).all()
        assert (hopeless.meter.forwards == 23).all()
        assert norm(eps=1e-4).admits(hopeless.z, x).all()


def test_l0_and_settings_out_of_range_are_refused(digits):
    model, x, y = digits
    with pytest.raises(UsageError, match=r"L0.*Linf, L2 and L1"):
        play(APGD(), model, x[:2], Untargeted(y[:2]), L0(eps=3))
    with pytest.raises(UsageError, match="steps"):
        APGD(steps=0)
    with pytest.raises(UsageError, match=r"wider"):
        APGD(wider=0.5)
