"""Findings: what bears on whether a number can be trusted, with the evidence and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from advkit.evaluation.trust.advice import ADVICE

SEVERITIES = ("info", "warning", "unreliable")
GROSS = 0.05  # fraction of samples from which a fault is no longer a matter of single samples


@dataclass(frozen=True)
class Finding:
    """Something that bears on whether a number can be trusted.

    id:        one of the report schema's flag ids
    severity:  "info", "warning" or "unreliable"
    message:   the evidence
    advice:    what to do about it
    value:     the figure measured; None where there is none
    threshold: what it was compared with
    attack:    the attack it belongs to; empty where it is the model's
    """

    id: str
    severity: str
    message: str
    advice: str = ""
    value: float | None = None
    threshold: float | None = None
    attack: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The report's flag; the advice ends the message."""
        flag: dict[str, Any] = {
            "id": self.id,
            "severity": self.severity,
            "message": f"{self.message} ({self.advice})" if self.advice else self.message,
        }
        for name, number in (("value", self.value), ("threshold", self.threshold)):
            if number is not None and math.isfinite(number):
                flag[name] = float(number)
        if self.attack:
            flag["attack"] = self.attack
        return flag


def found(
    id: str,
    severity: str,
    message: str,
    value: float | None = None,
    threshold: float | None = None,
    attack: str = "",
    advice: str = "",
) -> Finding:
    """A finding with its id's usual advice where none is given."""
    return Finding(id, severity, message, advice or ADVICE[id], value, threshold, attack)


def graded(fraction: float, gross: float = GROSS) -> str:
    """A fault of single samples is a warning; a fraction of `gross` and more makes the number unreliable."""
    return "unreliable" if fraction >= gross else "warning"


def merge(findings: Iterable[Finding]) -> list[Finding]:
    """One finding per id and attack, the gravest, in the order of first appearance."""
    gravest: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.id, finding.attack)
        if key not in gravest or SEVERITIES.index(finding.severity) > SEVERITIES.index(gravest[key].severity):
            gravest[key] = finding
    return list(gravest.values())
