"""What the terminal says first, and that nothing of it is cut off."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import advkit
from advkit.cli import zoo as zoo_command
from advkit.cli.main import run
from advkit.evaluation.report import grids
from advkit.models import zoo

ASKED = {"task": "digits", "model": "zoo:digits-mlp", "n": 12, "beside": False}


def rate(k: int, n: int) -> dict[str, object]:
    return {"value": k / n, "numerator": k, "denominator": n, "denominator_kind": "all_samples", "ci": None}


def test_the_verdict_comes_first_and_the_cost_last() -> None:
    report = advkit.evaluate("fgsm", **ASKED)
    brief, full = ([line for line, _ in lines(80)] for lines in (report.brief, report.full))
    place = next(i for i, line in enumerate(brief) if line.startswith("Robust accuracy is"))
    assert place == 2
    assert not any("%" in line for line in brief[:place])
    assert full[1].startswith("Robust accuracy is")
    assert full.index("cost") > max(i for i, line in enumerate(full) if line.startswith("class "))
    assert any(line.startswith("passes per attacked sample") for line in full[full.index("cost") :])


def test_transfer_is_a_grid_of_kinds_and_sources_that_says_what_the_metrics_say() -> None:
    metrics = {
        f"tapm_{kind}{end}": rate(k, 10)
        for k, end in enumerate(("", "_seen", "_unseen", "_group_linf", "_group_normal"))
        for kind in ("acc_avg", "acc_best_attack", "acc_per_sample")
    }
    (grid,) = grids.of({"metrics": metrics})
    assert grid.columns == ["all", "seen", "unseen", "linf", "normal"]
    assert set(grid.metrics) == set(metrics)
    assert list(grid.cells["strongest cell"]) == ["0.0 %", "10.0 %", "20.0 %", "30.0 %", "40.0 %"]
    narrow = grid.lines(60)
    assert max(map(len, narrow)) <= 60
    assert sum("strongest cell" in line for line in narrow) == 2
    assert " ".join(" ".join(narrow).split()).count("%") == 15
    assert grids.of({"metrics": {"tapm_acc_avg": rate(1, 2)}}) == []  # one column is no grid


def test_judges_are_a_grid_of_what_is_counted_and_judge() -> None:
    metrics = {
        "refusal_asr_greedy": rate(1, 4),
        "exact_asr_greedy": rate(0, 4),
        "refusal_asr_any_of_3": rate(3, 4),
        "refusal_hit_at_2": {"value": 0.5, "n": 4},
        "asr": rate(1, 2),
    }
    (grid,) = grids.of({"metrics": metrics})
    assert grid.columns == ["refusal", "exact"]
    assert {name: list(cells) for name, cells in grid.cells.items()} == {
        "attacked, greedy reply": ["25.0 %", "0.0 %"],
        "attacked, any of 3 replies": ["75.0 %", ""],
        "hit@2": ["50.0 %", ""],
    }
    assert "asr" not in grid.metrics


def test_a_suite_names_the_stages_that_were_not_needed() -> None:
    report = advkit.evaluate("lean", **ASKED)
    spared = report.to_dict()["protocol"]["not_needed"]
    assert {"square", "apgd-t", "fab-t"} <= set(spared)  # no alarm
    assert not set(spared) & {attack["stage"] for attack in report.attacks}
    said = f"Stages that were not needed: {', '.join(spared)}."
    (line,) = [line for line in str(report).splitlines() if line.startswith("stages that were not needed")]
    assert len(line) <= 80
    assert f", {spared[0]}" in line.replace(": ", ", ")
    left = len(spared) - (line.count(",") + 1 - ("more" in line))
    assert line.endswith(f"{left} more") == bool(left)
    assert said in report.verdict()
    assert "not_needed" not in advkit.evaluate("fgsm", **ASKED).to_dict()["protocol"]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_zoo_is_never_cut_off(width, monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert run(["zoo"]) == 0
    said = capsys.readouterr().out
    flat = "".join(said.split())
    for card in zoo.cards():
        assert card.name in said
        for name, value in card.measured.items():
            assert f"{100 * value:.1f}%" in flat, (card.name, name)
    listed = zoo_command._listed("digits", [zoo.card("digits-mlp-trades")], 40)
    assert max(map(len, listed)) <= 40


def test_doctor_answers_before_it_tells_of_the_installation(monkeypatch, capsys) -> None:
    from advkit.cli import doctor

    seen = {"advkit": "1", "python": "3", "platform": "x", "packages": {}, "devices": ["cpu"], "data": {}}
    monkeypatch.setattr(doctor, "installation", lambda: {**seen, "zoo": {"models": 0, "broken": []}})
    monkeypatch.setattr(doctor, "_examine", lambda *given: ([], {"rows": 5, "indicators": {}}))
    assert run(["doctor", "--task", "digits", "--rows", "5"]) == 0
    said = capsys.readouterr().out
    assert said.index("no check speaks against the numbers") < said.index("measured") < said.index("installation")


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    code = "import sys; from advkit.cli.main import run; sys.exit(run(['zoo']))"
    command = f'{sys.executable} -c "{code}" | head -1'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, env=os.environ, check=False)
    assert done.stdout
    assert not done.stderr
