"""Benchmarks of attacks: suites against a peer in one process, PGD against bare passes, operations per step.

Times are CPU seconds of this process on one thread. Repetitions are interleaved and every figure is the median of the
ratios of neighbouring runs, so that another program on the machine affects both sides alike. Passes are counted on the
model itself, for both sides with the same hooks.
"""

from __future__ import annotations

from advkit.benchmark.loops import Ops, dispatcher_ops, pgd_overhead
from advkit.benchmark.page import markdown
from advkit.benchmark.sides import (
    REFERENCE,
    STAGES,
    TARGETS,
    Passes,
    Run,
    counted,
    entries,
    environment,
    our_run,
    reference_run,
    side_by_side,
)

__all__ = [
    "REFERENCE",
    "STAGES",
    "TARGETS",
    "Ops",
    "Passes",
    "Run",
    "counted",
    "dispatcher_ops",
    "entries",
    "environment",
    "markdown",
    "our_run",
    "pgd_overhead",
    "reference_run",
    "side_by_side",
]
