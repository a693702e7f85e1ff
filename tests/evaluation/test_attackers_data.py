"""Attacks that hold labelled data of their own, or look inside the model, go through an evaluation."""

from __future__ import annotations

import pytest

import advkit
from advkit.evaluation.api import resolve

SOURCE = "transfer:sources=zoo:digits-public-cnn,eps=0.2"


@pytest.mark.parametrize("part", ["[naa:points=2]", "linbp"])
def test_attacks_that_look_inside_are_not_refused_by_the_rehearsal(part: str) -> None:
    report = advkit.evaluate(f"transfer:{part},steps=2", task="digits", threat_model=SOURCE, n=6, beside=False)
    assert report.to_dict()["attacks"][0]["n_attacked"] > 0
    assert not any(flag["id"] == "budget_violation" for flag in report.flags)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_admix_gets_the_tasks_training_data_and_others_none(workers: int) -> None:
    attack = "transfer:[admix:scales=1,mixes=1],steps=2"
    assert len(resolve(attack, task="digits", threat_model=SOURCE).data) > 1000
    assert resolve("pgd", task="digits").data is None
    assert resolve("pgd", task="digits", threat_model=f"tapm:sources=zoo:digits-public-cnn,attacks=[{attack}]").data
    report = advkit.evaluate(
        attack, task="digits", threat_model=SOURCE, n=6, beside=False, batch_size=3, workers=workers
    )
    assert report.to_dict()["attacks"][0]["cost"]["backward"] > 0
