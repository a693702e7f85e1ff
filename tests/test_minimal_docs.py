"""The tables of docs/minimal.md are those of docs/minimal.json, and every minimum-norm attack has one."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from advkit.attacks import ATTACKS

ROOT = Path(__file__).parents[1]
MINIMAL = [name for name in ATTACKS.names() if ".minimal." in ATTACKS.target(name) and "fab" not in name]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("minimal_benchmark", ROOT / "benchmarks" / "minimal.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lines():
    return json.loads((ROOT / "docs" / "minimal.json").read_text(encoding="utf-8"))["lines"]


def test_tables_are_the_measured_lines(bench, lines):
    page = (ROOT / "docs" / "minimal.md").read_text(encoding="utf-8")
    for name in MINIMAL:
        mine = [line for line in lines if bench.key(line)[1] == name]
        threats = {line["threat"] for line in mine}
        assert threats == set(ATTACKS.build(name).norms), name
        assert f"<!-- table {name} -->\n{bench.table(mine)}\n<!-- end -->" in page, name


def test_every_row_is_measured_on_both_models(bench, lines):
    measured = {(line["model"], line["attack"], line["threat"]): line for line in lines}
    assert measured.keys() == {(model, row.attack, row.threat) for row in bench.ROWS for model in bench.MODELS}
    for row in bench.ROWS:
        wanted = [(each.name, {k: str(v) for k, v in each.settings.items()}) for each in row.peers]
        for model in bench.MODELS:
            line = measured[model, row.attack, row.threat]
            assert [(p["peer"], p["settings"]) for p in line["peers"]] == wanted, row
            assert len(line["distances"]) == bench.COMMON


def test_optimality_is_counted_from_the_distances(bench, lines):
    again = copy.deepcopy(lines)
    bench.with_optimality(again)
    assert again == lines
    for line in lines:
        results = [line, *line["peers"]]
        case = [r["distances"] for each in lines for r in (each, *each["peers"]) if bench.same_case(each, line) and "distances" in r]  # fmt: skip
        best = np.full(bench.COMMON, np.inf)
        for own in case:
            best[: len(own)] = np.minimum(best[: len(own)], [np.inf if d is None else d for d in own])
        for result in results:
            if "optimality" not in result:
                continue
            own = np.array([np.inf if d is None else d for d in result["distances"]])
            largest = best.max()
            grid = np.linspace(0, largest, 20_001)[:-1]
            areas = [np.mean(each[:, None] > grid) for each in (own, best[: len(own)])]
            assert result["optimality"]["value"] == pytest.approx((1 - areas[0]) / (1 - areas[1]), abs=2e-3)
            assert result["optimality"]["low"] <= result["optimality"]["value"] <= result["optimality"]["high"]
