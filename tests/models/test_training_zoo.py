"""The embedded models of the training defenses: found by name without training or downloads, and as their cards say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import advkit
from advkit.defenses import DEFENSES
from advkit.evaluation.plan import Request, plan
from advkit.models import zoo
from advkit.tasks import TASKS

PGD = "pgd:steps=40,step_size=0.1"
TRAINING = [name for name in DEFENSES.names() if ".adversarial." in type(DEFENSES.build(name)).__module__]
WITHOUT = {"fgsm_at"}  # the known failing case; docs/adversarial_training.md has its figures
EMBEDDED = sorted(set(TRAINING) - WITHOUT)


@pytest.fixture(autouse=True)
def _nothing_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A victim that is not embedded would be trained; that must not happen here."""

    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a victim was trained; expected an embedded one")

    monkeypatch.setattr("advkit.evaluation.victims._trained", refused)
    monkeypatch.delenv("ADVKIT_DATA", raising=False)


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_training_defense_has_an_embedded_model(name: str) -> None:
    victim = plan(Request(attack="pgd", defense=name, device="cpu")).victim
    assert victim.origin == f"zoo:fashion-mnist-cnn-{name}"
    guard = DEFENSES.build(victim.defense)
    assert DEFENSES.name_of(guard) == name
    card = zoo.card(f"fashion-mnist-cnn-{name}")
    assert "first 20000 training images" in card.notes
    assert card.measured["pgd-40 accuracy"] <= card.measured["clean accuracy"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_accuracy_is_the_card_s(name: str) -> None:
    card = zoo.card(f"fashion-mnist-cnn-{name}")
    batch = next(iter(TASKS.build(card.task).batches(1_000)))
    with torch.no_grad():
        correct = float((zoo.load(card.name)(batch.x).argmax(1) == batch.labels).float().mean())
    assert correct == pytest.approx(card.measured["clean accuracy"], abs=0.0021)  # round-off at the boundary


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EMBEDDED)
def test_robust_accuracy_is_the_card_s(name: str) -> None:
    report = advkit.evaluate(PGD, defense=name, threat_model="linf:eps=0.1", device="cpu", beside=False)
    said = zoo.card(f"fashion-mnist-cnn-{name}").measured["pgd-40 accuracy"]
    assert report.robust_accuracy == pytest.approx(said, abs=0.0051)
