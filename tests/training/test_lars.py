"""LARS: its steps are the paper's formula, weight by weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models import MODELS
from advkit.training.lars import LARS
from advkit.training.loop import Objective, Recipe, fit


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_ten_steps_are_those_of_the_formula(decay: float) -> None:
    draws = np.random.default_rng(0)
    w, b = draws.normal(size=(3, 4)), draws.normal(size=3)
    weight, bias = nn.Parameter(torch.tensor(w)), nn.Parameter(torch.tensor(b))
    groups = [{"params": [weight], "weight_decay": decay}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=2.0, momentum=0.8, trust=0.05)
    speed_w, speed_b = np.zeros_like(w), np.zeros_like(b)
    for step in range(10):
        g, h = draws.normal(size=(3, 4)), draws.normal(size=3)
        weight.grad, bias.grad = torch.tensor(g), torch.tensor(h)
        rate = 2.0 / (1 + step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        local = 0.05 * np.linalg.norm(w) / (np.linalg.norm(g) + decay * np.linalg.norm(w))
        speed_w = 0.8 * speed_w + local * (g + decay * w)
        speed_b = 0.8 * speed_b + h
        w, b = w - rate * speed_w, b - rate * speed_b
        assert np.allclose(weight.detach().numpy(), w, atol=1e-12)
        assert np.allclose(bias.detach().numpy(), b, atol=1e-12)


def test_the_scale_of_the_gradient_does_not_matter_and_zeros_are_steps_of_sgd() -> None:
    for scale in (1e-3, 1e3):
        weight = nn.Parameter(torch.full((2, 2), 3.0))
        weight.grad = scale * torch.tensor([[3.0, 0.0], [4.0, 0.0]])
        LARS([weight], lr=1.0, momentum=0.0).step()
        moved = (3.0 - weight.detach()).flatten()
        assert torch.allclose(moved, 1e-3 * 6.0 * torch.tensor([0.6, 0.0, 0.8, 0.0]), rtol=1e-3)
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    untouched = nn.Parameter(torch.ones(2, 2))
    LARS([weight, untouched], lr=0.5, momentum=0.0).step()
    assert torch.equal(weight, torch.full((2, 2), -0.5))
    assert torch.equal(untouched, torch.ones(2, 2))


@pytest.mark.slow
def test_the_loop_trains_with_it() -> None:
    y = torch.arange(120) % 3
    noise = RowRng.from_ids(1, [str(i) for i in range(120)]).uniform(torch.empty(120, 2))
    data = Data(x=(0.2 + 0.3 * y[:, None] + 0.1 * noise).clamp(0, 1), y=y, space=Box(), classes=3)
    rng = RowRng.from_ids(7, ["run"])
    model = MODELS.build("mlp:hidden=8")((2,), 3, rng.at("init"))
    recipe = Recipe(epochs=120, optimizer="lars", lr=2.0, batch_size=60, schedule="cosine")
    done = fit(model, data, Objective(), recipe, rng, progress=False)
    assert done.log[-1].loss < 0.8 * done.log[0].loss
    assert done.best.clean > 0.9
