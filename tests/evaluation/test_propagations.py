"""A budget of propagations: every attack ends at it, the report says it, and it is part of the case."""

from __future__ import annotations

import json

import pytest

import advkit
from advkit.core.errors import UsageError
from advkit.evaluation.plan import Request, plan


def records_of(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("attack", ["pgd:steps=50,stop=false", "ddn", "fab", "square", "apgd-t"])
def test_no_sample_costs_more(attack, tmp_path):
    report = advkit.evaluate(attack, task="digits", n=24, budget="propagations=31", out=tmp_path)
    records = records_of(tmp_path)
    assert 0 < max(record["forwards"] + record["backwards"] for record in records) <= 31
    assert json.loads(report.to_json())["threat_model"]["details"]["propagations"] == 31
    assert json.loads(report.to_json())["request"]["budget"] == "propagations=31"
    assert not any(record["outcome"] == "error" for record in records)


def test_it_is_part_of_the_case_and_none_changes_no_digest():
    whole, limited = (plan(Request(task="digits", n=4, budget=budget)) for budget in (None, "propagations=31"))
    assert whole.digest() != limited.digest()
    assert "propagations" not in whole.case.config()


@pytest.mark.parametrize("budget", ["31", "propagations", "propagations=0", "propagations=-3", "queries=5", ""])
def test_what_can_not_be_read_is_said_in_one_line(budget):
    with pytest.raises(UsageError, match=r"expected propagations=N, N >= 1.*queries=1000"):
        advkit.evaluate("pgd", task="digits", n=4, budget=budget)


def test_a_budget_below_one_step_is_said_before_the_run():
    with pytest.raises(UsageError, match="square can't take one step with 0 queries"):
        advkit.evaluate("square", task="digits", n=4, threat_model="linf:eps=0.1,access=scores,queries=0")
    with pytest.raises(UsageError, match="pgd can't take one step with a budget of 1 propagations"):
        advkit.evaluate("pgd", task="digits", n=4, budget="propagations=1")


def test_what_makes_no_passes_for_samples_has_no_budget():
    with pytest.raises(UsageError, match="leave --budget out"):
        advkit.evaluate("farfirst", "svm", "digits-pair", threat_model="label-flips:rate=0.25", budget="propagations=9")
