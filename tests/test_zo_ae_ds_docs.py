"""docs/zo_ae_ds.md: its commands exist, and its table is that of the file beside it."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from pathlib import Path

import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.defenses import DEFENSES
from advkit.models import MODELS
from advkit.threat_models import THREAT_MODELS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "zo_ae_ds.md").read_text(encoding="utf-8")
FILE = json.loads((DOCS / "zo_ae_ds.json").read_text(encoding="utf-8"))
RUNS = list(FILE["runs"].values())
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
ROWS = {
    cells[0]: cells[1:]
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in TEXT.partition("## Measured")[2].partition("\n## ")[0].splitlines()
        if line.startswith("|")
    )
}


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    registries = {"attack": ATTACKS, "defense": DEFENSES, "threat_model": THREAT_MODELS, "model": MODELS}
    for option, registry in registries.items():
        if asked.get(option):
            registry.build(asked[option])


def test_the_table_is_that_of_the_file() -> None:
    names = {name for rows in RUNS for name in rows} - {"victim"}
    assert names <= ROWS.keys()
    for name in names:
        runs = [rows[name] for rows in RUNS if name in rows]
        expected = [
            f"{statistics.mean(100 * run['certified'][r] for run in runs):.1f}"
            for r in ("0", "0.25", "0.5", "0.75", "1")
        ]
        expected.append(f"{statistics.mean(100 * run['clean_accuracy_of_the_chain'] for run in runs):.1f}")
        queries = [run.get("queries", 0) for run in runs]
        assert len(set(queries)) == 1
        assert ROWS[name] == [*expected, f"{queries[0]:,}", str(len(runs))]


def test_the_lines_of_acceptance_are_those_of_the_file() -> None:
    for name, line in FILE["acceptance"].items():
        assert ROWS[name] == [f"{line['value']:.2f}", line["expected"], "yes" if line["holds"] else "no"]


def test_the_scatter_between_seeds_is_told() -> None:
    both = [(rows["ZO-AE-DS, CGE d_z=32"]["certified"], rows["ZO-DS, RGE q=64"]["certified"]) for rows in RUNS]
    gaps = [100 * (ae["0.75"] - zo["0.75"]) for ae, zo in both]
    assert f"above ZO-DS are {', '.join(f'{gap:.1f}' for gap in gaps)}: they scatter" in TEXT
    assert min(gaps) < 5
    assert f"{statistics.mean(100 * ae['0'] for ae, _ in both):.1f} % are certified at radius 0" in TEXT
