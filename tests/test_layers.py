"""Imports run one way, as pyproject.toml's contract says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from importlinter import cli

import advkit

ROOT = Path(advkit.__file__).parents[1]


def lint(config: Path) -> int:
    return cli.lint_imports(config_filename=str(config), no_cache=True)


def test_imports_run_one_way(capsys: pytest.CaptureFixture[str]) -> None:
    code = lint(ROOT / "pyproject.toml")
    assert code == cli.EXIT_STATUS_SUCCESS, capsys.readouterr().out


def test_every_package_has_its_layer() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (each["layers"] for each in contract["contracts"] if each["type"] == "layers")
    named = {name.strip() for layer in layers for name in layer.split("|")}
    packages = {f"advkit.{each.parent.name}" for each in (ROOT / "advkit").glob("*/__init__.py")}
    assert packages == named


def test_an_import_against_the_layers_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "backwards.toml"
    config.write_text(
        '[tool.importlinter]\nroot_package = "advkit"\n[[tool.importlinter.contracts]]\nname = "Backwards"\n'
        'type = "layers"\nlayers = ["advkit.core", "advkit.attacks"]\n',
        encoding="utf-8",
    )
    assert lint(config) != cli.EXIT_STATUS_SUCCESS
    assert "advkit.attacks" in capsys.readouterr().out
