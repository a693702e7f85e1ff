"""Flips of bits: what is admitted, what is measured, and who is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.spaces import Binary, Box
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.events import Flips

X = torch.tensor([[0.0, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]]).view(2, 1, 2, 1, 3)


def flipped(*bits):
    z = X.clone().flatten(1)
    for bit in bits:
        z[:, bit] = 1 - z[:, bit]
    return z.view_as(X)


def test_admits_bits_within_the_budget_and_in_the_allowed_direction():
    two = flipped(0, 2)  # the first row gains bit 0 and loses bit 2, the second loses both
    assert Flips().admits(two, X).tolist() == [True, True]
    assert Flips(n=2).admits(two, X).all()
    assert not Flips(n=1).admits(two, X).any()
    assert Flips(n=0).admits(X, X).all()
    assert Flips(allow="delete").admits(two, X).tolist() == [False, True]
    assert Flips(allow="add").admits(flipped(0), X).tolist() == [True, False]
    for value in (0.5, -1.0, 2.0, torch.nan, torch.inf):
        bad = X.clone()
        bad[1, 0, 0, 0, 0] = value
        assert Flips().admits(bad, X).tolist() == [True, False]
    assert not Flips().admits(X[..., :2], X).any()


def test_distances_and_measures():
    threat = Flips()
    assert threat.distance(flipped(0, 2, 5), X).tolist() == [3, 3]
    measured = threat.measures(flipped(1), X)
    assert measured["l0"].tolist() == [1, 1]
    torch.testing.assert_close(measured["l0_percent"], torch.full((2,), 100 / 6, dtype=torch.float64))
    with pytest.raises(BadInput):
        threat.distance(X[..., :2], X)


@pytest.mark.parametrize("allow", ["flip", "add", "delete"])
@pytest.mark.parametrize("n", [None, 0, 1, 2, 6])
def test_projection_is_the_nearest_admitted_row_of_all(n, allow):
    threat = Flips(n=n, allow=allow)
    everything = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6))).view(-1, 1, 2, 1, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        z = X + torch.randn(X.shape, generator=generator)
        landed = threat.project(z, X)
        assert threat.admits(landed, X).all()
        for row in range(2):
            legal = everything[threat.admits(everything, X[row : row + 1].expand_as(everything))]
            best = (legal - z[row]).flatten(1).norm(dim=1).amin()
            torch.testing.assert_close((landed[row] - z[row]).norm(), best)
        assert torch.equal(threat.project(landed, X), landed)


def test_levels_end_with_the_budget():
    assert Flips().levels() == {"l0": (200, 800), "l0_percent": (0.05, 0.1, 0.25, 0.5, 1)}
    assert Flips(n=300).levels()["l0"] == (200,)


def test_binds_to_binary_spaces_alone():
    bound = Flips(n=4).bind(Binary((1, 2, 1, 3)))
    assert bound.space.shape == (1, 2, 1, 3)
    assert bound.n == 4
    with pytest.raises(UsageError, match="fashion-mnist-dvs"):
        Flips().bind(Box())


def test_what_needs_a_step_is_told_what_else_there_is():
    threat = Flips(n=2)
    for question in (
        lambda: threat.eps,
        lambda: threat.steepest(X, X),
        lambda: Flips().sample(X, RowRng.from_ids(0, ["a", "b"])),
    ):
        with pytest.raises(UsageError, match="sda"):
            question()
    assert not hasattr(threat, "eps")


def test_samples_flip_n_allowed_bits():
    rng = RowRng.from_ids(0, ["a", "b"])
    for n in (0, 1, 3):
        drawn = Flips(n=n).sample(X, rng)
        assert Flips().distance(drawn, X).tolist() == [n, n]
    assert Flips().distance(Flips(n=5, allow="add").sample(X, rng), X).tolist() == [3, 3]  # three zeros each
    alone = Flips(n=3).sample(X[1:], rng.take(torch.tensor([1])))
    assert torch.equal(alone, Flips(n=3).sample(X, rng)[1:])


def test_specs_and_reports():
    threat = THREAT_MODELS.build("flips:n=200,allow=add,access=labels,queries=50")
    assert threat == Flips(n=200, allow="add", access=Access.LABELS, queries=50)
    assert THREAT_MODELS.build(THREAT_MODELS.spec(threat)) == threat
    block = threat.describe()
    assert block["norm"] == "L0"
    assert block["eps"] == 200
    assert block["knowledge"] == "black_box_decision"
    assert block["details"]["allow"] == "add"
    assert Flips().describe()["eps"] is None
    for senseless in ("flips:n=-1", "flips:allow=maybe", "flips:queries=-2"):
        with pytest.raises(UsageError):
            THREAT_MODELS.build(senseless)
