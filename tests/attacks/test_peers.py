"""Attacks of other packages: the oracle as a torch module, and the adapters."""

from __future__ import annotations

import importlib.util
import random
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from advkit.attacks import ATTACKS
from advkit.attacks.peers import ART, Foolbox, TorchAttacks, foreign_randomness, peer_package, read_settings
from advkit.core.errors import AccessDenied, BudgetExhausted, MissingExtra, UnknownName, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Outcome
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.testing.play import play
from advkit.testing.victims import linear, uniform
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.minimum import MinimumL2
from advkit.threat_models.sparse import L0


def streams(rows):
    return RowRng.from_ids(0, [f"row {i}" for i in range(rows)])


class TestDifferentiable:
    def test_answers_and_gradients_are_the_models(self, digits):
        model, x, y = digits
        oracle = MeteredOracle(model, 20)
        module = oracle.differentiable(x[:20])
        leaf = x[:20].clone().requires_grad_()
        answer = module(leaf)
        assert torch.equal(answer, model(x[:20]))
        nn.functional.cross_entropy(answer, y[:20], reduction="sum").backward()
        _, gradient, _ = MeteredOracle(model, 20).gradient(x[:20], Untargeted(y[:20]))
        torch.testing.assert_close(leaf.grad, -gradient)
        assert oracle.meter.forwards.tolist() == [1] * 20
        assert oracle.meter.backwards.tolist() == [1] * 20

    def test_the_models_parameters_stay_out_of_it(self, digits):
        model, x, _ = digits
        before = [p.grad for p in model.module.parameters()]
        module = MeteredOracle(model, 4).differentiable(x[:4])
        assert sum(p.numel() for p in module.parameters()) == 0
        assert next(module.parameters()).device == x.device
        module(x[:4].clone().requires_grad_()).sum().backward()
        assert all(p.requires_grad for p in model.module.parameters())
        assert all(p.grad is old for p, old in zip(model.module.parameters(), before, strict=True))
        module.train()
        assert not model.module.training

    def test_each_backward_counts_once(self, digits):
        model, x, _ = digits
        oracle = MeteredOracle(model, 4)
        leaf = x[:4].clone().requires_grad_()
        answer = oracle.differentiable(x[:4])(leaf)
        for column in range(3):
            torch.autograd.grad(answer[:, column].sum(), leaf, retain_graph=True)
        assert oracle.meter.forwards.tolist() == [1] * 4
        assert oracle.meter.backwards.tolist() == [3] * 4

    def test_subsets_and_copies_are_told_apart_by_the_nearest_origin(self, digits):
        model, x, _ = digits
        oracle = MeteredOracle(model, 10)
        module = oracle.differentiable(x[:10])
        rows = torch.tensor([7, 2, 2])
        leaf = (x[rows] + 0.05 * torch.randn_like(x[rows])).requires_grad_()
        module(leaf).sum().backward()
        module(x[rows])
        assert oracle.meter.forwards.tolist() == [0, 0, 4, 0, 0, 0, 0, 2, 0, 0]
        assert oracle.meter.backwards.tolist() == [0, 0, 2, 0, 0, 0, 0, 1, 0, 0]

    def test_a_view_counts_into_the_shared_meter(self, digits):
        model, x, _ = digits
        oracle = MeteredOracle(model, 6)
        rows = torch.tensor([5, 1, 3])
        module = oracle.take(rows).differentiable(x[rows])
        module(x[rows])
        module(x[rows[:1]].clone().requires_grad_()).sum().backward()
        assert oracle.meter.forwards.tolist() == [0, 1, 0, 1, 0, 2]
        assert oracle.meter.backwards.tolist() == [0, 0, 0, 0, 0, 1]

    def test_access_is_checked(self, digits):
        model, x, _ = digits
        scores = MeteredOracle(model, 4, Access.SCORES).differentiable(x[:4])
        assert torch.equal(scores(x[:4]), model(x[:4]))
        with pytest.raises(AccessDenied, match="gradient"):
            scores(x[:4].clone().requires_grad_())
        labels = MeteredOracle(model, 4, Access.LABELS).differentiable(x[:4])(x[:4])
        assert labels.sum(1).tolist() == [1.0] * 4
        assert torch.equal(labels.argmax(1), model(x[:4]).argmax(1))
        with pytest.raises(AccessDenied, match="answer"):
            MeteredOracle(model, 4, Access.NOTHING).differentiable(x[:4])(x[:4])

    def test_the_budget_ends(self, digits):
        model, x, _ = digits
        module = MeteredOracle(model, 4, queries=2).differentiable(x[:4])
        module(x[:4])
        module(x[:1])
        module(x[1:2])
        with pytest.raises(BudgetExhausted):
            module(x[:1])

    def test_broken_gradients_are_zeroed_and_remembered(self):
        def model(x):
            return torch.stack([x.sqrt().sum(1), x.sum(1)], 1)

        x = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
        oracle = MeteredOracle(model, 2)
        leaf = x.clone().requires_grad_()
        oracle.differentiable(x)(leaf)[:, 0].sum().backward()
        assert leaf.grad.tolist() == [[0.0, 0.5], [0.5, 0.5]]
        assert oracle.meter.non_finite.tolist() == [True, False]

    def test_zero_gradients_are_remembered(self):
        x = torch.rand(3, 2)
        oracle = MeteredOracle(lambda z: z * torch.tensor([[0.0], [1.0], [0.0]]), 3)
        oracle.differentiable(x)(x.clone().requires_grad_()).sum().backward()
        assert oracle.meter.zero_gradient.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("steps=20,rel_stepsize=1/40,loss=ce", {"steps": 20, "rel_stepsize": 1 / 40, "loss": "ce"}),
        ("flag=true,other=False,nothing=none,eta=1e-3", {"flag": True, "other": False, "nothing": None, "eta": 1e-3}),
        ("text=[a,b]", {"text": "a,b"}),
    ],
)
def test_settings(text, expected):
    assert read_settings(text) == expected


@pytest.mark.parametrize("text", ["steps", "a=1,a=2"])
def test_settings_that_are_none(text):
    with pytest.raises(UsageError):
        Foolbox(name="LinfPGD", settings=text)


@pytest.mark.parametrize(
    "spec",
    [
        "foolbox:LinfPGD",
        "foolbox:LinfPGD,settings=[steps=20,rel_stepsize=0.1]",
        "torchattacks:Square,settings=n_queries=100,access=scores",
        "art:DeepFool",
    ],
)
def test_specs(spec):
    assert ATTACKS.spec(ATTACKS.build(spec)) == spec


def test_what_an_adapter_needs_is_what_it_was_told():
    assert ATTACKS.build("foolbox:LinfPGD").needs == Access.GRADIENTS
    assert ATTACKS.build("foolbox:L2BoundaryAttack,access=labels").needs == Access.LABELS


def test_global_randomness_is_lent():
    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002

    before = states()
    drawn = []
    for _ in range(2):
        with foreign_randomness(7):
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))  # noqa: NPY002
            torch.manual_seed(3)
    assert drawn[0] == drawn[1]
    assert states() == before


@pytest.mark.parametrize("name", ["foolbox", "torchattacks", "art"])
def test_a_missing_package_is_named_with_its_extra(digits, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    model, x, y = digits
    extra = "torchattacks" if name == "torchattacks" else "peers"
    with pytest.raises(MissingExtra, match=rf"advkit\[{extra}\]"):
        ATTACKS.build(f"{name}:PGD")(MeteredOracle(model, 4), x[:4], Untargeted(y[:4]), Linf(0.1), streams(4))


def test_robustbench_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "robustbench", None)
    monkeypatch.setitem(sys.modules, "robustbench.utils", None)
    with pytest.raises(MissingExtra, match=r"pip install robustbench 'setuptools<82'.*autoattack from github"):
        MODELS.build("robustbench:Standard")((3, 32, 32), 10, streams(1))


def test_robustbench_names_are_checked():
    pytest.importorskip("robustbench", exc_type=ImportError)
    with pytest.raises(UnknownName, match="Carmon2019Unlabeled"):
        MODELS.build("robustbench:Carmon2019Unlabelled")((3, 32, 32), 10, streams(1))


class TestFoolbox:
    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("foolbox")

    def test_the_points_are_foolboxs_own(self, digits):
        model, x, y = digits
        x, y = x[:32], y[:32]
        oracle = MeteredOracle(model, 32)
        attack = Foolbox(name="LinfPGD", settings="steps=10,rel_stepsize=0.2")
        z = attack(oracle, x, Untargeted(y), Linf(0.1), streams(32))
        foolbox = peer_package("foolbox")
        seed = int(streams(32).at("peer").integers(2**31 - 1, torch.empty(32, 1))[0])
        with foreign_randomness(seed):
            theirs = foolbox.attacks.LinfPGD(steps=10, rel_stepsize=0.2)(
                foolbox.PyTorchModel(model.module, bounds=(0, 1), device="cpu"),
                x,
                foolbox.Misclassification(y),
                epsilons=0.1,
            )[1]
        assert torch.equal(z, theirs)
        assert Linf(0.1).admits(z, x).all()
        assert oracle.meter.backwards.tolist() == [10] * 32
        assert oracle.meter.forwards.tolist() == [11] * 32  # and foolbox's own verdict

    def test_the_same_seed_gives_the_same_points(self, digits):
        model, x, y = digits
        attack = Foolbox(name="L2PGD", settings="steps=3")

        def run(seed):
            rng = RowRng.from_ids(seed, [str(i) for i in range(8)])
            return attack(MeteredOracle(model, 8), x[:8], Untargeted(y[:8]), L2(0.5), rng)

        assert torch.equal(run(0), run(0))
        assert not torch.equal(run(0), run(1))

    def test_targets_are_reached(self, digits):
        model, x, y = digits
        goal = Targeted((y[:16] + 1) % 10)
        z = Foolbox(name="LinfPGD", settings="steps=40,rel_stepsize=0.1")(
            MeteredOracle(model, 16), x[:16], goal, Linf(0.4), streams(16)
        )
        assert goal.reached(model(z)).float().mean() > 0.8

    def test_label_only_attacks_get_labels_only(self, digits):
        model, x, y = digits
        attack = Foolbox(
            name="SaltAndPepperNoiseAttack", settings="steps=20,across_channels=false", access=Access.LABELS
        )
        oracle = MeteredOracle(model, 8, Access.LABELS)
        z = attack(oracle, x[:8], Untargeted(y[:8]), L2(4.0), streams(8))
        assert L2(4.0).admits(z, x[:8]).all()
        assert int(oracle.meter.backwards.sum()) == 0
        with pytest.raises(AccessDenied):
            Foolbox(name="LinfPGD")(oracle, x[:8], Untargeted(y[:8]), Linf(0.1), streams(8))

    def test_what_does_not_fit_is_said(self, digits):
        model, x, y = digits

        def run(attack, goal=None, ball=None):
            attack(MeteredOracle(model, 4), x[:4], goal or Untargeted(y[:4]), ball or Linf(0.1), streams(4))

        with pytest.raises(UnknownName, match="LinfPGD"):
            run(Foolbox(name="LinfPDG"))
        with pytest.raises(UnknownName, match="has no attack 'Attack'; did you mean 'GenAttack'"):
            run(Foolbox(name="Attack"))
        with pytest.raises(UsageError, match="L2"):
            run(Foolbox(name="LinfPGD"), ball=L2(0.5))
        with pytest.raises(UsageError, match="rel_stepsize"):
            run(Foolbox(name="LinfPGD", settings="stepz=3"))
        with pytest.raises(UsageError, match="Diverge"):
            run(Foolbox(name="LinfPGD"), goal=Diverge(model(x[:4])))
        with pytest.raises(UsageError, match="bound"):
            run(Foolbox(name="LinfPGD"), ball=Linf(0.1, box=Box(torch.zeros(1, 8, 8), 1.0)))

    @pytest.mark.parametrize("ball", [Linf(0.5), L2(3.0), L1(20.0)])
    @pytest.mark.parametrize("name", ["InversionAttack", "BinarySearchContrastReductionAttack", "DatasetAttack"])
    def test_a_free_distance_is_that_of_the_ball(self, digits, name, ball):
        model, x, y = digits
        x, y = x[:8], y[:8]
        attack = Foolbox(name=name, access=Access.LABELS)
        z = attack(MeteredOracle(model, 8, Access.LABELS), x, Untargeted(y), ball, streams(8))
        foolbox = peer_package("foolbox")
        norm = {"Linf": np.inf, "L2": 2, "L1": 1}[ball.norm]
        theirs = getattr(foolbox.attacks, name)(distance=foolbox.distances.LpDistance(norm))
        victim = foolbox.PyTorchModel(model.module, bounds=(0, 1), device="cpu")
        seed = int(streams(8).at("peer").integers(2**31 - 1, torch.empty(8, 1))[0])
        with foreign_randomness(seed):
            if name == "DatasetAttack":
                theirs.feed(victim, x)
            points = theirs(victim, x, foolbox.Misclassification(y), epsilons=ball.eps)[1]
        assert torch.equal(z, points)
        assert ball.admits(z, x).all()
        assert name != "DatasetAttack" or (ball.distance(z, x) > 0.3 * ball.eps).all()

    @pytest.mark.slow
    def test_pointwise_has_no_argument_for_its_distance_and_gets_it(self, digits):
        model, x, y = digits
        attack = Foolbox(name="PointwiseAttack", access=Access.LABELS)
        z = attack(MeteredOracle(model, 8, Access.LABELS), x[:8], Untargeted(y[:8]), L2(3.0), streams(8))
        assert L2(3.0).admits(z, x[:8]).all()
        assert (model(z).argmax(1) != y[:8]).float().mean() > 0.7

    @pytest.mark.slow
    def test_l0_points_come_back_into_the_ball(self, digits):
        model, x, y = digits
        z = Foolbox(name="L0FMNAttack")(MeteredOracle(model, 16), x[:16], Untargeted(y[:16]), L0(2), streams(16))
        assert L0(2).admits(z, x[:16]).all()
        z = Foolbox(name="L0FMNAttack")(MeteredOracle(model, 16), x[:16], Untargeted(y[:16]), L0(12), streams(16))
        assert (model(z).argmax(1) != y[:16]).float().mean() > 0.5

    @pytest.mark.parametrize("ball", [Linf(0.3), L2(2.0)])
    def test_a_constraint_is_the_norm_of_the_ball(self, digits, ball):
        model, x, y = digits
        settings = "steps=2,initial_gradient_eval_steps=20,max_gradient_eval_steps=50"
        attack = Foolbox(name="HopSkipJumpAttack", settings=settings, access=Access.LABELS)
        z = attack(MeteredOracle(model, 8, Access.LABELS), x[:8], Untargeted(y[:8]), ball, streams(8))
        assert ball.admits(z, x[:8]).all()
        assert (model(z).argmax(1) != y[:8]).float().mean() > 0.4
        with pytest.raises(UsageError, match="this ball is L1"):
            attack(MeteredOracle(model, 8, Access.LABELS), x[:8], Untargeted(y[:8]), L1(3.0), streams(8))

    @pytest.mark.slow
    def test_a_goal_that_a_class_does_not_serve_is_refused(self, digits):
        model, x, y = digits
        attack = Foolbox(name="GenAttack", settings="steps=40", access=Access.SCORES)
        targets = Targeted((y[:8] + 1) % 10)
        z = attack(MeteredOracle(model, 8, Access.SCORES), x[:8], targets, Linf(0.4), streams(8))
        assert targets.reached(model(z)).any()
        with pytest.raises(UsageError, match="goal targeted alone"):
            attack(MeteredOracle(model, 8, Access.SCORES), x[:8], Untargeted(y[:8]), Linf(0.4), streams(8))

    @pytest.mark.filterwarnings("ignore:torch.meshgrid")
    def test_points_moved_by_transformations_are_judged_in_the_ball(self, digits):
        model, x, y = digits
        attack = Foolbox(name="SpatialAttack", settings="max_translation=2", access=Access.LABELS)
        z = attack(MeteredOracle(model, 8, Access.LABELS), x[:8], Untargeted(y[:8]), L2(0.5), streams(8))
        assert L2(0.5).admits(z, x[:8]).all()


class TestTorchAttacks:
    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("torchattacks")

    def test_the_points_are_torchattacks_own(self, digits, capsys):
        model, x, y = digits
        x, y = x[:32], y[:32]
        attack = TorchAttacks(name="PGD", settings="steps=10,alpha=0.02,random_start=false")
        z = attack(MeteredOracle(model, 32), x, Untargeted(y), Linf(0.1), streams(32))
        theirs = peer_package("torchattacks").PGD(model.module, eps=0.1, alpha=0.02, steps=10, random_start=False)
        assert torch.equal(z, theirs(x, y))
        assert capsys.readouterr().out == ""

    def test_another_box_is_stretched(self, digits):
        model, x, y = digits
        x, y = x[:32], y[:32]
        attack = TorchAttacks(name="PGD", settings="steps=10,alpha=0.02,random_start=false")
        z = attack(MeteredOracle(model, 32), x, Untargeted(y), Linf(0.1), streams(32))

        def wide(w):
            return model((w + 1) / 2)

        ball = Linf(0.2, box=Box(-1.0, 1.0))
        w = attack(MeteredOracle(wide, 32), 2 * x - 1, Untargeted(y), ball, streams(32))
        assert ball.admits(w, 2 * x - 1).all()
        assert ((w + 1) / 2 - z).abs().gt(1e-5).float().mean() < 0.02

    @pytest.mark.slow
    def test_points_beyond_eps_of_an_attack_without_eps_come_back_into_the_ball(self, digits):
        model, x, y = digits
        x, y = x[:12], y[:12]
        attack = TorchAttacks(name="DeepFool", settings="steps=20")
        free = attack(MeteredOracle(model, 12), x, Untargeted(y), L2(100.0), streams(12))
        length = L2(1.0).distance(free, x)
        eps = float(length.median())
        z = attack(MeteredOracle(model, 12), x, Untargeted(y), L2(eps), streams(12))
        near = length <= eps
        assert torch.equal(z[near], free[near])
        assert torch.equal(z[~near], L2(eps).project(free[~near], x[~near]))
        assert 0 < int(near.sum()) < 12

    def test_its_own_seed_is_ours(self, digits):
        model, x, y = digits
        attack = TorchAttacks(name="Square", settings="n_queries=20", access=Access.SCORES)
        oracle = MeteredOracle(model, 8, Access.SCORES)
        before = torch.get_rng_state()
        z = attack(oracle, x[:8], Untargeted(y[:8]), Linf(0.1), streams(8))
        assert torch.equal(torch.get_rng_state(), before)
        other = attack(
            MeteredOracle(model, 8), x[:8], Untargeted(y[:8]), Linf(0.1), RowRng.from_ids(1, list("abcdefgh"))
        )
        assert not torch.equal(z, other)
        assert int(oracle.meter.forwards.min()) >= 1

    def test_what_does_not_fit_is_said(self, digits):
        model, x, y = digits

        def run(attack, goal=None, ball=None):
            attack(MeteredOracle(model, 4), x[:4], goal or Untargeted(y[:4]), ball or Linf(0.1), streams(4))

        with pytest.raises(UsageError, match="Linf"):
            run(TorchAttacks(name="PGD"), ball=L2(0.5))
        with pytest.raises(UsageError, match="L2"):
            run(TorchAttacks(name="PGDL2"))
        with pytest.raises(UsageError, match="threat model"):
            run(TorchAttacks(name="PGD", settings="eps=0.5"))
        with pytest.raises(UsageError, match="target"):
            run(TorchAttacks(name="DeepFool"), goal=Targeted((y[:4] + 1) % 10))

    def test_what_a_class_calls_its_radius_otherwise_gets_it(self, digits):
        model, x, y = digits
        wide = x[:8].repeat(1, 3, 1, 1)

        def grey(z):
            return model(z.mean(1, keepdim=True))

        for name in ("PIFGSM", "PIFGSMPP"):
            oracle = MeteredOracle(grey, 8)
            z = TorchAttacks(name=name)(oracle, wide, Untargeted(y[:8]), Linf(0.3), streams(8))
            assert Linf(0.3).admits(z, wide).all()
            assert (z - wide).abs().amax() > 0.29  # the class's own default is 16/255
            assert (grey(z).argmax(1) != y[:8]).float().mean() > 0.7
            with pytest.raises(UsageError, match="three channels"):
                TorchAttacks(name=name)(MeteredOracle(model, 8), x[:8], Untargeted(y[:8]), Linf(0.3), streams(8))
            told = TorchAttacks(name=name, settings="max_epsilon=0.1")
            with pytest.raises(UsageError, match="max_epsilon come from the threat model"):
                told(MeteredOracle(grey, 8), wide, Untargeted(y[:8]), Linf(0.3), streams(8))

    def test_step_sizes_follow_eps(self, digits):
        """With its 2/255 the class could not cross a ball of 0.4 in ten steps; a step of its own is kept."""
        model, x, y = digits
        x, y = x[:16], y[:16]
        theirs = peer_package("torchattacks").PGD

        def run(settings, eps):
            attack = TorchAttacks(name="PGD", settings=f"random_start=false,{settings}")
            return attack(MeteredOracle(model, 16), x, Untargeted(y), Linf(eps), streams(16))

        assert torch.equal(run("steps=3", 0.4), theirs(model.module, 0.4, 0.1, 3, False)(x, y))
        assert torch.equal(run("steps=3", 8 / 255), theirs(model.module, steps=3, random_start=False)(x, y))
        assert torch.equal(run("steps=3,alpha=0.02", 0.4), theirs(model.module, 0.4, 0.02, 3, False)(x, y))

    def test_fab_aims_at_no_class_and_says_so(self, digits):
        model, x, y = digits
        with pytest.raises(UsageError, match="fab-t"):
            TorchAttacks(name="FAB")(MeteredOracle(model, 4), x[:4], Targeted((y[:4] + 1) % 10), Linf(0.1), streams(4))

    def test_the_number_of_classes_is_the_models(self, digits, monkeypatch):
        """The class's default is 10, whatever the model."""
        model, x, y = digits
        got = []

        class Counting(peer_package("torchattacks").APGDT):
            def __init__(self, model, norm="Linf", eps=0.1, steps=2, seed=0, n_classes=10):
                got.append(n_classes)
                super().__init__(model, norm=norm, eps=eps, steps=steps, seed=seed, n_classes=n_classes)

        monkeypatch.setattr(peer_package("torchattacks"), "APGDT", Counting)
        kept = (y < 4).nonzero().squeeze(1)[:6]
        oracle = MeteredOracle(lambda z: model(z)[:, :4], 6)
        TorchAttacks(name="APGDT")(oracle, x[kept], Untargeted(y[kept]), Linf(0.3), streams(6))
        assert got == [4]

    @pytest.mark.parametrize(
        ("name", "settings"),
        [("CW", "c=10,steps=40,lr=0.05"), ("EADL1", "max_iterations=20"), ("EADEN", "max_iterations=20")],
    )
    def test_a_number_added_to_all_scores_changes_no_point(self, name, settings):
        """By themselves these classes lose their gradient where scores are negative: CW returns its input."""
        victim, x = linear(classes=3), uniform(3, 8, 8) * 0.4 + 0.3
        labels = victim(x).argmax(1)

        def points(shift):
            oracle = MeteredOracle(lambda z: victim(z) + shift, len(x))
            attack = TorchAttacks(name=name, settings=settings)
            return attack(oracle, x, Untargeted(labels), MinimumL2(), streams(len(x)))

        below, above = points(-64.0), points(64.0)
        assert bool((below != x).any())
        torch.testing.assert_close(below, above, atol=1e-3, rtol=0)

    def test_jsma_without_targets_aims_at_a_class_that_there_is(self):
        """By itself it aims at (label + 1) modulo 10, and raises IndexError on samples of the last class of three."""
        victim, x = linear(features=16, classes=3), uniform(0, 12, 1, 4, 4)
        labels = victim(x).argmax(1)
        z = TorchAttacks(name="JSMA", settings="theta=1,gamma=1")(
            MeteredOracle(victim, 12), x, Untargeted(labels), L0(16), streams(12)
        )
        broken = victim(z).argmax(1) != labels
        assert bool((labels == 2).any())
        assert bool(broken.any())
        assert bool((victim(z).argmax(1)[broken] == (labels[broken] + 1) % 3).all())

    @pytest.mark.parametrize("name", sorted(TorchAttacks.refused))
    def test_what_can_not_be_run_is_refused_with_the_reason(self, digits, name):
        model, x, y = digits
        assert hasattr(peer_package("torchattacks"), name)
        with pytest.raises(UsageError, match="can't be run here: it"):
            TorchAttacks(name=name)(MeteredOracle(model, 4), x[:4], Untargeted(y[:4]), Linf(0.1), streams(4))


def test_a_package_that_one_attack_needs_besides_is_named_with_the_extra(digits, monkeypatch):
    class Needy:
        def __init__(self, model, eps=0.1):
            raise ImportError("No module named 'numba'")

    package = ModuleType("torchattacks")
    package.Needy = Needy
    monkeypatch.setitem(sys.modules, "torchattacks", package)
    model, x, y = digits
    with pytest.raises(MissingExtra, match=r"numba.*advkit\[torchattacks\]"):
        TorchAttacks(name="Needy")(MeteredOracle(model, 4), x[:4], Untargeted(y[:4]), Linf(0.1), streams(4))


def test_who_hands_over_float64_is_answered_in_the_victims_own_type(digits):
    model, x, _ = digits
    oracle = MeteredOracle(model, 4)
    leaf = x[:4].double().requires_grad_()
    answer = oracle.differentiable(x[:4])(leaf)
    assert torch.equal(answer, model(x[:4]))
    answer.sum().backward()
    assert leaf.grad.dtype == torch.float64


class TestART:
    @pytest.fixture(autouse=True)
    def _needs(self):
        pytest.importorskip("art")

    @pytest.mark.parametrize(
        ("name", "settings", "ball"),
        [
            ("ProjectedGradientDescent", "max_iter=10,eps_step=0.02", Linf(0.1)),
            ("ProjectedGradientDescent", "max_iter=10,eps_step=0.2", L2(0.7)),
            ("ProjectedGradientDescent", "max_iter=10,eps_step=1.0", L1(3.0)),
            ("DeepFool", "max_iter=20", L2(0.7)),
        ],
    )
    def test_rows_fall_inside_the_ball(self, digits, name, settings, ball):
        model, x, y = digits
        oracle = MeteredOracle(model, 24)
        z = ART(name=name, settings=settings)(oracle, x[:24], Untargeted(y[:24]), ball, streams(24))
        assert ball.admits(z, x[:24]).all()
        assert (model(z).argmax(1) != y[:24]).float().mean() > 0.2
        assert int(oracle.meter.backwards.sum()) > 0

    def test_targets(self, digits):
        model, x, y = digits
        goal = Targeted((y[:16] + 1) % 10)
        attack = ART(name="ProjectedGradientDescent", settings="max_iter=30,eps_step=0.05")
        z = attack(MeteredOracle(model, 16), x[:16], goal, Linf(0.4), streams(16))
        assert goal.reached(model(z)).float().mean() > 0.8

    @pytest.mark.parametrize(
        ("name", "settings", "ball", "least"),
        [
            ("SaliencyMapMethod", "", L0(30), 0.4),  # labels to leave would be taken for classes to reach
            ("SimBA", "max_iter=200", L2(3.0), 0.2),  # probabilities, one row at a time
            ("VirtualAdversarialMethod", "max_iter=2,finite_diff=1/1000", L2(3.0), 0.2),
            ("BasicIterativeMethod", "max_iter=10", Linf(0.02), 0.0),  # its step of 0.1 would be larger than eps
            ("CarliniL0Method", "max_iter=5,binary_search_steps=2", L0(40), 0.0),
        ],
    )
    def test_what_single_classes_want(self, digits, name, settings, ball, least):
        model, x, y = digits
        z = ART(name=name, settings=settings)(MeteredOracle(model, 10), x[:10], Untargeted(y[:10]), ball, streams(10))
        assert ball.admits(z, x[:10]).all()
        assert (model(z).argmax(1) != y[:10]).float().mean() >= least

    def test_classes_to_reach_are_handed_over(self, digits):
        model, x, y = digits
        goal = Targeted((y[:10] + 1) % 10)
        z = ART(name="SaliencyMapMethod")(MeteredOracle(model, 10), x[:10], goal, L0(40), streams(10))
        assert goal.reached(model(z)).float().mean() > 0.3
        with pytest.raises(UsageError, match="goal targeted"):
            ART(name="TargetedUniversalPerturbation")(
                MeteredOracle(model, 4), x[:4], Untargeted(y[:4]), Linf(0.1), streams(4)
            )

    @pytest.mark.parametrize("name", sorted(ART.refused))
    def test_what_can_not_be_run_is_refused_with_the_reason(self, digits, name):
        model, x, y = digits
        assert hasattr(peer_package("art.attacks.evasion"), name)
        with pytest.raises(UsageError, match="can't be run here: it"):
            ART(name=name)(MeteredOracle(model, 4), x[:4], Untargeted(y[:4]), Linf(0.1), streams(4))


def test_the_harness_judges_what_the_package_returns(digits, tmp_path, monkeypatch):
    """A package that leaves the ball gets no win, whatever it claims."""
    from advkit.evaluation.api import resolve
    from advkit.evaluation.execute import run
    from advkit.evaluation.run.engine import open_store

    class Cheat:
        def __init__(self, model, eps=0.1):
            self.model, self.eps = model, eps

        def __call__(self, x, y):
            return (x + 3 * self.eps * torch.randn_like(x).sign()).clamp(0, 1)

    package = ModuleType("torchattacks")
    package.Cheat = Cheat
    monkeypatch.setitem(sys.modules, "torchattacks", package)
    model, x, y = digits
    victim = TorchModel(model.module, Box(shape=(1, 8, 8)), 10)
    case = resolve("torchattacks:Cheat", "none", (x[:20], y[:20]), victim, "linf:eps=0.1", device="cpu")
    records = run(case, open_store(case, tmp_path))
    assert {record.outcome for record in records} == {Outcome.INVALID}


def test_the_harness_refuses_a_class_the_package_lacks_before_it_starts(digits):
    pytest.importorskip("foolbox")
    from advkit.evaluation.api import evaluate

    model, x, y = digits
    with pytest.raises(UnknownName, match="foolbox"):
        evaluate("foolbox:LinfPDG", "none", (x[:20], y[:20]), model, "linf:eps=0.1", device="cpu")


def test_a_peer_in_the_harness(digits):
    pytest.importorskip("foolbox")
    from advkit.evaluation.api import evaluate

    model, x, y = digits
    found = {}
    for attack in ("pgd:steps=20", "foolbox:LinfPGD,settings=[steps=20,rel_stepsize=0.1]"):
        report = evaluate(attack, "none", (x[:100], y[:100]), model, "linf:eps=0.1", device="cpu").to_dict()
        found[attack.partition(":")[0]] = report["metrics"]["robust_accuracy"]["value"]
        (entry,) = report["attacks"]
        assert entry["cost"]["backward"] > 0
    assert 0 < found["pgd"] <= found["foolbox"] <= found["pgd"] + 0.05


# --- without a radius, and with a budget


def adv_lib():
    """Skip by name where adv-lib is not installed: it imports visdom, so that an import alone does not tell."""
    if importlib.util.find_spec("adv_lib") is None:
        pytest.skip("adv-lib is not installed: pip install --no-deps adv-lib==0.2.8 tqdm")


@pytest.mark.parametrize(
    ("package", "spec", "threat"),
    [
        ("foolbox", "foolbox:DDNAttack", "minimum-l2"),
        ("foolbox", "foolbox:LinfDeepFoolAttack", "minimum-linf"),
        ("torchattacks", "torchattacks:CW", "minimum-l2"),
        ("art", "art:DeepFool", "minimum-l2"),
        ("adv_lib", "advlib:ddn", "minimum-l2"),
        ("adv_lib", "advlib:df", "minimum-linf"),
        ("adv_lib", "advlib:alma,settings=[num_steps=60]", "minimum-l1"),
    ],
)
def test_attacks_that_look_for_the_nearest_point_need_no_radius(package, spec, threat):
    pytest.importorskip(package) if package != "adv_lib" else adv_lib()
    victim, x = linear(classes=3), uniform(3, 8, 8) * 0.4 + 0.3
    labels = victim(x).argmax(1)
    ball = THREAT_MODELS.build(threat)
    played = play(ATTACKS.build(spec), victim, x, Untargeted(labels), ball)
    exact = victim.distance(x, labels, threat.removeprefix("minimum-"))
    distance = ball.distance(played.z, x)
    found = played.reached
    assert bool(found.any())
    assert bool((distance[found] >= exact[found] * (1 - 1e-4) - 1e-6).all())
    if "alma" not in spec and "CW" not in spec:
        assert bool((distance[found] <= 1.1 * exact[found] + 0.02).all())


@pytest.mark.parametrize("spec", ["foolbox:LinfPGD", "torchattacks:PGD", "art:BasicIterativeMethod", "advlib:pgd_linf"])
def test_attacks_within_a_radius_are_refused_where_there_is_none(spec):
    package = spec.partition(":")[0]
    adv_lib() if package == "advlib" else pytest.importorskip(package)
    victim, x = linear(), uniform(3, 4, 8)
    with pytest.raises(UsageError, match=r"works within a radius.*linf:eps="):
        play(ATTACKS.build(spec), victim, x, Untargeted(victim(x).argmax(1)), THREAT_MODELS.build("minimum-linf"))


@pytest.mark.parametrize("spec", ["advlib:ddn", "foolbox:DDNAttack", "foolbox:L2ProjectedGradientDescentAttack"])
def test_where_passes_end_the_best_point_so_far_counts(spec):
    package = spec.partition(":")[0]
    adv_lib() if package == "advlib" else pytest.importorskip(package)
    victim, x = linear(), uniform(3, 12, 8)
    labels = victim(x).argmax(1)
    for ball in [MinimumL2()] if "Projected" not in spec else [L2(0.5)]:
        played = play(ATTACKS.build(spec), victim, x, Untargeted(labels), ball, propagations=41)
        assert int((played.meter.forwards + played.meter.backwards).max()) <= 41
        assert bool(ball.admits(played.z, x).all())
        reachable = victim.distance(x, labels, "l2") <= (0.1 if "Projected" in spec else 10)  # it starts up to 0.5 away
        assert bool(played.reached[reachable].all())


def test_advlib_says_what_it_does_not_have():
    adv_lib()
    victim, x = linear(), uniform(3, 2, 8)
    goal = Untargeted(victim(x).argmax(1))
    for spec, threat, says in (
        ("advlib:dnn", "minimum-l2", "adv-lib has no attack 'dnn'; did you mean 'ddn'"),
        ("advlib:ddn", "minimum-linf", "works in L2, this threat model is Linf"),
        ("advlib:perc_al", "minimum-l2", "looks for small differences of colour"),
        ("advlib:ddn,settings=[stepps=3]", "minimum-l2", "has no setting stepps; it has .*steps"),
        ("advlib:fmn,settings=[norm=1]", "minimum-l2", "norm come from the threat model"),
    ):
        with pytest.raises((UsageError, UnknownName), match=says):
            play(ATTACKS.build(spec), victim, x, goal, THREAT_MODELS.build(threat))
    assert "visdom" not in sys.modules or importlib.util.find_spec("visdom") is not None


def test_advlib_in_a_ball_of_another_box():
    adv_lib()
    victim, x = linear(classes=4, space=Box(-2.0, 3.0)), uniform(3, 8, 8) * 5 - 2
    goal, ball = Untargeted(victim(x).argmax(1)), Linf(0.5, box=Box(-2.0, 3.0))
    for spec in ("advlib:pgd_linf", "advlib:apgd"):
        played = play(ATTACKS.build(spec), victim, x, goal, ball)
        assert bool(ball.admits(played.z, x).all())
        assert bool((played.z != x).any())
