"""A scenario, a norm and a goal of another package: entry points alone, nothing of advkit edited for them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advkit.evaluation.report import Report

PACKAGE = Path(__file__).parents[1] / "plugin" / "scouting.py"
ENTRY_POINTS = """\
[advkit.scenarios]
scouting = scouting:Scouting

[advkit.threat_models]
scouting = scouting:ScoutingLinf
weighted = scouting:Weighted

[advkit.goals]
unsure = scouting:Unsure
"""
EVALUATE = ("evaluate", "--task", "digits", "--model", "zoo:digits-mlp", "--device", "cpu", "--no-plots")
SCOUTING = (*EVALUATE, "--attack", "pgd:steps=5", "--threat-model", "scouting:eps=0.1,submissions=8", "--n", 60)


@pytest.fixture
def installed(tmp_path):
    """The package in a folder of its own, as pip leaves it there."""
    folder = tmp_path / "site"
    info = folder / "scouting-1.0.dist-info"
    info.mkdir(parents=True)
    shutil.copy(PACKAGE, folder)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: scouting\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return folder


def advkit(*words, folder, package=None, check=0):
    """The command line in a process of its own, with the package or without."""
    path = os.pathsep.join(filter(None, [str(package or ""), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "advkit", *map(str, words)]
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == check, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_scenario_of_another_package_is_evaluated_ranked_and_read_without_it(installed, tmp_path):
    said = advkit(*SCOUTING, "--out", "runs/one", folder=tmp_path, package=installed)
    assert "hit rate" in said.stdout
    assert "of the submitted samples are broken" in " ".join(said.stdout.split())
    advkit(*SCOUTING, "--defense", "none", "--seed", 1, "--out", "runs/two", folder=tmp_path, package=installed)
    data = json.loads((tmp_path / "runs" / "one" / "report.json").read_text())
    assert data["section"]["scenario"] == "scouting"
    hits = data["metrics"]["scouting_hit_rate"]
    assert hits["denominator"] == 8
    assert hits["denominator_kind"] == "submitted_samples"
    # from here on the package is not installed
    assert "hit rate" in advkit("show", "runs/one", folder=tmp_path).stdout
    advkit("leaderboard", "runs", folder=tmp_path)
    board = json.loads((tmp_path / "runs" / "leaderboard.json").read_text())
    assert "Hit rate of scouting" in json.dumps(board)
    refused = advkit(*SCOUTING, "--out", "runs/three", folder=tmp_path, check=2)
    assert "scouting" in refused.stderr
    assert not (tmp_path / "runs" / "three").exists()


@pytest.mark.slow
def test_a_scenario_of_another_package_is_resumed_after_kill_9(installed, tmp_path):
    words = [*map(str, SCOUTING), "--batch-size", "4", "--out"]
    path = os.pathsep.join([str(installed), os.environ.get("PYTHONPATH", "")])
    run = subprocess.Popen(
        [sys.executable, "-m", "advkit", *words, "cut"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    records = tmp_path / "cut" / "records.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and run.poll() is None:
        if records.exists() and records.read_bytes().count(b"\n") >= 8:
            break
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    run.wait()
    kept = records.read_bytes()
    assert kept.count(b"\n") >= 8
    advkit(*words, "cut", folder=tmp_path, package=installed)
    advkit(*words, "whole", folder=tmp_path, package=installed)
    assert records.read_bytes().startswith(kept[: kept.rfind(b"\n") + 1])
    assert records.read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()


@pytest.mark.slow
def test_a_goal_and_a_norm_of_ones_own_end_in_a_report(installed, tmp_path):
    words = (*EVALUATE, "--attack", "fgsm", "--threat-model", "weighted:eps=0.1", "--goal", "unsure", "--n", 20)
    advkit(*words, "--out", "run", folder=tmp_path, package=installed)
    report = Report.load(tmp_path / "run")
    data = report.to_dict()
    assert data["threat_model"]["goal"] == "unsure"
    assert data["threat_model"]["norm"] == "weighted_linf"
    assert "unsure rate" in str(report).casefold()


def test_a_threat_model_of_an_unknown_scenario_is_refused_before_anything_is_spent(monkeypatch):
    import advkit as package
    from advkit.core.errors import UnknownName
    from advkit.threat_models.lp import Linf

    monkeypatch.setattr(Linf, "scenario", "nobody's")
    with pytest.raises(UnknownName, match="scenario"):
        package.evaluate("pgd", task="digits", n=4, device="cpu")


def test_the_scenario_keeps_the_laws(monkeypatch):
    monkeypatch.syspath_prepend(PACKAGE.parent)
    import scouting

    from advkit.evaluation.api import resolve
    from advkit.evaluation.scenarios import SCENARIOS
    from advkit.testing import check_scenario

    monkeypatch.setitem(SCENARIOS.table, "scouting", "scouting:Scouting")
    monkeypatch.setitem(SCENARIOS._folded, "scouting", "scouting")
    case = resolve(
        "pgd:steps=3", "none", "digits", "zoo:digits-mlp", scouting.ScoutingLinf(eps=0.1), n=30, device="cpu"
    )
    check_scenario(scouting.Scouting(), case)
