"""docs/python.md: its code runs, its commands and names exist, and what it says of numbers is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import advkit
from advkit.attacks import ATTACKS
from advkit.attacks.suites import AutoAttack, Thorough
from advkit.cli.main import COMMANDS, load_command
from advkit.evaluation.report.examples import Examples
from advkit.evaluation.run.speed import planned_passes

TEXT = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
LINES = [line for block in re.findall(r"^```console\n(.*?)^```$", TEXT, re.M | re.S) for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_every_command_and_option_exists(line: str) -> None:
    program, name, *rest = shlex.split(line)
    assert program == "advkit"
    assert name in COMMANDS
    asked = load_command(name).make_context(name, list(rest)).params
    if asked.get("attack"):
        ATTACKS.build(asked["attack"])


def test_the_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXT, re.M | re.S)
    space: dict[str, object] = {}
    exec(code, space)
    examples, report = space["examples"], space["report"]
    assert isinstance(examples, Examples)
    assert isinstance(report, advkit.Report)
    assert int(examples.broken.sum()) == report.metrics["attack_success_rate"]["numerator"]
    assert r"\label{tab:digits}" in capsys.readouterr().out


def test_every_name_is_there() -> None:
    first = TEXT.partition("## Progress")[0].partition("stands in `advkit` itself")[2]
    own, _, figures = first.partition("Figures that several runs share")
    for module, part in ((advkit, own), (advkit.plots, figures)):
        names = [name for name in re.findall(r"`(\w+)`", part) if name not in ("advkit", "import")]
        assert names
        for name in names:
            assert name in module.__all__, name
    table = TEXT.partition("## Adversarial examples")[2].partition("## Figures")[0]
    for name in re.findall(r"^\| (`.*?`) \|", table, re.M):
        for each in re.findall(r"`(\w+)`", name):
            assert each in Examples.__dataclass_fields__, each


def test_what_is_planned_is_what_is_written() -> None:
    assert f"about {planned_passes(AutoAttack()):,.0f} passes" in TEXT
    assert f"plans about {planned_passes(Thorough()):,.0f}," in TEXT
