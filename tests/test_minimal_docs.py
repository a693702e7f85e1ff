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
FULLY_MEASURED = ["cw", "ead", "jsma", "sigma_zero", "brendel_bethge"]
"""Attacks whose peers have a value in the column of optimality, too."""


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("minimal_benchmark", ROOT / "benchmarks" / "minimal.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        patch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        yield module


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
            if row.attack.partition(":")[0] in FULLY_MEASURED:
                assert all("optimality" in each for each in (line, *line["peers"])), row


@pytest.mark.slow
def test_optimality_is_counted_from_the_distances(bench, lines):
    again = copy.deepcopy(lines)
    bench.with_optimality(again)
    assert again == lines
    cases = {(line["model"], line["threat"]) for line in lines}
    for case in cases:
        results = [r for line in lines if (line["model"], line["threat"]) == case for r in (line, *line["peers"])]
        found = [np.array(r["distances"], dtype=float) for r in results if "distances" in r]  # null becomes NaN
        best = np.full(bench.COMMON, np.inf)
        for own in found:
            best[: len(own)] = np.fmin(best[: len(own)], own)
        grid = np.linspace(0, best.max(), 20_001)[:-1]
        for result in results:
            if "optimality" not in result:
                continue
            own = np.nan_to_num(np.array(result["distances"], dtype=float), nan=np.inf)
            left, least = (np.mean(each[:, None] > grid) for each in (own, best[: len(own)]))
            assert result["optimality"]["value"] == pytest.approx((1 - left) / (1 - least), abs=2e-3)
            assert result["optimality"]["low"] <= result["optimality"]["value"] <= result["optimality"]["high"]
