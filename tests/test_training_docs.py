"""docs/adversarial_training.md: its commands exist, and its tables are the figures of the JSON files beside it."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from advkit.cli.main import COMMANDS, load_command
from advkit.defenses import DEFENSES
from advkit.models import zoo
from advkit.tasks import TASKS
from advkit.threat_models import THREAT_MODELS
from advkit.training.loop import Recipe

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "adversarial_training.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```console\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines()]
TRAINED = [line for line in LINES if line.startswith("advkit train")]


@pytest.fixture(autouse=True)
def _recipe_of_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The YAML of the text lies in the working directory."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.yaml").write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line.partition(" -m ")[2] if line.startswith("torchrun ") else line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    for option, registry in (("defense", DEFENSES), ("task", TASKS), ("threat_model", THREAT_MODELS)):
        if asked.get(option):
            registry.build(asked[option])
    if asked.get("recipe"):
        built: Any = DEFENSES.build(f"none:recipe=[{asked['recipe']}]")
        assert built.recipe != Recipe()


def test_training_is_shown() -> None:
    told = [line for line in TRAINED if "--defense" in line]
    assert {DEFENSES.name_of(DEFENSES.build(_option(line, "--defense"))) for line in told} >= {
        "mart",
        "awp",
        "doubly_robust",
        "conadv",
    }


def _option(line: str, name: str) -> str:
    words = shlex.split(line)
    return words[words.index(name) + 1]


def tables(file: str) -> list[list[list[str]]]:
    """The tables of the section that links to a file, as rows of cells without marks."""
    section = next(part for part in re.split(r"^#+ ", TEXT, flags=re.MULTILINE) if f"({file})" in part)
    found = re.findall(r"^\|.*?(?=\n\n)", section, re.MULTILINE | re.DOTALL)
    return [[[cell.strip(" *") for cell in row.strip("|").split("|")] for row in table.splitlines()] for table in found]


@pytest.mark.parametrize(
    "file", ["doubly_robust.json", "doubly_robust_balanced.json", "doubly_robust_fashion_mnist.json"]
)
def test_the_tables_of_reweighting_are_the_measured_figures(file: str) -> None:
    held = json.loads((DOCS / file).read_text(encoding="utf-8"))
    assert held["commits"]
    assert not any("dirty" in commit for commit in held["commits"])
    by_row = {each["row"]: each for each in held["summary"]}
    _, _, *rows = tables(file)[0]
    seen = set()
    for cells in rows:
        name = re.sub(r" \(.*?\)", "", cells[0]).replace(", implicit", ",implicit=true").replace(" ", "")
        found = by_row[name]
        seen.add(name)
        keys = ("clean", "pgd", "tail_30", "worst_class")
        assert [float(cell) for cell in cells[1:5]] == [round(found["mean"][key], 3) for key in keys]
        gains = found["minus_reference"]["tail_30"]
        if name != "r=inf":
            assert float(cells[5]) == pytest.approx(100 * sum(gains) / len(gains), abs=0.0501)
            assert float(cells[6]) == round(found["sign_test_tail_30"], 3)
        assert float(cells[7]) == round(found["mean"]["effective_sample_size"], 2)
    assert seen == set(by_row)


@pytest.mark.parametrize(
    "file",
    ["stale_attacks_digits.json", "stale_attacks_fashion_mnist.json", "stale_attacks_fashion_mnist_lower_lr.json"],
)
def test_the_tables_of_old_weights_are_the_measured_figures(file: str) -> None:
    held = json.loads((DOCS / file).read_text(encoding="utf-8"))
    assert not any("dirty" in commit for commit in held["commits"])
    _, _, *rows = tables(file)[0]
    assert [cells[0] for cells in rows] == list(dict.fromkeys(each["row"] for each in held["runs"]))
    for cells in rows:
        own = [each for each in held["runs"] if each["row"] == cells[0]]
        for key, cell in zip(("clean", "pgd", "cosine_first_sixth", "cosine_last_quarter"), cells[1:], strict=True):
            values = [each[key] for each in own]
            assert (cell == "") == (None in values)
            assert not cell or float(cell) == round(sum(values) / len(values), 3)


def test_the_table_of_a_steps_cost_is_the_measured_ratios() -> None:
    held = json.loads((DOCS / "training_overhead.json").read_text(encoding="utf-8"))
    assert "dirty" not in held["commit"]
    _, _, *rows = tables("training_overhead.json")[0]
    assert len(rows) == len(held["results"])
    for cells, found in zip(rows, held["results"], strict=True):
        method, ratios, passes = found["method"].partition(":")[0], found["ratios"], found["passes_per_row"]["fit"]
        assert passes == found["passes_per_row"]["bare"]
        assert cells[:3] == [
            f"`{method}`",
            f"`{found['network']}`",
            f"{passes['forwards']:g} + {passes['backwards']:g}",
        ]
        names = ("fit_over_bare", "madry_over_fit", "madry_whole_over_fit", "fbf_over_fit")
        assert cells[3:] == [f"{ratios[name]:.2f}" if name in ratios else "" for name in names]


def test_what_was_expected_of_old_weights_and_is_missed() -> None:
    section = next(part for part in re.split(r"^#+ ", TEXT, flags=re.MULTILINE) if part.startswith("What was expected"))
    lines = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\|.*$", section, re.MULTILINE)
    ]
    for column, name in ((2, "fashion_mnist"), (3, "fashion_mnist_lower_lr")):
        runs = json.loads((DOCS / f"stale_attacks_{name}.json").read_text(encoding="utf-8"))["runs"]

        def mean(row: str, key: str, runs: Any = runs) -> float:
            values = [each[key] for each in runs if each["row"] == row]
            assert len(values) == 3
            return float(sum(values)) / 3

        clean, pgd = (100 * (mean("tau=1", key) - mean("tau=0", key)) for key in ("clean", "pgd"))
        gains = [100 * (mean(row, "pgd") - mean("none", "pgd")) for row in ("tau=0", "tau=1")]
        cosine = mean("tau=1", "cosine_last_quarter")
        met = [abs(clean) <= 1.5, abs(pgd) <= 3, *(gain >= 10 for gain in gains), cosine >= 0.95]
        for figure, fine, cells in zip((clean, pgd, *gains, cosine), met, lines[2:], strict=True):
            assert float(cells[column].strip("*")) == pytest.approx(figure, abs=0.0501 if figure != cosine else 0.0005)
            assert cells[column].startswith("**") == (not fine)


def test_the_acceptance_of_the_protocol_on_digits() -> None:
    held = json.loads((DOCS / "doubly_robust.json").read_text(encoding="utf-8"))
    half = next(each for each in held["summary"] if each["row"] == "r=0.5")
    assert half["seeds"] == [0, 1, 2, 3, 4]
    gains = half["minus_reference"]
    assert sum(gains["tail_30"]) / 5 >= 0.05
    assert all(gain > 0 for gain in gains["tail_30"])
    assert sum(gains["pgd"]) / 5 >= -0.01


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark of all training defenses."""
    file = DOCS.parent / "benchmarks" / "adversarial_training_table.py"
    spec = importlib.util.spec_from_file_location("adversarial_training_table", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def expected_passes(method: str, steps: int) -> tuple[int, int]:
    """Forward and backward passes per image of a training step, by hand."""
    multistep = {
        "pgd_at": (steps + 1, steps + 1),
        "trades": (steps + 3, steps + 2),  # the clean answer once as a constant, once to be differentiated
        "mart": (steps + 2, steps + 2),
        "awp on pgd_at": (steps + 2, steps + 2),
        "awp on trades": (steps + 5, steps + 4),
        "doubly_robust": (steps + 1, steps + 1),
        "grad_align": (3, 4),
        "conadv": (3, 3),
        "none": (1, 1),
        "free_at": (1, 1),
    }
    return multistep.get(method, (2, 2))


def test_the_table_of_all_methods_is_the_measured_figures(script: ModuleType) -> None:
    held = json.loads((DOCS / "adversarial_training_table.json").read_text(encoding="utf-8"))
    assert script.table(held) in TEXT
    assert {(run["method"], run["seed"]) for run in held["runs"]} == {
        (method, seed) for method in script.METHODS for seed in (31, 32, 33)
    }
    commits = {run["commit"] for run in held["runs"]} | {held["cost"]["commit"]}
    assert not any("dirty" in commit or commit == "unknown" for commit in commits)
    for run in held["runs"]:
        assert run["n"] == 1_000
        assert run["worst_class"] <= run["tail_30"] <= run["thorough"] <= run["clean"]
        assert (run["transfer"] is None) == (run["method"] == "none")
    steps = held["settings"]["steps"]
    for method, spent in held["cost"]["methods"].items():
        assert (spent["forward"], spent["backward"]) == expected_passes(method, steps)
        assert spent["relative_cpu"] > 0.5


def test_passes_are_counted(script: ModuleType) -> None:
    setting = script.Setting.of("digits")
    for method in ("conadv", "trades"):
        counted = setting.counted(method)
        assert (counted["forward"], counted["backward"]) == expected_passes(method, setting.protocol.steps)


@pytest.mark.slow
def test_the_table_of_all_methods_on_digits(script: ModuleType) -> None:
    setting = script.Setting.of("digits", epochs=10)
    none, single, multi = (setting.played(method, 1) for method in ("none", "fgsm_rs", "pgd_at"))
    for run in (none, single, multi):
        assert run["n"] == 360
        assert run["worst_class"] <= run["tail_30"] <= run["thorough"] <= run["clean"]
        assert run["thorough"] <= run["pgd"]
        assert run["effective_sample_size"] is None
    assert none["transfer"] is None
    for trained in (single, multi):
        assert trained["thorough"] > none["thorough"] + 0.1
        assert trained["transfer"] >= trained["pgd"]
    for method in script.METHODS:
        counted = setting.counted(method)
        assert (counted["forward"], counted["backward"]) == expected_passes(method, setting.protocol.steps)


def test_the_embedded_models_are_those_of_the_cards(script: ModuleType) -> None:
    section = TEXT[TEXT.index("## Embedded models") : TEXT.index("## What is refused")]
    rows = [[cell.strip(" `") for cell in row.strip("|").split("|")] for row in re.findall(r"^\| `.*", section, re.M)]
    assert sorted(rows) == sorted(
        [
            card.name,
            card.defense,
            script.figure(card.measured["clean accuracy"]),
            script.figure(card.measured["pgd-40 accuracy"]),
        ]
        for card in zoo.find("fashion-mnist", "cnn", role="victim")
        if "pgd-40 accuracy" in card.measured  # certified ones are measured otherwise
    )
