"""The command line in process, and a small trained victim that it can name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from advkit.cli.main import run


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Said]


@pytest.fixture
def advkit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """Run `advkit ARGUMENTS...` in an empty working directory; gives code, standard output and standard error."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("ADVKIT_DATA", raising=False)
    monkeypatch.delenv("ADVKIT_DEBUG", raising=False)

    def call(*arguments: object) -> Said:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def victim(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The spec of a digits classifier that `advkit train` made."""
    folder = tmp_path_factory.mktemp("victim")
    code = run(["train", "--task", "digits", "--recipe", "epochs=6", "--device", "cpu", "--out", str(folder), "--json"])
    assert code == 0
    return f"path:{folder / 'model.safetensors'}"
