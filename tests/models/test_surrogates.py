"""Backward rules: areas, published numbers, statistics against numpy, degenerate layers, contexts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from advkit.core.errors import SpecError, UnknownName, UsageError
from advkit.models.spiking import RULES
from advkit.models.spiking.neurons import LIF
from advkit.models.spiking.surrogates import (
    ASSG,
    PDSG,
    Dynamics,
    RateRule,
    Rule,
    SlopeRule,
    active_rule,
    use_surrogate,
)

USUAL = Dynamics()
FIXED = ["atan", "atan:alpha=50", "sigmoid", "sigmoid:alpha=25", "rect", "rect:width=0.1", "triangle", "gaussian"]


def potentials(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.7 + 0.4


@pytest.mark.parametrize("spec", FIXED)
@pytest.mark.parametrize("threshold", [1.0, 0.5])
def test_fixed_surrogates_have_unit_area_and_peak_at_the_threshold(spec: str, threshold: float) -> None:
    u = torch.linspace(-12, 12, 600_001, dtype=torch.float64).sinh() + threshold  # dense in the middle, to 80,000
    h = RULES.build(spec).slopes(u, Dynamics(threshold=threshold))
    assert float(torch.trapezoid(h, u)) == pytest.approx(1, abs=1e-3)
    assert float(h.max()) == pytest.approx(float(h[len(h) // 2]))
    assert torch.allclose(h, h.flip(0), atol=1e-9)


def test_published_peaks() -> None:
    at = torch.tensor([1.0])
    peaks = {spec: float(RULES.build(spec).slopes(at, USUAL)) for spec in ("atan", "sigmoid", "rect", "triangle")}
    assert peaks == pytest.approx({"atan": 1.0, "sigmoid": 1.0, "rect": 1.0, "triangle": 1.0})


def test_every_rule_has_a_spec_that_comes_back() -> None:
    for name in RULES.names():
        if issubclass(RULES.load(name), SlopeRule):
            rule = RULES.build(f"{name}:detach_reset=true")
        else:  # nothing passes through a reset there
            with pytest.raises(SpecError, match="detach_reset"):
                RULES.build(f"{name}:detach_reset=true")
            rule = RULES.build(name)
        assert RULES.build(RULES.spec(rule)) == rule
        assert RULES.summary(name)
    with pytest.raises(UnknownName, match="pdsg"):
        RULES.build("pdgs")


def test_a_rule_gives_slopes_or_a_gradient_and_a_half_made_one_can_not_be_built() -> None:
    for name in RULES.names():
        kind = RULES.load(name)
        assert issubclass(kind, SlopeRule) != issubclass(kind, RateRule)
    for kind in (Rule, SlopeRule, RateRule):
        with pytest.raises(TypeError, match="abstract"):
            kind()


@pytest.mark.parametrize("spec", ["atan:alpha=0", "rect:width=-1", "pdsg:stats=row", "hart:gamma=0", "assg:memory=1"])
def test_settings_out_of_range(spec: str) -> None:
    with pytest.raises((UsageError, SpecError)):
        RULES.build(spec)


AXES = {
    # shape of [T, B, ...] -> axes of one row's group, and of the batch's
    (4, 3, 2, 5, 6): ((0, 3, 4), (0, 1, 3, 4)),
    (4, 3, 7, 2): ((0, 2), (0, 1, 2)),
    (4, 3, 9): ((0, 2), (0, 1)),
    (4, 3, 2, 4, 4): ((0, 3, 4), (0, 1, 3, 4)),
}


@pytest.mark.parametrize("shape", AXES)
@pytest.mark.parametrize("stats", ["sample", "batch"])
def test_deviations_are_numpys_over_the_prefix(shape: tuple[int, ...], stats: str) -> None:
    u = potentials(*shape)
    found = PDSG(stats=stats).deviations(u, USUAL)  # type: ignore[arg-type]
    axes = AXES[shape][stats == "batch"]
    for t in range(shape[0]):
        expected = np.std(u[: t + 1].numpy(), axis=axes, ddof=1, keepdims=True)[0]
        assert np.allclose(found[t].numpy(), expected, rtol=1e-12, atol=0)


def test_the_slope_is_a_gaussian_around_half_a_deviation() -> None:
    # potentials at the threshold and around, in a layer whose deviation is known
    u = potentials(1, 1, 400)
    sigma = float(u.std())
    h = PDSG().slopes(u, USUAL).flatten()
    distance = u.flatten() - 1
    expected = torch.exp(-((distance - sigma / 2) ** 2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
    assert torch.allclose(h, expected, rtol=1e-12)
    best = distance[h.argmax()]
    assert float((best - sigma / 2).abs()) == float((distance - sigma / 2).abs().min())
    at_threshold = torch.cat([u.flatten(), torch.ones(1, dtype=u.dtype)]).reshape(1, 1, -1)
    sigma = float(at_threshold.std())
    assert float(PDSG().slopes(at_threshold, USUAL).flatten()[-1]) * sigma == pytest.approx(0.352065, abs=1e-6)


def test_a_deviation_knows_nothing_of_later_steps() -> None:
    u = potentials(5, 2, 3, 4, 4)
    before = PDSG().slopes(u, USUAL)
    changed = u.clone()
    changed[3:] *= 7
    after = PDSG().slopes(changed, USUAL)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3:], after[3:])


def test_sample_statistics_are_a_rows_own() -> None:
    u = potentials(4, 5, 3, 4, 4).float()
    order = torch.tensor([3, 0, 4, 1, 2])
    together = PDSG().slopes(u, USUAL)
    assert torch.equal(PDSG().slopes(u[:, order], USUAL), together[:, order])
    for row in range(5):
        assert torch.equal(PDSG().slopes(u[:, row : row + 1], USUAL), together[:, row : row + 1])
    assert not torch.equal(PDSG(stats="batch").slopes(u[:, :1], USUAL), PDSG(stats="batch").slopes(u, USUAL)[:, :1])


@pytest.mark.parametrize("stats", ["sample", "batch"])
@pytest.mark.parametrize(
    "u",
    [
        torch.full((1, 1, 1), 0.3),  # one value
        torch.full((1, 1, 4, 1, 1), 0.3),  # 1x1 maps, T = 1
        torch.full((4, 1, 2, 3, 3), 0.1),  # constant
        torch.zeros(3, 2, 7),  # dead
        torch.full((5, 3, 4, 7, 7), 0.1) * 1e-20,
        torch.full((2, 1, 3, 1, 1), 1e20),
    ],
    ids=["one", "1x1", "constant", "dead", "tiny", "huge"],
)
def test_layers_without_spread_use_the_thresholds_height(u: Tensor, stats: str) -> None:
    for reset, height in ((0.0, 1.0), (0.25, 0.75), (None, 1.0)):
        dynamics = Dynamics(reset=reset)
        rule = PDSG(stats=stats)  # type: ignore[arg-type]
        assert torch.equal(rule.deviations(u, dynamics), torch.full_like(rule.deviations(u, dynamics), height))
        assert torch.isfinite(rule.slopes(u, dynamics)).all()


@pytest.mark.parametrize("spec", [*RULES.names(), "pdsg:stats=batch"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3, 1, 1), (4, 1, 2, 1, 1), (4, 1, 6), (1, 2, 3, 4, 4)])
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0, None])
def test_no_rule_makes_nan(spec: str, shape: tuple[int, ...], value: float | None) -> None:
    x = (potentials(*shape).float() if value is None else torch.full(shape, value)).requires_grad_()
    LIF(surrogate=spec)(x).sum().backward()
    assert torch.isfinite(x.grad).all()


def gradient(spec: str, x: Tensor, upstream: Tensor, **more: float) -> Tensor:
    leaf = x.clone().requires_grad_()
    LIF(surrogate=spec, **more)(leaf).backward(upstream)
    return leaf.grad


def test_rga_is_its_formula() -> None:
    x, upstream = potentials(5, 3, 8) * 2, potentials(5, 3, 8, seed=1)
    for theta, tau in ((1.0, 2.0), (0.7, 1.5)):
        leak = 1 / tau
        lam = 1 - leak
        rate = x.mean(0) / theta
        h = torch.full_like(rate, 0.2)
        h[rate >= 1 - lam] = (1 - 0.2 * (1 - lam)) / (lam + 1)
        h[(rate < 0) | (rate > 2)] = 0.0
        assert {round(float(v), 3) for v in h.flatten()} == {0.0, 0.2, round((1 - 0.2 * leak) / (lam + 1), 3)}
        assert torch.allclose(gradient("rga", x, upstream, threshold=theta, tau=tau), upstream * h / theta, rtol=1e-12)


def test_bptr_passes_where_it_spiked() -> None:
    x, upstream = potentials(4, 3, 8), potentials(4, 3, 8, seed=1)
    spiked = LIF()(x).sum(0) > 0
    assert 0 < int(spiked.sum()) < 24
    assert torch.equal(gradient("bptr", x, upstream), upstream * spiked)


def test_hart_is_the_mean_of_detached_steps() -> None:
    x, upstream = potentials(4, 3, 8), potentials(4, 3, 8, seed=1)
    potential, total = torch.zeros(3, 8, dtype=torch.float64), torch.zeros(3, 8, dtype=torch.float64)
    for t in range(4):
        u = potential / 2 + x[t]
        total += upstream[t] * (1 - (u - 1).abs() / 0.8).clamp_min(0) / 0.8
        potential = torch.where(u >= 1, 0.0, u)
    found = gradient("hart:gamma=0.8", x, upstream)
    assert torch.allclose(found, (total / 4).expand_as(found), rtol=1e-12)


def test_assg_follows_its_averages() -> None:
    rule = ASSG()
    u = potentials(2, 3, 4)
    mean, deviation = torch.ones_like(u), torch.zeros_like(u)
    for _ in range(3):
        h, mean, deviation = rule.adapted(u, mean, deviation)
    m, d = np.ones(u.shape), np.zeros(u.shape)
    for _ in range(3):
        m = 0.9 * m + 0.1 * np.abs(u.numpy())
        d = 0.9 * d + 0.1 * np.abs(np.abs(u.numpy()) - m)
        alpha = 2 / math.pi * math.tan(0.4 * math.pi) / (m + 1.5 * d + 1e-4)
        expected = alpha / (2 * (1 + (math.pi * alpha * u.numpy() / 2) ** 2))
    assert np.allclose(h.numpy(), expected, rtol=1e-12)
    # half the share of the area on either side lies within the reach
    reach = 2 / math.pi * math.tan(0.4 * math.pi)
    grid = torch.linspace(-1, 1, 200_001, dtype=torch.float64)
    wide = RULES.build(f"atan:alpha={reach}").slopes(grid, Dynamics(threshold=1e-12, reset=-1.0))
    assert float(torch.trapezoid(wide, grid)) == pytest.approx(0.8, abs=1e-4)


def _fail() -> None:
    raise RuntimeError("inside")


def test_contexts_nest_and_end_whatever_happens() -> None:
    assert active_rule() is None
    with use_surrogate("pdsg") as outer:
        assert active_rule() is outer
        seen = []
        with pytest.raises(RuntimeError, match="inside"), use_surrogate("atan:alpha=3"):
            seen.append(active_rule()) or _fail()
        assert seen == [RULES.build("atan:alpha=3")]
        assert active_rule() is outer
    assert active_rule() is None
    with pytest.raises(UnknownName), use_surrogate("nothing"):
        pass
    assert active_rule() is None


def test_a_rule_is_chosen_in_the_forward_pass() -> None:
    x = potentials(4, 2, 3).requires_grad_()
    made = LIF(surrogate="atan")
    with use_surrogate("pdsg"):
        answer = made(x)
    answer.sum().backward()
    assert torch.equal(x.grad, gradient("pdsg", x.detach(), torch.ones_like(x)))
