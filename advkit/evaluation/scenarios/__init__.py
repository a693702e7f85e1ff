"""Scenarios by name: who moves when. Adding one is one file below this package and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advkit.core.registry import Registry

if TYPE_CHECKING:
    from advkit.evaluation.run.case import Case
    from advkit.evaluation.run.scenario import Scenario

SCENARIOS: Registry[Scenario] = Registry(
    "scenario",
    {
        "certification": "advkit.evaluation.scenarios.certification:Certification",
        "evasion": "advkit.evaluation.scenarios.evasion:Evasion",
        "grid": "advkit.evaluation.scenarios.grid:Grid",
        "poisoning": "advkit.evaluation.scenarios.poisoning:Poisoning",
        "stream": "advkit.evaluation.scenarios.stream:Stream",
    },
    group="advkit.scenarios",
    contract="advkit.evaluation.run.scenario:Scenario",
)


def scenario_of(case: Case) -> Scenario:
    """The scenario that the case's threat model names; raises UnknownName where nobody brought it."""
    return SCENARIOS.build(case.threat.scenario)
