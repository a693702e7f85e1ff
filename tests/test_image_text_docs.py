"""docs/image_text.md: its commands exist, its code runs, and its tables are those of the file beside it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.models import MODELS, zoo
from advkit.tasks import TASKS
from advkit.threat_models import GOALS, THREAT_MODELS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "image_text.md").read_text(encoding="utf-8")
FILE = json.loads((DOCS / "image_text.json").read_text(encoding="utf-8"))
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
ROWS = {
    cells[0]: cells[1:]
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TEXT.partition("## Measured")[2].splitlines()
        if line.startswith("|")
    )
}


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    registries = {"attack": ATTACKS, "task": TASKS, "threat_model": THREAT_MODELS, "model": MODELS, "goal": GOALS}
    for option, registry in registries.items():
        if asked.get(option) and "IMAGES" not in asked[option]:
            registry.build(asked[option])


def percent(counted: list[int]) -> str:
    return f"{100 * counted[0] / counted[1]:.1f}"


def ranked_row(row: dict[str, Any], prefix: str = "") -> list[str]:
    accuracy = "clean_accuracy" if prefix else "robust_accuracy"
    texts, images = (
        [row[f"{prefix}recall_at_{k}_{way}"] for k in (1, 5)] for way in ("image_to_text", "text_to_image")
    )
    return [percent(row[accuracy]), *map(percent, texts), *(f"{found} of {asked}" for found, asked in images)]


def test_the_first_table_is_that_of_the_file() -> None:
    assert len(FILE["ranked"]) == 8
    for name, row in FILE["ranked"].items():
        assert ROWS[name] == [percent(row["attack_success_rate"]), *ranked_row(row)], name
        assert ROWS["clean"] == ["", *ranked_row(row, "clean_")]
        assert not row["flags"]


def test_the_second_table_is_that_of_the_file() -> None:
    assert len(FILE["near"]) == 6
    for name, row in FILE["near"].items():
        means = [f"{row[key]:.2f}" for key in ("similarity_before", "similarity_after")]
        assert ROWS[name] == [*means, percent(row["attack_success_rate"]), percent(row["class_changed"])], name
        assert not row["flags"]


def test_the_model_is_the_one_that_was_measured() -> None:
    card = zoo.card("fashion-mnist-dual-encoder")
    assert FILE["model"] == card.sha256
    pgd = FILE["ranked"]["PGD-40"]
    assert card.measured == {
        "clean accuracy": pgd["clean_accuracy"][0] / 1000,
        "pgd-40 accuracy": pgd["robust_accuracy"][0] / 1000,
    }


def test_its_code_makes_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    exec(compile(code, "docs/image_text.md", "exec"), {})
    assert np.load("target.npy").shape == (128,)
