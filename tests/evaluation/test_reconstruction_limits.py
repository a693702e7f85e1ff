"""Reconstruction: models of the user's own by name, attacks and speeds that are refused, lost rows, edited figures."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

import advkit
from advkit.core.errors import AdvkitError, BadModel
from advkit.evaluation.victims import protected
from advkit.tasks import TASKS

NET = "python:own_reconstructions:net"


class Scaled(nn.Module):
    def __init__(self, factor=0.9):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x):
        return self.factor * x


@pytest.fixture(autouse=True)
def own(monkeypatch):
    """A module of the user's own, with factories of a function, of a network and of what does not fit."""
    module = types.ModuleType("own_reconstructions")
    module.function = lambda: lambda x: 0.9 * x
    module.net = Scaled
    module.classifier = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    module.no_factory = lambda x: 0.9 * x
    monkeypatch.setitem(sys.modules, "own_reconstructions", module)


def run(model=NET, attack="pgd:steps=2", **more):
    more = {"n": 6, "device": "cpu", "threat_model": "l2:eps=0.5", **more}
    return advkit.evaluate(attack=attack, model=model, task="digits-reconstruction", **more)


@pytest.mark.parametrize("name", ["function", "net"])
def test_a_factory_of_a_function_or_network_is_a_model(name):
    task = TASKS.build("digits-reconstruction")
    model = protected(f"python:own_reconstructions:{name}", "none", task, device="cpu").model
    assert (model.answer_shape, model.classes) == ((1, 8, 8), None)
    x = next(iter(task.batches(6))).x
    metrics = run(f"python:own_reconstructions:{name}").metrics
    expected = (0.1 * x).double().square().flatten(1).mean(1).sqrt().mean()
    assert metrics["clean_rmse"]["value"] == pytest.approx(float(expected), abs=1e-6)
    # the answer to x + d is 0.9 (x + d): the worst d lies along -x
    worst = ((0.1 * x).flatten(1).norm(dim=1) + 0.9 * 0.5) / 8
    assert metrics["clean_rmse"]["value"] < metrics["rmse"]["value"] <= float(worst.mean()) + 1e-6


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("python:own_reconstructions:classifier", "wants reconstructed samples"),
        ("python:own_reconstructions:no_factory", "expected a factory"),
        ("zoo:digits-mlp", "this task wants reconstructed samples"),
    ],
)
def test_models_that_do_not_fit_are_named_without_classes(name, said):
    with pytest.raises(BadModel, match=said) as refused:
        protected(name, "none", TASKS.build("digits-reconstruction"), device="cpu")
    assert "has 0" not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"attack": "fab:steps=2"}, "looks for the nearest point"),
        ({"attack": "fab-t:steps=2"}, "looks for the nearest point"),
        ({"speed": "bf16"}, "use fp32"),
        ({"speed": "fp16"}, "use fp32"),
    ],
)
def test_what_would_understate_the_error_is_refused(more, said):
    with pytest.raises(AdvkitError, match=said) as refused:
        run(**more)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("attack", ["apgd-dlr:steps=3", "apgd-t:steps=3", "apgd-margin:steps=3", "square:queries=9"])
def test_other_attacks_do_not_depend_on_the_threshold(attack):
    found = [run(attack=attack, n=3, goal=f"reconstruction:rmse={rmse}").metrics["rmse"] for rmse in (0.02, 9)]
    assert found[0] == found[1]
