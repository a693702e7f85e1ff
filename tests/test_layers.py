"""Imports run one way, as pyproject.toml's contract says."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from importlinter import cli

import advkit

ROOT = Path(advkit.__file__).parents[1]


LINT = (
    "import sys; from importlinter import cli; sys.exit(cli.lint_imports(config_filename=sys.argv[1], no_cache=True))"
)


def lint(config: Path) -> subprocess.CompletedProcess[str]:
    # In a process of its own: import-linter's logging setup switches every other logger of its process off.
    return subprocess.run(
        [sys.executable, "-c", LINT, str(config)], capture_output=True, text=True, cwd=ROOT, check=False
    )


@pytest.mark.slow
def test_imports_run_one_way() -> None:
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == cli.EXIT_STATUS_SUCCESS, done.stdout + done.stderr


def test_every_package_has_its_layer() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (each["layers"] for each in contract["contracts"] if each["name"] == "Imports run one way")
    named = {name.strip() for layer in layers for name in layer.split("|")}
    packages = {f"advkit.{each.parent.name}" for each in (ROOT / "advkit").glob("*/__init__.py")}
    assert packages == named


@pytest.mark.slow
def test_an_import_against_the_layers_is_seen(tmp_path: Path) -> None:
    config = tmp_path / "backwards.toml"
    config.write_text(
        '[tool.importlinter]\nroot_package = "advkit"\n[[tool.importlinter.contracts]]\nname = "Backwards"\n'
        'type = "layers"\nlayers = ["advkit.core", "advkit.attacks"]\n',
        encoding="utf-8",
    )
    done = lint(config)
    assert done.returncode != cli.EXIT_STATUS_SUCCESS
    assert "Backwards" in done.stdout
