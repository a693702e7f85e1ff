"""`advkit report RUN` and `advkit leaderboard --watch`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import advkit
from advkit.cli.main import run
from advkit.evaluation.report import Report
from advkit.evaluation.report import leaderboard as boards


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("runs") / "a"
    advkit.evaluate("pgd:steps=10", task="digits", threat_model="linf:eps=0.13", n=30, device="cpu", out=made)
    return made


def test_one_page_shows_what_broke_and_what_held(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    report = Report.load(folder)
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n{report.verdict()}\n"
    assert text == report.to_html()
    assert re.search(r"<(script|link|iframe)|https?://|url\(", text) is None
    assert "default-src 'none'" in text
    assert text.count('class="pair"') == 5
    ended = re.findall(r'class="badge (?:warning|adaptive)">(broken|held)<', text)
    outcomes = report.adversarial().outcomes
    broken, held = outcomes.count("broken"), outcomes.count("robust")
    assert broken
    assert held
    assert ended.count("held") == min(held, max(2, 5 - broken))
    assert len(ended) == 5
    assert report.current["reproducibility"]["command"] in text
    assert "advkit.evaluate(attack=&#39;pgd:steps=10&#39;" in text
    metrics = report.metrics
    for name in ("clean_accuracy", "robust_accuracy", "attack_success_rate"):
        assert f'<p class="value">{100 * metrics[name]["value"]:.1f} %</p>' in text


def test_out_and_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(folder / "report.json"), "--out", str(tmp_path / "p.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(tmp_path / "p.html")
    assert (tmp_path / "p.html").is_file()


def test_without_records_the_page_says_so(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.json").write_bytes((folder / "report.json").read_bytes())
    assert run(["report", str(tmp_path)]) == 0
    said = f"{tmp_path / 'report.json'} has no records beside it, so no examples either: name the run's own folder"
    assert capsys.readouterr().err == f"the page has no examples: {said}\n"
    assert run(["plot", str(tmp_path)]) == 0
    why = f"{tmp_path} has no records.jsonl, from which plots are drawn; name the run's own folder"
    assert capsys.readouterr().out == f"nothing to draw: {why}\n"
    assert run(["plot", str(tmp_path), "per_class"]) != 0
    assert capsys.readouterr().err == f"advkit: error: this run has no plot 'per_class'; it has none: {why}\n"
    assert run(["leaderboard", str(tmp_path)]) == 0
    assert capsys.readouterr().err == (
        "1 report without records.jsonl beside it: figures stand as written; put run folders here to have them counted "
        "again\n"
    )
    text = Report.load(tmp_path).to_html()
    assert "No examples: " in text
    assert "has no records beside it" in text


def test_a_folder_without_a_report_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["report", str(tmp_path)]) != 0
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "no report at" in err
    assert run(["leaderboard", str(tmp_path)]) == 0
    assert "no report.json under" in capsys.readouterr().err
    assert run(["leaderboard", str(tmp_path), "--watch", "--json"]) != 0
    assert "leave --json out" in capsys.readouterr().err
    assert run(["leaderboard", str(tmp_path), "--watch", "--every", "0"]) != 0
    assert "--every 0: expected" in capsys.readouterr().err


def test_a_kind_of_plot_that_is_not_there_is_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plot", str(folder), "nonsense"]) != 0
    said = "this run has no plot 'nonsense'; it has per_class, examples: name one of them"
    assert capsys.readouterr().err == f"advkit: error: {said}\n"


def test_watch_writes_again_when_a_report_changes(folder: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    (runs / "a").mkdir(parents=True)
    seen: list[int] = []

    class Enough(Exception):
        pass

    def told(board: boards.Board, paths: list[Path]) -> None:
        seen.append(len(board))
        if len(seen) == 2:
            raise Enough
        threading.Timer(
            0.1, lambda: (runs / "a" / "report.json").write_bytes((folder / "report.json").read_bytes())
        ).start()

    with pytest.raises(Enough):
        boards.watch(runs, seconds=0.05, told=told)
    assert seen == [0, 1]


@pytest.mark.slow
def test_ctrl_c_ends_watching(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "advkit", "leaderboard", str(tmp_path), "--watch", "--every", "0.1"]
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "leaderboard.json").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0
    assert out.endswith("watching ended\n")
    assert "Traceback" not in err
