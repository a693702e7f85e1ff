"""Ordered and unordered top-K, out of the top K: losses against plain formulas, strictness, drawing of targets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.rng import RowRng
from advkit.threat_models import GOALS
from advkit.threat_models.goals.ordered_topk import OrderedTopK, OutOfTopK, TopK
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted

CLASSES, ROWS = 7, 40
LOSSES = ("ce", "margin", "dlr", "cw", "ad", "quad")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def scores():
    return torch.randn(ROWS, CLASSES, generator=generator(), dtype=torch.float64) * 2


def targets_of(k, rows=ROWS, classes=CLASSES, seed=1):
    return torch.rand(rows, classes, generator=generator(seed)).argsort(1)[:, :k]


def ordered(z, targets):
    """Whether the first of the sorted classes are the targets, in order and without a tie, row by row."""
    order = np.argsort(-z, axis=1, kind="stable")
    top = -np.sort(-z, axis=1)
    k = targets.shape[1]
    strict = [np.all(np.diff(row[: k + 1]) < 0) for row in top]
    return (order[:, :k] == targets).all(1) & np.array(strict)


@pytest.mark.parametrize("k", [1, 2, 3, CLASSES - 1, CLASSES])
def test_ordered_is_reached_exactly_where_sorting_says_so(k):
    targets = targets_of(k, 4000)
    # Few values, so that ties are common; half of the rows start in order and then lose a class or two to chance.
    z = torch.randint(0, 4, (4000, CLASSES), generator=generator(2)).double()
    ladder = torch.arange(k, 0, -1).double().expand(2000, k)
    z[::2] = torch.zeros(2000, CLASSES).double().scatter(1, targets[::2], ladder)
    place = torch.randint(CLASSES, (1000, 1), generator=generator(9))
    z[::4] = z[::4].scatter(1, place, torch.randint(0, 4, (1000, 1), generator=generator(10)).double())
    goal = OrderedTopK(targets)
    expected = torch.as_tensor(ordered(z.numpy(), targets.numpy()))
    assert 100 < expected.sum() < 3900
    assert torch.equal(goal.reached(z), expected)
    assert torch.equal(goal.margin(z) < 0, expected)


def test_every_order_of_four_classes():
    z = torch.tensor([[0.3, -1.0, 2.0, 0.7]])
    for k in range(1, 5):
        reached = [p for p in itertools.permutations(range(4), k) if OrderedTopK(torch.tensor([p])).reached(z)]
        assert reached == [(2, 3, 0, 1)[:k]]


def test_ties_and_broken_answers_reach_nothing():
    z = torch.tensor([[2.0, 1.0, 1.0], [2.0, 1.0, torch.nan], [torch.inf, 1.0, 0.0], [2.0, 1.0, 0.0]])
    for goal in (OrderedTopK(torch.tensor([[0, 1]] * 4)), TopK(torch.tensor([[0, 1]] * 4))):
        assert goal.reached(z).tolist() == [False, False, False, True]
        assert goal.margin(z)[0] == 0
        assert goal.margin(z)[1:3].tolist() == [torch.inf] * 2
    assert OutOfTopK(torch.tensor([2] * 4), 1).reached(z).tolist() == [True, False, False, True]
    assert OutOfTopK(torch.tensor([2] * 4), 2).reached(z).tolist() == [False, False, False, True]


@pytest.mark.parametrize("k", [1, 3, CLASSES])
def test_ordered_losses_against_loops(k, scores):
    z, targets = scores.numpy(), targets_of(k).numpy()
    goal = OrderedTopK(torch.as_tensor(targets))
    listwise, hinge, margin = [], [], []
    for row, t in zip(z, targets, strict=True):
        left, ce, cw, gaps = list(range(CLASSES)), 0.0, 0.0, []
        for i in range(k):
            ce += logsumexp(row[left]) - row[t[i]]
            left.remove(t[i])
            if left:
                cw += max(0.0, row[left].max() - row[t[: i + 1]].min() + 0.4)
                gaps.append(row[left].max() - row[t[i]] if i == k - 1 else row[t[i + 1]] - row[t[i]])
        listwise.append(ce)
        hinge.append(cw / k)
        margin.append(max(gaps))
    np.testing.assert_allclose(goal.loss(scores).numpy(), listwise, rtol=1e-9)
    np.testing.assert_allclose(goal.under("margin").loss(scores).numpy(), margin, rtol=1e-12)
    tuned = OrderedTopK(torch.as_tensor(targets), surrogate="cw", kappa=0.4)
    np.testing.assert_allclose(tuned.loss(scores).numpy(), hinge, rtol=1e-9)
    if k + 3 <= CLASSES:
        top = -np.sort(-z, axis=1)
        spread = top[:, 0] - (top[:, k + 1] + top[:, k + 2]) / 2
        np.testing.assert_allclose(goal.under("dlr").loss(scores).numpy(), margin / spread, rtol=1e-9)


def test_one_place_is_the_targeted_goal(scores):
    targets = targets_of(1)
    one, targeted = OrderedTopK(targets), Targeted(targets[:, 0])
    for loss in ("ce", "margin", "dlr"):
        torch.testing.assert_close(one.under(loss).loss(scores), targeted.under(loss).loss(scores))
    assert torch.equal(one.reached(scores), targeted.reached(scores))
    hinge = targeted.under("margin").loss(scores).clamp_min(0)
    torch.testing.assert_close(one.under("cw").loss(scores), hinge)
    torch.testing.assert_close(TopK(targets).loss(scores), one.loss(scores))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_hinge_is_zero_exactly_in_order(k):
    targets = targets_of(k, 600)
    z = torch.randn(600, CLASSES, generator=generator(3), dtype=torch.float64)
    steps = torch.arange(k, 0, -1).double().expand(600, k) / 3
    z[::2] = z[::2].scatter(1, targets[::2], 3.2 + steps[::2] + 0.2 * z[::2, :k])
    goal = OrderedTopK(targets, surrogate="cw")
    assert 100 < goal.reached(z).sum() < 590
    assert torch.equal(goal.loss(z) == 0, goal.reached(z))


def test_unordered_losses_against_loops(scores):
    z, targets = scores.numpy(), targets_of(3).numpy()
    goal = TopK(torch.as_tensor(targets))
    others = np.array([np.delete(row, t) for row, t in zip(z, targets, strict=True)])
    wanted = np.take_along_axis(z, targets, 1)
    ce = [sum(logsumexp([*rest, value]) - value for value in row) for rest, row in zip(others, wanted, strict=True)]
    np.testing.assert_allclose(goal.loss(scores).numpy(), ce, rtol=1e-9)
    margin = others.max(1) - wanted.min(1)
    np.testing.assert_allclose(goal.margin(scores).numpy(), margin)
    order = np.argsort(-z, axis=1)[:, :3]
    expected = [set(a) == set(b) for a, b in zip(order, targets, strict=True)]
    np.testing.assert_array_equal(goal.reached(scores).numpy(), expected)
    hinge = np.maximum(others.max(1, keepdims=True) - wanted, 0).mean(1)
    np.testing.assert_allclose(goal.under("cw").loss(scores).numpy(), hinge)


@pytest.mark.parametrize("k", [1, 2, CLASSES - 1])
def test_out_of_topk_is_the_rank_of_the_true_class(k, scores):
    labels = torch.randint(CLASSES, (ROWS,), generator=generator(4))
    goal = OutOfTopK(labels, k)
    rank = (scores > scores.gather(1, labels[:, None])).sum(1)
    assert torch.equal(goal.reached(scores), rank >= k)
    if k > 1:
        places, true = -np.sort(-scores.numpy(), axis=1), scores.gather(1, labels[:, None]).squeeze(1).numpy()
        kth = [np.sort(np.delete(row, y))[-k] for row, y in zip(scores.numpy(), labels.numpy(), strict=True)]
        np.testing.assert_allclose(goal.margin(scores).numpy(), true - kth)
        if k + 2 <= CLASSES:
            spread = places[:, 0] - places[:, k + 1]
            np.testing.assert_allclose(goal.under("dlr").loss(scores).numpy(), (true - kth) / spread, rtol=1e-9)
        return
    for loss in ("ce", "margin", "dlr"):
        expected = Untargeted(labels).under(loss).loss(scores)
        torch.testing.assert_close(goal.under(loss).loss(scores), expected)


def test_out_of_topk_listwise_loss_against_a_loop(scores):
    labels = torch.randint(CLASSES, (ROWS,), generator=generator(4))
    expected = []
    for row, y in zip(scores.numpy(), labels.numpy(), strict=True):
        left, total = list(np.argsort(-row)), 0.0
        for _ in range(3):
            total += row[y] - logsumexp(row[left])
            left.remove(next(c for c in left if c != y))
        expected.append(total)
    np.testing.assert_allclose(OutOfTopK(labels, 3).loss(scores).numpy(), expected, rtol=1e-9)


def test_distillation_against_its_formula(scores):
    targets = targets_of(3)
    half = torch.rand(CLASSES, CLASSES, generator=generator(5), dtype=torch.float64)
    similarity = (half + half.T) - 1
    goal = OrderedTopK(targets, surrogate="ad", similarity=similarity)
    logits = similarity.numpy()[targets.numpy()].mean(1)
    for i in range(3):
        logits[np.arange(ROWS), targets[:, i].numpy()] = 10 - 0.3 * i
    wanted = softmax(logits, axis=1)
    np.testing.assert_allclose(goal.distribution(scores).sum(1).numpy(), 1, rtol=1e-12)
    expected = rel_entr(wanted, np.exp(log_softmax(scores.numpy(), axis=1))).sum(1)
    np.testing.assert_allclose(goal.loss(scores).numpy(), expected, rtol=1e-9)
    # At the logits of the distribution nothing is left to distil, and they stand in order.
    best = torch.as_tensor(logits)
    assert goal.loss(best).abs().max() < 1e-12
    assert goal.reached(best).all()
    tied = OrderedTopK(targets, surrogate="ad", beta=0.0).distribution(scores).gather(1, targets)
    assert torch.equal(tied, tied[:, :1].expand(-1, 3))
    torch.testing.assert_close(
        TopK(targets, surrogate="ad").loss(scores), OrderedTopK(targets, surrogate="ad", beta=0.0).loss(scores)
    )


def test_distillation_refuses_a_ladder_that_ends_among_the_others():
    many = torch.arange(35)[None]
    with pytest.raises(UsageError, match=r"alpha=10, beta=0.3 .*raise alpha or lower beta"):
        OrderedTopK(many, surrogate="ad")
    OrderedTopK(many[:, :34], surrogate="ad")
    alike = torch.ones(40, 40)
    with pytest.raises(UsageError, match="no more than the 1 of some other class"):
        OrderedTopK(many[:, :31], surrogate="ad", similarity=alike)
    OrderedTopK(many[:, :30], surrogate="ad", similarity=alike)
    OrderedTopK(many, surrogate="cw")


def test_the_projection_has_its_closed_form_for_two_classes():
    z = torch.randn(30, 2, generator=generator(6), dtype=torch.float64)
    weight = torch.randn(2, 5, generator=generator(7), dtype=torch.float64)
    goal = OrderedTopK(torch.zeros(30, 1, dtype=torch.long), surrogate="quad")
    short = (0.2 - (z[:, 0] - z[:, 1])).clamp_min(0).square()
    length = (weight[0] - weight[1]).square().sum()
    torch.testing.assert_close(goal.with_gram(weight @ weight.T).loss(z), short / length, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(goal.loss(z), short / 2, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["ordered", "unordered", "out"])
def test_gradients_match_finite_differences(kind, loss, scores):
    weight = torch.randn(CLASSES, 12, generator=generator(8), dtype=torch.float64)
    if kind == "out":
        if loss == "ad":
            return
        goal = OutOfTopK(torch.arange(4), 2, gram=weight @ weight.T)
    else:
        goal = (OrderedTopK if kind == "ordered" else TopK)(targets_of(3, 4), gram=weight @ weight.T)
    assert torch.autograd.gradcheck(goal.under(loss).loss, (scores[:4].clone().requires_grad_(),), atol=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_and_subsets_are_on_their_own(loss, scores):
    targets = targets_of(3)
    similarity = torch.eye(CLASSES, dtype=torch.float64)
    for goal in (
        OrderedTopK(targets, surrogate=loss, similarity=similarity).for_classes(CLASSES),
        TopK(targets, surrogate=loss),
        *([] if loss == "ad" else [OutOfTopK(targets[:, 0], 3, surrogate=loss)]),
    ):
        z = scores.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(goal.loss(z)[3], z)
        assert gradient[torch.arange(ROWS) != 3].abs().sum() == 0
        for rows in (torch.tensor([5, 2]), torch.arange(ROWS) % 3 == 0):
            assert torch.equal(goal.take(rows).loss(scores[rows]), goal.loss(scores)[rows])
            assert torch.equal(goal.take(rows).reached(scores[rows]), goal.reached(scores)[rows])
        assert torch.equal(goal.to("cpu").loss(scores), goal.loss(scores))
        assert goal.under(loss) is goal


def test_a_step_down_lowers_every_loss(scores):
    """One sign convention: a small step against the gradient lowers every loss."""
    goal = OrderedTopK(targets_of(2))
    for loss in LOSSES:
        z = scores.clone().requires_grad_()
        value = goal.under(loss).loss(z)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        after = goal.under(loss).loss(scores - 1e-5 * gradient)
        moving = gradient.abs().amax(1) > 0
        assert moving.any()
        assert (after[moving] < value[moving]).all()


def test_what_does_not_fit_is_said():
    scores = torch.zeros(2, 4)
    for wrong, words in (
        (torch.tensor([0, 1]), "long tensor \\[B, K\\]"),
        (torch.tensor([[0.0], [1.0]]), "long tensor \\[B, K\\]"),
        (torch.tensor([[0, 1], [2, 2]]), "sample 1 wants \\[2, 2\\]"),
        (torch.tensor([[-1, 1], [2, 3]]), "from 0 up"),
    ):
        with pytest.raises(BadInput, match=words):
            OrderedTopK(wrong)
    with pytest.raises(BadInput, match="up to 4, and the model has 4 classes"):
        OrderedTopK(torch.tensor([[0, 4], [1, 2]])).reached(scores)
    with pytest.raises(BadInput, match="rows"):
        OrderedTopK(torch.tensor([[0, 1]])).reached(scores)
    with pytest.raises(BadInput, match="always holds"):
        TopK(torch.arange(4)[None].expand(2, 4)).reached(scores)
    with pytest.raises(BadModel, match="scores alone"):
        OrderedTopK(torch.tensor([[0, 1], [2, 3]])).reached(torch.tensor([0, 1]))
    with pytest.raises(BadModel, match="use loss 'margin'"):
        OrderedTopK(torch.tensor([[0, 1], [2, 3]]), surrogate="dlr").loss(scores)
    with pytest.raises(UsageError, match="expected one of ce, margin, dlr, cw, ad, quad"):
        OrderedTopK(torch.tensor([[0, 1]])).under("hinge")
    with pytest.raises(UsageError, match="no loss 'ad'"):
        OutOfTopK(torch.tensor([0, 1]), 2).under("ad")
    with pytest.raises(BadInput, match="only 3 classes"):
        OutOfTopK(torch.tensor([0, 1]), 4).reached(scores)
    with pytest.raises(BadInput, match="gram matrix is of 3 classes"):
        OrderedTopK(torch.tensor([[0, 1], [1, 2]]), gram=torch.eye(3), surrogate="quad").loss(scores)


class TestRules:
    @pytest.mark.parametrize("spec", ["ordered-topk:k=4", "topk:k=4"])
    def test_targets_are_wrong_distinct_and_the_rows_own(self, spec):
        rule = GOALS.build(spec)
        labels = torch.arange(300) % 10
        answer = torch.zeros(300, 10)
        ids = [f"r{i}" for i in range(300)]
        goal = rule(labels, answer, RowRng.from_ids(0, ids))
        assert goal.targets.shape == (300, 4)
        assert (goal.targets != labels[:, None]).all()
        assert (goal.targets.sort(1).values.diff(dim=1) > 0).all()
        some = torch.tensor([7, 3, 200])
        part = rule(labels[some], answer[some], RowRng.from_ids(0, [ids[i] for i in some.tolist()]))
        assert torch.equal(part.targets, goal.targets[some])
        other = rule(labels, answer, RowRng.from_ids(1, ids))
        assert not torch.equal(other.targets, goal.targets)

    def test_targets_are_uniform_over_orders(self):
        """All 12 ordered pairs of the four wrong classes come equally often (chi square, 11 degrees of freedom)."""
        rows = 4800
        rule = GOALS.build("ordered-topk:k=2")
        labels = torch.zeros(rows, dtype=torch.long)
        rng = RowRng.from_ids(0, [str(i) for i in range(rows)])
        targets = rule(labels, torch.zeros(rows, 5), rng).targets
        counts = torch.bincount(targets[:, 0] * 5 + targets[:, 1], minlength=25)
        seen = counts[counts > 0].double()
        assert len(seen) == 12
        expected = rows / 12
        assert ((seen - expected) ** 2 / expected).sum() < 31.3  # 0.1 %

    def test_as_many_as_there_are_wrong_classes_and_no_more(self):
        labels = torch.arange(6) % 5
        rng = RowRng.from_ids(0, [str(i) for i in range(6)])
        goal = GOALS.build("ordered-topk:k=4")(labels, torch.zeros(6, 5), rng)
        assert torch.equal(torch.cat([goal.targets, labels[:, None]], 1).sort(1).values, torch.arange(5).expand(6, 5))
        with pytest.raises(BadInput, match="has 4 wrong ones"):
            GOALS.build("ordered-topk:k=5")(labels, torch.zeros(6, 5), rng)
        with pytest.raises(BadInput, match="only 4 classes"):
            GOALS.build("out-of-topk:k=5")(labels, torch.zeros(6, 5), rng)
        with pytest.raises(BadModel, match="needs scores"):
            GOALS.build("topk:k=2")(labels, labels, rng)

    def test_out_of_topk_takes_the_labels(self):
        labels = torch.arange(6) % 5
        goal = GOALS.build("out-of-topk:k=2")(labels, torch.zeros(6, 5), RowRng.from_ids(0, list("abcdef")))
        assert torch.equal(goal.labels, labels)
        assert goal.k == 2

    @pytest.mark.parametrize("name", ["ordered-topk", "topk", "out-of-topk"])
    def test_specs_round_trip_and_refuse_no_place(self, name):
        assert GOALS.spec(GOALS.build(f"{name}:k=7")) == f"{name}:k=7"
        with pytest.raises(UsageError, match="k is 0"):
            GOALS.build(f"{name}:k=0")
