"""docs/raw_isp.md: its commands exist, and its tables are those of the file beside it."""

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

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "raw_isp.md").read_text(encoding="utf-8")
FILE: dict[str, Any] = json.loads((DOCS / "raw_isp.json").read_text(encoding="utf-8"))
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]


def tables() -> list[list[list[str]]]:
    """The rows of each measured table, cell by cell, without its head."""
    found: list[list[list[str]]] = []
    for part in TEXT.partition("## Measured")[2].split("\n### ")[1:]:
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
        found.append(rows[2:])
    return found


def said(entry: Any) -> str:
    return "–" if entry is None else f"{entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]"


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    for option, registry in {"attack": ATTACKS, "defense": DEFENSES, "task": TASKS}.items():
        if asked.get(option):
            registry.build(asked[option])


@pytest.mark.parametrize(("place", "task"), list(enumerate(("imagenet-samples", "photographs"))))
def test_the_tables_are_those_of_the_file(place: int, task: str) -> None:
    held, shown = FILE["tasks"][task]["rows"], tables()[place]
    assert len(shown) == len(held)
    for (label, row), cells in zip(held.items(), shown, strict=True):
        name = "none" if label == "none" else f"**raw_isp, {label}**" if "(" not in label else f"`{row['spec']}`"
        psnr = "–" if row["psnr"] is None else f"{row['psnr']:.1f}"
        figures = [row["clean"], *(row["oblivious"].get(eps) for eps in "124"), row["adaptive"].get("2")]
        assert cells == [name, psnr, *map(said, figures)]
        DEFENSES.build(row["spec"])


def test_what_the_text_says_of_them() -> None:
    rows = FILE["tasks"]["imagenet-samples"]["rows"]
    known = {label: row["adaptive"]["2"]["value"] for label, row in rows.items() if "2" in row["adaptive"]}
    three = ("faithful", "smoothed", "lossy")
    assert [rows[label]["oblivious"]["2"]["value"] for label in three] == [0.10, 0.40, 0.35]
    assert [known[label] for label in three] == [0, 0, 0]
    most = max(value for label, value in known.items() if "(" in label)
    assert f"({most:.2f} at most)" in TEXT
    for group in three:
        blur = rows[f"Gaussian blur ({group})"]
        assert abs(blur["psnr"] - rows[group]["psnr"]) < 0.1
        for eps in "124":
            own, other = rows[group]["oblivious"][eps], blur["oblivious"][eps]
            assert own["low"] <= other["high"]
            assert other["low"] <= own["high"]
    for task in FILE["tasks"].values():
        for row in task["rows"].values():
            for eps, entry in row["adaptive"].items():
                # knowing the defense does the attacker no harm, but for samples on the very edge
                assert entry["k"] <= row["oblivious"][eps]["k"] + 0.03 * task["n"]
