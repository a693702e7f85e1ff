"""README's commands and Python run as they stand there, its links lead somewhere, and every option exists."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from advkit.cli.main import COMMANDS, load_command, run

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]


def commands() -> list[list[str]]:
    """The arguments of every `advkit` command in the shell blocks, in order; their output lines are not commands."""
    found = []
    for language, block in BLOCKS:
        if language not in ("bash", "console", "sh", "shell"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.removeprefix("$ ").split("&&"):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:  # a line of output with a lone quote
                    continue
                if words and os.path.basename(words[0]) == "advkit":
                    found.append(words[1:])
    return found


def test_there_is_something_to_run() -> None:
    assert ["evaluate", "--attack", "pgd", "--defense", "pubdef"] in commands()
    assert PYTHON


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_and_option_exists(arguments: list[str]) -> None:
    name, *rest = arguments
    assert name in COMMANDS
    parsed = load_command(name).make_context(name, list(rest)).params
    from advkit.attacks import ATTACKS
    from advkit.defenses import DEFENSES
    from advkit.tasks import TASKS
    from advkit.threat_models import GOALS, THREAT_MODELS

    registries: dict[str, Any] = {
        "attack": ATTACKS, "defense": DEFENSES, "task": TASKS, "threat_model": THREAT_MODELS, "goal": GOALS,
    }  # fmt: skip
    for option, registry in registries.items():
        if parsed.get(option):
            registry.build(parsed[option])


def test_every_link_leads_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", TEXT) + re.findall(
        r"`((?:notebooks|docs|scripts|benchmarks)/[^`\s]*)`", TEXT
    )
    local = [target for target in targets if "://" not in target]
    assert local
    missing = [target for target in local if not (ROOT / target).exists()]
    assert not missing


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and no data or cache of the user's."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVKIT_DATA", raising=False)
    return here


@pytest.mark.slow
def test_the_commands_run_in_their_order(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for the first evaluation, which CI runs as a step of its own, as a user does."""
    ended = {}
    first = ["evaluate", "--attack", "pgd", "--defense", "pubdef"]
    assert f"\nadvkit {' '.join(first)}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for arguments in [each for each in commands() if each != first]:
        code = run(list(arguments))
        said = capsys.readouterr()
        if code != 0:
            ended[" ".join(arguments)] = (code, said.err[-500:])
    assert not ended
    assert list(elsewhere.rglob("report.json"))


@pytest.mark.slow
def test_the_python_runs(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, code in enumerate(PYTHON):
        exec(compile(code, f"README.md, python block {number + 1}", "exec"), namespace)
    assert capsys.readouterr().out.strip()
