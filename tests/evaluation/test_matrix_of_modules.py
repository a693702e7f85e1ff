"""The transfer matrix takes what `evaluate` takes: modules, functions, and tensors whose labels miss a class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import advkit
from advkit.attacks.gradient.pgd import PGD
from advkit.core.errors import BadModel, UsageError
from advkit.evaluation.sources import Member
from advkit.models import MODELS
from advkit.models.torch import TorchModel, as_model
from advkit.models.zoo import load
from advkit.tasks import TASKS


class Negated(nn.Module):
    """The opposite scores; it has no weights."""

    def forward(self, x: Tensor) -> Tensor:
        return -x


def net(seed: int, classes: int = 10, *more: nn.Module) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), *more).eval()


def table(sources: Any, attacks: Any, targets: Any, folder: Path, **settings: Any) -> dict[str, Any]:
    given = {"task": "digits", "n": 16, "seeds": 1, "equal_budget": None, "device": "cpu", "cache": folder, **settings}
    return advkit.matrix(sources, attacks, targets, **given).to_dict()


def right(made: dict[str, Any]) -> dict[tuple[str, str], float]:
    return {(one["s"], one["t"]): one["acc"]["counts"][0][0] for one in made["cells"]}


@pytest.mark.slow
def test_modules_as_they_are(tmp_path: Path) -> None:
    """A single one needs no list (a Sequential is a sequence of layers, too); those that share a name are numbered."""
    source, target = net(0), net(1)
    listed = table([source], ["mi"], [target], tmp_path)
    assert right(table(source, "mi", target, tmp_path)) == right(listed)
    assert right(table(source, PGD(steps=2), target, tmp_path)) is not None
    both = table([source, target], ["mi"], [target, source], tmp_path)
    assert [one["name"] for one in both["sources"]] == ["Sequential", "Sequential-2"]
    whitebox = {(one["s"], one["t"]): one["whitebox"] for one in both["cells"]}
    assert whitebox == {
        ("Sequential", "Sequential"): False,
        ("Sequential", "Sequential-2"): True,
        ("Sequential-2", "Sequential"): True,
        ("Sequential-2", "Sequential-2"): False,
    }
    assert right(both)["Sequential", "Sequential"] == right(listed)["Sequential", "Sequential"]
    table([(source, target)], ["mi"], [lambda x: target(x)], tmp_path)


def test_labels_that_miss_the_last_class(tmp_path: Path) -> None:
    x, y = torch.rand(24, 1, 8, 8), torch.arange(24) % 5
    for models in ((net(0, 6), net(1, 6)), (TorchModel(net(0, 6), name="s"), TorchModel(net(1, 6), name="t"))):
        made = table([models[0]], ["mi"], [models[1]], tmp_path, task=(x, y), n=24, eps=0.1)
        assert made["n"] == 24
    with pytest.raises(BadModel, match="answers 7 classes, the task arrays has 6"):
        table([net(0, 6)], ["mi"], [net(1, 7)], tmp_path, task=(x, y), n=24)
    with pytest.raises(BadModel, match="answers 3 classes, the task arrays has 5"):
        table([net(0, 3)], ["mi"], [net(1, 3)], tmp_path, task=(x, y), n=24)
    with pytest.raises(BadModel, match="7 classes"):
        table([net(0, 7)], ["mi"], [net(1)], tmp_path)


def test_kept_images_and_answers_know_what_a_network_computes(tmp_path: Path) -> None:
    """Networks of the same weights that compute different things share nothing; a named one is known by its name."""
    plain, opposite = net(0), net(0, 10, Negated())
    opposite.load_state_dict(plain.state_dict())
    task = TASKS.build("digits")
    keys = {Member.of(as_model(model, task)).key for model in (plain, opposite, net(1))}
    assert len(keys) == 3
    assert Member.of(as_model(plain, task)).key == Member.of(as_model(net(0), task)).key
    held = load("digits-mlp")
    again = MODELS.build("zoo:digits-mlp")((1, 8, 8), 10, None, space=task.space)
    assert Member.of(held).key == Member.of(again).key
    batch = next(iter(task.batches(16)))
    assert batch.labels is not None
    for model in (plain, opposite):
        made = table([net(1)], ["mi"], [model], tmp_path)
        counted = int((model(batch.x).argmax(1) == batch.labels).sum())
        assert made["summary"]["Sequential"]["clean"]["counts"] == [[counted, 16]]


def test_a_network_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="training mode"):
        table([net(0, 10, nn.Dropout()).train()], ["mi"], [net(1)], tmp_path)
