"""The projection onto score orders against cvxpy, scipy, closed forms, finite differences and its own symmetries."""

from __future__ import annotations

import cvxpy
import numpy as np
import pytest
import torch
from scipy.optimize import linprog, nnls
from torch import Tensor

from advkit.core.errors import BadInput, UsageError
from advkit.threat_models.goals.polyhedron import (
    Pairs,
    Solution,
    gram,
    ordered_pairs,
    out_of_topk_pairs,
    projection_loss,
    solve,
    unordered_pairs,
)


def head(classes: int, features: int, rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight [C, d], features [B, d] and logits [B, C] of a random head."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, features, generator=g, dtype=torch.float64) / features**0.5
    a = 3 * torch.randn(rows, features, generator=g, dtype=torch.float64)
    return weight, a, a @ weight.T


def drawn(rows: int, classes: int, k: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(classes, generator=g)[:k] for _ in range(rows)])


def pair_matrix(pairs: Pairs, row: int, classes: int) -> np.ndarray:
    eye = np.eye(classes)
    return eye[pairs.upper[row].numpy()] - eye[pairs.lower[row].numpy()]


def reference(a: Tensor, weight: Tensor, matrix: np.ndarray, margin: float) -> tuple[float, np.ndarray]:
    """The primal program in the features, as cvxpy and Clarabel see it."""
    z = cvxpy.Variable(a.shape[0])
    rows = matrix @ weight.numpy()
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(z - a.numpy())), [rows @ z >= margin])
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
    return float(problem.value), np.asarray(z.value)


def same_bits(left: Solution, right: Solution) -> bool:
    names = ("loss", "mu", "gap", "residual", "feasible", "rounds", "multipliers")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in names)


@pytest.mark.parametrize(("classes", "k"), [(2, 1), (2, 2), *((c, k) for c in (10, 30) for k in (1, 3, 5, c - 1, c))])
def test_agrees_with_cvxpy(classes: int, k: int) -> None:
    weight, a, logits = head(classes, 2 * classes, rows=2, seed=classes + k)
    pairs = ordered_pairs(drawn(2, classes, k), classes)
    solution = solve(logits, gram(weight), pairs)
    nearest = a + solution.mu @ weight
    assert solution.feasible.all()
    for row in range(2):
        loss, z = reference(a[row], weight, pair_matrix(pairs, row, classes), 0.2)
        assert abs(float(solution.loss[row]) - loss) <= 1e-8 * max(loss, 1e-6)
        assert np.abs(nearest[row].numpy() - z).max() < 1e-8
        assert float(((nearest[row] - a[row]) ** 2).sum()) == pytest.approx(float(solution.loss[row]), rel=1e-10, abs=0)


@pytest.mark.parametrize("kind", ["unordered", "out_of_topk"])
def test_other_polyhedra_agree_with_cvxpy(kind: str) -> None:
    weight, a, logits = head(12, 24, rows=2, seed=7)
    if kind == "unordered":
        pairs = unordered_pairs(drawn(2, 12, 4), 12)
    else:
        top = logits.topk(4, dim=1).indices
        pairs = out_of_topk_pairs(top[:, 0], top[:, 1:])
    solution = solve(logits, gram(weight), pairs)
    for row in range(2):
        loss, _ = reference(a[row], weight, pair_matrix(pairs, row, 12), 0.2)
        assert float(solution.loss[row]) == pytest.approx(loss, rel=1e-8)


@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_certificate_at_imagenet_size(k: int) -> None:
    weight, a, logits = head(1000, 512, rows=4, seed=k)
    targets = drawn(4, 1000, k)
    solution = solve(logits, gram(weight), targets)
    moved = (a + solution.mu @ weight) @ weight.T
    order = moved.gather(1, targets)
    others = moved.scatter(1, targets, -torch.inf).amax(1, keepdim=True)
    steps = -torch.diff(torch.cat([order, others], dim=1), dim=1)
    assert solution.feasible.all()
    assert float(solution.gap.max()) < 1e-9
    assert float(solution.residual.max()) < 1e-9
    assert float((0.2 - steps).max()) < 1e-9
    assert torch.equal(moved.topk(k, dim=1).indices, targets)
    assert float((steps - 0.2).abs().amin(1).max()) < 1e-9


def by_nnls(logits: Tensor, S: Tensor, pairs: Pairs, row: int, margin: float) -> float:
    D = pair_matrix(pairs, row, logits.shape[1])
    v = margin - D @ logits[row].numpy()
    M = D @ S.numpy() @ D.T
    L = np.linalg.cholesky(M + 1e-12 * np.trace(M) / len(M) * np.eye(len(M)))
    x, _ = nnls(L.T, np.linalg.solve(L, v), maxiter=20000)
    return float(x @ M @ x)


def test_agrees_with_nnls_on_the_dual() -> None:
    weight, _, logits = head(120, 150, rows=2, seed=3)
    pairs = ordered_pairs(drawn(2, 120, 8), 120)
    solution = solve(logits, gram(weight), pairs)
    for row in range(2):
        assert float(solution.loss[row]) == pytest.approx(by_nnls(logits, gram(weight), pairs, row, 0.2), rel=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 5, 10, 20])
def test_agrees_with_nnls_at_imagenet_size(k: int) -> None:
    weight, _, logits = head(1000, 1280, rows=1, seed=k)
    pairs = ordered_pairs(drawn(1, 1000, k), 1000)
    solution = solve(logits, gram(weight), pairs)
    assert float(solution.loss[0]) == pytest.approx(by_nnls(logits, gram(weight), pairs, 0, 0.2), rel=1e-5)


def test_two_classes_closed_form() -> None:
    weight, _, logits = head(2, 6, rows=40, seed=1)
    solution = solve(logits, gram(weight), torch.zeros(40, 1, dtype=torch.long))
    short = (0.2 - (logits[:, 0] - logits[:, 1])).clamp_min(0)
    assert 5 < int((short == 0).sum()) < 35
    torch.testing.assert_close(solution.loss, short**2 / ((weight[0] - weight[1]) ** 2).sum(), rtol=1e-12, atol=0)
    assert torch.equal(solution.rounds > 0, short > 0)


@pytest.mark.parametrize("metric", ["gram", "identity"])
@pytest.mark.parametrize("kind", ["ordered", "unordered"])
def test_gradient_is_the_derivative(metric: str, kind: str) -> None:
    weight, a, logits = head(9, 14, rows=3, seed=5)
    S = gram(weight) if metric == "gram" else None
    make = ordered_pairs if kind == "ordered" else unordered_pairs
    pairs = make(drawn(3, 9, 3), 9)
    start = a if S is not None else logits

    def loss(point: Tensor) -> Tensor:
        return projection_loss(point @ weight.T if S is not None else point, S, pairs)

    point = start.clone().requires_grad_()
    value = loss(point)
    (slope,) = torch.autograd.grad(value.sum(), point)
    step = 1e-5
    for j in range(start.shape[1]):
        e = torch.zeros_like(start)
        e[:, j] = step
        numeric = (loss(start + e) - loss(start - e)) / (2 * step)
        torch.testing.assert_close(slope[:, j], numeric, rtol=1e-5, atol=1e-5 * float(slope.abs().max()))
    assert torch.equal(value.detach(), loss(start))


def test_walking_back_shrinks_the_loss_by_the_square() -> None:
    weight, a, logits = head(30, 50, rows=5, seed=2)
    S, targets = gram(weight), drawn(5, 30, 6)
    solution = solve(logits, S, targets)
    for s in (0.1, 0.5, 0.9):
        there = solve((a + s * solution.mu @ weight) @ weight.T, S, targets)
        torch.testing.assert_close(there.loss, (1 - s) ** 2 * solution.loss, rtol=1e-9, atol=0)
    nearest = solve(logits + solution.mu @ S, S, targets)
    assert float(nearest.loss.max()) == 0.0
    assert float(nearest.mu.abs().max()) == 0.0


def test_satisfied_rows_cost_nothing() -> None:
    weight, _, logits = head(20, 30, rows=3)
    order = logits.argsort(dim=1, descending=True)
    solution = solve(logits, gram(weight), order[:, :2], margin=1e-6)
    assert torch.equal(solution.mu, torch.zeros_like(logits))
    assert solution.rounds.tolist() == [0, 0, 0]
    assert solution.loss.tolist() == [0.0, 0.0, 0.0]
    assert solution.feasible.all()


def test_symmetries() -> None:
    weight, _, logits = head(25, 40, rows=4, seed=4)
    S, targets = gram(weight), drawn(4, 25, 5)
    base = solve(logits, S, targets)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    place = order.argsort()
    renamed = solve(logits[:, order], S[order][:, order], place[targets])
    torch.testing.assert_close(renamed.mu, base.mu[:, order], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solve(logits + 17.0, S, targets).mu, base.mu, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solve(3 * logits, S, targets, 0.6).loss, 9 * base.loss, rtol=1e-10, atol=0)
    torch.testing.assert_close(solve(logits, None, targets).loss, solve(logits, torch.eye(25), targets).loss)
    losses = torch.stack([solve(logits, S, targets, margin).loss for margin in (0.0, 0.1, 0.2, 1.0, 5.0)])
    assert bool((torch.diff(losses, dim=0) > 0).all())
    margins = torch.full((4, 24), 0.2)
    assert torch.equal(solve(logits, S, targets, margins).loss, solve(logits, S, targets, float(margins[0, 0])).loss)


def test_any_order_is_no_further_than_a_given_one() -> None:
    weight, _, logits = head(15, 20, rows=8, seed=6)
    targets = drawn(8, 15, 4)
    given = solve(logits, gram(weight), targets)
    free = solve(logits, gram(weight), unordered_pairs(targets, 15))
    assert bool((free.loss < given.loss).all())


def test_warm_equals_cold() -> None:
    weight, _, logits = head(300, 400, rows=6, seed=8)
    S, targets = gram(weight), drawn(6, 300, 10)
    earlier = solve(logits, S, targets)
    nudged = logits + 0.02 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cold, warm = solve(nudged, S, targets), solve(nudged, S, targets, warm=earlier)
    torch.testing.assert_close(warm.mu, cold.mu, rtol=1e-9, atol=1e-9)
    assert int(warm.rounds.sum()) < int(cold.rounds.sum()) / 2


@pytest.mark.parametrize("k", [1, 5, 20])
def test_float32(k: int) -> None:
    weight, _, logits = head(1000, 512, rows=2, seed=k)
    S, targets = gram(weight), drawn(2, 1000, k)
    exact, rough = solve(logits, S, targets), solve(logits, S, targets, dtype=torch.float32)
    assert rough.mu.dtype == torch.float32
    assert rough.feasible.all()
    torch.testing.assert_close(rough.loss.double(), exact.loss, rtol=1e-3, atol=0)


@pytest.mark.parametrize(("classes", "k"), [(10, 5), (1000, 5), (1000, 20)])
def test_a_row_does_not_depend_on_its_batch(classes: int, k: int) -> None:
    rows = 21
    weight, _, logits = head(classes, 6 if classes == 10 else 512, rows=rows, seed=9)
    S, targets = gram(weight), drawn(rows, classes, k)
    whole = solve(logits, S, targets)
    if classes == 10:
        assert 0 < int(whole.feasible.sum()) < rows  # soft rows beside hard ones
    for part in ([0], [4, 2], list(range(20, 3, -1))):
        assert same_bits(solve(logits[part], S, targets[part]), whole.take(torch.tensor(part)))
    again = solve(logits + 0.01, S, targets, warm=whole)
    for part in ([7], [20, 0, 13]):
        alone = solve(logits[part] + 0.01, S, targets[part], warm=whole.take(torch.tensor(part)))
        assert same_bits(alone, again.take(torch.tensor(part)))


def possible(weight: Tensor, matrix: np.ndarray) -> bool:
    answer = linprog(
        np.zeros(weight.shape[1]),
        A_ub=-(matrix @ weight.numpy()),
        b_ub=np.full(len(matrix), -0.2),
        bounds=(None, None),
        method="highs",
    )
    return answer.status == 0


def test_flags_exactly_the_impossible() -> None:
    weight, _, logits = head(10, 5, rows=40, seed=11)
    pairs = ordered_pairs(drawn(40, 10, 4), 10)
    solution = solve(logits, gram(weight), pairs)
    truth = [possible(weight, pair_matrix(pairs, row, 10)) for row in range(40)]
    assert 5 < sum(truth) < 35
    assert solution.feasible.tolist() == truth


def test_the_soft_problem_of_impossible_rows() -> None:
    weight, a, logits = head(10, 4, rows=6, seed=12)
    S, pairs = gram(weight), ordered_pairs(drawn(6, 10, 7), 10)
    solution = solve(logits, S, pairs)
    assert not solution.feasible.any()
    assert float(solution.gap.max()) < 1e-9
    assert bool((solution.residual > 0.01).all())
    softness = 1e-2 * float(S.diagonal().mean())
    for row in range(2):
        D = pair_matrix(pairs, row, 10) @ weight.numpy()
        z = cvxpy.Variable(4)
        objective = cvxpy.sum_squares(z - a[row].numpy()) + cvxpy.sum_squares(cvxpy.pos(0.2 - D @ z)) / softness
        assert float(solution.loss[row]) == pytest.approx(cvxpy.Problem(cvxpy.Minimize(objective)).solve(), rel=1e-6)
    e = 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rise = solve(logits + e, S, pairs).loss - solve(logits - e, S, pairs).loss
    torch.testing.assert_close(rise, 2 * (-2 * solution.mu * e).sum(1), rtol=1e-4, atol=1e-8)


def test_impossible_at_imagenet_size() -> None:
    weight, _, logits = head(1000, 10, rows=2, seed=13)
    solution = solve(logits, gram(weight), drawn(2, 1000, 5))
    assert solution.feasible.tolist() == [False, False]
    assert bool(torch.isfinite(solution.loss).all())
    assert bool(torch.isfinite(solution.mu).all())
    assert float(solution.gap.max()) < 1e-9


def test_rows_that_are_not_finite_do_not_spread() -> None:
    weight, _, logits = head(8, 12, rows=3)
    S, targets = gram(weight), drawn(3, 8, 3)
    sick = logits.clone()
    sick[1, 4] = torch.nan
    solution, healthy = solve(sick, S, targets), solve(logits, S, targets)
    assert solution.feasible.tolist() == [True, False, True]
    assert bool(solution.loss[1].isnan())
    assert torch.equal(solution.mu[1], torch.zeros(8, dtype=torch.float64))
    assert same_bits(solution.take(torch.tensor([0, 2])), healthy.take(torch.tensor([0, 2])))


def test_pairs_say_what_they_should() -> None:
    ordered = ordered_pairs(torch.tensor([[3, 1]]), 4)
    assert torch.stack([ordered.upper[0], ordered.lower[0]], 1).tolist() == [[3, 1], [1, 0], [1, 2]]
    assert ordered.always == 1
    loose = unordered_pairs(torch.tensor([[3, 1]]), 4)
    assert torch.stack([loose.upper[0], loose.lower[0]], 1).tolist() == [[3, 0], [3, 2], [1, 0], [1, 2]]
    out = out_of_topk_pairs(torch.tensor([2]), torch.tensor([[0, 3]]))
    assert torch.stack([out.upper[0], out.lower[0]], 1).tolist() == [[0, 2], [3, 2]]
    everything = solve(torch.zeros(1, 3), None, unordered_pairs(torch.tensor([[2, 0, 1]]), 3))
    assert everything.loss.tolist() == [0.0]
    assert len(solve(torch.zeros(0, 3), None, torch.zeros(0, 2, dtype=torch.long)).loss) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ordered_pairs(torch.tensor([[1, 1]]), 4), "twice"),
        (lambda: ordered_pairs(torch.tensor([[1, 4]]), 4), "0..3"),
        (lambda: ordered_pairs(torch.tensor([1, 2]), 4), "long tensor"),
        (lambda: unordered_pairs(torch.tensor([[0, 1, 2]]), 2), "1 to 2"),
        (lambda: out_of_topk_pairs(torch.tensor([2]), torch.tensor([[2, 1]])), "above it"),
        (lambda: gram(torch.zeros(3)), "features"),
        (lambda: solve(torch.zeros(1, 4), torch.eye(3), torch.tensor([[1]])), "Gram"),
        (lambda: solve(torch.zeros(2, 4), None, torch.tensor([[1]])), "2 samples"),
        (lambda: solve(torch.zeros(1, 4, dtype=torch.long), None, torch.tensor([[1]])), "floats"),
    ],
)
def test_complains(call: object, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        call()  # type: ignore[operator]


def test_refuses_other_precisions() -> None:
    with pytest.raises(UsageError, match="float16"):
        solve(torch.zeros(1, 4), None, torch.tensor([[1]]), dtype=torch.float16)
