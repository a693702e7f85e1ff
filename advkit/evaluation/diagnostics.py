"""The stable path of diagnostics; the code is in `advkit.evaluation.trust.diagnostics`."""

from __future__ import annotations

from advkit.evaluation.trust.diagnostics import (
    BETTER,
    FIRST_ROWS,
    GROSS,
    PROBABILITY,
    REPEATS,
    SEVERITIES,
    SPREAD,
    Finding,
    Progress,
    after,
    black_box_beats_white_box,
    cheap,
    found,
    graded,
    merge,
)

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
