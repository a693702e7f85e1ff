"""`advkit doctor` from the outside: what it prints, writes and exits with."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from advkit.cli.doctor import installation
from advkit.cli.main import run

SOUND = ("doctor", "--task", "digits", "--model", "zoo:digits-public-mlp", "--rows", "8", "--draws", "5")


@pytest.mark.slow
def test_a_sound_model_exits_with_zero_and_leaves_its_curves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SOUND, "--json", "--out", str(tmp_path / "out")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [f for f in said["findings"] if f["severity"] != "info"] == []
    assert said["case"]["rows"] == said["curves"]["rows"] == 8
    assert "installation" not in said
    assert json.loads((tmp_path / "out" / "doctor.json").read_text()) == said
    for name in ("eps", "iterations", "loss"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_masked_model_exits_with_three_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "masked_victim.py").write_text(
        "from advkit.models.zoo import load\n"
        "from advkit.testing.victims import quantised\n"
        "def make():\n    return quantised(load('digits-public-mlp'), 3)\n"
    )
    arguments = ["doctor", "--task", "digits", "--model", "python:masked_victim:make", "--rows", "8", "--draws", "5"]
    assert run(arguments) == 3
    out = " ".join(capsys.readouterr().out.split())
    assert "zero_gradient" in out
    assert "unreliable" in out
    assert "measured" in out


def test_mistakes_exit_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--task", "digits", "--model", "zoo:digits-public-mpl"]) == 2
    assert "digits-public-mlp" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run([*SOUND, "--json", "--out", str(tmp_path / "file")]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_installation_names_versions_devices_and_data() -> None:
    seen = installation()
    assert seen["packages"]["torch"] == version("torch")
    assert seen["devices"][0].startswith("cpu")
    assert seen["data"]["digits"] == "360 rows to evaluate, 1437 rows to train on"
    assert seen["zoo"]["broken"] == []
