"""Settings out of range: every attack and every part of transfer attacks refuses them, in the same words."""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest

from advkit.attacks import ATTACKS
from advkit.attacks.transfer import PARTS
from advkit.core.errors import UsageError

ALL = [(ATTACKS, name) for name in ATTACKS.names() if not name.endswith(":")]
ALL += [(PARTS, name) for name in PARTS.names()]


@pytest.mark.parametrize(("registry", "name"), ALL, ids=[f"{registry.kind} {name}" for registry, name in ALL])
def test_numbers_below_their_range_are_named_with_what_was_expected(registry: Any, name: str) -> None:
    attack = registry.build(name)
    checked = [each.name for each in fields(attack) if each.init and each.type in ("int", "float", "int | None")]
    said = {setting: refusal(type(attack), setting) for setting in checked}
    assert all(re.match(rf"{setting} is -1; expected ", words) for setting, words in said.items() if words)
    # Every count, length and fraction is checked; -1 is legal for one setting at most.
    assert sum(map(bool, said.values())) >= len(checked) - 1


def refusal(part: type, setting: str) -> str:
    """What is said of -1; empty where it is legal."""
    try:
        part(**{setting: -1})
    except UsageError as refused:
        return str(refused)
    return ""
