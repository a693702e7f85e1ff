"""A defense that no attacker knew of is flagged; one that somebody asked is not."""

from __future__ import annotations

from typing import Any

import pytest

import advkit
from advkit.evaluation.trust.advice import ADVICE

MODEL = "zoo:digits-mlp"
ON: dict[str, Any] = {"task": "digits", "model": MODEL, "n": 12, "device": "cpu", "attack": "fgsm"}
TRANSFER = f"transfer:eps=0.1,sources={MODEL}"

CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "transfer from the bare model": ({"defense": "bit-depth:bits=2", "threat_model": TRANSFER}, True),
    "and nothing beside": ({"defense": "blur", "threat_model": TRANSFER, "beside": False}, True),
    "white box": ({"defense": "bit-depth:bits=2", "threat_model": "linf:eps=0.1"}, False),
    "white box alone": ({"defense": "blur", "threat_model": "linf:eps=0.1", "beside": False}, False),
    "scores": (
        {
            "defense": "blur",
            "threat_model": "linf:eps=0.1,access=scores",
            "attack": "square:queries=10",
            "beside": False,
        },
        False,
    ),
    "no defense": ({"defense": "none", "threat_model": TRANSFER}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_defense_that_nobody_asked_is_flagged(name: str) -> None:
    settings, flagged = CASES[name]
    report = advkit.evaluate(**{**ON, **settings})
    found = [flag for flag in report.flags if flag["id"] == "only_oblivious"]
    assert bool(found) is flagged
    for flag in found:
        assert flag["severity"] == "warning"
        assert settings["defense"] in flag["message"]
        assert ADVICE["only_oblivious"] in flag["message"]
    assert not flagged or "do not know of it" in str(found)


def test_a_grid_with_its_white_box_beside_it_is_not() -> None:
    threat = "tapm:eps=0.1,sources=zoo:digits-public-cnn-b,attacks=fgsm"
    asked = {**ON, "defense": "pubdef", "threat_model": threat, "model": "zoo:digits-mlp-pubdef"}
    both = advkit.evaluate(**asked)
    assert not [flag for flag in both.flags if flag["id"] == "only_oblivious"]
    alone = advkit.evaluate(**asked, beside=False)
    assert [flag["id"] for flag in alone.flags if flag["id"] == "only_oblivious"] == ["only_oblivious"]
