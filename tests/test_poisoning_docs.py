"""docs/poisoning.md: its commands exist, its tables are those of the file beside it, and so are its claims."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.defenses import DEFENSES
from advkit.tasks import TASKS
from advkit.threat_models import THREAT_MODELS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "poisoning.md").read_text(encoding="utf-8")
FILE = json.loads((DOCS / "label_poisoning.json").read_text(encoding="utf-8"))
CELLS: dict[tuple[Any, ...], dict[str, Any]] = {
    (c["task"], c["attack"], c["rate"], c["defense"], c["attacker"]): c for c in FILE["cells"]
}
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
SECTIONS = re.findall(r"^### (\w+), 25 %, (\w+) attacker\n\n(.*?)\n\n", TEXT, re.M | re.S)


def robust(task: str, attack: str, defense: str, rate: float = 0.25, attacker: str = "oblivious") -> float:
    return float(CELLS[task, attack, rate, defense, attacker]["robust_accuracy"]["value"])


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    registries: dict[str, Any] = {
        "attack": ATTACKS, "defense": DEFENSES, "threat_model": THREAT_MODELS, "task": TASKS,
    }  # fmt: skip
    for option, registry in registries.items():
        if asked.get(option):
            registry.build(asked[option])


def test_the_tables_are_those_of_the_file() -> None:
    assert {(task, attacker) for task, attacker, _ in SECTIONS} == {
        (task, attacker) for task in FILE["tasks"] for attacker in ("oblivious", "adaptive")
    }
    for task, attacker, table in SECTIONS:
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        attacks = head[2:]
        seen = set()
        for defense, clean, *values in rows:
            name = defense.strip("`")
            for attack, value in zip(attacks, values, strict=True):
                cell = CELLS.get((task, attack, 0.25, name, attacker))
                assert value == ("-" if cell is None else f"{cell['robust_accuracy']['value']:.3f}")
                if cell is not None:
                    seen.add((attack, name))
                    assert f"{cell['clean_accuracy']['value']:.3f}" == clean
        assert seen == {(c[1], c[3]) for c in CELLS if (c[0], c[2], c[4]) == (task, 0.25, attacker)}


def test_every_cell_names_what_there_is() -> None:
    for task, attack, rate, defense, attacker in CELLS:
        ATTACKS.build(FILE["attacks"][attack])
        DEFENSES.build(defense)
        TASKS.build(FILE["tasks"][task])
        THREAT_MODELS.build(f"label-flips:rate={rate},trials={FILE['trials']},attacker={attacker}")


def test_figures_of_the_page_are_there() -> None:
    for name in re.findall(r"\(images/([^)]+)\)", TEXT):
        assert (DOCS / "images" / name).stat().st_size > 5_000


def test_what_the_grid_was_expected_to_show() -> None:
    """ALFA hurts far more than chance; FLORAL gains on farthest-first flips of digits at next to no clean accuracy."""
    assert robust("digits", "random_labels", "svm:C=1") - robust("digits", "alfa", "svm:C=1") >= 0.10
    assert robust("digits", "farfirst", "floral:C=10") - robust("digits", "farfirst", "svm:C=10") >= 0.04
    clean = [
        CELLS["digits", "farfirst", 0.25, f"{name}:C=10", "oblivious"]["clean_accuracy"]["value"]
        for name in ("svm", "floral")
    ]
    assert clean[0] - clean[1] <= 0.01
