"""What a training step costs beside the passes that the method needs: counted, never timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from advkit.benchmark import Ops, counted
from advkit.core.lanes import Lanes
from advkit.core.meter import Meter
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.core.state import frozen
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.base import in_mode
from advkit.models import MODELS
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.training.loop import Recipe, fit

BATCH = 16
RECIPE = Recipe(epochs=1, batch_size=BATCH, optimizer="sgd", validation=0.0, select="last")
RNG = RowRng.from_ids(5, ["cost"])
METHODS = {"pgd_at": "pgd_at:steps=5", "aaer": "aaer"}
PASSES = {"pgd_at": 6, "aaer": 2}
# Operations of a step beside those of its bare passes, as they are: a step may become cheaper, never dearer unnoticed.
# 90 of them draw the random start.
OPS = {"pgd_at": 157, "aaer": 179}
SYNCS = {"pgd_at": 3, "aaer": 1}


def rows(batches: int = 1) -> Data:
    generator = torch.Generator().manual_seed(0)
    n = BATCH * batches
    return Data(torch.rand((n, 1, 14, 14), generator=generator), torch.arange(n) % 10, Box(), 10)


def net(spec: str = "cnn") -> Any:
    return MODELS.build(spec)((1, 14, 14), 10, RNG.at("init"))


def trained(method: str, model: Any, data: Data) -> None:
    fit(model, data, DEFENSES.build(METHODS[method]).objective(), RECIPE, RNG, progress=False)


def bare(passes: int) -> Ops:
    """A step's passes, one of them to train, and the optimiser's step, which is not its first one."""
    module, data = net().module, rows()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        with Ops() as ops:
            with frozen(module):
                for _ in range(passes - 1):
                    leaf = data.x.clone().requires_grad_()
                    torch.autograd.grad(cross_entropy(module(leaf), data.y, reduction="sum"), leaf)
            optimizer.zero_grad()
            cross_entropy(module(data.x), data.y).backward()
            optimizer.step()
    return ops


@pytest.mark.parametrize("method", METHODS)
def test_a_step_costs_no_more_operations_than_today(method: str) -> None:
    trained(method, net(), rows())  # what is made once in a process is made now
    with Ops() as few:
        trained(method, net(), rows(2))
    with Ops() as many:
        trained(method, net(), rows(6))
    assert 0 < (many.ops - few.ops) / 4 - bare(PASSES[method]).ops <= OPS[method]
    assert (many.syncs - few.syncs) / 4 <= SYNCS[method]


@pytest.mark.parametrize("method", METHODS)
def test_a_training_makes_the_passes_of_the_method_and_no_other(method: str) -> None:
    model, data = net(), rows(3)
    with counted(model.module) as passes:
        trained(method, model, data)
    assert passes.forwards == passes.backwards == PASSES[method] * len(data)


def test_a_meter_that_does_not_look_counts_all_the_same() -> None:
    model, data = net(), rows()
    x, y = data.x[:4].clone(), data.y[:4]
    x[0] = torch.nan
    found = {}
    for looks in (True, False):
        oracle = MeteredOracle(model, 4, lanes=Lanes(chunk=4, multiple=1), meter=Meter(4, looks=looks))
        with frozen(model.module):
            found[looks] = (*oracle.gradient(x, Untargeted(y)), oracle(x), oracle.take(torch.tensor([1, 3]))(x[1::2]))
        assert oracle.meter.forwards.tolist() == [2, 3, 2, 3]
        assert oracle.meter.backwards.tolist() == [1, 1, 1, 1]
        assert oracle.meter.asked_non_finite.tolist() == [looks, False, False, False]
    for one, other in zip(found[True], found[False], strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("training", [True, False])
def test_every_module_gets_its_mode_back(training: bool) -> None:
    model = net("resnet8:width=4")
    model.module.train(training)
    model.module.norm.train(not training)
    before = [module.training for module in model.module.modules()]
    for asked in (True, False):
        with in_mode(model, asked):
            assert {module.training for module in model.module.modules()} == {asked}
        assert [module.training for module in model.module.modules()] == before
