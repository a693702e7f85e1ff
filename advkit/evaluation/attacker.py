"""Who the attacker of a run was: what was asked of the victim, and whether the defense was known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from advkit.core.protocols import Access, Adapts, FlipsLabels, Record, Suite, Undefended
from advkit.defenses.labels.base import LabelDefense
from advkit.evaluation.run.case import Case
from advkit.threat_models.capability import KNOWLEDGE

_ORDER = [KNOWLEDGE[access] for access in sorted(KNOWLEDGE)]
LESS = {word: frozenset(_ORDER[: rank + 1]) for rank, word in enumerate(_ORDER)}
"""For every word for access, those that mean no more."""


def access_of(case: Case, records: Sequence[Record], stage: str = "") -> str:
    """What an attack made use of: white_box, black_box_score, black_box_decision, transfer or none.

    An attack declares what it needs; whether it took gradients, its oracle has counted. Of the attacks that declare
    gradients and take none it is known only that scores were enough for them.

    stage: of a suite; all of its stages without
    """
    if case.attack is None:
        return KNOWLEDGE[Access.NOTHING]
    if case.surrogates or (_flips_labels(case) and any(record.source for record in records)):
        return "transfer"
    needs = Access(max(int(attack.needs) for attack in _attacks(case, stage)))
    if any(record.backwards for record in records):
        needs = Access.GRADIENTS
    elif any(record.forwards for record in records):
        needs = min(needs, Access.SCORES)
    return KNOWLEDGE[needs]


def attacker_of(case: Case, records: Sequence[Record]) -> dict[str, str]:
    """The report's `attacker`.

    access:  see `access_of`
    defense: what the attacker makes of it: "none" where there is none, "unknown" where the defended model was never
             asked (oblivious), "known" where it was, "adaptive" where the attack was made for it
    """
    access = access_of(case, records)
    if _flips_labels(case):
        return {"access": access, "defense": _of_trained(case, access)}
    return {"access": access, "defense": _of_defense(case, access)}


def _flips_labels(case: Case) -> bool:
    return isinstance(case.attack, FlipsLabels)


def _of_trained(case: Case, access: str) -> str:
    """What an attacker who moves before training makes of the defense: unknown where it never trained it."""
    if isinstance(case.defense, LabelDefense) and not case.defense.defends:
        return "none"
    return "unknown" if access in ("transfer", KNOWLEDGE[Access.NOTHING]) else "adaptive"


def _of_defense(case: Case, access: str) -> str:
    name = case.specs.get("defense", "none").partition(":")[0]
    if name == "none" or case.attack is None:
        return "none"
    if case.surrogates:
        return "unknown"
    declared = any(isinstance(attack, Adapts) and name in attack.adapts_to for attack in _attacks(case))
    return "adaptive" if declared or (access == KNOWLEDGE[Access.GRADIENTS] and _own_view(case.victim)) else "known"


def _own_view(victim: Any) -> bool:
    """Whether the defense itself says how it is differentiated (BPDA, EOT), apart from the model behind it."""
    if victim.attacker_view() is victim:
        return False
    inner = victim.undefended if isinstance(victim, Undefended) else None
    return inner is not None and inner.attacker_view() is inner


def _attacks(case: Case, stage: str = "") -> Iterator[Any]:
    """The attack, or the stages of a suite: that of a name, or all."""
    attack: Any = case.attack
    if not isinstance(attack, Suite):
        yield attack
        return
    stages = attack.stages()
    yield from (each.attack for each in stages if each.name == stage or not any(one.name == stage for one in stages))
