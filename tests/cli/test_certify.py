"""`advkit certify`: what it prints, its exit status, and that it is `evaluate` without an attack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from advkit.cli.main import run
from advkit.evaluation.report import Report

ASKED = ["--task", "digits", "--model", "zoo:digits-mlp", "--n", "6", "--device", "cpu", "--no-plots"]
FEW = ["--threat-model", "certified:n0=64,n=256,radii=0+0.1"]


@pytest.mark.slow
def test_it_prints_a_page_and_keeps_the_report(tmp_path, capsys):
    assert run(["certify", *ASKED, *FEW, "--out", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    assert "certified at radius 0.1" in printed
    assert "average certified radius" in printed
    assert "robust accuracy" not in printed
    assert max(map(len, printed.partition("report: ")[0].splitlines())) <= 80
    assert Report.load(tmp_path / "run").to_dict()["request"]["attack"] == "none"


@pytest.mark.slow
def test_it_is_evaluate_without_an_attack(tmp_path, capsys):
    for name, command in (("one", ["certify"]), ("other", ["evaluate", "--attack", "none", "--defense", "smoothing"])):
        assert run([*command, *ASKED, *FEW, "--out", str(tmp_path / name), "--json"]) == 0
        metrics = json.loads(capsys.readouterr().out)["metrics"]
        assert metrics["certified_accuracy"][1]["radius"] == 0.1
    one, other = ((tmp_path / name / "records.jsonl").read_bytes() for name in ("one", "other"))
    assert one == other
    assert run(["rerun", str(tmp_path / "one"), "--out", str(tmp_path / "again")]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--defense", "none"], "only smoothed models are certified"),
        (["--defense", "smoothing:sigma=0"], "sigma is 0.0"),
        (["--threat-model", "certified:n=0"], "n is 0"),
        (["--threat-model", "certified:alpha=1"], "alpha is 1.0"),
        (["--threat-model", "certified:radii=-1"], "radii"),
        (["--threat-model", "linf:eps=0.1"], "needs an attack"),
        (["--defense", "smoothing:noise=lattice"], "no 8-bit images"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(options, words, tmp_path: Path, capsys):
    assert run(["certify", *ASKED, *options, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
