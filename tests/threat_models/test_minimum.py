"""The minimum-L2 threat model: the box is all there is, distances are exact, nothing has a radius."""

from __future__ import annotations

import pytest
import torch

from advkit.core.errors import UsageError
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.spaces import Binary, Box
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.minimum import MinimumL2


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(6, 3, 4, 4, generator=generator), torch.rand(6, 3, 4, 4, generator=generator)


def test_the_whole_box_is_admitted_and_nothing_else(rows):
    x, z = rows
    threat = MinimumL2()
    assert threat.admits(z, x).all()
    assert threat.admits(1 - x.round(), x).all()
    for value in (-0.01, 1.01, torch.nan, torch.inf):
        bad = z.clone()
        bad[2, 0, 0, 0] = value
        assert threat.admits(bad, x).tolist() == [True, True, False, True, True, True]
    assert not threat.admits(z[:, :2], x).any()


def test_distances_are_those_of_the_balls(rows):
    x, z = rows
    threat = MinimumL2()
    assert torch.equal(threat.distance(z, x), L2(1.0).distance(z, x))
    measured = threat.measures(z, x)
    for name, ball in (("l1", L1(1.0)), ("l2", L2(1.0)), ("linf", Linf(1.0))):
        torch.testing.assert_close(measured[name], ball.distance(z, x).to(measured[name].dtype))


def test_projection_is_a_clamp_that_leaves_the_untouched_row_alone(rows):
    x, _ = rows
    threat = MinimumL2().bind(Box(0.2, 0.7))
    assert torch.equal(threat.project(x + 5, x), torch.maximum(x, torch.tensor(0.7)))
    assert torch.equal(threat.project(x, x), x)


def test_finish_rounds_to_files(rows):
    x, z = rows
    x = (x * 255).round() / 255
    done = MinimumL2(lattice=255).finish(z, x)
    assert torch.equal(done, (done * 255).round() / 255)
    assert (done - z).abs().max() <= 0.5 / 255 + 1e-6
    assert torch.equal(MinimumL2().finish(z, x), z)
    # A row that is not on the lattice and was not touched stays what it is.
    off = torch.full((1, 3), 0.1234)
    assert torch.equal(MinimumL2(lattice=255).finish(off, off), off)
    symmetric = MinimumL2(lattice=2).bind(Box(-1.0, 1.0))
    assert symmetric.finish(torch.tensor([[-0.9, 0.4, 0.6]]), torch.zeros(1, 3)).tolist() == [[-1.0, 0.0, 1.0]]


def test_what_needs_a_radius_is_told_where_to_find_one(rows):
    x, z = rows
    threat = MinimumL2()
    for question in (
        lambda: threat.eps,
        lambda: threat.steepest(z, x),
        lambda: threat.sample(x, RowRng.from_ids(0, list("abcdef"))),
    ):
        with pytest.raises(UsageError, match=r"has no radius.*l2:eps="):
            question()
    assert not hasattr(threat, "eps")


def test_binding_and_settings():
    box = Box(0.0, 1.0, shape=(3, 4, 4))
    assert MinimumL2().bind(box).box == box
    with pytest.raises(UsageError, match="in a Box"):
        MinimumL2().bind(Binary())
    with pytest.raises(UsageError, match="unbounded"):
        MinimumL2(lattice=255).bind(Box(-torch.inf, torch.inf))
    with pytest.raises(UsageError, match="lattice is -1"):
        MinimumL2(lattice=-1)
    with pytest.raises(UsageError, match="queries is -1"):
        MinimumL2(queries=-1)
    built = THREAT_MODELS.build("minimum-l2:access=scores,queries=100")
    assert built == MinimumL2(access=Access.SCORES, queries=100)
    assert THREAT_MODELS.spec(built) == "minimum-l2:access=scores,queries=100"
    block = built.describe()
    assert (block["eps"], block["norm"], block["knowledge"]) == (None, "L2", "black_box_score")
