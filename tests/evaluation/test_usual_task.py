"""The task of a request that names none: what its attack is made for, else Fashion-MNIST."""

from __future__ import annotations

import pytest

from advkit.attacks import ATTACKS
from advkit.evaluation.plan import Request, outline


@pytest.mark.parametrize(
    ("attack", "task"),
    [
        ("pgd", "fashion-mnist"),
        ("beast:k=2", "prompts"),
        ("gcg", "prompts"),
        ("random_suffix:evaluations=3", "prompts"),
    ],
)
def test_attacks_on_words_are_on_prompts(attack, task) -> None:
    assert outline(Request(attack=attack)).specs["task"] == task


def test_a_task_that_is_named_is_taken() -> None:
    asked = Request(attack=ATTACKS.build("beast:k=2"), task="prompts:set=general")
    assert outline(asked).specs["task"] == "prompts:set=general"
