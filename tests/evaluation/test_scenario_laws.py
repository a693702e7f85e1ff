"""The laws of scenarios, over those of advkit, and that they can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest

from advkit.evaluation.api import resolve
from advkit.evaluation.run.scenario import Headline
from advkit.evaluation.scenarios import SCENARIOS, scenario_of
from advkit.evaluation.scenarios.evasion import Evasion
from advkit.testing import SCENARIO_LAWS, check_scenario

CASES = {
    "certification": {"attack": "none", "defense": "smoothing", "threat_model": "certified:n=100,n0=20"},
    "evasion": {"attack": "pgd:steps=3", "threat_model": "linf:eps=0.1"},
    "grid": {"attack": "pgd:steps=3", "threat_model": "tapm:sources=zoo:digits-public-mlp,attacks=fgsm"},
    "stream": {"attack": "online:inner=fgsm,k=3", "threat_model": "online:k=3,permutations=20"},
}


def case_of(name):
    return resolve(task="digits", model="zoo:digits-mlp", n=24, device="cpu", **CASES[name])


def test_every_scenario_has_a_case():
    assert set(CASES) == set(SCENARIOS.names())


@pytest.mark.parametrize("name", CASES)
def test_scenarios_keep_the_laws(name):
    case = case_of(name)
    check_scenario(scenario_of(case), case)


@pytest.mark.slow
def test_a_suite_keeps_the_laws():
    case = resolve("lean", task="digits", model="zoo:digits-mlp", threat_model="linf:eps=0.05", n=24, device="cpu")
    check_scenario(Evasion(), case)


class Nameless(Evasion):
    name = "Not A Word"


class Repeats(Evasion):
    def rounds(self, case, engine, records):
        yield from super().rounds(case, engine, {})


class Miscounts(Evasion):
    def expected(self, case, records):
        return 1


class Reorders(Evasion):
    def rounds(self, case, engine, records):
        for each in super().rounds(case, engine, records):
            first, *rest = each.records
            yield replace(each, records=[replace(first, queries=case.batch_size), *rest])


class Promises(Evasion):
    def summarize(self, case, records):
        return replace(super().summarize(case, records), headline=Headline("nothing", "Nothing"))


class Counts(Evasion):
    calls = 0

    def summarize(self, case, records):
        Counts.calls += 1
        return replace(super().summarize(case, records), sentence=f"call {Counts.calls}")


class Raises(Evasion):
    def accepts(self, case):
        return None if case.attack is not None else object()


BROKEN = {
    "has_a_name": Nameless,
    "refuses_before_it_spends": Raises,
    "expects_what_it_yields": Miscounts,
    "resumes_exactly": Repeats,
    "batches_do_not_matter": Reorders,
    "summarizes_in_plain_data": Promises,
    "summarizes_the_records_alone": Counts,
}


def test_every_law_can_fail():
    assert set(BROKEN) == set(SCENARIO_LAWS)


@pytest.mark.parametrize("law", BROKEN)
def test_a_scenario_that_breaks_a_law_is_named(law):
    with pytest.raises(AssertionError, match=f"law {law}" if law != "resumes_exactly" else "on record|other records"):
        check_scenario(BROKEN[law](), case_of("evasion"), laws=[law])
