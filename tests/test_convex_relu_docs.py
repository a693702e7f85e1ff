"""docs/convex_relu_at.md: its commands exist, its tables are those of the file beside it, and promises are kept."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.defenses import DEFENSES
from advkit.tasks import TASKS
from advkit.threat_models import THREAT_MODELS

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "convex_relu_at.md").read_text(encoding="utf-8")
FILE: dict[str, Any] = json.loads((DOCS / "convex_relu.json").read_text(encoding="utf-8"))
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]
ROWS = {line.strip() for line in TEXT.splitlines() if line.startswith("| ")}
RUNS = FILE["protocol_b"]["runs"]


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    registries = {"attack": ATTACKS, "defense": DEFENSES, "threat_model": THREAT_MODELS, "task": TASKS}
    for option, registry in registries.items():
        if asked.get(option):
            registry.build(asked[option])


def spread(name: str, key: str, digits: int) -> str:
    found = [value for run in RUNS for value in run[key][name]]
    return f"{min(found):.{digits}f} to {max(found):.{digits}f}"


def expected() -> list[str]:
    """Every row of figures, as the file has them."""
    rows = [
        f"| {loss} | {v['convex']:.8f} | {v['network']:.8f} | {v['gradient_best']:.8f} | {v['gradient_worst']:.8f} | "
        f"{v['gap']:.0e} |"
        for loss, v in FILE["optimum"].items()
    ]
    rows += [
        f"| {loss} | {v['convex']:.7f} | {v['grid']:.7f} | {v['standard']:.7f} |" for loss, v in FILE["robust"].items()
    ]
    seconds = {
        "convex_at": f"{mean(run['seconds'] + run['pruning_seconds'] for run in RUNS):.1f}",
        "pgd_at": f"{mean(run['pgd_at_seconds'] for run in RUNS):.1f}",
    }
    for name, told in (
        ("convex", "convex, standard"),
        ("convex_at", "convex AT"),
        ("gradient", "gradient, standard"),
        ("pgd_at", "gradient, PGD-AT"),
    ):
        objective = mean(value for run in RUNS for value in run["robust_objective"][name])
        rows.append(
            f"| {told} | {spread(name, 'robust', 3)} | {spread(name, 'certified_of', 0)} | {objective:.4f} | "
            f"{seconds.get(name, '')} |"
        )
    rows += [
        f"| {r['seed']}, {r['beta']:g} | {r['rounds']} | {1000 * r['admm_seconds']:.0f} ms | "
        f"{r['clarabel_seconds']:.2f} s | {r['ratio']:.0f} | {r['clarabel_qdldl_seconds']:.2f} s | "
        f"{r['ratio_qdldl']:.0f} |"
        for r in FILE["admm"]["runs"]
    ]
    rows += [
        f"| {name} | {100 * r['clean']:.1f} % | {100 * r['robust']:.1f} % | {r['certified']} of {r['n']} | "
        f"{r['broken']} | {r['certified_and_broken']} |"
        for name, r in FILE["harness"].items()
    ]
    rows += [
        f"| `{name}` | {100 * r['clean']:.1f} % | {100 * r['adaptive']:.1f} % | {100 * r['oblivious']:.1f} % |"
        for name, r in FILE["beside"].items()
    ]
    return rows


def test_the_tables_are_those_of_the_file() -> None:
    rows = expected()
    assert len(rows) == 3 + 3 + 4 + 6 + 8 + 3
    assert [row for row in rows if row not in ROWS] == []


def test_what_is_promised_holds() -> None:
    for value in FILE["optimum"].values():
        assert value["network"] == pytest.approx(value["convex"], rel=1e-6)
        assert value["gradient_best"] >= value["convex"] - 1e-7
    for value in FILE["robust"].values():
        assert value["grid"] == pytest.approx(value["convex"], rel=1e-6)
        assert value["convex"] > value["standard"]
    assert len(RUNS) >= 2
    for run in RUNS:
        assert run["robust"]["convex_at"] == [1.0]
        assert run["certified"] == FILE["protocol_b"]["samples"]
        assert max(run["robust"]["convex"]) < 1
    for run in FILE["admm"]["runs"]:
        assert run["objective"] == pytest.approx(run["optimum"], rel=1e-4)
    for run in FILE["harness"].values():
        assert run["certified_and_broken"] == 0 < run["certified"]
        assert all(each["status"] == "optimal" for each in run["solved"]["networks"])


def test_what_falls_short_is_said_with_the_file_s_numbers() -> None:
    ratios = [run["ratio"] for run in FILE["admm"]["runs"]]
    fastest = [run["ratio_qdldl"] for run in FILE["admm"]["runs"]]
    short = TEXT.partition("## Where it fails")[2]
    assert f"is {min(ratios):.0f} to {max(ratios):.0f}; the 50 that we wanted hold in three of six" in short
    assert sum(ratio >= 50 for ratio in ratios) == 3
    assert f"it is {min(fastest):.0f} to {max(fastest):.0f}" in short
    attacked = [value for run in RUNS for value in run["robust"]["pgd_at"]]
    assert (sum(value == 1 for value in attacked), len(attacked)) == (11, 12)
    for run in RUNS:
        assert min(run["robust_objective"]["pgd_at"]) < run["robust_objective"]["convex_at"][0]
