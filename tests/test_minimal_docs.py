"""The tables of docs/minimal.md are those of docs/minimal.json, and every minimum-norm attack has one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from advkit.attacks import ATTACKS

ROOT = Path(__file__).parents[1]
NOT_MEASURED = ["cw", "ead", "jsma", "sigma_zero", "brendel_bethge"]
MINIMAL = [
    name
    for name in ATTACKS.names()
    if ".minimal." in ATTACKS.target(name) and "fab" not in name and name not in NOT_MEASURED
]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("minimal_benchmark", ROOT / "benchmarks" / "minimal.py")
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_tables_are_the_measured_lines(bench):
    lines = json.loads((ROOT / "docs" / "minimal.json").read_text(encoding="utf-8"))["lines"]
    page = (ROOT / "docs" / "minimal.md").read_text(encoding="utf-8")
    for name in MINIMAL:
        mine = [line for line in lines if bench.key(line)[1] == name]
        threats = {line["threat"] for line in mine}
        assert threats == set(ATTACKS.build(name).norms), name
        assert f"<!-- table {name} -->\n{bench.table(mine)}\n<!-- end -->" in page, name


def test_every_row_is_measured_on_both_models(bench):
    lines = json.loads((ROOT / "docs" / "minimal.json").read_text(encoding="utf-8"))["lines"]
    measured = {(line["model"], line["attack"], line["threat"]) for line in lines}
    rows = [row for row in bench.ROWS if row.attack.partition(":")[0] not in NOT_MEASURED]
    assert measured == {(model, row.attack, row.threat) for row in rows for model in bench.MODELS}


def test_what_is_not_measured_is_said():
    page = (ROOT / "docs" / "minimal.md").read_text(encoding="utf-8")
    assert f"Not in the tables yet: {', '.join(f'`{name}`' for name in NOT_MEASURED)}." in page
