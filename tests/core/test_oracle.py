"""The meter against hand counts, also where a view holds a row several times; gradients against plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkit.core import oracle as oracle_module
from advkit.core.errors import AccessDenied, BudgetExhausted
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.rows import finite_rows, row_size
from advkit.testing.victims import nan_off, network, uniform
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Rival, Untargeted

NAN, INF = float("nan"), float("inf")


class Scripted:
    """Logits x[:, :3] + x[:, 3:], with what a test wants of answers and gradients written into x itself."""

    def __call__(self, x: Tensor) -> Tensor:
        return x[:, :3] + x[:, 3:]


def flat(x: Tensor) -> Tensor:
    """An answer whose gradient is zero where x[:, 0] is not positive, and infinite where it is exactly 2."""
    a = x[:, :1].clamp_min(0)
    bent = torch.where(x[:, :1] == 2, (x[:, :1] - 2).abs().sqrt(), a)
    return torch.cat([bent, torch.zeros_like(a), torch.zeros_like(a)], 1)


def untargeted(rows: int) -> Untargeted:
    return Untargeted(torch.zeros(rows, dtype=torch.long), "margin")


def test_a_row_held_several_times_pays_several_times() -> None:
    oracle = MeteredOracle(Scripted(), 4)
    view = oracle.take(torch.tensor([2, 0, 2, 2]))
    x = torch.rand(4, 6)
    view.gradient(x, untargeted(4))
    view(x)
    view.take(torch.tensor([0, 1, 3])).gradient(x[:3], untargeted(3))
    oracle(x)
    assert oracle.meter.forwards.tolist() == [4, 1, 9, 1]
    assert oracle.meter.backwards.tolist() == [2, 0, 5, 0]
    assert oracle.meter.queries.tolist() == [4, 1, 9, 1]


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("place", range(4))
def test_one_bad_answer_among_a_rows_copies_is_remembered(bad: float, place: int) -> None:
    index = torch.tensor([1, 3, 1, 1])
    x = torch.rand(4, 6)
    x[place, 2] = -7.0
    for ask in ("call", "gradient"):
        oracle = MeteredOracle(lambda z: Scripted()(torch.where(z == -7.0, torch.tensor(bad), z)), 5)
        view = oracle.take(index)
        for z in (torch.rand(4, 6), x, torch.rand(4, 6)):
            view(z) if ask == "call" else view.gradient(z, untargeted(4))
        assert oracle.meter.non_finite.nonzero().flatten().tolist() == [int(index[place])]
        assert not oracle.meter.asked_non_finite.any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("ask", ["call", "gradient", "module"])
@pytest.mark.parametrize("of", [None, [0, 1, 2, 2, 3]])
def test_who_asks_about_nan_is_at_fault_for_what_comes_back(bad: float, ask: str, of: list[int] | None) -> None:
    """A row's input, not its answer, is what was bad; the other rows and the steps before say nothing of it."""
    origin = torch.rand(4, 6)
    oracle = MeteredOracle(Scripted(), 4)
    module = oracle.differentiable(origin)
    where = None if of is None else torch.tensor(of)
    good = origin if where is None else origin[where]
    asked = good.clone()
    asked[2, 4] = bad
    for x in (good, asked, good):
        if ask == "call":
            oracle(x, where)
        elif ask == "gradient":
            oracle.gradient(x, untargeted(len(x)), where)
        else:
            leaf = x.clone().requires_grad_()
            (module(leaf) ** 2).sum().backward()
            assert torch.isfinite(leaf.grad).all()
    assert oracle.meter.asked_non_finite.tolist() == [False, False, True, False]
    assert not oracle.meter.non_finite.any()
    assert not oracle.meter.zero_gradient.any()


def test_zero_and_infinite_gradients_of_copies() -> None:
    oracle = MeteredOracle(flat, 4)
    view = oracle.take(torch.tensor([0, 0, 1, 1, 2, 2]))
    x = torch.tensor([[-1.0], [-2.0], [-1.0], [1.0], [-1.0], [2.0]])
    _, gradient, answer = view.gradient(x, untargeted(6))
    assert torch.isfinite(answer).all()
    assert torch.isfinite(gradient).all()
    # Row 3 never asked; row 1 has a slope on one of its copies, row 2 an infinite one, which counts as no zero.
    assert oracle.meter.zero_gradient.tolist() == [True, False, False, False]
    assert oracle.meter.non_finite.tolist() == [False, False, True, False]


def test_what_happened_once_is_not_forgotten_in_a_long_walk() -> None:
    """Notes are folded now and then: a fold keeps NaN, infinity and the one slope among a hundred flat steps."""
    oracle = MeteredOracle(flat, 3)
    flat_ground = torch.full((3, 1), -1.0)
    for step in range(100):
        x = flat_ground.clone()
        if step == 7:
            x[1] = 1.0
        if step == 70:
            x[2] = 2.0
        oracle.gradient(x, untargeted(3))
    assert oracle.meter.zero_gradient.tolist() == [True, False, False]
    assert oracle.meter.non_finite.tolist() == [False, False, True]
    assert oracle.meter.backwards.tolist() == [100] * 3


def test_tiny_and_huge_gradients_are_neither_zero_nor_infinite() -> None:
    """Norms that square or add would say otherwise."""
    scale = torch.tensor([[1e-44], [1e38], [0.0]])
    oracle = MeteredOracle(lambda x: torch.cat([x * scale, x * 0], 1), 3, lanes=Lanes(chunk=3, multiple=1))
    oracle.gradient(torch.full((3, 8), 1e-3), Untargeted(torch.zeros(3, dtype=torch.long), "margin"))
    assert oracle.meter.zero_gradient.tolist() == [False, False, True]
    assert not oracle.meter.non_finite.any()


def test_budgets_count_every_copy() -> None:
    oracle = MeteredOracle(Scripted(), 3, queries=7)
    view = oracle.take(torch.tensor([0, 1, 1]))
    x = torch.rand(3, 6)
    assert (oracle.left, view.left) == (7, 3)
    for _ in range(3):
        view(x)
    assert (oracle.left, view.left) == (1, 0)
    with pytest.raises(BudgetExhausted, match="number 8"):
        view(x)
    assert oracle.meter.queries.tolist() == [3, 6, 0]
    oracle(x)
    with pytest.raises(BudgetExhausted):
        oracle(x)
    assert oracle.take(torch.tensor([2])).left == 6


def test_budgets_hold_across_views_that_take_turns() -> None:
    oracle = MeteredOracle(Scripted(), 2, queries=4)
    first, both = oracle.take(torch.tensor([0])), oracle.take(torch.tensor([0, 1]))
    x = torch.rand(2, 6)
    for _ in range(2):
        first(x[:1])
        both(x)
    with pytest.raises(BudgetExhausted):
        first(x[:1])
    with pytest.raises(BudgetExhausted):
        both(x)
    assert oracle.meter.queries.tolist() == [4, 2]


@pytest.mark.parametrize("rows", [1, 5, 16, 33, 150])
@pytest.mark.parametrize("surrogate", ["ce", "margin"])
def test_gradients_are_those_of_plain_autograd(rows: int, surrogate: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4)).double()
    x = torch.rand(rows, 6, dtype=torch.float64)
    goal = Untargeted(torch.arange(rows) % 4).under(surrogate)
    leaf = x.clone().requires_grad_()
    loss = goal.loss(module(leaf))
    expected = torch.autograd.grad(loss.sum(), leaf)[0]
    oracle = MeteredOracle(module, rows)
    for _ in range(2):  # the second asks with the goals of the chunks at hand
        found_loss, gradient, answer = oracle.gradient(x, goal)
        torch.testing.assert_close(found_loss, loss.detach())
        torch.testing.assert_close(gradient, expected)
        assert not (found_loss.requires_grad)
        assert not (gradient.requires_grad)
        assert not (answer.requires_grad)
    other = Untargeted((goal.labels + 1) % 4).under(surrogate)
    torch.testing.assert_close(oracle.gradient(x, other)[0], other.loss(module(x)).detach())


def test_cross_entropy_keeps_its_gradient_after_inference_mode() -> None:
    goal = Untargeted(torch.tensor([1, 0]))
    answer = torch.tensor([[0.2, 0.3, 1.1, 4.0, -2.0], [1.0, 0.3, 0.5, 0.0, 2.0]], dtype=torch.float64)
    with torch.inference_mode():
        inside = goal.loss(answer)
    leaf = answer.clone().requires_grad_()
    loss = goal.loss(leaf)
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    torch.testing.assert_close(loss.detach(), inside.clone())
    torch.testing.assert_close(loss.detach(), answer.log_softmax(1)[[0, 1], [1, 0]])
    torch.testing.assert_close(gradient, torch.eye(5, dtype=torch.float64)[[1, 0]] - answer.softmax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_row_size(dtype: torch.dtype) -> None:
    values = torch.randn(6, 3, 5, dtype=dtype)
    assert torch.equal(row_size(values), values.abs().flatten(1).amax(1))
    assert torch.equal(row_size(values[:, 0, 0]), values[:, 0, 0].abs())
    values[1, 2, 4], values[3, 0, 0], values[4, 1, 1] = NAN, INF, -INF
    assert finite_rows(values).tolist() == [True, False, True, False, False, True]


def test_views_goals_and_streams_take_a_row_several_times() -> None:
    rows = torch.tensor([2, 0, 2])
    scores = torch.randn(3, 4)
    classes = torch.tensor([0, 1, 3])
    for goal in (Untargeted(classes), Targeted(classes), Diverge(scores), *Untargeted(classes).rivals(scores, 2)):
        assert torch.equal(goal.take(rows).loss(scores[rows]), goal.loss(scores)[rows])
        assert torch.equal(goal.take(rows).reached(scores[rows]), goal.reached(scores)[rows])
    rng = RowRng.from_ids(0, ("a", "b", "c"))
    assert torch.equal(rng.take(rows).normal(torch.empty(3, 5)), rng.normal(torch.empty(3, 5))[rows])


def test_several_gradients_of_one_forward_are_those_of_one_call_each():
    model, x = network(), uniform(1, 21, 2, 6, 6)
    goals = [Targeted(torch.full((21,), each)) for each in range(3)]
    for lanes in (None, Lanes(), Lanes(8, 8)):
        together, apart = MeteredOracle(model, 21, lanes=lanes), MeteredOracle(model, 21, lanes=lanes)
        losses, gradients, answer = together.gradients(x, goals)
        for which, goal in enumerate(goals):
            loss, gradient, said = apart.gradient(x, goal)
            assert torch.equal(losses[which], loss.detach())
            assert torch.equal(gradients[which], gradient)
            assert torch.equal(answer, said)
        assert together.meter.forwards.tolist() == [1] * 21
        assert together.meter.backwards.tolist() == [3] * 21
        assert apart.meter.forwards.tolist() == [3] * 21


def test_several_gradients_need_the_right_to_one_and_remember_what_is_not_finite():
    x = uniform(1, 4, 2, 6, 6)
    goals = [Targeted(torch.zeros(4, dtype=torch.long)), Targeted(torch.ones(4, dtype=torch.long))]
    with pytest.raises(AccessDenied, match="grants scores only"):
        MeteredOracle(network(), 4, Access.SCORES).gradients(x, goals)
    oracle = MeteredOracle(nan_off(network(), x[:1]), 4)
    _, gradients, _ = oracle.gradients(x, goals)
    assert bool(torch.isfinite(gradients).all())
    assert oracle.meter.non_finite.tolist() == [False, True, True, True]
    assert not bool(oracle.meter.asked_non_finite.any())


def test_a_budget_of_propagations_counts_both_ways_through_the_model():
    model, x = network(), uniform(1, 3, 2, 6, 6)
    goal = Targeted(torch.zeros(3, dtype=torch.long))
    oracle = MeteredOracle(model, 3, propagations=7)
    assert oracle.left == 3
    oracle.gradient(x, goal)
    oracle.take(torch.tensor([1]))(x[1:2])
    assert (oracle.left, oracle.take(torch.tensor([0, 2])).left) == (2, 2)
    oracle.gradients(x, [goal, goal])
    assert (oracle.left, oracle.take(torch.tensor([0, 2])).left) == (0, 1)
    with pytest.raises(BudgetExhausted, match=r"came to 8 propagations of a sample; the budget is 7"):
        oracle.gradient(x, goal)
    oracle.take(torch.tensor([0, 2]))(x[[0, 2]])
    assert (oracle.meter.forwards + oracle.meter.backwards).tolist() == [6, 6, 6]
    asking = MeteredOracle(model, 3, Access.SCORES, queries=9, propagations=7, differentiates=False)
    assert asking.left == 7
    candidates = asking.take(torch.tensor([0, 0, 1]))
    assert candidates.left == 3


def test_others_loops_have_the_budget_too():
    model, x = network(), uniform(1, 3, 2, 6, 6)
    oracle = MeteredOracle(model, 3, propagations=5)
    module = oracle.differentiable(x)
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        module(leaf).sum().backward()
    with pytest.raises(BudgetExhausted, match="the budget is 5"):
        module(x.clone().requires_grad_())
    module(x)
    assert (oracle.meter.forwards + oracle.meter.backwards).tolist() == [5] * 3


@pytest.mark.parametrize("make", [Untargeted, Targeted, lambda y: Rival(y, surrogate="ce", rival=(y + 1) % 5)])
def test_a_goal_knows_the_derivative_that_autograd_finds(make: Any) -> None:
    """Bit for bit, with infinite scores and scores that are none among them."""
    generator = torch.Generator().manual_seed(4)
    answer = 5 * torch.randn(40, 5, generator=generator)
    answer[3, 2], answer[7, 0], answer[9, 4] = torch.inf, torch.nan, -torch.inf
    goal = make(torch.randint(5, (40,), generator=generator))
    leaf = answer.clone().requires_grad_()
    loss = goal.loss(leaf)
    (slope,) = torch.autograd.grad(loss.sum(), leaf)
    found = goal.sloped(answer)
    assert torch.equal(found[0].nan_to_num(7.5), loss.detach().nan_to_num(7.5))
    assert torch.equal(found[1].nan_to_num(7.5), slope.nan_to_num(7.5))
    taken = goal.take(torch.tensor([1, 5]))
    assert torch.equal(taken.sloped(answer[[1, 5]])[1], slope[[1, 5]])
    assert goal.under("margin").sloped(answer) is None


def test_a_goal_with_a_loss_of_its_own_is_differentiated_by_autograd() -> None:
    class Halved(Untargeted):
        def loss(self, answer: Tensor) -> Tensor:
            return super().loss(answer) / 2

    net, x, labels = nn.Linear(4, 3).requires_grad_(False), torch.rand(5, 4), torch.tensor([0, 1, 2, 0, 1])
    whole = MeteredOracle(net, 5).gradient(x, Untargeted(labels))
    half = MeteredOracle(net, 5).gradient(x, Halved(labels))
    assert torch.equal(half[0], whole[0] / 2)
    assert torch.allclose(half[1], whole[1] / 2)


def test_points_that_are_lent_are_differentiated_as_they_are() -> None:
    """A leaf that requires a gradient already, in one call, in several and padded: as a copy would be."""
    net, x, goal = nn.Linear(4, 3).requires_grad_(False), torch.rand(5, 4), Untargeted(torch.tensor([0, 1, 2, 0, 1]))
    for lanes in (None, Lanes(chunk=2, multiple=1), Lanes(chunk=4, multiple=4)):
        lent = MeteredOracle(net, 5, lanes=lanes).gradient(x.clone().requires_grad_(), goal)
        copied = MeteredOracle(net, 5, lanes=lanes).gradient(x, goal)
        for one, other in zip(lent, copied, strict=True):
            assert torch.equal(one, other)
            assert not one.requires_grad


def test_gradients_without_torchs_engine_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x, goal = nn.Linear(4, 3).requires_grad_(False), torch.rand(5, 4), Untargeted(torch.tensor([0, 1, 2, 0, 1]))
    found = MeteredOracle(net, 5).gradient(x, goal)
    assert oracle_module._engine is not None
    monkeypatch.setattr(oracle_module, "_engine", None)
    for one, other in zip(found, MeteredOracle(net, 5).gradient(x, goal), strict=True):
        assert torch.equal(one, other)
