"""Benchmarks of attacks: suites against a peer in one process, PGD against bare passes, operations per step.

Times are CPU seconds of this process on one thread. Repetitions are interleaved and every figure is the median of the
ratios of neighbouring runs, so that another program on the machine affects both sides alike. Passes are counted on the
model itself, for both sides with the same hooks.
"""

from __future__ import annotations

from advkit.benchmark.device import batch_sizes, device_page, equality
from advkit.benchmark.goals import goals_table
from advkit.benchmark.loops import Ops, dispatcher_ops, pgd_overhead, speeds
from advkit.benchmark.page import markdown
from advkit.benchmark.shapes import call_sizes
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
    "batch_sizes",
    "call_sizes",
    "counted",
    "device_page",
    "dispatcher_ops",
    "entries",
    "environment",
    "equality",
    "goals_table",
    "markdown",
    "our_run",
    "pgd_overhead",
    "reference_run",
    "side_by_side",
    "speeds",
]
