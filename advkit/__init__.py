"""Attacks, defenses and threat models in one evaluation harness; importing it loads neither torch nor numpy."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkit.defenses.labels.floral import FLORAL
    from advkit.evaluation.api import certify, evaluate
    from advkit.evaluation.matrix import matrix
    from advkit.evaluation.report.compare import compare
    from advkit.evaluation.report.document import Report
    from advkit.evaluation.report.optimality import optimality
    from advkit.evaluation.report.query import query
    from advkit.evaluation.sweep import sweep
    from advkit.skeleton import init_attack, init_defense

# MKL, torch's matrix library on x86, lets the last bits of a product depend on where its rows lie in memory and on how
# many there are: a sample would depend on its place in the batch (`Linear(294, 10)`, torch 2.14), and no call could be
# smaller than 16 rows. In strict mode it adds up in one order. It reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.1.0"
__all__ = [
    "FLORAL",
    "Report",
    "__version__",
    "certify",
    "compare",
    "evaluate",
    "init_attack",
    "init_defense",
    "matrix",
    "optimality",
    "query",
    "sweep",
]

_LAZY = {
    "FLORAL": "advkit.defenses.labels.floral",
    "certify": "advkit.evaluation.api",
    "evaluate": "advkit.evaluation.api",
    "compare": "advkit.evaluation.report.compare",
    "init_attack": "advkit.skeleton",
    "init_defense": "advkit.skeleton",
    "matrix": "advkit.evaluation.matrix",
    "optimality": "advkit.evaluation.report.optimality",
    "query": "advkit.evaluation.report.query",
    "sweep": "advkit.evaluation.sweep",
    "Report": "advkit.evaluation.report.document",
}
_SUBPACKAGES = (
    "attacks",
    "cli",
    "core",
    "defenses",
    "evaluation",
    "models",
    "skeleton",
    "tasks",
    "testing",
    "threat_models",
    "training",
)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"advkit.{name}")
    raise AttributeError(f"module 'advkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, *_SUBPACKAGES})
