"""Optimality of attacks: against the definition by areas, computed on a fine grid; from records alone."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shutil

import numpy as np
import pytest
from typer.testing import CliRunner

import advkit
from advkit.cli.group import app
from advkit.core.errors import UsageError
from advkit.evaluation.figures.plots import accuracy_by_distance, accuracy_by_distance_of
from advkit.evaluation.report import leaderboard as leaderboards
from advkit.evaluation.report.document import Report
from advkit.evaluation.run.store import read_records


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    for name, attack, settings in (
        ("long", "ddn:steps=60", {}),
        ("short", "ddn:steps=6", {}),
        ("few", "ddn:steps=60", {"budget": "propagations=9"}),
        ("ball", "pgd:steps=20,restarts=2", {"threat_model": "l2:eps=0.5"}),
        ("other", "ddn:steps=6", {"model": "zoo:digits-mlp-pgd_at"}),
        ("linf", "pgd:steps=2", {"threat_model": "linf:eps=0.1"}),
    ):
        asked = {"threat_model": "minimum-l2", **settings}
        advkit.evaluate(attack, task="digits", n=40, out=root / name, **asked)
    return root


def distances(folder):
    """Least distances by definition: 0 where wrong when clean, infinite where nothing broke it."""
    found = {}
    for line in (folder / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        wrong = record["outcome"] == "wrong"
        found[record["id"]] = 0.0 if wrong else record["measures"]["l2"] if record["outcome"] == "broken" else math.inf
    return np.array(list(found.values()))


def area(least, largest, points=200_001):
    """Under robust accuracy over the radius, up to the largest."""
    grid = np.linspace(0, largest, points)
    accuracy = 1 - np.searchsorted(np.sort(least), grid, side="right") / len(least)
    return float(accuracy[:-1].mean()) * largest


@pytest.mark.slow
def test_local_optimality_is_the_ratio_of_areas(runs):
    found = advkit.optimality([runs])
    case = next(case for case in found.cases if "digits-mlp (none)" in case.title)
    own = {name: distances(runs / name) for name in ("long", "short", "few")}
    ball = np.array(
        [r.distance if r.outcome == "broken" else math.inf for r in read_records(runs / "ball" / "records.jsonl")]
    )
    best = np.minimum(np.min(list(own.values()), axis=0), np.where(own["long"] == 0, 0, ball))
    largest = best.max()
    nothing = float((best > 0).mean()) * largest
    for attack in case.attacks:
        name = attack.run.rsplit("/", 1)[-1]
        expected = 1 - (area(own[name], largest) - area(best, largest)) / (nothing - area(best, largest))
        assert attack.local == pytest.approx(expected, abs=2e-4)
        assert attack.interval.low <= attack.local <= attack.interval.high
        assert attack.median == pytest.approx(np.median(own[name]))
    assert [each.run.rsplit("/", 1)[-1] for each in case.attacks] == ["long", "short", "few"]
    assert case.attacks[-1].name == "ddn:steps=60 (9 propagations)"
    assert case.attacks[-1].cost <= 9
    assert case.bounded == ("pgd:steps=20,restarts=2 (l2 eps=0.5, untargeted, white box)",)


def test_the_mean_over_cases_is_of_the_cases_an_attack_was_run_on(runs):
    found = advkit.optimality([runs / "short", runs / "other", runs / "long"])
    by_case = [{each.name: each.local for each in case.attacks} for case in found.cases]
    overall = {each.attack: (each.value, each.cases) for each in found.overall()}
    short = [case["ddn:steps=6"] for case in by_case]
    assert overall["ddn:steps=6"] == (pytest.approx(np.mean(short)), 2)
    assert overall["ddn:steps=60"][1] == 1
    assert sorted(short)[1] == 1.0  # alone on its case it is the best known


@pytest.mark.slow
def test_the_command_prints_and_writes_it(runs, tmp_path):
    out = tmp_path / "optimality.json"
    done = CliRunner().invoke(app, ["compare", "--optimality", str(runs), "--json", "--out", str(out)])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json.loads(out.read_text()) == advkit.optimality([runs]).to_dict()
    shown = CliRunner().invoke(app, ["compare", "--optimality", str(runs)])
    assert shown.exit_code == 0
    assert "best known" in shown.stdout
    assert "the best known distances include pgd" in " ".join(shown.stdout.split())


def test_an_infinite_median_is_said_in_words(tmp_path):
    report = advkit.evaluate(
        "ddn:steps=1", task="digits", n=10, threat_model="minimum-l2", budget="propagations=2", out=tmp_path / "held"
    )
    assert report.robust_accuracy == report.clean_accuracy  # two passes look at the clean samples alone
    assert report.metrics["least_l2_median"]["unbounded"]
    for text in (str(report), report.verdict(), report._repr_html_()):
        assert not re.search(r"\binf\b", text)
    assert "Half of the samples or more withstood: there is no median" in report.verdict()
    shown = CliRunner().invoke(app, ["compare", "--optimality", str(tmp_path)])
    assert shown.exit_code == 0
    assert "no median: half of the samples or more withstood (ddn:steps=1 (2 propagations))" in shown.stdout


def test_without_a_minimum_there_is_nothing_to_compare(runs, tmp_path):
    with pytest.raises(UsageError, match="no run without a radius here"):
        advkit.optimality([runs / "ball", runs / "linf"])
    with pytest.raises(UsageError, match=r"there is no report\.json in"):
        advkit.optimality([tmp_path])
    with pytest.raises(UsageError, match="does not exist"):
        advkit.optimality([tmp_path / "nowhere"])
    (runs / "linf" / "records.jsonl").rename(runs / "linf" / "moved")
    found = advkit.optimality([runs / "linf", runs / "long"])
    (runs / "linf" / "moved").rename(runs / "linf" / "records.jsonl")
    assert [run.rsplit("/", 2)[-2] for run, _ in found.skipped] == ["linf"]


def test_robust_accuracy_at_every_radius_has_its_interval(runs):
    figure = accuracy_by_distance({"a": ([0.5, 2.0], 3, 4)}, norm="L2")
    line = figure.axes[0].lines[0]
    assert line.get_ydata().tolist() == [0.75, 0.5, 0.25, 0.25]
    assert line.get_xdata().tolist() == pytest.approx([0.0, 0.5, 2.0, 2.1])
    assert len(figure.axes[0].collections) == 1
    assert (runs / "long" / "plots" / "accuracy_by_distance.png").exists() is False  # the command draws, Python asks
    report = Report.load(runs / "long")
    drawn = accuracy_by_distance_of(report, read_records(runs / "long" / "records.jsonl"))
    drawn_line = drawn.axes[0].lines[0]
    assert drawn_line.get_ydata()[0] == report.clean_accuracy
    assert drawn_line.get_ydata()[-1] == report.robust_accuracy
    with pytest.raises(UsageError, match="no more broken ones"):
        accuracy_by_distance({"a": ([0.5, 2.0], 1, 4)})


@pytest.mark.slow
def test_the_interval_over_cases_is_that_of_one_case_where_there_is_one(runs):
    one = advkit.optimality([runs / "short", runs / "long"])
    ((_, long),) = ((case, case.attacks[0]) for case in one.cases)
    assert next(each for each in one.overall() if each.attack == long.name).interval == long.interval
    several = advkit.optimality([runs / "short", runs / "other", runs / "long"])
    short = next(each for each in several.overall() if each.attack == "ddn:steps=6")
    alone = [each for case in several.cases for each in case.attacks if each.name == "ddn:steps=6"]
    # A mean of two independent ones, of which one is certain: half of the width of the other.
    widths = sorted(each.interval.high - each.interval.low for each in alone)
    assert widths[0] == 0
    assert short.interval.high - short.interval.low == pytest.approx(widths[1] / 2, rel=0.05)


def opened(page: str) -> str:
    """What the entries of a board's page open."""
    (packed,) = re.findall(r'id="details">([^<]*)<', page)
    return gzip.decompress(base64.b64decode(packed)).decode()


@pytest.mark.slow
def test_the_board_says_how_near_to_optimal_the_attacks_of_a_case_are(runs):
    found = leaderboards.scan(runs)
    expected = {each.run.rsplit("/", 1)[-1]: each for case in advkit.optimality([runs]).cases for each in case.attacks}
    told = {path.partition("/")[0]: attack.optimality for path, attack in found.attacks.items()}
    assert {name for name, each in told.items() if each is not None} == {"long", "short", "few"}  # other is alone
    for name in ("long", "short", "few"):
        assert told[name].local == expected[name].local
        assert told[name].interval == expected[name].interval
        assert told[name].text == f"{100 * told[name].local:.1f} % ({_ends(told[name].interval)})"
        assert told[name].text in opened(leaderboards.html_of(found))
        assert told[name].text in leaderboards.markdown_of(found)
    attacks = [each for group in found.to_dict()["groups"] for victim in group["victims"] for each in victim["attacks"]]
    assert {each["optimality"]["local"] for each in attacks if each["optimality"]} == {
        each.local for each in told.values() if each is not None
    }


def _ends(interval):
    return f"{100 * interval.low:.1f} to {100 * interval.high:.1f}"


def test_a_report_that_disagrees_with_its_records_sets_no_best_distance(runs, tmp_path):
    for name in ("long", "short"):
        shutil.copytree(runs / name, tmp_path / name)
    file = tmp_path / "long" / "records.jsonl"
    file.write_text(file.read_text().replace('"l2":0.', '"l2":0.0'))
    (only,) = {attack.optimality for path, attack in leaderboards.scan(tmp_path).attacks.items() if "short" in path}
    assert only is None


def test_a_report_without_a_radius_points_to_the_comparison(runs):
    said = {
        name: json.loads((runs / name / "report.json").read_text())["section"]["sentence"] for name in ("long", "ball")
    }
    assert "`advkit compare --optimality`" in said["long"]
    assert "optimality" not in said["ball"]
