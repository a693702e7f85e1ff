"""BPDA and EOT: what the views answer, and the derivative they claim to have."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from advkit.attacks.gradient.apgd import APGDCE
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.wrappers import averaged as averaged_oracle
from advkit.core.errors import BadModel
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.models.torch import TorchModel, is_model
from advkit.models.views import Averaged, Preprocessed, averaged, identity, straight_through
from advkit.testing.victims import linear, network, noisy, normal, uniform
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf


def rounded(x):
    return (x * 3).round() / 3


def squared(x):
    return x.square()


def halved(x):
    return x[:, ::2]


def pooled(x):
    return x.reshape(len(x), -1, 2).mean(2)


def gradient(function, x, weight):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad((function(leaf) * weight).sum(), leaf)[0]


# straight_through


@pytest.mark.parametrize("backward", [identity, squared, torch.sin])
def test_the_answer_is_forwards_and_the_derivative_is_backwards(backward):
    x, weight = uniform(0, 5, 8), normal(1, 5, 8)
    function = straight_through(rounded, backward)
    assert torch.equal(function(x), rounded(x))
    assert torch.equal(function(x.clone().requires_grad_()), rounded(x))
    assert torch.equal(gradient(function, x, weight), gradient(backward, x, weight))
    assert gradient(rounded, x, weight).count_nonzero() == 0


def test_the_default_is_the_identity():
    x, weight = uniform(0, 5, 8), normal(1, 5, 8)
    assert torch.equal(gradient(straight_through(rounded), x, weight), weight)


def test_it_chains_with_what_is_around_it():
    x, weight = uniform(0, 5, 8).double(), normal(1, 5, 8).double()
    inner = straight_through(rounded, squared)
    found = gradient(lambda z: torch.sin(inner(torch.exp(z))), x, weight)
    e = torch.exp(x)
    assert torch.allclose(found, weight * torch.cos(rounded(e)) * 2 * e * e, rtol=1e-12)


def test_rows_do_not_meet_and_no_grad_works():
    x, weight = uniform(0, 6, 8), normal(1, 6, 8)
    function = straight_through(rounded, squared)
    with torch.no_grad():
        assert not function(x).requires_grad
    whole = gradient(function, x, weight)
    parts = torch.cat([gradient(function, a, b) for a, b in zip(x.split(2), weight.split(2), strict=True)])
    assert torch.equal(whole, parts)


def test_another_shape_needs_a_stand_in_of_that_shape():
    x, weight = uniform(0, 5, 8), normal(1, 5, 4)
    assert torch.equal(gradient(straight_through(halved, pooled), x, weight), gradient(pooled, x, weight))
    with pytest.raises(BadModel, match="identity"):
        straight_through(halved)(x)
    with pytest.raises(BadModel, match="must agree"):
        gradient(straight_through(halved, squared), x, weight)


def test_what_has_no_derivative_is_refused():
    x = uniform(0, 5, 8)
    with pytest.raises(BadModel, match="int64"):
        straight_through(lambda z: z.argmax(1))(x)
    with pytest.raises(BadModel, match="no gradient of its own"):
        gradient(straight_through(rounded, torch.Tensor.detach), x, torch.ones(5, 8))


def test_twice_is_refused_by_torch():
    leaf = uniform(0, 5, 8).requires_grad_()
    (first,) = torch.autograd.grad(straight_through(rounded, squared)(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_broken_gradient_attack_works_through_it():
    # A linear victim behind rounding: plain PGD sees no gradient, BPDA sees the linear model's.
    sound = linear(features=16, seed=3)
    x = uniform(4, 40, 16)
    model = Preprocessed(sound, straight_through(rounded, lambda z: 0 * z), backward=identity)
    labels = model(x).argmax(1)
    ball, attack = Linf(0.25).bind(sound.space), PGD(steps=10)

    def robust(view):
        rng = RowRng.from_ids(0, [str(i) for i in range(len(x))])
        z = attack(MeteredOracle(view, len(x)), x, Untargeted(labels), ball, rng)
        return int((model(z).argmax(1) == labels).sum())

    assert robust(model.attacker_view()) < robust(model) - 5


# Averages


def draws_of(deviation, draws, repeats=200, oracle=True, loss="margin"):
    """Gradients [repeats, rows, features] of noisy two-class victims, averaged on the one side or on the other."""
    weight = normal(5, 2, 6)

    class Gauss(nn.Module):
        """Noise on the weights, not on the input: a linear model's gradient would not feel that."""

        def forward(self, z):
            return z @ (weight + deviation * torch.randn_like(weight)).T

    model = TorchModel(Gauss().eval(), classes=2)
    x, goal = uniform(6, 3, 6), Untargeted(torch.zeros(3, dtype=torch.long)).under(loss)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        found = []
        for _ in range(repeats):
            asked = MeteredOracle(model if oracle else averaged(model, draws), 3)
            asked = averaged_oracle(asked, draws) if oracle else asked
            found.append(asked.gradient(x, goal)[1])
    return torch.stack(found), weight[0] - weight[1]


@pytest.mark.slow
@pytest.mark.parametrize("oracle", [True, False], ids=["eot", "view"])
@pytest.mark.parametrize("draws", [1, 4, 16])
def test_the_variance_of_the_gradient_falls_as_one_over_draws(draws, oracle):
    # The margin's gradient is W_0 - W_1 plus N(0, 2 deviation^2): mean and variance are known.
    found, slope = draws_of(0.5, draws, oracle=oracle)
    expected = 2 * 0.5**2 / draws
    rows = found[:, 0]  # the rows of a batch share each draw here
    count = rows.numel()
    assert rows.var(0, correction=1).mean().item() == pytest.approx(expected, rel=6 * (2 / count) ** 0.5)
    off = (rows.mean(0) - slope).abs().max().item()
    assert off < 5 * (expected / len(rows)) ** 0.5


@pytest.mark.parametrize("attack", [PGD(steps=3, eot=5), APGDCE(steps=3, eot=5)])
def test_an_attacks_eot_asks_for_every_draw(attack):
    once = type(attack)(steps=3)
    model, x = noisy(linear(), 0.01), uniform(8, 4, 8)
    costs = []
    for each in (once, attack):
        oracle = MeteredOracle(model, 4, decides=False)
        with torch.random.fork_rng(devices=[]):
            each(oracle, x, Untargeted(torch.zeros(4, dtype=torch.long)), Linf(0.1), RowRng.from_ids(0, list("abcd")))
        costs.append(oracle.meter.backwards)
    assert torch.equal(costs[1], 5 * costs[0])


def test_both_averages_multiply_and_are_counted():
    model = noisy(linear(), 0.1)
    view = averaged(averaged(model, 3), 4)
    assert view.passes == 12
    calls = []

    def counted(x):
        calls.append(len(x))
        return model(x)

    spy = Averaged(TorchModel(_Calls(counted).eval(), classes=2), 3)
    with torch.random.fork_rng(devices=[]):
        averaged_oracle(MeteredOracle(spy, 16), 4)(uniform(9, 16, 8))
    assert calls == [16] * 12


class _Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_fixed_draws_make_a_function_and_leave_the_generators_alone():
    model, x = noisy(linear(), 0.3), uniform(10, 5, 8)
    before = torch.get_rng_state()
    one, two, other = averaged(model, 4, seed=1), averaged(model, 4, seed=1), averaged(model, 4, seed=2)
    assert torch.equal(one(x), one(x))
    assert torch.equal(one(x), two(x))
    assert not torch.equal(one(x), other(x))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        assert torch.allclose(one(x), torch.stack([model(x) for _ in range(4)]).mean(0), atol=1e-6)


def test_one_draw_is_the_model_and_none_is_refused():
    model = linear()
    assert averaged(model, 1) is model
    with pytest.raises(BadModel, match="at least one draw"):
        averaged(model, 0)


# Preprocessed


def test_a_model_behind_a_transformation_is_a_model():
    sound, x = network(), uniform(11, 4, 2, 6, 6)
    model = Preprocessed(sound, rounded, backward=identity, label="thirds")
    view = model.attacker_view()
    assert is_model(model)
    assert is_model(view)
    assert torch.equal(model(x), sound(rounded(x)))
    assert torch.equal(view(x), model(x))
    weight = normal(12, 4, 3)
    leaf = rounded(x).requires_grad_()
    inner = torch.autograd.grad((sound(leaf) * weight).sum(), leaf)[0]
    assert torch.allclose(gradient(view, x, weight), inner, atol=1e-6)
    info = model.describe()
    assert (info.differentiable, info.randomized, info.classes) == (False, False, 3)
    assert info.name == "network behind thirds"
    assert model.undefended is sound
    assert model.to("cpu") is model
    assert view.attacker_view() is view


def test_hashes_tell_transformations_apart():
    sound = network()

    def sha(model):
        return model.describe().state_sha256

    named = [Preprocessed(sound, rounded, label=label) for label in ("a", "a", "b")]
    nameless = [Preprocessed(sound, rounded) for _ in range(2)]
    assert sha(named[0]) == sha(named[1])
    assert len({sha(sound), *map(sha, named[1:]), *map(sha, nameless)}) == 5
    assert sha(nameless[0].attacker_view()) == sha(nameless[0])


def test_views_nest():
    # Noise in front of rounding in front of a net: the outer view averages what the inner one straightens.
    sound, x = network(), uniform(13, 4, 2, 6, 6)
    inner = Preprocessed(sound, rounded, backward=identity, label="thirds")

    def shaken(z):
        return z + 0.1 * torch.randn_like(z)

    outer = Preprocessed(inner, shaken, randomized=True, draws=6, label="noise")
    assert outer.describe().randomized
    assert not outer.describe().differentiable
    view = outer.attacker_view()
    assert (view.draws, view.passes) == (6, 6)
    with torch.random.fork_rng(devices=[]):
        assert gradient(outer, x, torch.ones(4, 3)).count_nonzero() == 0
        assert gradient(view, x, normal(14, 4, 3)).count_nonzero() > 0


def test_a_differentiable_transformation_needs_no_view():
    model = Preprocessed(network(), squared, label="squared")
    assert model.attacker_view() is model
    assert model.describe().differentiable


def test_views_travel_to_other_processes():
    model = Preprocessed(network(), rounded, backward=squared, label="thirds")
    x = uniform(15, 3, 2, 6, 6)
    there = pickle.loads(pickle.dumps(model.attacker_view()))
    assert torch.equal(there(x), model(x))
    assert torch.equal(gradient(there, x, torch.ones(3, 3)), gradient(model.attacker_view(), x, torch.ones(3, 3)))
