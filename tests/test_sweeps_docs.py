"""docs/sweeps.md: its commands parse, its Python and its grid run, and the grid of every pair names every attack."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.defenses import DEFENSES
from advkit.evaluation.sweep import Sweep, sweep
from advkit.evaluation.sweep.api import prepare
from advkit.evaluation.sweep.engines import ENGINES
from advkit.evaluation.sweep.grid import Grid, read_grid
from advkit.evaluation.sweep.line import Line, carry_out

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]


class Here:
    """An engine of this very process."""

    def run(self, home: Path, lines: Sequence[Line], workers: int) -> Iterator[int]:
        for line in lines:
            carry_out(home, line.line)
            yield line.line


@pytest.mark.parametrize("line", LINES)
def test_every_command_parses(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert (program, name) == ("advkit", "sweep")
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    ENGINES.build(asked["engine"])


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S))
def test_python_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/sweeps.md", "exec"), {"__name__": "docs"})


def test_the_grid_is_read_and_its_keys_are_all_named(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.M | re.S)
    file = tmp_path / "grid.yaml"
    file.write_text(block)
    lines = prepare(file, tmp_path / "runs").lines
    ends = [("excluded" if line.excluded else "refused" if line.reason else "run") for line in lines]
    assert ends == ["run", "run", "run", "excluded", "refused", "refused"]
    for key in Grid.model_fields:
        assert f"`{key}`" in TEXT


def test_the_grid_of_every_pair_names_every_attack_and_every_defense() -> None:
    grid = read_grid(ROOT / "docs" / "every_pair.yaml")
    for named, registry in ((grid.attacks, ATTACKS), (grid.defenses, DEFENSES)):
        assert {registry.known(spec.partition(":")[0]) for spec in named} == set(registry.names())


@pytest.mark.slow
def test_the_page_of_every_pair_has_a_number_or_a_reason_for_each(tmp_path: Path) -> None:
    grid: dict[str, Any] = {
        "attacks": ["fgsm", "sda", "beast"],
        "defenses": ["none", "svm", "ppl_filter"],
        "tasks": "digits",
        "n": 2,
    }
    made = sweep(grid, out=tmp_path, engine=Here())
    assert isinstance(made, Sweep)
    text = runpy.run_path(str(ROOT / "scripts" / "every_pair.py"))["page"]([made])
    assert "9 pairs: 2 with a number in at least one table, 7 with none." in text
    assert "9 cells in all: 2 numbers, 7 reasons." in text
    cells = [[each.strip(" `") for each in line.split("|")[1:-1]] for line in text.splitlines() if line[:3] == "| `"]
    table = {attack: told for attack, *told in cells}
    values = {(row.parts["attack"], row.parts["defense"]): row.value for row in made.rows}
    for attack in grid["attacks"]:
        for place, defense in enumerate(grid["defenses"]):
            told, value = table[attack][place], values[attack, defense]
            assert re.fullmatch(r"\([1-9]\)", told) if value is None else float(told) == pytest.approx(value, abs=0.01)
    for row in made.rows:
        assert row.state == "done" or row.reason[-20:] in text


def test_the_page_in_the_docs_is_of_these_grids() -> None:
    grids = [read_grid(ROOT / "docs" / "every_pair.yaml")]
    grids += [read_grid(file) for file in sorted((ROOT / "docs" / "every_pair").glob("*.yaml"))]
    text = (ROOT / "docs" / "every_pair.md").read_text(encoding="utf-8")
    tables = re.split(r"^## ", text.partition("\n## Reasons")[0], flags=re.M)[1:]
    assert len(tables) == len(grids)
    for grid, table in zip(grids, tables, strict=True):
        listed = [re.match(r"\| `([^`]+)` \|", line) for line in table.splitlines()]
        assert [found[1] for found in listed if found] == grid.attacks
        assert re.findall(r"^\| d\d+ \| `([^`]+)` \|$", table, re.M) == grid.defenses
    assert "not run yet" not in text
    assert f"{sum(len(grid.attacks) * len(grid.defenses) for grid in grids):,} cells in all: " in text
    told = re.search(r"^([\d,]+) pairs: ([\d,]+) with a number in at least one table, ([\d,]+) with none", text, re.M)
    assert told is not None
    assert told[1] == f"{len(grids[0].attacks) * len(grids[0].defenses):,}"
    assert all(f"{number} " in TEXT for number in told.groups())


def test_every_attack_has_a_number_against_a_defense() -> None:
    """In one table at least: what fits nowhere would not have been tried."""
    text = (ROOT / "docs" / "every_pair.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, re.M)
    with_number = {
        ATTACKS.known(name.partition(":")[0]) for name, cells in rows if re.search(r"(?<![(\d])\d[\d.]*( |$)", cells)
    }
    assert with_number == set(ATTACKS.names())
