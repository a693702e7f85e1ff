"""The stable path of comparisons; the code is in `advkit.evaluation.report.compare`."""

from __future__ import annotations

from advkit.evaluation.report.compare import (
    Comparison,
    PairedTest,
    RowVerdict,
    compare,
    compare_records,
    paired,
    per_class_rates,
    row_verdicts,
    same_eps,
    same_kind,
    same_threat,
)

__all__ = [
    "Comparison",
    "PairedTest",
    "RowVerdict",
    "compare",
    "compare_records",
    "paired",
    "per_class_rates",
    "row_verdicts",
    "same_eps",
    "same_kind",
    "same_threat",
]
