"""Smoothed models: closed forms of the vote, the lattice's certificate, streams of the rows, the attacker's view."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.lanes import Lanes
from advkit.core.noise import lattice_normal
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.core.smoothing import largest_radius, radius
from advkit.core.spaces import Box
from advkit.core.state import full_precision
from advkit.evaluation.run.judge import Judge
from advkit.models.smoothed import GaussianNoise, LatticeNoise, Smoothed, Smoothing
from advkit.models.torch import TorchModel
from advkit.testing.victims import linear, network, uniform
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted

SETTINGS = Smoothing(sigma=0.25, n_predict=100)


class _Fixed(nn.Module):
    """Logits that do not look at the input; NaN where a mark says so."""

    def __init__(self, logits, nan_above: float = math.inf) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor(logits))
        self.nan_above = nan_above

    def forward(self, x):
        answer = self.logits.expand(len(x), -1).clone()
        answer[x.flatten(1)[:, 0] > self.nan_above] = math.nan
        return answer


def fixed(logits, nan_above: float = math.inf, features: int = 4) -> TorchModel:
    return TorchModel(_Fixed(logits, nan_above).eval(), Box(shape=(features,)), len(logits))


@pytest.mark.slow
def test_the_radius_of_a_halfspace_is_certified_and_never_passed():
    """A linear model under noise gives its class with probability Phi(distance / sigma): the true radius."""
    model = linear(features=8, seed=3)
    sigma, alpha, n = 0.25, 0.01, 100_000
    smoothed = Smoothed(model, Smoothing(sigma=sigma))
    rows = uniform(4, 40, 8)
    labels = model(rows).argmax(1)
    distances = model.distance(rows, labels, "l2").numpy()
    inner = np.flatnonzero((distances > 0.5 * sigma) & (distances < 2 * sigma))[:3]
    assert len(inner) == 3
    found = []
    for row in inner:
        tally = smoothed.tally(rows[row], int(row) + 77, n)
        assert int(tally.votes.sum()) == n
        found.append(radius(int(tally.votes[labels[row]]), n, sigma, alpha))
    found, true = np.array(found), distances[inner]
    assert bool((found <= true).all())
    assert bool((found > 0.95 * true).all())


def test_a_constant_model_reaches_the_largest_radius():
    for sigma in (0.1, 0.25, 1.0):
        smoothed = Smoothed(fixed([0.0, 1.0]), Smoothing(sigma=sigma))
        tally = smoothed.tally(torch.rand(4), 5, 1000)
        assert tally.votes.tolist() == [0, 1000]
        assert radius(1000, 1000, sigma, 0.001) == largest_radius(1000, sigma, 0.001)


def test_lattice_certificates_hold_for_every_8_bit_input():
    """On one feature everything is known: the vote's probability, and the nearest 8-bit input with another answer."""
    sigma = 0.1
    scale = sigma * 255
    for step in (0, 1, 2, 10, 60):  # the input lies so many steps inside the class
        inside = stats.norm.cdf((step + 0.5) / scale)  # P(Z >= -step), of a rounded normal variable
        proven = sigma * stats.norm.ppf(inside) * 255
        assert proven == pytest.approx(step + 0.5, rel=1e-9)
        assert proven < step + 1  # where the vote of the other class has the majority
    law = lattice_normal(sigma)
    drawn = torch.cat([law.block(3, block, 64, torch.zeros(16)).flatten() for block in range(40)])
    share = float((drawn >= -10).double().mean())
    assert share == pytest.approx(stats.norm.cdf(10.5 / scale), abs=4 * 0.5 / len(drawn) ** 0.5)


def test_lattice_copies_are_8_bit_inputs_and_move_with_them():
    noise = LatticeNoise(0.25)
    row = torch.tensor([0.0, 51 / 255, 200 / 255, 1.0])
    copies = noise.around(row, 9, 0, 64)
    whole = copies.double() * 255
    assert float((whole - whole.round()).abs().max()) < 1e-3
    moved = noise.around(row + torch.tensor([7, -3, 0, 1]) / 255, 9, 0, 64)
    difference = (moved.double() * 255).round() - whole.round()
    assert bool((difference == torch.tensor([7, -3, 0, 1])).all())
    assert noise.sound
    assert not GaussianNoise(0.25).sound
    assert 0 < noise.slack(784) < 1e-8
    assert noise.off_grid(torch.stack([row, row + 0.001])).tolist() == [False, True]


def test_a_rows_votes_depend_on_its_key_and_on_nothing_beside_it():
    smoothed = Smoothed(network(), SETTINGS)
    x = uniform(8, 6, 2, 6, 6)
    keys = RowRng.from_ids(0, [str(row) for row in range(6)]).keys()
    whole = smoothed.drawing(x, keys)
    assert whole.shape == (6, 3)
    assert bool((whole.sum(1) == 100).all())
    rows = torch.tensor([4, 1])
    assert torch.equal(smoothed.drawing(x[rows], keys[rows]), whole[rows])
    view = smoothed.attacker_view()
    turned = torch.tensor([4, 1, 0, 3, 5, 2])  # as many rows: calls of other shapes may differ in the last bits
    assert torch.equal(view.drawing(x[turned], keys[turned]), view.drawing(x, keys)[turned])
    assert torch.allclose(view.drawing(x[rows], keys[rows]), view.drawing(x, keys)[rows], atol=1e-5)


def test_every_query_of_an_oracle_draws_anew_whatever_is_asked_beside_it():
    smoothed = Smoothed(network(), SETTINGS)
    view, x = smoothed.attacker_view(), uniform(8, 5, 2, 6, 6)
    keys = RowRng.from_ids(0, list("abcde")).keys()

    def oracle(model, rows):
        return MeteredOracle(model, len(rows), lanes=Lanes(16, 4), keys=keys[rows])

    everyone = torch.arange(5)
    for model in (smoothed, view):
        whole = oracle(model, everyone)
        first, second = whole(x), whole(x)
        assert not torch.equal(first, second)
        alone = oracle(model, torch.tensor([3]))
        assert torch.equal(alone(x[3:4]), first[3:4])
        part = whole.take(torch.tensor([3, 0]))
        assert torch.equal(part(x[[3, 0]])[:1], alone_third(oracle(model, torch.tensor([3])), x[3:4]))
    goal = Untargeted(torch.zeros(5, dtype=torch.long))
    loss, gradient, _ = oracle(view, everyone).gradient(x, goal)
    some = torch.tensor([2, 4])
    other, moved, _ = oracle(view, some).gradient(x[some], goal.take(some))
    assert torch.equal(other, loss[some])
    assert torch.equal(moved, gradient[some])


def alone_third(oracle, x):
    oracle(x), oracle(x)
    return oracle(x)


def test_the_view_is_the_mean_probability_and_differentiable():
    smoothed = Smoothed(network(), Smoothing(sigma=0.1, draws=4))
    view, x = smoothed.attacker_view(), uniform(9, 3, 2, 6, 6)
    keys = torch.tensor([1, 2, 3])
    answer = view.drawing(x, keys)
    assert torch.allclose(answer.exp().sum(1), torch.ones(3))
    copies = torch.stack([smoothed.noise.around(row, key, 0, 4) for row, key in zip(x, keys.tolist(), strict=True)])
    means = torch.stack([smoothed.model(copies[:, draw]).softmax(1) for draw in range(4)]).mean(0)
    assert torch.allclose(answer.exp(), means, atol=1e-6)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(view.drawing(leaf, keys)[:, 0].sum(), leaf)
    direction = torch.sign(gradient)
    step = 1e-2
    up, down = (view.drawing(x + side * step * direction, keys)[:, 0] for side in (1, -1))
    expected = (gradient * direction).flatten(1).sum(1)
    assert torch.allclose((up - down) / (2 * step), expected, rtol=0.05)


def test_abstaining_is_a_wrong_answer():
    smoothed = Smoothed(fixed([0.0, 1.0, 0.0]), SETTINGS)
    votes = torch.tensor([[0.0, 100.0, 0.0], [50.0, 50.0, 0.0], [10.0, 45.0, 45.0], [60.0, 20.0, 20.0]])
    assert smoothed.abstained(votes).tolist() == [False, True, True, False]
    judge = Judge(smoothed, Lanes(4, 1))
    assert judge.decide(votes).tolist() == [1, -1, -1, 0]
    labels = torch.tensor([1, 0, 1, 0])
    assert judge.majority(Untargeted(labels), [votes]).tolist() == [False, True, True, False]
    target = Targeted(torch.tensor([1, 1, 1, 0]))
    assert judge.majority(target, [votes]).tolist() == [True, False, False, True]


def test_ten_draws_always_abstain():
    few = Smoothed(fixed([0.0, 1.0]), Smoothing(sigma=0.25, n_predict=10))
    assert bool(few.abstained(few(torch.rand(3, 4))).all())
    more = Smoothed(fixed([0.0, 1.0]), Smoothing(sigma=0.25, n_predict=11))
    assert not bool(more.abstained(more(torch.rand(3, 4))).any())


def test_votes_that_are_not_finite_count_for_no_class():
    smoothed = Smoothed(fixed([0.0, 1.0], nan_above=0.5), Smoothing(sigma=0.25))
    tally = smoothed.tally(torch.full((4,), 0.5), 1, 1000)
    assert tally.votes[0] == 0
    assert tally.draws == 1000
    assert tally.votes[1] == pytest.approx(500, abs=80)


def test_calls_within_the_memory_limit_give_the_same_votes():
    smoothed = Smoothed(linear(features=8), Smoothing(sigma=0.5))
    row = torch.full((8,), 0.5)
    whole = smoothed.tally(row, 3, 200).votes
    assert smoothed.tally(row, 3, 200, memory=4 * 8 * 16).votes.tolist() == whole.tolist()
    sizes = []

    class Small(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            if len(x) > 16:
                raise torch.OutOfMemoryError("too much")
            return torch.stack([x[:, 0], 1 - x[:, 0]], 1)

    tight = Smoothed(TorchModel(Small().eval(), Box(shape=(8,)), 2), Smoothing(sigma=0.5))
    assert int(tight.tally(row, 3, 200).votes.sum()) == 200
    assert max(sizes) == 64
    assert sizes[-1] == 16


def test_parts_of_a_stream_are_fresh_draws():
    smoothed = Smoothed(linear(features=8), Smoothing(sigma=0.5))
    row = torch.full((8,), 0.5)
    first, second = smoothed.tally(row, 3, 64), smoothed.tally(row, 3, 64, first=1)
    both = smoothed.tally(row, 3, 128)
    assert (first + second).votes.tolist() == both.votes.tolist()
    assert (first + second).draws == 128


def test_what_can_not_be_smoothed_is_refused():
    with pytest.raises(UsageError, match=r"8-bit inputs in \[0, 1\]"):
        Smoothed(linear(features=8, space=Box(-1.0, 1.0, (8,))), Smoothing(sigma=0.25, noise="lattice"))
    with pytest.raises(BadModel, match="draws by itself"):
        Smoothed(Smoothed(linear(features=8), SETTINGS), SETTINGS)
    half = TorchModel(nn.Sequential(nn.Linear(4, 2).bfloat16()).eval(), Box(shape=(4,)), 2)
    assert Smoothed(half, SETTINGS).low_precision == "bfloat16"
    assert Smoothed(linear(features=8), SETTINGS).low_precision == ""
    lattice = Smoothed(linear(features=8), Smoothing(sigma=0.25, noise="lattice"))
    with pytest.raises(BadInput, match=r"1 samples \(the first: b\).*noise=gaussian"):
        lattice.check_grid(torch.tensor([[0.0] * 8, [0.5] * 8]), ["a", "b"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sigma": 0.0}, "sigma is 0.0"),
        ({"sigma": -1.0}, "sigma is -1.0"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"sigma": 0.25, "alpha": 0.0}, "alpha is 0.0"),
        ({"sigma": 0.25, "alpha": 1.0}, "alpha is 1.0"),
        ({"sigma": 0.25, "n_predict": 0}, "n_predict is 0"),
        ({"sigma": 0.25, "draws": 0}, "draws is 0"),
        ({"sigma": 0.25, "noise": "pink"}, "noise is 'pink'"),
        ({"sigma": 9.0, "noise": "lattice"}, "sigma is 9.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, words):
    with pytest.raises(UsageError, match=words):
        Smoothing(**settings)


def test_it_travels_to_other_processes_and_has_a_hash_of_its_own():
    smoothed = Smoothed(network(), SETTINGS)
    again = pickle.loads(pickle.dumps(smoothed))
    assert again.describe().state_sha256 == smoothed.describe().state_sha256
    others = [Smoothing(sigma=0.5, n_predict=100), Smoothing(sigma=0.25, n_predict=100, noise="lattice")]
    hashes = {Smoothed(network(), each).describe().state_sha256 for each in (SETTINGS, *others)}
    assert len({*hashes, network().describe().state_sha256}) == 4


def test_full_precision_is_given_back_as_it_was():
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with torch.autocast("cpu", dtype=torch.bfloat16), full_precision():
        assert not torch.is_autocast_enabled("cpu")
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
        assert (torch.rand(4, 4) @ torch.rand(4, 4)).dtype == torch.float32
    assert before == (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())
