"""Goals: losses against their formulas, strictness, abstentions, answers that are not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr, softmax

from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.rng import RowRng
from advkit.threat_models import GOALS
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.targeted import Targeted, TargetedRule
from advkit.threat_models.goals.untargeted import Untargeted, UntargetedRule

CLASSES = 6


@pytest.fixture
def scores():
    return torch.randn(50, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.fixture
def classes():
    return torch.randint(CLASSES, (50,), generator=torch.Generator().manual_seed(1))


def goals(classes, scores):
    reference = torch.zeros_like(scores).scatter(1, classes[:, None], 1.0)
    return Untargeted(classes), Targeted(classes), Diverge(reference)


def test_untargeted_losses(scores, classes):
    z, y = scores.numpy(), classes.numpy()
    rows = np.arange(50)
    other = np.where(np.eye(CLASSES, dtype=bool)[y], -np.inf, z).max(1)
    top = -np.sort(-z, axis=1)
    margin = z[rows, y] - other
    for name, expected in {
        "ce": log_softmax(z, axis=1)[rows, y],
        "margin": margin,
        "dlr": margin / (top[:, 0] - top[:, 2]),
    }.items():
        np.testing.assert_allclose(Untargeted(classes).under(name).loss(scores).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(Untargeted(classes).margin(scores).numpy(), margin)
    np.testing.assert_array_equal(Untargeted(classes).reached(scores).numpy(), z.argmax(1) != y)


def test_targeted_losses(scores, classes):
    z, t = scores.numpy(), classes.numpy()
    rows = np.arange(50)
    other = np.where(np.eye(CLASSES, dtype=bool)[t], -np.inf, z).max(1)
    top = -np.sort(-z, axis=1)
    margin = other - z[rows, t]
    for name, expected in {
        "ce": -log_softmax(z, axis=1)[rows, t],
        "margin": margin,
        "dlr": margin / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2),
    }.items():
        np.testing.assert_allclose(Targeted(classes).under(name).loss(scores).numpy(), expected, rtol=1e-9)
    np.testing.assert_allclose(Targeted(classes).margin(scores).numpy(), margin)
    np.testing.assert_array_equal(Targeted(classes).reached(scores).numpy(), z.argmax(1) == t)


def test_targeted_dlr_is_the_papers_while_the_true_class_leads(scores, classes):
    z = scores.numpy()
    top = -np.sort(-z, axis=1)
    y, t = z.argmax(1), z.argsort(1)[:, -3]
    rows = np.arange(50)
    paper = -(z[rows, y] - z[rows, t]) / (top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]))  # to be maximised
    np.testing.assert_allclose(Targeted(torch.as_tensor(t), "dlr").loss(scores).numpy(), -paper, rtol=1e-9)


def test_diverge_is_minus_the_divergence(scores):
    reference = scores.flip(0)
    p, q = softmax(reference.numpy(), axis=1), softmax(scores.numpy(), axis=1)
    np.testing.assert_allclose(Diverge(reference).loss(scores).numpy(), -rel_entr(p, q).sum(1), rtol=1e-9)
    assert Diverge(scores).loss(scores).abs().max() < 1e-12
    assert not Diverge(scores).reached(scores).any()
    assert torch.equal(Diverge(reference).reached(scores), reference.argmax(1) != scores.argmax(1))
    goal = Diverge(reference)
    assert goal.under("dlr") is goal


@pytest.mark.parametrize("name", ["ce", "margin", "dlr"])
@pytest.mark.parametrize("kind", [Untargeted, Targeted])
def test_gradients_match_finite_differences(name, kind, scores, classes):
    goal = kind(classes[:4], name)
    assert torch.autograd.gradcheck(goal.loss, (scores[:4].clone().requires_grad_(),))


def test_rows_have_their_own_loss(scores, classes):
    for goal in goals(classes, scores):
        z = scores.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(goal.loss(z)[3], z)
        assert gradient[3].abs().sum() > 0
        assert gradient[torch.arange(50) != 3].abs().sum() == 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Untargeted, "ce"), (Untargeted, "margin"), (Untargeted, "dlr"), (Targeted, "ce"), (Targeted, "margin")],
)
def test_a_step_down_the_loss_comes_nearer_to_the_goal(kind, name, scores, classes):
    """One sign convention for all losses (targeted DLR may also widen its denominator, so it makes no such promise)."""
    goal = kind(classes, name)
    z = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(goal.loss(z).sum(), z)
    away = ~goal.reached(scores)
    closer = goal.margin(scores - 1e-4 * gradient) < goal.margin(scores)
    assert away.any()
    assert closer[away].all()


def test_among_equal_scores_the_lowest_index_decides():
    tie = torch.tensor([[1.0, 1.0, 0.0]])
    for goal, reached in (
        (Untargeted(torch.tensor([0])), False),
        (Untargeted(torch.tensor([1])), True),
        (Targeted(torch.tensor([0])), True),
        (Targeted(torch.tensor([1])), False),
    ):
        assert bool(goal.reached(tie)) is reached
        assert goal.margin(tie).item() == 0
    assert not Diverge(torch.tensor([[3.0, 1.0, 0.0]])).reached(tie).any()
    smallest = torch.tensor([[1.0, 1.0 + 2**-23, 0.0]])
    assert Untargeted(torch.tensor([0])).reached(smallest).all()
    assert Untargeted(torch.tensor([0])).margin(smallest).item() < 0


def test_margin_agrees_with_reached_but_for_ties():
    generator = torch.Generator().manual_seed(3)
    scores = torch.randint(0, 3, (400, 4), generator=generator).float()  # many ties
    scores[::17, 1] = float("nan")
    scores[::23, 2] = float("inf")
    classes = torch.randint(4, (400,), generator=generator)
    for goal in goals(classes, scores):
        reached, margin = goal.reached(scores), goal.margin(scores)
        untied = margin != 0
        assert torch.equal(reached[untied], margin[untied] < 0)
        assert 0 < reached.sum() < 400


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_answers_that_are_not_finite_reach_nothing(bad):
    for place in range(3):
        answer = torch.tensor([[0.0, 5.0, 1.0]])
        answer[0, place] = bad
        for goal in (Untargeted(torch.tensor([0])), Targeted(torch.tensor([1])), Diverge(torch.tensor([[1.0, 0, 0]]))):
            assert not goal.reached(answer).any()
            assert goal.margin(answer).item() == float("inf")


def test_decisions_and_abstentions():
    decisions = torch.tensor([0, 1, 2, -1])
    untargeted = Untargeted(torch.tensor([0, 0, 0, 0]))
    assert untargeted.reached(decisions).tolist() == [False, True, True, False]
    assert untargeted.margin(decisions).tolist() == [1, -1, -1, 1]
    assert untargeted.under("margin").loss(decisions).tolist() == [1, -1, -1, 1]
    targeted = Targeted(torch.tensor([0, 2, 2, 2]))
    assert targeted.reached(decisions).tolist() == [True, False, True, False]
    with pytest.raises(BadModel, match="decisions"):
        untargeted.loss(decisions)
    assert Diverge(torch.eye(4)).reached(decisions).tolist() == [False, False, False, False]
    assert Diverge(torch.eye(4)).reached(decisions.flip(0).clamp_min(0)).tolist() == [False, True, True, True]


def test_take_keeps_rows_together(scores, classes):
    rows = torch.tensor([7, 3, 3])
    mask = torch.zeros(50, dtype=torch.bool)
    mask[[3, 7]] = True
    for goal in goals(classes, scores):
        for name in ("ce", "margin"):
            goal = goal.under(name)
            assert torch.equal(goal.take(rows).loss(scores[rows]), goal.loss(scores)[rows])
            assert torch.equal(goal.take(mask).loss(scores[mask]), goal.loss(scores)[mask])
            assert goal.to("cpu").take(rows).margin(scores[rows]).tolist() == goal.margin(scores)[rows].tolist()
        assert goal.take(torch.tensor([], dtype=torch.long)).loss(scores[:0]).shape == (0,)


def test_kinds_are_the_reports_words():
    assert (Untargeted.kind, Targeted.kind, Diverge.kind) == ("untargeted", "targeted", "untargeted")


def test_bad_labels_and_answers_are_named(scores):
    with pytest.raises(BadInput, match="-1"):
        Untargeted(torch.tensor([0, -1]))
    with pytest.raises(BadInput, match="long"):
        Untargeted(torch.tensor([0.0]))
    with pytest.raises(BadInput, match="list"):
        Targeted([0, 1])
    far = Untargeted(torch.tensor([0, 9]))
    for use in (far.loss, far.reached, far.margin):
        with pytest.raises(BadInput, match="up to 9, and the model has 6 classes"):
            use(scores[:2])
    with pytest.raises(BadInput, match="3 samples"):
        far.loss(torch.zeros(3, 10))
    with pytest.raises(BadModel, match="expected scores"):
        far.loss(torch.zeros(2, 10, 4))
    with pytest.raises(BadModel, match="1 class"):
        Untargeted(torch.tensor([0])).loss(torch.zeros(1, 1))
    with pytest.raises(BadModel, match="2 classes"):
        Untargeted(torch.tensor([0]), "dlr").loss(torch.zeros(1, 2))
    with pytest.raises(BadModel, match="3 classes"):
        Targeted(torch.tensor([0]), "dlr").loss(torch.zeros(1, 3))
    with pytest.raises(UsageError, match="dlr"):
        Untargeted(torch.tensor([0])).under("hinge")
    with pytest.raises(BadInput, match="scores"):
        Diverge(torch.tensor([1, 2]))


def rng(n: int, seed: int = 0) -> RowRng:
    return RowRng.from_ids(seed, [str(i) for i in range(n)])


def test_rules(scores, classes):
    assert isinstance(UntargetedRule()(classes, scores, rng(50)), Untargeted)
    following = TargetedRule()(classes, scores, rng(50)).targets
    assert torch.equal(following, (classes + 1) % CLASSES)
    drawn = TargetedRule(how="random")(classes, scores, rng(50)).targets
    assert not (drawn == classes).any()
    assert set(drawn.tolist()) == set(range(CLASSES))
    rows = torch.tensor([9, 4])
    again = TargetedRule(how="random")(classes[rows], scores[rows], rng(50).take(rows)).targets
    assert torch.equal(again, drawn[rows])
    assert not torch.equal(TargetedRule(how="random")(classes, scores, rng(50, 1)).targets, drawn)
    same = TargetedRule(how="class", target=3)(classes, scores, rng(50)).targets
    assert set(same.tolist()) == {3}


def test_least_likely_never_is_the_true_class(scores, classes):
    targets = TargetedRule(how="least_likely")(classes, scores, rng(50)).targets
    lowest = scores.argmin(1)
    assert (lowest == classes).any()
    assert torch.equal(targets[lowest != classes], lowest[lowest != classes])
    assert not (targets == classes).any()
    broken = torch.full((1, 3), float("nan"))
    assert TargetedRule(how="least_likely")(torch.tensor([0]), broken, rng(1)).targets.item() != 0


def test_random_targets_are_uniform():
    labels = torch.full((12_000,), 2)
    targets = TargetedRule(how="random")(labels, torch.zeros(12_000, 4), rng(12_000)).targets
    counts = torch.bincount(targets, minlength=4)
    assert counts[2] == 0
    assert (counts[[0, 1, 3]] - 4000).abs().max() < 250


def test_rules_refuse_what_does_not_fit(scores, classes):
    with pytest.raises(UsageError, match="target"):
        TargetedRule(how="class")
    with pytest.raises(UsageError, match="target"):
        TargetedRule(target=1)
    with pytest.raises(UsageError, match="next"):
        TargetedRule(how="worst")
    with pytest.raises(BadInput, match="target=9"):
        TargetedRule(how="class", target=9)(classes, scores, rng(50))
    with pytest.raises(BadInput, match="classes"):
        UntargetedRule()(classes + 5, scores, rng(50))
    with pytest.raises(BadModel, match="decisions"):
        TargetedRule()(classes, scores.argmax(1), rng(50))
    decided = TargetedRule(how="class", target=1)(classes, scores.argmax(1), rng(50))
    assert set(decided.targets.tolist()) == {1}


@pytest.mark.parametrize("spec", ["untargeted", "targeted", "targeted:how=random", "targeted:how=class,target=3"])
def test_specs_round_trip(spec):
    rule = GOALS.build(spec)
    assert GOALS.spec(rule) == spec
    assert rule.kind == spec.partition(":")[0]
