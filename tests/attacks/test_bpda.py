"""BPDA around any gradient attack: what it replaces, what it leaves, and how it is planned."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import pytest
import torch

import advkit
from advkit.attacks import ATTACKS
from advkit.attacks.adaptive.bpda import BPDA
from advkit.core.errors import UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses.inputs.base import InputDefense
from advkit.defenses.inputs.random_resize import RandomResize
from advkit.models.torch import TorchModel
from advkit.models.views import Averaged
from advkit.testing.victims import network, uniform
from advkit.threat_models.goals.untargeted import Untargeted

ASKED = {"task": "digits", "model": "zoo:digits-mlp", "threat_model": "linf:eps=0.15", "n": 24, "device": "cpu"}


@dataclass(frozen=True, kw_only=True)
class Wall(InputDefense):
    """Rounding with a derivative of its own that is of no use: none at all."""

    def transform(self, x):
        return x + (torch.round(8 * x) / 8 - x).detach() - (x - x.detach())


def seen_gradient(model, through):
    """The gradient that an attack sees."""
    x = uniform(1, 4, 2, 6, 6)
    goal = Untargeted(torch.tensor([0, 1, 2, 0]))
    found = []

    @dataclass(frozen=True)
    class Look:
        needs = BPDA.needs

        def __call__(self, oracle, x, goal, ball, rng, /):
            found.append((oracle.gradient(x, goal), oracle.decides))
            return x

    attack = BPDA(attack="pgd", through=through)
    object.__setattr__(attack, "inner", Look())
    attack(MeteredOracle(model.attacker_view(), 4), x, goal, None, RowRng.from_ids(0, list("abcd")))
    return found[0]


def test_the_identitys_derivative_takes_the_place_of_the_transformations():
    model = network()
    victim = Wall().protect(model, None, None)
    x, goal = uniform(1, 4, 2, 6, 6), Untargeted(torch.tensor([0, 1, 2, 0]))
    (_, own, answer), _ = seen_gradient(victim, "own")
    assert own.abs().max() == 0
    (_, gradient, same), decides = seen_gradient(victim, "identity")
    assert decides
    assert torch.equal(same, answer)
    # the model's own gradient at the transformed point
    leaf = Wall().transform(x).detach().requires_grad_()
    (wanted,) = torch.autograd.grad(goal.loss(model(leaf)).sum(), leaf)
    assert torch.allclose(gradient, wanted, atol=1e-6)


def test_a_model_without_a_transformation_is_attacked_as_it_is():
    model = network()
    one, other = (seen_gradient(model, through)[0] for through in ("own", "identity"))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_averages_keep_their_draws():
    bare = TorchModel(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3)).eval(), Box(shape=(3, 4, 4)), 3)
    view = RandomResize(smallest=0.5, draws=3).protect(bare, None, None).attacker_view()
    assert isinstance(view, Averaged)
    straight = view.with_identity()
    assert isinstance(straight, Averaged)
    assert straight.draws == 3
    leaf = uniform(2, 2, 3, 4, 4).requires_grad_()
    with torch.random.fork_rng(devices=[]):
        (gradient,) = torch.autograd.grad(straight(leaf)[:, 0].sum(), leaf)
    weight = bare.module[1].weight[0].reshape(3, 4, 4)
    assert torch.allclose(gradient, weight.expand_as(gradient), atol=1e-6)


def test_it_breaks_what_the_defenses_own_derivative_hides():
    wall = Wall()
    hidden = advkit.evaluate(attack="pgd:steps=10,start=origin", defense=wall, beside=False, **ASKED)
    passed = advkit.evaluate(attack="bpda:[pgd:steps=10,start=origin]", defense=wall, beside=False, **ASKED)
    assert hidden.robust_accuracy == hidden.clean_accuracy > 0.8
    assert passed.robust_accuracy < 0.3


def test_both_is_the_worst_case_of_its_stages():
    asked = {"defense": "bit-depth:bits=3", **ASKED}
    report = advkit.evaluate(attack="bpda:[pgd:steps=3],through=both", **asked)
    stages = [entry["name"].rpartition("/")[2] for entry in report.attacks if not entry["beside"]]
    assert stages == ["own", "identity"]
    assert [entry["name"] for entry in report.attacks if entry["beside"]] == ["pgd:steps=3@undefended"]
    own = advkit.evaluate(attack="bpda:[pgd:steps=3],through=own", beside=False, **asked)
    assert report.robust_accuracy <= own.robust_accuracy


def test_specs_travel():
    for text in ("bpda:pgd", "bpda:[pgd:steps=3],through=both", "bpda:fgsm,through=own"):
        attack = ATTACKS.build(text)
        assert ATTACKS.build(ATTACKS.spec(attack)) == attack
        assert pickle.loads(pickle.dumps(attack)) == attack
    both = ATTACKS.build("bpda:[pgd:steps=3],through=both")
    assert [stage.name for stage in both.stages()] == ["own", "identity"]
    assert not isinstance(replace(both, through="own"), type(both))
    assert ATTACKS.build("bpda:[pgd:steps=3]").steps == 3


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("bpda:square", "needs no gradient"),
        ("bpda:auto", "name one attack on inputs"),
        ("bpda:online", "name one attack on inputs"),
        ("bpda:pgd,through=mine", "through"),
    ],
)
def test_what_has_nothing_to_replace_is_refused(spec, said):
    with pytest.raises(UsageError, match=said):
        ATTACKS.build(spec)
