"""Input transformations: what they do to images, and what the two attackers make of them."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

from advkit.attacks.wrappers import averaged
from advkit.core.errors import BadModel, UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.inputs.base import InputDefense
from advkit.defenses.inputs.bit_depth import BitDepth
from advkit.defenses.inputs.random_resize import RandomResize, placed
from advkit.evaluation.api import evaluate
from advkit.evaluation.plan import Request, plan
from advkit.models.torch import TorchModel
from advkit.testing import check_defense
from advkit.testing.victims import network, normal, uniform
from advkit.threat_models.goals.untargeted import Untargeted

EPS = "linf:eps=0.1"


# Bit depth


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_values_land_on_the_nearest_level(bits):
    x = uniform(0, 4, 2, 6, 6)
    levels = torch.arange(2**bits) / (2**bits - 1)
    nearest = levels[(x.unsqueeze(-1) - levels).abs().argmin(-1)]
    assert torch.allclose(BitDepth(bits=bits).transform(x), nearest, atol=1e-6)


def test_eight_bit_images_keep_their_bits():
    x = torch.arange(256).reshape(1, 1, 16, 16) / 255
    assert torch.equal(BitDepth(bits=8).transform(x), x)


@pytest.mark.parametrize("spec", ["bit-depth:bits=0", "bit-depth:bits=17", "random-resize:smallest=0"])
def test_settings_without_meaning_are_refused(spec):
    with pytest.raises(UsageError):
        DEFENSES.build(spec)


# Resizing and padding


@pytest.mark.parametrize("how", ["nearest", "bilinear"])
def test_every_image_is_resized_and_padded_as_torch_does_it(how):
    x = uniform(1, 6, 3, 13, 17)
    tall, wide = torch.tensor([13.0, 12, 9, 5, 13, 1]), torch.tensor([17.0, 16, 9, 6, 12, 2])
    top, left = torch.tensor([0.0, 1, 4, 8, 0, 12]), torch.tensor([0.0, 1, 8, 11, 5, 0])
    found = placed(x, tall, wide, top, left, how)
    extra = {} if how == "nearest" else {"align_corners": False}
    for i, (h, w, a, b) in enumerate(zip(*(v.long().tolist() for v in (tall, wide, top, left)), strict=True)):
        small = functional.interpolate(x[i : i + 1], size=(h, w), mode=how, **extra)
        expected = functional.pad(small, (b, 17 - w - b, a, 13 - h - a))
        assert torch.allclose(found[i : i + 1], expected, atol=5e-6)


def test_sizes_and_places_are_drawn_evenly_and_per_image():
    # A white image shows where it was put.
    rows, side = 20_000, 20
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        z = RandomResize(smallest=0.9).transform(torch.ones(rows, 1, side, side))
    shown = z[:, 0].amax(2)
    tall, top = shown.sum(1).long(), shown.argmax(1)
    for size in (18, 19, 20):
        share = (tall == size).float().mean().item()
        assert abs(share - 1 / 3) < 5 * (2 / 9 / rows) ** 0.5
        for place in range(side - size + 1):
            found = (top[tall == size] == place).float().mean().item()
            assert abs(found - 1 / (side - size + 1)) < 5 * (0.25 / (rows / 3)) ** 0.5
    assert torch.equal(z.sum((1, 2, 3)).long(), tall * tall)


def test_the_whole_size_leaves_images_alone():
    x = uniform(2, 4, 2, 9, 9)
    with torch.random.fork_rng(devices=[]):
        assert torch.equal(RandomResize(smallest=1.0).transform(x), x)


def test_rows_that_are_no_images_are_refused():
    with pytest.raises(BadModel, match=r"\[B, C, H, W\]"):
        RandomResize().transform(uniform(3, 4, 9))


# As defenses


@dataclass(frozen=True, kw_only=True)
class Coarse(InputDefense):
    """A defense of somebody else's, as short as the base class promises."""

    levels: int = 4

    def transform(self, x):
        return (x * self.levels).round() / self.levels

    def backward(self, x):
        return x


@dataclass(frozen=True, kw_only=True)
class Masked(Coarse):
    """The same with a view that does not help: it gives the attacker no gradient either."""

    def backward(self, x):
        return 0 * x


def test_the_kit_tells_an_honest_view_from_another():
    check_defense(Coarse())
    with pytest.raises(AssertionError, match="honest_view"):
        check_defense(Masked())


@pytest.mark.parametrize("spec", ["bit-depth:bits=4", "random-resize:draws=4"])
def test_settings_are_part_of_the_protected_models_hash(spec):
    model = network()
    one, twin, other = (
        DEFENSES.build(each).protect(model, None, None).describe() for each in (spec, spec, spec.partition(":")[0])
    )
    assert one == twin
    assert one.state_sha256 != other.state_sha256
    assert one.randomized == spec.startswith("random")


@pytest.fixture(scope="module")
def digits_cnn(digits):
    """A small convolutional network for digits, so that resizing has images to work on."""
    data = digits.training()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 32), nn.ReLU(), nn.Linear(32, 10)
        )
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(8):
            for rows in torch.randperm(len(data)).split(128):
                loss = functional.cross_entropy(net(data.x[rows]), data.y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for parameter in net.parameters():
        parameter.grad = None
    return TorchModel(net.eval(), Box(shape=(1, 8, 8)), 10, name="digits-cnn")


@pytest.mark.slow
def test_both_attackers_stand_in_the_report(digits_cnn):
    settings = {"task": "digits", "threat_model": "linf:eps=0.2", "n": 60, "device": "cpu"}
    report = evaluate("pgd:steps=10", "bit-depth:bits=2", model=digits_cnn, **settings)
    data = report.to_dict()
    adaptive, oblivious = data["metrics"]["robust_accuracy"], data["metrics"]["oblivious_robust_accuracy"]
    assert adaptive["denominator"] == oblivious["denominator"] == 60
    names = {attack["name"]: bool(attack.get("beside")) for attack in data["attacks"]}
    assert names == {"pgd:steps=10": False, "pgd:steps=10@undefended": True}
    assert data["threat_model"]["adaptive"] is True
    assert data["defense"]["is_differentiable"] is False
    assert [f["severity"] for f in report.flags if f["id"] == "not_differentiable"] == ["info"]
    assert not [f for f in report.flags if f["id"] == "zero_gradient"]
    # The attack without the view does not move a single row: it has no gradient to follow.
    alone = TorchModel(_Alone(digits_cnn.module).eval(), digits_cnn.space, 10)
    blind = evaluate("pgd:steps=10,start=origin", model=alone, **settings)
    assert blind.metrics["robust_accuracy"]["value"] == blind.clean_accuracy > adaptive["value"] + 0.1
    json.dumps(data)


class _Alone(nn.Module):
    """The same rounding, without a view."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(BitDepth(bits=2).transform(x))


def test_an_oblivious_attacker_who_wins_is_a_finding(digits_cnn):
    @dataclass(frozen=True, kw_only=True)
    class Misled(BitDepth):
        """Its view points the attacker the wrong way."""

        def backward(self, x):
            return -x

    report = evaluate("pgd:steps=10", Misled(bits=3), task="digits", model=digits_cnn, threat_model=EPS, n=60)
    metrics = report.metrics
    assert metrics["oblivious_robust_accuracy"]["value"] < metrics["robust_accuracy"]["value"] - 0.1
    (flag,) = [f for f in report.flags if f["id"] == "black_box_beats_white_box"]
    assert flag["severity"] == "unreliable"
    assert flag["attack"] == "pgd:steps=10@undefended"


def test_a_suite_leaves_its_place_to_one_long_attack(digits_cnn):
    settings = {"task": "digits", "model": digits_cnn, "threat_model": EPS, "n": 20, "device": "cpu"}
    (companion,) = plan(Request(attack="lean", defense="bit-depth:bits=3", **settings)).companions
    assert str(companion.case.label) == "apgd-ce@undefended"
    assert companion.case.surrogates[0][1].module is digits_cnn.module
    assert plan(Request(attack="lean", defense="bit-depth:bits=3", beside=False, **settings)).companions == ()


@pytest.mark.slow
def test_the_oblivious_attacker_plays_by_the_same_rules(digits_cnn):
    settings = {"task": "digits", "model": digits_cnn, "n": 6, "device": "cpu"}
    for attack, threat in (
        ("cw_topk:k=1,budget=9x5", "minimum-l2"),
        ("square:queries=30", "linf:eps=0.1,access=scores"),
    ):
        resolved = plan(Request(attack=attack, defense="bit-depth:bits=3", threat_model=threat, **settings))
        (companion,) = resolved.companions
        assert companion.case.threat == resolved.case.threat
        assert companion.case.surrogates[0][1] is resolved.case.victim.undefended
    # a threat model without a radius: the nearest point on the bare model, shown to the defended one
    report = evaluate("cw_topk:k=1,budget=9x5", "bit-depth:bits=3", threat_model="minimum-l2", **settings)
    assert report.metrics["oblivious_robust_accuracy"]["denominator"] == 6


def test_a_random_defense_is_attacked_through_its_draws(digits_cnn):
    settings = {"task": "digits", "model": digits_cnn, "threat_model": EPS, "n": 24, "device": "cpu"}
    report = evaluate("pgd:steps=5", "random-resize:smallest=0.8,draws=6", **settings)
    data = report.to_dict()
    (pgd,) = [attack for attack in data["attacks"] if not attack.get("beside")]
    assert data["defense"]["is_randomized"]
    # Each of the five gradients of each row went through six draws.
    assert pgd["cost"]["backward"] == 6 * 5 * pgd["n_attacked"]
    assert [f["severity"] for f in report.flags if f["id"] == "randomized_output"] == ["warning"]


@pytest.mark.parametrize("draws", [1, 5, 20])
def test_averaging_finds_the_expected_gradient_of_a_random_resize(draws):
    """On a linear model the expectation over sizes and places, and the variance around it, are sums over 14 cases."""
    weight, side, rows = normal(6, 2, 64), 8, 256
    bare = TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False)).eval(), Box(shape=(1, 8, 8)), 2)
    with torch.no_grad():
        bare.module[1].weight.copy_(weight)

    cases, shares = [], []
    for size in (6, 7, 8):
        for top in range(side - size + 1):
            for left in range(side - size + 1):
                leaf = torch.zeros(1, 1, side, side, requires_grad=True)
                z = placed(leaf, *(torch.tensor([float(v)]) for v in (size, size, top, left)), "nearest")
                margin = bare(z)[:, 0] - bare(z)[:, 1]
                cases.append(torch.autograd.grad(margin.sum(), leaf)[0].flatten())
                shares.append(1 / 3 / (side - size + 1) ** 2)
    exact, share = torch.stack(cases), torch.tensor(shares)[:, None]
    expected = (share * exact).sum(0)
    variance = (share * (exact - expected).square()).sum().item()

    victim = RandomResize(smallest=0.75, draws=draws).protect(bare, None, None)
    x, goal = uniform(7, 1, 1, 8, 8).expand(rows, -1, -1, -1), Untargeted(torch.zeros(rows, dtype=torch.long))
    lanes = Lanes(chunk=rows, multiple=1)
    for oracle in (
        averaged(MeteredOracle(victim, rows, lanes=lanes), draws),  # pgd:eot=N and apgd:eot=N
        MeteredOracle(victim.attacker_view(), rows, lanes=lanes),  # what every attack sees of the defense
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8)
            found = oracle.gradient(x, goal.under("margin"))[1].flatten(1)
        off = (found - expected).square().sum(1)
        assert off.mean().item() == pytest.approx(variance / draws, rel=0.15)
        assert (found.mean(0) - expected).square().sum().item() < 3 * variance / draws / rows


def test_without_a_model_it_goes_around_the_tasks_undefended_one(digits):
    asked = {"task": "fashion-mnist", "threat_model": EPS, "n": 8, "device": "cpu"}
    resolved = plan(Request(attack="pgd", defense="bit-depth:bits=4", **asked))
    assert resolved.victim.origin.startswith("zoo:")
    bare = plan(Request(attack="pgd", defense="none", **asked)).victim
    assert resolved.victim.model.undefended.state_sha256() == bare.model.state_sha256()
