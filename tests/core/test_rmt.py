"""Random matrix theory: closed forms against quadrature, published constants and simulated matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate

from advkit.core import rmt
from advkit.core.errors import UsageError

MEDIANS = {0.01: 0.996666, 0.032: 0.989323, 0.1: 0.966565, 0.25: 0.916004, 0.5: 0.830466, 0.9: 0.689222}
QUANTILES = {0.5: -1.268575, 0.9: 0.450143, 0.95: 0.979316, 0.99: 2.023449, 0.999: 3.272196}


@pytest.mark.parametrize(("g", "median"), MEDIANS.items())
def test_the_median_of_the_bulk_is_the_known_one(g: float, median: float) -> None:
    assert rmt.mp_median(g) == pytest.approx(median, abs=1e-6)
    assert rmt.mp_median(g, 3.0) == pytest.approx(3 * median, abs=3e-6)
    assert rmt.mp_median(1 / g) == pytest.approx(rmt.mp_median(g) / g)


@pytest.mark.parametrize("g", [0.05, 0.5, 1.0, 2.5])
def test_the_distribution_function_is_the_integral_of_the_density(g: float) -> None:
    sigma2 = 1.7
    low, high = rmt.mp_edges(g, sigma2)
    assert (low, high) == pytest.approx((sigma2 * (1 - math.sqrt(g)) ** 2, sigma2 * (1 + math.sqrt(g)) ** 2))
    atom = max(0.0, 1 - 1 / g)
    assert rmt.mp_atom(g) == atom
    for share in (0.1, 0.5, 0.97):
        x = low + share * (high - low)
        # x = low + (x - low) t^2 takes the root at the lower end, and for g = 1 the pole, out of the integrand
        found = integrate.quad(
            lambda t, x=x: rmt.mp_density(low + (x - low) * t * t, g, sigma2) * 2 * (x - low) * t, 0, 1
        )[0]
        assert rmt.mp_cdf(x, g, sigma2) == pytest.approx(found + atom, abs=1e-7)
    assert rmt.mp_cdf([-1.0, high, high + 1], g, sigma2).tolist() == pytest.approx([0.0, 1.0, 1.0])
    assert rmt.mp_cdf(0.0, g, sigma2) == pytest.approx(atom)
    assert rmt.mp_density([low / 2, high * 1.01], g, sigma2).tolist() == [0.0, 0.0]


def test_simulated_eigenvalues_follow_the_law_and_so_do_those_of_few_samples() -> None:
    draws = np.random.default_rng(0).normal(size=(800, 400))
    for rows, g in ((draws, 0.5), (draws.T, 2.0)):
        values = np.linalg.eigvalsh(rows.T @ rows / len(rows))
        for x in (0.3, 1.0, 2.0, 2.5):
            assert (values <= x).mean() == pytest.approx(rmt.mp_cdf(x, g), abs=0.01)
        assert np.median(values[values > 1e-9]) == pytest.approx(rmt.mp_median(g), abs=0.02)


@pytest.mark.slow
def test_quantiles_of_tracy_widom_are_the_known_ones() -> None:
    for level, value in QUANTILES.items():
        assert rmt.tracy_widom_quantile(level) == pytest.approx(value, abs=2e-6)
        assert rmt.tracy_widom_cdf(value) == pytest.approx(level, abs=1e-6)


def test_mean_and_variance_of_tracy_widom_are_the_known_ones() -> None:
    x = np.linspace(-8.0, 6.0, 71)
    below = rmt.tracy_widom_cdf(x)
    assert (np.diff(below) > 0).all()
    mean = x[-1] - integrate.simpson(below, x=x)
    square = x[-1] ** 2 - 2 * integrate.simpson(x * below, x=x)
    assert mean == pytest.approx(-1.206534, abs=1e-4)
    assert square - mean**2 == pytest.approx(1.607781, abs=1e-3)
    assert rmt.tracy_widom_cdf([-100.0, 100.0]).tolist() == [0.0, 1.0]


def test_the_largest_eigenvalue_of_noise_follows_tracy_widom() -> None:
    n, d, draws = 100, 40, 2000
    rows = np.random.default_rng(1).normal(size=(draws, n, d))
    largest = np.linalg.eigvalsh(np.swapaxes(rows, 1, 2) @ rows)[:, -1]
    centre, scale = rmt.tracy_widom_scale(n, d)
    for level in (0.5, 0.9, 0.99):
        share = float(((largest - centre) / scale <= rmt.tracy_widom_quantile(level)).mean())
        assert share == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / draws) + 0.005)
        assert share == float((largest / n <= rmt.tracy_widom_edge(n, d, level)).mean())


def test_spikes_are_where_theory_says_and_debiasing_finds_them_back() -> None:
    g, sigma2 = 0.15, 2.0
    threshold = rmt.bbp_threshold(g, sigma2)
    assert threshold == pytest.approx(2 * (1 + math.sqrt(0.15)))
    spikes = np.array([threshold * 1.01, 4.0, 40.0])
    assert rmt.debiased(rmt.spiked(spikes, g, sigma2), g, sigma2) == pytest.approx(spikes)
    edge = rmt.mp_edges(g, sigma2)[1]
    assert rmt.spiked(threshold * (1 + 1e-9), g, sigma2) == pytest.approx(edge)
    assert rmt.spiked(1.5, g, sigma2) == edge
    assert math.isnan(rmt.debiased(edge, g, sigma2))
    assert rmt.overlap(1.5, g, sigma2) == 0
    assert rmt.overlap(threshold * (1 + 1e-9), g, sigma2) == pytest.approx(0, abs=1e-6)
    assert rmt.overlap([12.0, 6.0, 3.0], 60 / 399).tolist() == pytest.approx([0.985, 0.965, 0.895], abs=1e-3)


def test_what_no_law_has_is_refused() -> None:
    for wrong in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(UsageError, match="aspect ratio"):
            rmt.mp_edges(wrong)
    with pytest.raises(UsageError, match="noise variance"):
        rmt.mp_edges(0.5, 0.0)
    for level in (0.0, 1.0, -0.5):
        with pytest.raises(UsageError, match="level"):
            rmt.tracy_widom_quantile(level)
    with pytest.raises(UsageError, match="at least 1"):
        rmt.tracy_widom_scale(0, 3)
    with pytest.raises(UsageError, match="not finite"):
        rmt.tracy_widom_cdf(math.nan)
