"""AAER's terms against their formulas written out row by row, their gradients in closed form and by differences."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.aaer import AAER, terms
from advkit.defenses.adversarial.one_step import take
from advkit.defenses.adversarial.single_step import FGSMAT, FGSMRS, NFGSM
from advkit.models.torch import TorchModel
from advkit.training.loop import Recipe, fit

LAMBDAS = (0.7, 2.5, 1.5)
K = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def logits(seed, rows=6):
    return torch.randn(rows, K, generator=generator(seed), dtype=torch.float64)


Y = torch.tensor([0, 1, 2, 3, 0, 1])


def pushed(before, y, by):
    """Logits after a step: the true class moved by `by` [B]; up lowers the loss (abnormal), down raises it."""
    after = before.clone()
    after[torch.arange(len(y)), y] += torch.tensor(by, dtype=before.dtype)
    return after


BEFORE = logits(0)
CASES = {
    "mixed": (BEFORE, pushed(BEFORE, Y, [2.0, -0.5, 1.5, -0.3, -0.2, 0.9])),
    "mixed, AV < NV": (BEFORE, pushed(BEFORE, Y, [0.1, -2.0, 0.2, -1.5, -1.0, 0.3])),
    "none": (BEFORE, pushed(BEFORE, Y, [-2.0, -0.5, -1.5, -0.3, -0.2, -0.9])),
    "all": (BEFORE, pushed(BEFORE, Y, [2.0, 0.5, 1.5, 0.3, 0.2, 0.9])),
    "ties": (BEFORE, pushed(BEFORE, Y, [0.0, -0.5, 0.0, -0.3, 0.0, 1.0])),
    "nothing but ties": (BEFORE, BEFORE.clone()),
    "random": (logits(1), logits(2)),
}


def by_hand(before, after, y, lambdas, ce_grad, apply_to_all=False):
    """(loss, gradient with respect to `after`) by loops over rows and classes, from the paper's formulas."""
    rows = len(y)

    def loss_of(row):
        return math.log(sum(math.exp(v) for v in row.tolist()))

    start = [loss_of(before[i]) - before[i, y[i]].item() for i in range(rows)]
    end = [loss_of(after[i]) - after[i, y[i]].item() for i in range(rows)]
    bad = [i for i in range(rows) if start[i] - end[i] > 1e-12]  # ties are ties beyond round-off, too
    good = [i for i in range(rows) if i not in bad]
    square = [sum((after[i, c] - before[i, c]).item() ** 2 for c in range(K)) for i in range(rows)]
    softmax = after.softmax(1)
    pull = softmax - functional.one_hot(y, K)
    loss, gradient = sum(end) / rows, pull / rows
    av = sum(square[i] for i in bad) / len(bad) if bad else 0.0
    nv = sum(square[i] for i in good) / len(good) if good else 0.0
    drop = sum(start[i] - end[i] for i in bad) / len(bad) if bad else 0.0
    applies = bad and (good or apply_to_all)
    if applies:
        scale = lambdas[0] * len(bad) / rows
        loss += scale * (lambdas[1] * drop + lambdas[2] * max(av - nv, 0.0))
        gradient = gradient.clone()
        for i in bad:
            if ce_grad:
                gradient[i] -= scale * lambdas[1] * pull[i] / len(bad)
            if av > nv:
                gradient[i] += scale * lambdas[2] * 2 * (after[i] - before[i]) / len(bad)
    return loss, gradient, bad, drop, av, nv


@pytest.mark.parametrize("when_all", ["skip", "apply"])
@pytest.mark.parametrize("ce_grad", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_terms_are_their_formulas(case, ce_grad, when_all):
    before, after = (each.clone().requires_grad_() for each in CASES[case])
    found = terms(before, after, Y, LAMBDAS, ce_grad, when_all=when_all)
    loss, gradient, bad, drop, av, nv = by_hand(*CASES[case], Y, LAMBDAS, ce_grad, when_all == "apply")
    assert found.abnormal.nonzero().flatten().tolist() == bad
    assert found.loss.item() == pytest.approx(loss, abs=1e-12)
    assert (found.drop.item(), found.moved.item(), found.normal.item()) == pytest.approx((drop, av, nv), abs=1e-12)
    to_after, to_before = torch.autograd.grad(found.loss, (after, before), allow_unused=True)
    assert torch.allclose(to_after, gradient, atol=1e-12)
    assert to_before is None  # what was before the step is a constant
    assert not found.normal.requires_grad
    assert found.drop.requires_grad == ce_grad


def test_the_cases_are_what_they_are_called():
    kinds = {}
    for name, (before, after) in CASES.items():
        _, _, bad, _, av, nv = by_hand(before, after, Y, LAMBDAS, False)
        kinds[name] = (len(bad), av > nv)
    assert kinds["mixed"] == (3, True)
    assert kinds["mixed, AV < NV"] == (3, False)
    assert kinds["none"][0] == kinds["nothing but ties"][0] == 0
    assert kinds["all"][0] == 6
    assert kinds["ties"][0] == 1


@pytest.mark.parametrize("case", ["mixed", "mixed, AV < NV", "random"])
@pytest.mark.parametrize("ce_grad", [False, True])
def test_gradients_by_finite_differences(case, ce_grad):
    before, after = CASES[case]
    leaf = after.clone().requires_grad_()
    (analytic,) = torch.autograd.grad(terms(before, leaf, Y, LAMBDAS, ce_grad).loss, leaf)
    held = terms(before, after, Y, LAMBDAS)
    share = held.abnormal.double().mean()

    def loss(z):
        # what is a constant to the gradient stays where it was: NV, and without ce_grad the drop
        now = terms(before, z, Y, LAMBDAS)
        drop = now.drop if ce_grad else held.drop
        pushed_apart = (now.moved - held.normal).clamp(min=0)
        return (now.ce + LAMBDAS[0] * share * (LAMBDAS[1] * drop + LAMBDAS[2] * pushed_apart)).item()

    assert loss(after) == pytest.approx(terms(before, after, Y, LAMBDAS, ce_grad).loss.item(), abs=1e-12)
    h = 1e-6
    for place in range(after.numel()):
        up, down = (after.clone() for _ in range(2))
        up.view(-1)[place] += h
        down.view(-1)[place] -= h
        assert (loss(up) - loss(down)) / (2 * h) == pytest.approx(analytic.view(-1)[place].item(), abs=1e-8)


def test_without_ce_grad_lambda2_moves_the_loss_and_no_gradient():
    before, after = CASES["mixed"]
    found = []
    for l2 in (0.0, 2.5, 100.0):
        leaf = after.clone().requires_grad_()
        loss = terms(before, leaf, Y, (1.0, l2, 1.5)).loss
        found.append((loss.item(), torch.autograd.grad(loss, leaf)[0]))
    assert found[0][0] < found[1][0] < found[2][0]
    assert all(torch.equal(found[0][1], each[1]) for each in found)
    leaf = after.clone().requires_grad_()
    (other,) = torch.autograd.grad(terms(before, leaf, Y, (1.0, 2.5, 1.5), True).loss, leaf)
    assert not torch.allclose(other, found[0][1])


def test_logits_are_not_centred():
    # A constant c on all of a row's logits changes no loss, and AV by K c^2.
    before, after = CASES["mixed"]
    bad = terms(before, after, Y, LAMBDAS).abnormal
    shifted = before.clone()
    shifted[bad] = after[bad] - 3.0
    found = terms(shifted, after, Y, LAMBDAS)
    # softmax is as before the shift, so up to round-off these rows are ties: make them abnormal by a hair
    shifted[bad, Y[bad]] -= 1e-9
    found = terms(shifted, after, Y, LAMBDAS)
    assert found.moved.item() == pytest.approx(K * 9.0, rel=1e-6)
    assert found.drop.item() == pytest.approx(0.0, abs=1e-8)


def test_a_constant_on_every_logit_leaves_the_mask_and_the_cross_entropy():
    before, after = CASES["mixed"]
    one, other = terms(before, after, Y, LAMBDAS), terms(before + 5.0, after - 2.0, Y, LAMBDAS)
    assert torch.equal(one.abnormal, other.abnormal)
    assert one.ce.item() == pytest.approx(other.ce.item(), abs=1e-12)
    assert one.drop.item() == pytest.approx(other.drop.item(), abs=1e-12)


def test_half_precision_logits_are_compared_in_float32():
    before, after = (each.to(torch.bfloat16) for each in CASES["mixed"])
    found = terms(before, after, Y, LAMBDAS)
    wide = terms(before.float(), after.float(), Y, LAMBDAS)
    assert found.drop.dtype == torch.float32
    assert torch.equal(found.abnormal, wide.abnormal)
    assert torch.equal(found.drop, wide.drop)
    assert torch.equal(found.moved, wide.moved)


# ---- in training


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    return TorchModel(module, Box(0.0, 1.0), 3)


def toy(n=96):
    y = torch.arange(n) % 3
    x = (0.5 * torch.rand(n, 6, generator=generator(5)) + 0.2 * functional.one_hot(y, 6)).clamp(0, 1)
    return Data(x, y, Box(0.0, 1.0), 3, "toy")


RNG = RowRng.from_ids(3, ["run"])


def trained(defense, epochs=1):
    recipe = Recipe(epochs=epochs, batch_size=32, lr=0.02, validation=0.0, select="last")
    return fit(network(), toy(), defense.objective(), recipe, RNG, progress=False)


@pytest.mark.parametrize(("base", "kind"), [("fgsm_rs", FGSMRS), ("n_fgsm", NFGSM), ("fgsm_at", FGSMAT)])
@pytest.mark.parametrize("off", [{"lambda1": 0.0}, {"lambda2": 0.0, "lambda3": 0.0}])
def test_without_weights_it_is_the_base_method_to_the_bit(base, kind, off):
    one, other = trained(AAER(eps=0.3, base=base, **off)), trained(kind(eps=0.3))  # three steps
    assert one.last.state_sha256() == other.last.state_sha256()
    assert one.log[0].loss == other.log[0].loss
    with_it = trained(AAER(eps=0.3, base=base, lambda3=50.0), epochs=4)
    assert with_it.last.state_sha256() != trained(kind(eps=0.3), epochs=4).last.state_sha256()


@pytest.mark.parametrize("ce_grad", [False, True])
def test_loss_of_a_batch(ce_grad):
    x, y = toy().x[:40], toy().y[:40]
    rows, rng = torch.arange(40), RowRng.from_ids(0, [str(i) for i in range(40)])
    defense = AAER(eps=0.4, lambda1=1.0, lambda2=4.0, lambda3=4.0, ce_grad=ce_grad)
    model, twin = network(), network()
    model.module.train()
    twin.module.train()
    objective = defense.objective()
    loss = objective.loss(model, x, y, rows, rng)
    move = take(twin, x, y, defense.ball(twin.space), FGSMRS().step, rng)
    with torch.no_grad():
        before = functional.cross_entropy(move.before, y, reduction="none")
    expected = terms(move.before, twin(move.end), y, (1.0, 4.0, 4.0), ce_grad)
    assert torch.equal(loss, expected.loss)
    assert torch.allclose(before.mean(), functional.cross_entropy(move.before, y))
    figures = objective.noted()
    assert figures["abnormal_share"] == pytest.approx(expected.abnormal.double().mean().item())
    assert figures["aaer_drop"] == pytest.approx(expected.drop.item(), abs=1e-6)
    assert figures["aaer_moved"] == pytest.approx(expected.moved.item(), rel=1e-5)
    assert figures["aaer_regulariser"] == pytest.approx(expected.regulariser.item(), abs=1e-6)
    assert not objective.noted()


def test_warm_up_scales_the_penalty_by_epochs_done():
    class Spy(type(AAER().objective())):
        scales: list[float] = []

        def outer(self, model, x, y, move, after, rng) -> Tensor:
            loss = super().outer(model, x, y, move, after, rng)
            full = terms(move.before, after, y, self.aaer.lambdas)
            if full.regulariser > 0:
                self.scales.append(((loss - full.ce) / full.regulariser).item())
            return loss

    recipe = Recipe(epochs=6, batch_size=96, lr=0.05, validation=0.0, select="last")
    defense = AAER(eps=0.6, warm_up=4)
    fit(network(), toy(), Spy(defense), recipe, RNG, progress=False)
    assert Spy.scales
    assert all(min(abs(scale - k / 4) for k in range(5)) < 1e-3 for scale in Spy.scales)
    assert Spy.scales == sorted(Spy.scales)
    assert trained(AAER(eps=0.6, warm_up=10**9)).last.state_sha256() == trained(FGSMRS(eps=0.6)).last.state_sha256()


@pytest.mark.slow
@pytest.mark.parametrize(("lambda2", "said"), [(1e6, True), (0.5, False)])
def test_a_penalty_that_dominates_is_said(lambda2, said, caplog):
    caplog.set_level(logging.WARNING, logger="advkit")
    data = toy(
        3_200
    )  # 64 steps, of which 50 in a row must have abnormal examples: N-FGSM's long steps make some in all
    recipe = Recipe(epochs=1, batch_size=50, lr=1e-5, validation=0.0, select="last")
    defense = AAER(eps=0.9, base="n_fgsm", lambda2=lambda2)
    fit(network(), data, defense.objective(), recipe, RNG, progress=False)
    assert ("more than 5 times the cross-entropy" in caplog.text) == said


def test_base_settings_reach_the_step():
    defense = DEFENSES.build("aaer:base=[n_fgsm:noise=1.5,step_size=0.5],eps=0.1")
    assert (defense.step.noise, defense.step.size, defense.step.clip) == (1.5, 0.5, False)
    assert DEFENSES.build(DEFENSES.spec(defense)) == defense
    assert AAER().step == FGSMRS().step
