"""Lanes: calls of sizes in which a row gets the same bits, found by a probe, and how a batch is cut into them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advkit.core.lanes import _CALL, Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.round_off import operations
from advkit.core.rows import elementwise
from advkit.threat_models.goals.untargeted import Untargeted

SIZES = (16, 32, 48, 64)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3, 2), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(), nn.Linear(6 * 49, 10)]
    return nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), *layers).eval().requires_grad_(False)


@pytest.mark.parametrize("sizes", [SIZES, (*SIZES, 128, 256), (7, 9), (64,), (1, 2, 3, 4, 6, 8)])
def test_calls_cover_a_batch_and_every_call_has_an_allowed_size(sizes: tuple[int, ...]) -> None:
    lanes = Lanes.of_sizes(sizes)
    for rows in [*range(140), 250, 999]:
        calls = lanes.split(rows)
        assert sum(calls) == rows
        assert all(lanes.padded(each) in ((0,) if rows == 0 else sizes) for each in calls)
        assert all(each in sizes for each in calls[:-1])  # the last one alone is padded


def test_a_batch_is_cut_as_cheaply_as_can_be() -> None:
    sizes = (4, 6, 9, 16)
    lanes = Lanes.of_sizes(sizes)

    def cost(calls: tuple[int, ...]) -> int:
        return sum(lanes.padded(each) + _CALL for each in calls)

    for rows in range(1, 33):
        best = min(
            sum(calls) + _CALL * len(calls)
            for many in range(1, 9)
            for calls in itertools.combinations_with_replacement(sizes, many)
            if sum(calls) >= rows
        )
        assert cost(lanes.split(rows)) == best


def test_a_probe_keeps_sizes_that_give_the_same_bits_and_no_other() -> None:
    x = torch.rand(64, 1, 14, 14, generator=torch.Generator().manual_seed(1))

    def odd(z: torch.Tensor) -> torch.Tensor:
        """Calls of 32 and 128 rows differ in the last bit."""
        answer = z.flatten(1)[:, :10] * 2
        return answer * (1 + 2.0**-23) if len(z) in (32, 128) else answer

    below = (1, 2, 3, 4, 6, 8, 12, 16, 24)
    assert Lanes.probed(odd, x).sizes == (*below, 48, 64)
    assert Lanes.probed(odd, x, rows=1e9).sizes == (*below, 48, 64, 256)

    def alone(z: torch.Tensor) -> torch.Tensor:
        """What 64 rows get, no other call gives."""
        return z.flatten(1)[:, :10] * (3 if len(z) >= 64 else 2)

    assert Lanes.probed(alone, x).sizes == (*below, 32, 48)

    def never(z: torch.Tensor) -> torch.Tensor:
        return z.flatten(1)[:, :10] * len(z)

    assert Lanes.probed(never, x).sizes == (64,)  # every call has 64 rows, as it ever was


@pytest.mark.parametrize(("first", "rest"), [(4, 64), (4, 48), (64, 64), (16, 50)])
def test_which_bits_are_taken_does_not_depend_on_the_batch(first: int, rest: int) -> None:
    """Small calls may agree with one another and not with large ones: batches of 3 tried no size that told the two."""
    x = torch.rand(64, 1, 14, 14)

    def stepped(z: torch.Tensor) -> torch.Tensor:
        answer = z.flatten(1)[:, :10] * 2
        return answer * (1 + 2.0**-20 * ((len(z) >= first) + (len(z) > rest)))

    taken = {
        bool(size >= first) + bool(size > rest)
        for batch in range(1, 66)
        for size in Lanes.probed(stepped, x, rows=100, batch=batch).sizes
    }
    assert len(taken) == 1


def test_sizes_are_tried_as_far_as_a_run_needs_them() -> None:
    x = torch.rand(64, 1, 14, 14)

    def double(z: torch.Tensor) -> torch.Tensor:
        return z.flatten(1)[:, :10] * 2

    assert Lanes.probed(double, x, rows=100, batch=10).sizes == (1, 2, 3, 4, 6, 8, 10, 64)
    assert Lanes.probed(double, x, rows=1e9, batch=10).sizes == (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64)
    assert Lanes.probed(double, x, rows=1e9, batch=250).sizes[-3:] == (64, 128, 250)
    assert Lanes.probed(double, x, rows=100, batch=1000).sizes[-1] == 64


class Narrow(nn.Module):
    """Two linear layers, and a function of so many numbers per row between them."""

    def __init__(self, width: int, function: Any) -> None:
        super().__init__()
        self.inner, self.outer, self.function = nn.Linear(50, width), nn.Linear(width, 10), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.outer(self.function(self.inner(x)))
        return answer


VECTORED = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh-gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "softplus": F.softplus,
    "elu": F.elu,
    "mish": F.mish,
    "power": lambda x: (x.abs() + 0.1).pow(2.2),
    "step": lambda x: torch.add(x, x.detach(), alpha=0.3),
}
EXACT = {
    "relu": F.relu,
    "leaky": F.leaky_relu,
    "clamp": lambda x: x.clamp(-0.1, 0.2),
    "root": lambda x: (x.abs() + 0.1).sqrt(),
    "square": lambda x: x.pow(2) / 3.3 - x,
    "softmax": lambda x: F.softmax(x, 1),
    "norm": lambda x: F.layer_norm(x, x.shape[1:]),
}


@pytest.mark.parametrize("name", VECTORED)
def test_calls_in_which_a_function_would_end_between_vectors_are_not_tried(name: str) -> None:
    """The ends differ in one number of a thousand, which a trial of a hundred rows misses."""
    for width, smallest in ((75, 32), (48, 2), (64, 1)):
        net = Narrow(width, VECTORED[name])
        found = operations(net, torch.rand(3, 50), True)
        assert found.known
        assert min(size for size in range(1, 65) if found.allow(size)) == smallest
        assert {size % smallest for size in range(1, 65) if found.allow(size)} == {0}
        assert {size % smallest for size in Lanes.probed(net, torch.rand(64, 50), rows=1e9).sizes} == {0}


@pytest.mark.slow
@pytest.mark.parametrize("name", {**VECTORED, **EXACT})
def test_a_function_gives_a_number_the_same_bits_in_every_allowed_call(name: str) -> None:
    """What the lists of `round_off` claim of this machine's torch: 60 draws, forward and backward, all numbers."""
    function = {**VECTORED, **EXACT}[name]
    for width in (7, 75, 96):

        def run(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            leaf = z.clone().requires_grad_()
            answer = function(leaf)
            return answer.detach(), torch.autograd.grad(answer, leaf, answer.detach())[0]

        allowed = operations(function, torch.rand(3, width), True)
        assert allowed.known
        sizes = [size for size in (1, 2, 3, 5, 8, 16, 24, 32, 48) if allowed.allow(size)]
        assert (1 in sizes) == (name in EXACT or width == 96)
        for seed in range(60 if sizes else 0):
            x = 3 * torch.randn(64, width, generator=torch.Generator().manual_seed(seed))
            whole = run(x)
            for size in sizes:
                for start in (0, 64 - size):
                    for part, all_ in zip(run(x[start : start + size]), whole, strict=True):
                        assert torch.equal(part, all_[start : start + size])


def test_code_that_is_not_known_keeps_to_even_calls() -> None:
    def elsewhere(z: torch.Tensor) -> torch.Tensor:
        return z * torch.from_numpy(np.exp(-z.detach().numpy()))

    compiled = torch.jit.trace(nn.Linear(64, 10), torch.rand(2, 64))
    for model in (elsewhere, compiled, lambda z: z.cumsum(1)):
        found = operations(model, torch.rand(3, 64), True)
        assert not found.known
        assert [size for size in (1, 8, 15, 16, 24, 48, 64) if found.allow(size)] == [16, 48, 64]
        assert Lanes.probed(model, torch.rand(64, 64)).sizes[0] >= 16


def test_what_a_probe_was_answered_is_known_again() -> None:
    net, x = network(), torch.rand(64, 1, 14, 14)
    found = Lanes.probed(net, x)
    assert found.bits == Lanes.answered(net, x) != Lanes.answered(net, x, backward=False)
    with torch.no_grad():
        net[1].weight += 2.0**-20
    assert Lanes.answered(net, x) != found.bits
    assert Lanes.answered(net, x.long()) == ""


@pytest.mark.slow
def test_rows_in_probed_calls_have_the_same_bits_in_any_batch() -> None:
    net = network()
    x = torch.rand(130, 1, 14, 14, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(130) % 10
    lanes = Lanes.probed(net, x[:64], rows=1e9)
    found = {}
    for batch in (1, 7, 50, 130):
        parts = [
            MeteredOracle(net, len(part), lanes=lanes).gradient(part, Untargeted(goal))
            for part, goal in zip(x.split(batch), labels.split(batch), strict=True)
        ]
        found[batch] = [torch.cat(each) for each in zip(*parts, strict=True)]
    for batch in (1, 7, 50):
        assert all(torch.equal(a, b) for a, b in zip(found[batch], found[130], strict=True))


@pytest.mark.parametrize("features", [294, 297, 2])
def test_rows_of_any_width_have_the_same_bits_at_any_place(features: int) -> None:
    """Rows that are no multiple of 16 bytes long begin at other places of a vector; see `advkit/__init__.py`."""
    torch.manual_seed(3)
    net = nn.Linear(features, 10).requires_grad_(False)
    x = torch.rand(16, features)
    whole = net(x)
    for row in range(16):
        assert torch.equal(net(x[row : row + 1].expand(16, -1).contiguous())[0], whole[row])


def test_a_place_that_matters_is_said(caplog: pytest.LogCaptureFixture) -> None:
    def placed(z: torch.Tensor) -> torch.Tensor:
        return z * (1 + torch.arange(len(z))[:, None] % 16)

    x = torch.rand(64, 3)
    Lanes.probed(placed, x)
    assert "depend on its place in the batch" in caplog.text
    caplog.clear()
    Lanes.probed(lambda z: z * 2, x)
    assert not caplog.text


def test_several_models_share_the_sizes_that_suit_all() -> None:
    first, second = Lanes.of_sizes((4, 8, 16, 64)), Lanes.of_sizes((8, 16, 32, 64, 128))
    assert Lanes.shared([first, second]).sizes == (8, 16, 64)
    assert Lanes.shared([first, Lanes(1, 1)]) == first  # that model says its own when it is asked
    assert Lanes.shared([first, Lanes(64, 64)]) == Lanes(64, 64)
    assert Lanes.shared([Lanes.of_sizes((16, 32, 48, 64)), Lanes(64, 16)]) == Lanes(64, 16)
    assert Lanes.shared([Lanes(64, 16), Lanes(64, 64)]) == Lanes(64, 64)


def test_a_direct_call_pads_nothing() -> None:
    seen: list[int] = []

    def model(z: torch.Tensor) -> torch.Tensor:
        seen.append(len(z))
        return z.flatten(1)

    MeteredOracle(model, 3, Access.SCORES)(torch.rand(3, 2))
    MeteredOracle(model, 130, Access.SCORES)(torch.rand(130, 2))
    MeteredOracle(model, 600, Access.SCORES)(torch.rand(600, 2))
    assert seen == [3, 130, 256, 256, 88]


@pytest.mark.parametrize(
    "function", [torch.sigmoid, torch.atanh, lambda share: 0.01**share], ids=["sigmoid", "atanh", "pow"]
)
def test_a_number_per_row_has_the_same_bits_wherever_it_stands(function):
    values = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 0.9
    whole = function(values)
    for rows in (0, 1, 3, 7, 31, 32, 33, 50):
        for first in (0, 5):
            assert torch.equal(elementwise(function, values[first : first + rows]), whole[first : first + rows])
