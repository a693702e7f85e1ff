"""Zeroth-order estimators on quadratic functions, where everything is known in closed form."""

from __future__ import annotations

import pytest
import torch

from advkit.core.errors import UsageError
from advkit.core.rng import RowRng
from advkit.core.zeroth_order import cge, cge_queries, rge, rge_queries

ROWS, D = 5, 7


class Quadratic:
    """0.5 z'A_b z + b_b'z of every row b, in float64, and a count of what was asked."""

    def __init__(self, rows: int = ROWS, d: int = D, curved: bool = True) -> None:
        draw = torch.Generator().manual_seed(3)
        root = torch.randn(rows, d, d, generator=draw, dtype=torch.float64)
        self.a = (root + root.transpose(1, 2)) * curved
        self.b = torch.randn(rows, d, generator=draw, dtype=torch.float64)
        self.z = torch.randn(rows, d, generator=draw, dtype=torch.float64)
        self.asked = torch.zeros(rows, dtype=torch.long)
        self.calls: list[int] = []

    def __call__(self, points, of):
        self.calls.append(len(points))
        self.asked += torch.bincount(of, minlength=len(self.asked))
        flat = points.flatten(1)
        return 0.5 * torch.einsum("ni,nij,nj->n", flat, self.a[of], flat) + (flat * self.b[of]).sum(1)

    @property
    def gradient(self):
        return torch.einsum("bij,bj->bi", self.a, self.z) + self.b


def streams(rows: int = ROWS, seed: int = 0) -> RowRng:
    return RowRng.from_ids(seed, [str(row) for row in range(rows)]).at("directions")


@pytest.mark.parametrize("mu", [1e-3, 0.1, 10.0])
def test_central_cge_is_exact_on_a_quadratic_for_every_step(mu):
    f = Quadratic()
    found = cge(f, f.z, mu=mu)
    torch.testing.assert_close(found.gradient, f.gradient, rtol=1e-6, atol=1e-9)
    assert found.value is None


@pytest.mark.parametrize("mu", [0.005, 0.5])
def test_forward_cge_is_off_by_half_the_curvature_times_the_step(mu):
    f = Quadratic()
    found = cge(f, f.z, mu=mu, mode="forward")
    expected = mu * torch.diagonal(f.a, dim1=1, dim2=2) / 2
    torch.testing.assert_close(found.gradient - f.gradient, expected, rtol=1e-6, atol=1e-9)


def test_cge_on_some_coordinates_is_cge_there_and_zero_elsewhere():
    f = Quadratic()
    places = torch.tensor([5, 0, 2])
    found = cge(f, f.z, coordinates=places)
    expected = torch.zeros_like(f.z)
    expected[:, places] = f.gradient[:, places]
    torch.testing.assert_close(found.gradient, expected, rtol=1e-6, atol=1e-9)
    assert f.asked.tolist() == [6] * ROWS


def directions(q: int, rows: int, d: int, rng: RowRng):
    """The directions that `rge` takes, seen by a function that keeps its points."""
    seen: list[torch.Tensor] = []

    def f(points, of):
        seen.append(points)
        return points.sum(1)

    rge(f, torch.zeros(rows, d, dtype=torch.float64), rng, q=q, mu=1.0, antithetic=True)
    return seen[0].reshape(rows, q, d)


@pytest.mark.parametrize("mu", [1e-3, 5.0])
def test_antithetic_rge_is_the_projection_of_the_gradient(mu):
    f, q = Quadratic(), 9
    u = directions(q, ROWS, D, streams())
    torch.testing.assert_close(torch.linalg.vector_norm(u, dim=2), torch.ones(ROWS, q, dtype=torch.float64))
    expected = D / q * torch.einsum("bkd,bke,be->bd", u, u, f.gradient)
    found = rge(f, f.z, streams(), q=q, mu=mu, antithetic=True)
    torch.testing.assert_close(found.gradient, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("antithetic", [False, True])
def test_rge_is_unbiased_on_a_quadratic(antithetic):
    """The second-order term of the forward difference is odd in no direction and vanishes in the mean."""
    draws = 20_000
    f = Quadratic(rows=1)
    many = f.z.expand(draws, D).contiguous()
    function = lambda points, of: f(points, torch.zeros_like(of))  # noqa: E731
    found = rge(function, many, streams(draws), q=1, mu=0.3, antithetic=antithetic, chunk=10**6).gradient
    error = found.mean(0) - f.gradient[0]
    assert bool((error.abs() < 4.5 * found.std(0) / draws**0.5).all())


@pytest.mark.slow
@pytest.mark.parametrize("q", [1, 4])
def test_the_variance_of_rge_is_that_of_directions_on_the_sphere(q):
    """Sum of the coordinates' variances: (d - 1) |g|^2 / q, within 4 %."""
    draws = 20_000
    f = Quadratic(rows=1, curved=False)
    function = lambda points, of: f(points, torch.zeros_like(of))  # noqa: E731
    found = rge(function, f.z.expand(draws, D).contiguous(), streams(draws), q=q, mu=1e-4, chunk=10**6).gradient
    assert float(found.var(0).sum()) == pytest.approx((D - 1) * float(f.b.square().sum()) / q, rel=0.04)


def test_queries_are_counted_as_they_are_made():
    for estimate, expected in (
        (lambda f: rge(f, f.z, streams(), q=11), rge_queries(11)),
        (lambda f: rge(f, f.z, streams(), q=11, antithetic=True), rge_queries(11, antithetic=True)),
        (
            lambda f: rge(f, f.z, streams(), q=11, antithetic=True, value=True),
            rge_queries(11, antithetic=True, value=True),
        ),
        (lambda f: cge(f, f.z), cge_queries(D)),
        (lambda f: cge(f, f.z, value=True), cge_queries(D, value=True)),
        (lambda f: cge(f, f.z, mode="forward"), cge_queries(D, mode="forward")),
    ):
        f = Quadratic()
        found = estimate(f)
        assert found.queries == expected
        assert f.asked.tolist() == [expected] * ROWS
    assert (rge_queries(20), rge_queries(20, antithetic=True), cge_queries(192, value=True)) == (21, 40, 385)


@pytest.mark.parametrize("chunk", [1, 3, 64, 10**6])
def test_the_size_of_calls_changes_nothing_and_is_kept(chunk):
    for estimate in (
        lambda f, chunk: rge(f, f.z, streams(), q=70, chunk=chunk),
        lambda f, chunk: cge(f, f.z, value=True, chunk=chunk),
    ):
        f, g = Quadratic(), Quadratic()
        torch.testing.assert_close(estimate(f, chunk).gradient, estimate(g, 4096).gradient)
        assert max(f.calls) <= chunk
        assert torch.equal(f.asked, g.asked)


def test_a_rows_directions_do_not_depend_on_the_batch():
    f = Quadratic()
    whole = rge(f, f.z, streams(), q=5).gradient
    alone = rge(lambda points, of: f(points, of + 3), f.z[3:4], streams().take(torch.tensor([3])), q=5).gradient
    assert torch.equal(whole[3:4], alone)


def test_rows_of_any_shape_and_no_graph():
    weight = torch.arange(12.0).reshape(3, 4)
    z = torch.zeros(2, 3, 4, requires_grad=True)
    found = cge(lambda points, of: (points * weight).sum((1, 2)) * (of + 1), z, value=True)
    torch.testing.assert_close(found.gradient, torch.stack([weight, 2 * weight]), atol=1e-4, rtol=1e-4)
    assert not found.gradient.requires_grad
    assert found.value.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("estimate", "words"),
    [
        (lambda f: rge(f, f.z, streams(), q=0), "q is 0; expected"),
        (lambda f: rge(f, f.z, streams(), mu=0.0), "mu is 0.0; expected"),
        (lambda f: rge(f, f.z, streams(3)), "one stream per row"),
        (lambda f: cge(f, f.z, mode="backward"), "expected one of central, forward"),
        (lambda f: cge(f, f.z, coordinates=torch.tensor([0, 7])), "from 0 to 6"),
        (lambda f: cge(f, f.z, coordinates=torch.tensor([1, 1])), "different whole numbers"),
        (lambda f: cge(f, f.z, chunk=0), "chunk is 0; expected"),
        (lambda f: cge(f, f.z.long()), "expected rows of floating numbers"),
        (lambda f: cge(lambda points, of: points, f.z), "expected one each"),
    ],
)
def test_what_is_out_of_range_is_refused_in_words(estimate, words):
    with pytest.raises(UsageError, match=words):
        estimate(Quadratic())
