"""A run folder that version 0.1 wrote under schema 1.0: labels as one text, no request, no section."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import advkit
from advkit.core.errors import ReportError, StaleRun
from advkit.core.protocols import Label
from advkit.evaluation.counts import by_label, count
from advkit.evaluation.plan import Request
from advkit.evaluation.report import Report
from advkit.evaluation.report.compare import compare
from advkit.evaluation.run.store import read_records

EARLIER = Path(__file__).with_name("run_of_schema_1_0")
ASKED = {"attack": "thorough", "defense": "pgd_at", "task": "digits", "n": 12, "device": "cpu"}


@pytest.fixture
def earlier(tmp_path):
    return Path(shutil.copytree(EARLIER, tmp_path / "run"))


def test_its_report_is_read_and_shown(earlier):
    report = Report.load(earlier)
    assert report.to_dict()["schema_version"] == "1.0"
    assert "robust accuracy" in str(report)
    assert report.robust_accuracy == 6 / 12


def test_its_labels_are_values(earlier):
    groups = by_label(read_records(earlier / "records.jsonl"))
    assert Label("thorough", "apgd-ce") in groups
    assert {label.attack for label in groups} == {"thorough"}
    assert count(read_records(earlier / "records.jsonl")).robust == 6


def test_its_request_is_read_from_the_title(earlier):
    asked = Request.from_report(Report.load(earlier).to_dict())
    assert (asked.attack, asked.defense, asked.n, asked.seed) == ("thorough", "pgd_at", 12, 0)
    assert asked.threat_model == "linf:eps=0.2"


def test_a_title_that_names_no_parts_is_refused_by_what_it_lacks(earlier):
    data = Report.load(earlier).to_dict()
    data["title"] = "a run"
    with pytest.raises(ReportError, match="attack, defense, task"):
        Request.from_report(data)


def test_it_is_resumed(earlier):
    path = earlier / "records.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before[:20]) + before[20][:30])
    report = advkit.evaluate(out=earlier, **ASKED)
    now = path.read_bytes().splitlines(keepends=True)
    assert now[:20] == before[:20]
    assert "stage" not in json.loads(now[0])
    assert json.loads(now[-1])["stage"]
    assert {(r.made_by, r.id) for r in read_records(path)} == {
        (r.made_by, r.id) for r in read_records(EARLIER / "records.jsonl")
    }
    assert report.robust_accuracy == 6 / 12
    assert report.to_dict()["schema_version"] == "1.1"


def test_another_case_is_refused(earlier):
    with pytest.raises(StaleRun, match="another case"):
        advkit.evaluate(out=earlier, **ASKED | {"seed": 1})


def test_it_is_compared_with_a_run_of_today(earlier, tmp_path):
    advkit.evaluate(out=tmp_path / "today", **ASKED)
    both = compare(earlier, tmp_path / "today")
    assert both is not None
