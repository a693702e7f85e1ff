"""The stable path of diagnostics; the code is in `advkit.evaluation.trust`."""

from __future__ import annotations

from advkit.evaluation.trust.context import Progress
from advkit.evaluation.trust.diagnostics import (
    BETTER,
    FIRST_ROWS,
    PROBABILITY,
    REPEATS,
    SPREAD,
    after,
    black_box_beats_white_box,
    cheap,
)
from advkit.evaluation.trust.findings import GROSS, SEVERITIES, Finding, found, graded, merge

__all__ = [
    "BETTER",
    "FIRST_ROWS",
    "Finding",
    "GROSS",
    "PROBABILITY",
    "Progress",
    "REPEATS",
    "SEVERITIES",
    "SPREAD",
    "after",
    "black_box_beats_white_box",
    "cheap",
    "found",
    "graded",
    "merge",
]
