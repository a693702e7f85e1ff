"""The kit names the law that a broken part breaks, and its victims are what they claim."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from advkit.attacks.base import Best, affords
from advkit.attacks.gradient.pgd import PGD
from advkit.core.errors import UsageError
from advkit.core.protocols import Access
from advkit.models.torch import TorchModel
from advkit.testing import (
    ATTACK_LAWS,
    BALLS,
    DEFENSE_LAWS,
    SCENARIO_LAWS,
    TEXT_LAWS,
    THREAT_LAWS,
    TOKEN_LAWS,
    Leaver,
    Quadratic,
    check_attack,
    check_defense,
    check_threat_model,
    exhaustive,
    linear,
    nan_off,
    network,
    noisy,
    quantised,
)
from advkit.testing.attack_laws import USUALLY
from advkit.testing.victims import uniform
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L2, Linf

LINF = {"linf": BALLS["linf"]}


@dataclass(frozen=True, kw_only=True)
class Broken:
    """PGD with one thing wrong."""

    needs: ClassVar[Access] = Access.GRADIENTS
    wrong: str
    steps: int = 20

    def __call__(self, oracle, x, goal, ball, rng, /):
        if self.wrong == "global randomness":
            torch.rand(1)
        if self.wrong == "caller's tensors":
            x[0, 0] += 0
            x.add_(1e-3).clamp_(0, 1)
        if self.wrong == "batch":
            ball = replace(ball, eps=ball.eps * (1 - 0.01 / len(x)))
        if self.wrong == "seed":
            z = ball.sample(x, rng)
            z = torch.rand(x.shape, generator=torch.Generator().manual_seed(id(z) % 2**31)) * 0.001 + x
            return ball.project(z, x)
        if self.wrong == "untouched":
            return x.clone()
        if self.wrong == "weights":
            oracle.model.module[0].weight.requires_grad_(False)
        if self.wrong == "access":
            return ball.project(x + ball.steepest(rng.normal(x), x), x)
        if self.wrong == "unmetered":
            oracle.model(x)
        out = PGD(steps=self.steps)(oracle, x, goal, ball, rng)
        return out * torch.nan if self.wrong == "nan" else out


@dataclass(frozen=True, kw_only=True)
class Returns:
    """What is no tensor of the rows' shape."""

    needs: ClassVar[Access] = Access.GRADIENTS
    what: str

    def __call__(self, oracle, x, goal, ball, rng, /):
        return {"nothing": None, "an array": x.numpy(), "a list": [x], "a row": x[:1]}[self.what]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("nothing", "NoneType; expected a tensor"),
        ("an array", "ndarray;"),
        ("a list", "list;"),
        ("a row", "1 rows for"),
    ],
)
def test_an_answer_that_is_no_tensor_is_told_under_a_law(what, said):
    with pytest.raises(AssertionError, match=rf"law stays_admitted: Returns\(.*it returned {said}"):
        check_attack(Returns(what=what))


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("global randomness", "leaves_no_trace"),
        ("caller's tensors", "leaves_no_trace"),
        ("batch", "batch_of_one"),
        ("seed", "one_step_moves|same_seed_same_bits|closed_form|more_eps_never_helps"),
        ("untouched", "one_step_moves"),
        ("access", "one_step_moves|closed_form|more_"),
        ("nan", "stays_admitted"),
    ],
)
def test_broken_attacks_are_named(wrong, law):
    with pytest.raises(AssertionError, match=f"law ({law})"):
        check_attack(Broken(wrong=wrong), LINF)


def test_an_attack_that_leaves_the_ball_is_named():
    with pytest.raises(AssertionError, match="law stays_admitted"):
        check_attack(Leaver())


def test_unmetered_use_of_the_model_is_named():
    from advkit.testing.attack_laws import check_law, subjects

    subject = subjects(Broken(wrong="unmetered"), LINF)["linf"]
    with pytest.raises(AssertionError, match="law metered_is_counted"):
        check_law("metered_is_counted", subject)


def test_broken_balls_are_named():
    class Loose(Linf):
        def project(self, z, origin):
            return self.box.clamp(z)

    class Biased(L2):
        def sample(self, origin, rng):
            return origin.clone()

    with pytest.raises(AssertionError, match="law projection_lands_inside"):
        check_threat_model(Loose(eps=0.1))
    with pytest.raises(AssertionError, match="law samples_are_admitted_and_differ"):
        check_threat_model(Biased(eps=0.5))


class Wrapping:
    """A defense that puts something in front of the model."""

    needs_data: ClassVar[bool] = False
    claims: ClassVar[str] = ""

    def __init__(self, wrap):
        self.wrap = wrap

    def protect(self, model, data, rng):
        return self.wrap(model)


class Straight(TorchModel):
    """Quantised answers with an attacker's view that passes gradients through."""

    def __init__(self, model):
        self.plain = model
        super().__init__(quantised(model).module, model.space, model.classes)

    def attacker_view(self):
        return self.plain


def test_defenses_must_be_honest():
    check_defense(Wrapping(lambda model: model))
    check_defense(Wrapping(Straight))
    with pytest.raises(AssertionError, match=r"law honest_view.*no gradient"):
        check_defense(Wrapping(quantised))


def test_random_defenses_need_another_view():
    class Seeded(Wrapping):
        def protect(self, model, data, rng):
            return noisy(model, 0.05)

    with torch.random.fork_rng(devices=[]), pytest.raises(AssertionError, match=r"law honest_view.*vary"):
        check_defense(Seeded(None))


def test_linear_distances_are_those_of_the_boundary():
    victim = linear(classes=4, seed=3)
    x = uniform(0, 20, 8)
    labels = victim(x).argmax(1)
    w = victim.weight
    for norm, direction in (
        ("l2", lambda d: d / d.norm()),
        ("linf", lambda d: d.sign()),
        ("l1", lambda d: torch.where(d.abs() == d.abs().max(), d.sign(), 0.0)),
    ):
        distance = victim.distance(x, labels, norm)
        for row in range(20):
            label = int(labels[row])
            # Walk to every other class along the dual direction: the nearest one is crossed just there.
            ways = torch.stack([direction(w[k] - w[label]) for k in range(4) if k != label])
            assert (victim(x[row] + (distance[row] * 1.001).float() * ways).argmax(1) != label).any(), (norm, row)
            assert (victim(x[row] + (distance[row] * 0.999).float() * ways).argmax(1) == label).all(), (norm, row)


def test_l0_distance_is_the_fewest_entries_by_trying_all_subsets():
    from itertools import combinations

    victim = linear(features=5, seed=4)
    x = uniform(1, 12, 5)
    labels = victim(x).argmax(1)
    exact = victim.distance_l0(x, labels)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 5)
    for row in range(12):
        fewest = next(
            (
                k
                for k in range(1, 6)
                for chosen in combinations(range(5), k)
                if (
                    victim(torch.where(torch.isin(torch.arange(5), torch.tensor(chosen)), corners, x[row])).argmax(1)
                    != labels[row]
                ).any()
            ),
            float("inf"),
        )
        assert exact[row] == fewest


def test_quadratic_distance_and_exhaustive_search_agree():
    victim = Quadratic(torch.tensor([0.5, 0.5]), 0.25)
    x = uniform(2, 25, 2)
    labels = victim(x).argmax(1)
    ball = L2(eps=0.1)
    lowest = exhaustive(victim, Untargeted(labels), ball, x)
    clear = (victim.distance(x) - 0.1).abs() > 0.005
    inside_box = ((x > 0.1) & (x < 0.9)).all(1)
    assert (((lowest < 0) == (victim.distance(x) < 0.1)) | ~clear | ~inside_box).all()
    assert clear.sum() > 15


def test_broken_victims_break_as_announced():
    model = network()
    x = uniform(3, 6, 2, 6, 6)
    answer = model(x)
    off = nan_off(model, x)
    assert torch.equal(off(x), answer)
    assert off(x + 1e-3).isnan().all()
    leaf = x.clone().requires_grad_()
    assert torch.autograd.grad(quantised(model)(leaf).sum(), leaf)[0].abs().max() == 0
    with torch.random.fork_rng(devices=[]):
        assert not torch.equal(noisy(model)(x), noisy(model)(x))
    assert torch.equal(model(x), answer)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Searches: tries a step up and down along every coordinate, and keeps what lowers the loss."""

    needs: ClassVar[Access] = Access.SCORES
    queries: int = 200

    def __call__(self, oracle, x, goal, ball, rng, /):
        best = Best(x, goal)
        if not affords(oracle):
            return best.x
        best.offer(x, oracle(x))
        for question in range(min(self.queries, oracle.left if oracle.left is not None else self.queries) - 1):
            if not affords(oracle):
                break
            place, sign = (question // 2) % x[0].numel(), 1 - 2 * (question % 2)
            step = torch.zeros_like(x)
            step.flatten(1)[:, place] = sign
            z = ball.project(best.x + ball.steepest(step, best.x), x)
            best.offer(z, oracle(z))
        return best.x


class NoDataclass:
    """An attack without a line more than it needs."""

    needs = Access.GRADIENTS

    def __call__(self, oracle, x, goal, ball, rng, /):
        return PGD(steps=40, step_size=0.1)(oracle, x, goal, ball, rng)


@pytest.mark.slow
def test_a_search_may_hand_back_the_input():
    """Its first question about a row may find nothing better; a white-box step always moves."""
    check_attack(Coordinates(), LINF)


@pytest.mark.slow
def test_an_attack_need_not_be_a_dataclass():
    check_attack(NoDataclass(), LINF)


def test_a_broken_law_says_what_it_means_and_what_breaks_it_most_often():
    with pytest.raises(AssertionError) as said:
        check_attack(Broken(wrong="untouched"), LINF)
    lines = str(said.value).splitlines()
    assert lines[0].startswith("law one_step_moves: Broken(")
    assert "returned untouched" in lines[0]
    assert lines[1].startswith("The law: One step is enough to leave the origin")
    assert lines[2].startswith("Usually: ")
    assert set(USUALLY) == set(ATTACK_LAWS)
    laws = ATTACK_LAWS | TEXT_LAWS | THREAT_LAWS | TOKEN_LAWS | DEFENSE_LAWS | SCENARIO_LAWS
    assert all((law.__doc__ or "").strip() for law in laws.values()), "a law without a meaning"


def test_an_attack_that_raises_is_a_broken_law_with_its_name():
    @dataclass(frozen=True)
    class Raises(Coordinates):
        def __call__(self, oracle, x, goal, ball, rng, /):
            raise IndexError("out of rows") if len(x) > 2 else UsageError("only pairs")

    with pytest.raises(AssertionError, match=r"law accepts_a_ball.*only pairs"):
        check_attack(Raises(), LINF)

    @dataclass(frozen=True)
    class RaisesLater(Coordinates):
        def __call__(self, oracle, x, goal, ball, rng, /):
            if len(x) > 2:
                raise IndexError("out of rows")
            return super().__call__(oracle, x, goal, ball, rng)

    with pytest.raises(AssertionError, match=r"(?s)law stays_admitted.*IndexError: out of rows.*The law: "):
        check_attack(RaisesLater(), LINF)


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        (PGD, "is a class"),
        (lambda oracle, x, goal, ball, rng: x, "lacks needs"),
        (object(), "lacks needs, __call__"),
        (type("Words", (NoDataclass,), {"needs": "gradients"})(), "Access, such as GRADIENTS"),
    ],
)
def test_what_is_no_attack_is_said_at_once(attack, words):
    with pytest.raises(AssertionError, match=words):
        check_attack(attack)
