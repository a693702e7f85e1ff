"""The embedded spiking victims: what their cards say, and which commands find them without training or downloads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import advkit
from advkit.evaluation.plan import Request, plan
from advkit.models import MODELS, zoo
from advkit.models.spiking.model import SpikingModel, neurons
from advkit.models.spiking.surrogates import ATan
from advkit.tasks import TASKS

FILMED = ("digits-dvs", "fashion-mnist-dvs")
STILL = ("digits", "fashion-mnist")


@pytest.fixture(autouse=True)
def _nothing_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A victim that is not embedded would be trained; that must not happen here."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a victim was trained; expected an embedded one")

    monkeypatch.setattr("advkit.evaluation.victims._trained", refused)


@pytest.mark.parametrize("task", [FILMED[0], pytest.param(FILMED[1], marks=pytest.mark.slow)])
def test_filmed_tasks_have_an_embedded_victim_and_attack_a_hundred_rows(task: str) -> None:
    resolved = plan(Request(attack="sda", task=task, device="cpu"))
    assert resolved.victim.origin == f"zoo:{task}-snn"
    assert resolved.case.n == 100
    assert isinstance(resolved.victim.model, SpikingModel)
    assert resolved.case.threat.n is None
    report = advkit.evaluate("sda", task=task, n=5, device="cpu").to_dict()
    bits = torch.Size(resolved.victim.model.space.shape).numel()
    assert report["metrics"]["attack_success_rate"]["value"] == 1
    assert report["metrics"]["l0_median"]["value"] <= 0.02 * bits
    assert {"l0_mean", "l0_percent_mean", "l0_percent_median"} <= report["metrics"].keys()
    assert not report["diagnostics"]["flags"]


@pytest.mark.parametrize("task", STILL)
def test_still_victims_differ_in_the_surrogate_they_were_trained_with(task: str) -> None:
    wide, narrow = zoo.load(f"{task}-snn"), zoo.load(f"{task}-snn-narrow")
    shapes = [{name: each.shape for name, each in model.module.state_dict().items()} for model in (wide, narrow)]
    assert shapes[0] == shapes[1]
    for model, alpha in ((wide, 2.0), (narrow, 10.0)):
        assert isinstance(model, SpikingModel)
        assert {layer.surrogate for layer in neurons(model.module)} == {ATan(alpha=alpha)}
    plain = MODELS.spec(MODELS.build(wide.architecture))
    resolved = plan(Request(attack="spiking:pgd", task=task, model=plain, device="cpu", n=1))
    assert resolved.victim.origin == f"zoo:{task}-snn"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [f"{task}-snn" for task in (*STILL, *FILMED)] + [f"{task}-snn-narrow" for task in STILL]
)
def test_accuracy_is_the_card_s(name: str) -> None:
    card = zoo.card(name)
    rows = 200  # of those that the card counts
    task = TASKS.build(card.task)
    batch = next(iter(task.batches(rows, n=rows)))
    with torch.no_grad():
        correct = float((zoo.load(name)(batch.x).argmax(1) == batch.labels).float().mean())
    said = card.measured["clean accuracy"]
    assert abs(correct - said) < 4 * (said * (1 - said) / rows) ** 0.5
    assert any("accuracy" in figure or "success" in figure for figure in card.measured if figure != "clean accuracy")
