"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

from advkit.models.torch import TorchModel
from advkit.tasks import TASKS

# One process per core runs the tests; threads beside it, in subprocesses too, would only wait for one another.
settings.register_profile("advkit", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # machines are busy
settings.load_profile("advkit")
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


LONG = ("test_notebooks.py", "test_readme.py", "test_fuzz.py")
"""Files whose single tests take a minute or more."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests begin first, so that at the end no process is left alone with one."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(autouse=True)
def _same_draws():
    """Every test starts from the same generators, whatever ran before it in the same process."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (what libraries draw from)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits():
    """The embedded digits task."""
    return TASKS.build("digits")


@pytest.fixture(scope="session")
def digits_module(digits):
    """A small network that reads digits well; trained once per session."""
    data = digits.training()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(30):
            for rows in torch.randperm(len(data)).split(128):
                loss = nn.functional.cross_entropy(net(data.x[rows]), data.y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    for parameter in net.parameters():
        parameter.grad = None
    return net.eval()


@pytest.fixture
def digits_model(digits, digits_module):
    """The same network as a model of the digits task."""
    return TorchModel(digits_module, space=digits.space, classes=10, name="digits-mlp")
