"""A small trained classifier on scikit-learn's digits, as images [1, 8, 8] in [0, 1]."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from advkit.core.spaces import Box
from advkit.models.torch import TorchModel


@pytest.fixture(scope="session")
def digits():
    """(model, x [360, 1, 8, 8], labels): an MLP 64-64-10, its correctly classified test images first."""
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(module.parameters(), 3e-3)
        for _ in range(15):
            for rows in train[torch.randperm(len(train))].split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    module.eval()
    x, y = x[test], y[test]
    with torch.no_grad():
        right = module(x).argmax(1) == y
    assert right.float().mean() > 0.93
    return TorchModel(module, Box(shape=(1, 8, 8)), 10), x[right], y[right]
