"""MART: its loss against the formula in numpy, its gradient by finite differences, its pieces at their limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from advkit.core.errors import UsageError
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses.adversarial import mart
from advkit.defenses.adversarial.base import attacked
from advkit.defenses.adversarial.mart import MART
from advkit.models.torch import TorchModel
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf

ROWS = torch.arange(12)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(seed: int, rows: int = 7, classes: int = 4) -> torch.Tensor:
    return torch.randn(rows, classes, generator=generator(seed), dtype=torch.float64)


def labels(rows: int = 7, classes: int = 4) -> torch.Tensor:
    return torch.arange(rows) % classes


def streams(n: int = 12) -> RowRng:
    return RowRng.from_ids(0, [str(row) for row in range(n)])


def network() -> TorchModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return TorchModel(module, Box(0.0, 1.0), 3)


def by_hand(nat: np.ndarray, adv: np.ndarray, y: np.ndarray, beta: float) -> float:
    total = 0.0
    for clean, moved, label in zip(nat, adv, y, strict=True):
        p, q = np.exp(clean) / np.exp(clean).sum(), np.exp(moved) / np.exp(moved).sum()
        others = [q[c] for c in range(len(q)) if c != label]
        boosted = -np.log(q[label]) - np.log(1.0001 - max(others) + 1e-12)
        apart = sum(p[c] * (np.log(p[c]) - np.log(q[c] + 1e-12)) for c in range(len(p)))
        total += boosted + beta * apart * (1.0000001 - p[label])
    return total / len(y)


@pytest.mark.parametrize("beta", [0.0, 5.0])
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_the_loss_is_the_formula(beta: float, scale: float) -> None:
    nat, adv, y = scale * logits(1), scale * logits(2), labels()
    assert float(mart.loss(nat, adv, y, beta)) == pytest.approx(by_hand(nat.numpy(), adv.numpy(), y.numpy(), beta))


def test_gradients_flow_through_both_answers_and_the_weight() -> None:
    nat, adv, y = logits(1).requires_grad_(), logits(2).requires_grad_(), labels()
    assert torch.autograd.gradcheck(lambda a, b: mart.loss(a, b, y, 5.0), (nat, adv))
    full = torch.autograd.grad(mart.loss(nat, adv, y, 5.0), nat)[0]
    p, q = nat.softmax(1), adv.softmax(1)
    weight = (1.0000001 - p.gather(1, y[:, None]).squeeze(1)).detach()
    held = 5.0 * ((p * (p.log() - (q + 1e-12).log())).sum(1) * weight).mean()
    without = torch.autograd.grad(held, nat)[0]
    assert (full - without).abs().max() > 1e-2


def test_a_sure_clean_answer_leaves_no_divergence() -> None:
    y, adv = labels(), logits(2)
    nat = 60.0 * functional.one_hot(y, 4).double()
    assert float(mart.loss(nat, adv, y, 5.0)) == pytest.approx(float(mart.loss(nat, adv, y, 0.0)), abs=1e-4)


def test_the_runner_up_is_the_best_other_class() -> None:
    adv = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2]]).log().double()  # the true class first, and second
    y, nat = torch.tensor([0, 0]), torch.zeros(2, 3, dtype=torch.float64)
    first, second = (float(mart.loss(nat[i : i + 1], adv[i : i + 1], y[i : i + 1], 0.0)) for i in range(2))
    assert first == pytest.approx(-np.log(0.5) - np.log(1.0001 - 0.3), abs=1e-6)
    assert second == pytest.approx(-np.log(0.3) - np.log(1.0001 - 0.5), abs=1e-6)


def test_a_certain_wrong_answer_is_finite() -> None:
    adv = torch.tensor([[-500.0, 500.0, 0.0]])
    found = mart.loss(torch.zeros(1, 3), adv, torch.tensor([0]), 5.0)
    assert torch.isfinite(found)
    assert found > 1_000


def test_training_takes_the_loss_at_the_end_of_a_walk_on_cross_entropy() -> None:
    x = torch.rand(12, 6, generator=generator(3))
    y = torch.arange(12) % 3
    model, defense = network(), MART(eps=0.1, steps=3, beta=2.0)
    model.module.eval()
    found = defense.objective().loss(model, x, y, ROWS, streams())
    assert defense.attack.start == "gaussian"
    z = attacked(model, defense.attack, x, Untargeted(y), Linf(0.1), streams().at("attack"))
    assert torch.equal(found, mart.loss(model(x), model(z), y, 2.0))
    calls: list[int] = []
    model.module.register_forward_hook(lambda *_: calls.append(1))
    defense.objective().loss(model, x, y, ROWS, streams()).backward()
    assert len(calls) == 3 + 2


@pytest.mark.parametrize("beta", [-1.0, float("nan")])
def test_nonsense_is_refused(beta: float) -> None:
    with pytest.raises(UsageError, match="beta"):
        MART(beta=beta)
