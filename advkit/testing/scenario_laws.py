"""What every scenario owes its users; each law raises AssertionError with its name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from advkit.core.protocols import Record
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import LocalEngine
from advkit.evaluation.run.rehearsal import preflight
from advkit.evaluation.run.scenario import Scenario, Section
from advkit.evaluation.run.store import Store
from advkit.testing.play import failure, require


@dataclass(frozen=True)
class ScenarioRun:
    """A case run from start to end."""

    scenario: Scenario
    case: Case
    records: tuple[Record, ...]
    section: Section


def _records(scenario: Scenario, case: Case, done: dict[str, Record]) -> list[Record]:
    """What the scenario yields, put on record round by round as the engine does."""
    found: list[Record] = []
    for each in scenario.rounds(case, LocalEngine(), done):
        for record in each.records:
            key = Store.key(record.made_by, record.id)
            require(key not in done, f"record {key} was yielded although it is on record")
            done[key] = record
            found.append(record)
    return found


def run_whole(scenario: Scenario, case: Case) -> ScenarioRun:
    """Run a case in memory."""
    preflight(case, scenario)
    records = tuple(_records(scenario, case, {}))
    return ScenarioRun(scenario, case, records, scenario.summarize(case, records))


def has_a_name(run: ScenarioRun) -> None:
    """A short plain name, by which threat models call it."""
    name = run.scenario.name
    require(re.fullmatch(r"[a-z][a-z0-9_-]*", name) is not None, f"the name is {name!r}; expected a short plain word")


def refuses_before_it_spends(run: ScenarioRun) -> None:
    """`accepts` gives None or a reason; it never raises for a case of another kind."""
    require(run.scenario.accepts(run.case) is None, "a case that was run is not accepted")
    reason = run.scenario.accepts(replace(run.case, attack=None))
    require(reason is None or isinstance(reason, str), f"accepts gave {reason!r}; expected None or a text")


def expects_what_it_yields(run: ScenarioRun) -> None:
    """A finished case has at most as many records as were expected of it."""
    held = {Store.key(record.made_by, record.id): record for record in run.records}
    expected = run.scenario.expected(run.case, held)
    require(len(run.records) <= expected, f"{len(run.records)} records, {expected} expected")


def resumes_exactly(run: ScenarioRun) -> None:
    """Cut after any part of its records, it yields the rest and nothing twice."""
    whole = {Store.key(record.made_by, record.id): record for record in run.records}
    for cut in sorted({0, 1, len(run.records) // 2, len(run.records)}):
        done = {Store.key(record.made_by, record.id): record for record in run.records[:cut]}
        _records(run.scenario, run.case, done)
        require(done == whole, f"resumed after {cut} of {len(run.records)} records, other records came out")


def batches_do_not_matter(run: ScenarioRun) -> None:
    """The same records whatever the batch size."""
    if run.case.randomized:
        return
    again = _records(run.scenario, replace(run.case, batch_size=7), {})
    one, other = ({Store.key(r.made_by, r.id): r for r in records} for records in (run.records, again))
    require(one == other, "another batch size gave other records")


def summarizes_in_plain_data(run: ScenarioRun) -> None:
    """The section is JSON, and every metric that it names is there."""
    section = run.section
    try:
        json.dumps([dict(section.metrics), section.block(run.scenario.name)], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise AssertionError(f"the section is no plain data: {error}") from error
    named = {section.headline.metric, *(metric for _, metric in section.table)}
    named |= set(re.findall(r"\{(\w+)\}", section.sentence))
    lost = sorted(named - set(section.metrics))
    require(not lost, f"the section names {', '.join(lost)}, which its metrics do not hold")
    require("clean_accuracy" in section.metrics, "the metrics have no clean_accuracy, which every report shows")


def summarizes_the_records_alone(run: ScenarioRun) -> None:
    """The same records give the same section, in whatever order they were made."""
    again = run.scenario.summarize(run.case, tuple(run.records))
    require(again == run.section, "summarizing the same records again gave another section")


SCENARIO_LAWS: dict[str, Callable[[ScenarioRun], None]] = {
    law.__name__: law
    for law in (
        has_a_name,
        refuses_before_it_spends,
        expects_what_it_yields,
        resumes_exactly,
        batches_do_not_matter,
        summarizes_in_plain_data,
        summarizes_the_records_alone,
    )
}


def check_scenario(scenario: Any, case: Case | None = None, laws: Sequence[str] = ()) -> None:
    """Every law on the scenario, run on a small case.

    case: what to run, small; its threat model names the scenario. None: 24 digits, PGD of 3 steps in a Linf ball
    laws: names of the laws to check; all by default

    Raises AssertionError at the first law that is broken, naming it.
    """
    if case is None:
        from advkit.evaluation.api import resolve

        case = resolve("pgd:steps=3", "none", "digits", "zoo:digits-mlp", "linf:eps=0.1", n=24, device="cpu")
    run = run_whole(scenario, case)
    for name in laws or SCENARIO_LAWS:
        try:
            SCENARIO_LAWS[name](run)
        except Exception as broken:  # code of the user's own raises whatever it likes
            raise failure(name, SCENARIO_LAWS[name], repr(scenario), broken) from broken
