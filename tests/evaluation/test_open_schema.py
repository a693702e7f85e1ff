"""Goals and threat models of other packages have words of their own: a run under them ends in a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

import advkit
from advkit.cli.main import run
from advkit.evaluation.report import Report
from advkit.evaluation.report import leaderboard as boards
from advkit.threat_models.goals.untargeted import UntargetedRule
from advkit.threat_models.lp import Linf


@dataclass(frozen=True, kw_only=True)
class Bewilder(UntargetedRule):
    """Any class other than the true one, under a name of its own."""

    kind: ClassVar[str] = "bewilder.v2"


@dataclass(frozen=True, kw_only=True)
class Perceptual(Linf):
    """A ball in a norm that no schema lists, against an attacker of a kind that none lists."""

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "name": "perceptual", "norm": "LPIPS-alex", "knowledge": "insider"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    advkit.evaluate("fgsm", task="digits", goal=Bewilder(), threat_model=Perceptual(eps=0.2), n=40, device="cpu",
                    out=tmp_path / "run")  # fmt: skip
    return tmp_path / "run"


def test_the_run_ends_in_a_report_that_opens_and_ranks(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report.load(folder)
    data = report.to_dict()
    assert (data["threat_model"]["goal"], data["threat_model"]["norm"]) == ("bewilder.v2", "LPIPS-alex")
    assert report.threat == "perceptual eps=0.2, bewilder.v2, insider"
    assert report.metrics["attack_success_rate"]["numerator"] > 0
    (group,) = boards.scan(folder).groups
    assert (group.norm, group.victims[0].rank) == ("LPIPS-alex", 1)
    assert run(["show", str(folder)]) == 0
    assert "bewilder.v2" in capsys.readouterr().out
