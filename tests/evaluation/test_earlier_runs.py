"""A run folder that version 0.1 wrote under schema 1.0: labels as one text, no request, no section."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import advkit
from advkit.attacks.gradient.apgd import APGDCE
from advkit.attacks.gradient.targeted import APGDT
from advkit.attacks.minimal.fab import FABT
from advkit.attacks.query.square import Square
from advkit.attacks.suites import Stage, Thorough
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


@dataclass(frozen=True, kw_only=True)
class FirstStage(Stage):
    """A stage as in revision 1: so many rows as its share says, at least `least`."""

    def takes(self, robust, /):
        return min(robust, robust if self.share >= 1 else max(self.least, math.ceil(self.share * robust)))


def toward(targets, **settings):
    return APGDT(targets=targets, order="adversarial", **{"loss": "margin", **settings})


def first_revision(suite):
    """The stages of `thorough` before revision 2, but for those of an escalation."""
    named = {
        "apgd-ce": (APGDCE(steps=10), {}),
        "apgd-t-short": (toward(3, steps=10), {}),
        "all-classes": (toward(9, steps=5, together=9), {"share": 0.5, "least": 12}),
        "near-targets": (toward(2, steps=100, together=2, loss="dlr"), {"share": 0.15, "least": 12}),
        "near-classes": (toward(9, steps=20, together=9), {"share": 0.05, "least": 4}),
        "nearest-dlr": (toward(0, steps=50, restarts=4, together=4, loss="dlr"), {"share": 0.07, "least": 12}),
        "nearest-margin": (toward(1, steps=25, restarts=8, together=8), {"share": 0.07, "least": 12}),
        "nearest-targets": (
            toward(2, steps=100, restarts=2, together=4, loss="dlr"),
            {"share": 0.07, "least": 12},
        ),
        "near-fab": (FABT(steps=20, targets=3), {"share": 0.25, "least": 4, "sentinel": True}),
        "near-sentinel": (Square(queries=1000), {"share": 0.03, "least": 16, "above": 0.1, "sentinel": True}),
        "sentinel": (Square(queries=100), {"sentinel": True}),
    }
    return tuple(FirstStage(name=name, attack=attack, **more) for name, (attack, more) in named.items())


def test_a_suite_of_another_revision_is_refused(earlier):
    with pytest.raises(StaleRun, match=r"another case \(different: revision\)"):
        advkit.evaluate(out=earlier, **ASKED)


@pytest.mark.slow
def test_it_is_resumed(earlier, monkeypatch):
    monkeypatch.setattr(Thorough, "revision", 1)
    monkeypatch.setattr(Thorough, "stages", first_revision)
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


@pytest.mark.slow
def test_it_is_compared_with_a_run_of_today(earlier, tmp_path):
    advkit.evaluate(out=tmp_path / "today", **ASKED)
    both = compare(earlier, tmp_path / "today")
    assert both is not None
