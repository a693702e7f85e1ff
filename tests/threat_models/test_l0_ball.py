"""The L0 ball: exhaustive search on few features, pixels against features, edges."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.threat_models.sparse import L0


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("eps", [0, 1, 3, 6, 8])
def test_projection_against_exhaustive_search(eps):
    x = torch.rand(10, 6, generator=generator())
    z = x + torch.randn(10, 6, generator=generator(1))
    got = L0(eps).project(z, x)
    for row in range(10):
        best = min(
            ((torch.where(mask, z[row].clamp(0, 1), x[row]) - z[row]).square().sum().item())
            for count in range(min(eps, 6) + 1)
            for chosen in combinations(range(6), count)
            for mask in [torch.tensor([i in chosen for i in range(6)])]
        )
        assert (got[row] - z[row]).square().sum().item() == pytest.approx(best, rel=1e-6)


def test_a_pixel_counts_once_for_all_its_channels():
    x = torch.full((1, 3, 4, 4), 0.5)
    z = x.clone()
    z[0, :, 1, 2] = 0.9
    z[0, 0, 3, 3] = 0.1
    assert L0(2).distance(z, x).item() == 2
    assert L0(4, per="feature").distance(z, x).item() == 4
    assert L0(2).admits(z, x).all()
    assert not L0(2, per="feature").admits(z, x).any()
    one = L0(1).project(z, x)
    assert torch.equal(one[0, :, 1, 2], z[0, :, 1, 2])
    assert one[0, 0, 3, 3] == 0.5
    assert torch.equal(L0(4, per="feature").project(z, x), z)


def test_frames_of_events_have_pixels_of_their_own():
    x = torch.zeros(1, 2, 3, 4, 4)  # [B, T, C, H, W]
    z = x.clone()
    z[0, 0, :, 1, 1] = 1.0
    z[0, 1, :, 1, 1] = 1.0
    assert L0(2).distance(z, x).item() == 2
    assert torch.equal(L0(2).project(z, x), z)


def test_samples_change_exactly_eps_positions_uniformly():
    n = 3000
    x = torch.full((n, 1, 4, 5), 0.5)
    rng = RowRng.from_ids(0, [str(i) for i in range(n)])
    z = L0(3).sample(x, rng)
    changed = (z != x).flatten(1)
    assert (changed.sum(1) == 3).all()
    assert (changed.double().mean(0) - 3 / 20).abs().max() < 0.03
    values = z[z != x]
    assert (values.mean() - 0.5).abs() < 0.02
    assert values.min() < 0.01
    assert values.max() > 0.99


def test_steepest_takes_the_most_promising_positions_to_the_edge():
    at = torch.tensor([[0.9, 0.2, 0.5, 0.0]])
    gradient = torch.tensor([[5.0, 1.0, -2.0, -9.0]])
    # gains: 0.5, 0.8, 1.0, and nothing to gain below the floor
    torch.testing.assert_close(L0(1).steepest(gradient, at), torch.tensor([[0.0, 0.0, -0.5, 0.0]]))
    torch.testing.assert_close(L0(4).steepest(gradient, at), torch.tensor([[0.1, 0.8, -0.5, 0.0]]))


def test_steepest_gains_more_than_any_other_choice():
    x = torch.rand(8, 6, generator=generator())
    gradient = torch.randn(8, 6, generator=generator(1))
    ball = L0(2)
    step = ball.steepest(gradient, x)
    edge = torch.where(gradient > 0, 1 - x, -x)
    gain = (step * gradient).sum(1)
    for chosen in combinations(range(6), 2):
        assert (gain >= (edge * gradient)[:, list(chosen)].sum(1) - 1e-6).all()
    assert ball.admits(x + step, x).all()


def test_more_positions_than_there_are():
    x = torch.rand(2, 4, generator=generator())
    z = x + 3
    assert torch.equal(L0(9).project(z, x), torch.ones_like(x))
    assert L0(9).admits(L0(9).sample(x, RowRng.from_ids(0, ["a", "b"])), x).all()


def test_nan_is_no_small_distance():
    x = torch.zeros(1, 1, 2, 2)
    z = x.clone()
    z[0, 0, 0, 0] = float("nan")
    assert L0(3).distance(z, x).isnan().all()
    assert not L0(3).admits(z, x).any()


def test_unmoved_positions_keep_their_bits_on_a_lattice():
    x = torch.rand(6, 3, 5, 5, generator=generator())
    ball = L0(4, lattice=255, box=Box(0, 1))
    z = ball.sample(x, RowRng.from_ids(0, [str(i) for i in range(6)]))
    done = ball.finish(z, x)
    assert torch.equal(done[z == x], x[z == x])
    changed = done[z != x]
    torch.testing.assert_close(changed, (changed * 255).round() / 255)
    assert ball.admits(done, x).all()
