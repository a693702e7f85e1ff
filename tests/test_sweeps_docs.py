"""docs/sweeps.md: its commands parse, its Python and its grid run, and the grid of every pair names every attack."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from advkit.attacks import ATTACKS
from advkit.cli.main import COMMANDS, load_command
from advkit.evaluation.sweep.api import prepare
from advkit.evaluation.sweep.engines import ENGINES
from advkit.evaluation.sweep.grid import Grid, read_grid

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]


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


def test_the_grid_of_every_pair_names_every_attack() -> None:
    grid = read_grid(ROOT / "docs" / "every_pair.yaml")
    named = {ATTACKS.known(spec.partition(":")[0]) for spec in grid.attacks}
    assert named == set(ATTACKS.names())
    assert grid.defenses == ["all"]
