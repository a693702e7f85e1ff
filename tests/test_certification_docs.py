"""docs/certification.md: its commands exist, and its tables are the figures of the JSON files beside it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.defenses import DEFENSES
from advkit.threat_models import THREAT_MODELS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "certification.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]


def table(heading: str) -> list[list[str]]:
    section = next(part for part in re.split(r"^## ", TEXT, flags=re.M) if part.startswith(heading))
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    for option, registry in (("attack", ATTACKS), ("defense", DEFENSES), ("threat_model", THREAT_MODELS)):
        if asked.get(option):
            registry.build(asked[option])


def test_the_table_of_accuracies_is_that_of_the_file() -> None:
    runs = json.loads((DOCS / "certification.json").read_text(encoding="utf-8"))["runs"]
    found = {row[0]: row[1:] for row in table("Measured")}
    assert found.keys() == runs.keys()
    for name, run in runs.items():
        points = [f"{100 * each['value']:.0f}" for each in run["certified"].values()]
        rest = [f"{run['average_certified_radius']:.3f}", f"{100 * run['abstention_rate']:.0f}"]
        assert found[name] == [*points, *rest]
    attacked = runs["trained under noise, gaussian"]
    assert f"{100 * attacked['empirical_robust_accuracy']:.0f} %" in TEXT
    assert attacked["certified"]["0.25"]["value"] <= attacked["empirical_robust_accuracy"]


def test_the_table_of_speed_is_that_of_the_file() -> None:
    speed = json.loads((DOCS / "certification_speed.json").read_text(encoding="utf-8"))
    found = {row[0]: row[1:] for row in table("Cost")}
    for name, run in speed["networks"].items():
        rates = [f"{run['images per second'][rival]:.0f}" for rival in ("bare", "gaussian", "lattice")]
        assert found[name] == [*rates, *(f"{100 * run['overhead'][rival]:+.1f} %" for rival in ("gaussian", "lattice"))]
    numbers = speed["numbers"]
    assert f"{numbers['new stream faster than core.rng']:.1f} times as fast" in TEXT
