"""Cells of a board, the same in every form of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from advkit.evaluation.report.board import Attack, Group, Victim
from advkit.evaluation.report.robustbench import FIGURES, Claim
from advkit.evaluation.report.text import percent


def flags_text(flags: Sequence[Mapping[str, Any]]) -> str:
    """Ids of the flags that are more than a note."""
    return ", ".join(flag["id"] for flag in flags if flag["severity"] != "info")


def victim_heads(group: Group) -> list[str]:
    """The columns of a group."""
    certified = ["Certified"] if group.has_certified else []
    score = f"{group.score_name} ({group.direction})"
    first = ["#", "Model", "Defense", score, "Interval", "Clean", *group.columns.values(), *certified]
    return [*first, "n", "Attacks", "Attacker", "Counted", "Verified", "Flags"]


def victim_cells(group: Group, victim: Victim) -> list[str]:
    """A line of a group, as texts."""
    point = victim.certified
    proof = [] if not group.has_certified else ["" if point is None else f"{percent(point[1])} at {point[0]:g}"]
    return [
        "-" if victim.rank is None else str(victim.rank),
        victim.model,
        victim.defense,
        victim.score.text,
        victim.score.interval,
        victim.clean.text,
        *(beside_text(group, victim, key) for key in group.columns),
        *proof,
        str(victim.n),
        ", ".join(victim.names),
        victim.attacker,
        victim.how,
        verified_text(victim),
        flags_text(victim.flags),
    ]


def verified_text(victim: Victim) -> str:
    """What can be said of its reports, those that do not count among them."""
    rest = victim.refuted if victim.trusted or not victim.verified.startswith("no:") else 0
    if not rest:
        return victim.verified
    return f"{victim.verified}; {rest} {'report' if rest == 1 else 'reports'} not verified, not counted"


def beside_text(group: Group, victim: Victim, key: str) -> str:
    """The figure of a column."""
    figure = victim.figure(key)
    if figure is not None:
        return figure.text
    return "not evaluated" if group.transfer and key == "white_box" else "-"


def attack_heads(group: Group) -> list[str]:
    """The columns of the attacks on one victim."""
    nearest = ["Optimality"] if group.has_optimality else []
    last = ["n", "Attacker", "Forward passes", "Backward passes", "Verified", "Flags", "Report"]
    return ["#", "Attack", group.score_name, *nearest, *last]


def attack_cells(group: Group, attack: Attack) -> list[str]:
    """A line of the attacks on one victim, as texts."""
    cost = attack.cost
    nearest = ["-" if attack.optimality is None else attack.optimality.text] if group.has_optimality else []
    return [
        "-" if attack.rank is None else str(attack.rank),
        attack.name,
        attack.score.text,
        *nearest,
        str(attack.n),
        attack.attacker,
        str(int(cost["forward"])),
        str(int(cost["backward"])),
        attack.verified if attack.counts else f"{attack.verified} (not counted)",
        flags_text(attack.flags),
        attack.path,
    ]


def claim_heads() -> list[str]:
    """The columns of what cards claim."""
    return ["Model", "Data set", "Threat", "eps", *FIGURES.values(), "Venue", "Remark"]


def claim_cells(claim: Claim) -> list[str]:
    """A line of what cards claim, as texts."""
    figures = [percent(claim.figures.get(key)) for key in FIGURES]
    remark = "called unreliable by its card" if claim.card.get("unreliable") else ""
    told = [claim.model, claim.dataset, claim.threat, str(claim.card["eps"] or "-")]
    return [*told, *figures, str(claim.card.get("venue", "")), remark]


def flips_text(group: Group) -> list[str]:
    """Whether the judges agree on who is ahead: one sentence per ranking that several of them can make."""
    said = []
    for what, flips in (group.flips or {}).items():
        if flips:
            said.append(f"The order of {what} depends on the judge. {'; '.join(map(str, flips))}.")
        else:
            said.append(f"No judge reverses the order of {what}.")
    return said
