"""docs/other_attacks.md: its commands build, and its tables are those of the file beside it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.tasks import TASKS
from advkit.threat_models import GOALS, THREAT_MODELS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "other_attacks.md").read_text(encoding="utf-8")
FILE: dict[str, Any] = json.loads((ROOT / "docs" / "other_attacks.json").read_text(encoding="utf-8"))
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
REGISTRIES: dict[str, Any] = {"attack": ATTACKS, "threat_model": THREAT_MODELS, "task": TASKS, "goal": GOALS}


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_part_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    for option, registry in REGISTRIES.items():
        if asked.get(option):
            registry.build(asked[option])


def test_the_tables_are_those_of_the_file() -> None:
    spec = importlib.util.spec_from_file_location("other_attacks", ROOT / "benchmarks" / "other_attacks.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    _, _, rest = TEXT.partition(made.MARKS[0])
    shown, end, _ = rest.partition(made.MARKS[1])
    assert end
    assert shown.strip() == made.table(FILE["lines"]).strip()


def test_every_line_is_an_evaluation_that_can_be_asked_for_again() -> None:
    ours = [line for line in FILE["lines"] if line["by"] == "advkit"]
    assert {line["attack"].partition(":")[0] for line in ours} >= {
        "spatial",
        "stadv",
        "patch",
        "universal",
        "corruption",
    }
    for line in ours:
        ATTACKS.build(line["attack"])
        THREAT_MODELS.build(line["threat_model"])
        GOALS.build(line["goal"])
        right, n = line["counts"]["robust_accuracy"]
        assert n == FILE["n"] >= 200
        assert line["robust_accuracy"] == right / n
