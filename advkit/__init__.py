"""Attacks, defenses and threat models in one evaluation harness; importing it loads neither torch nor numpy."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advkit.defenses.labels.floral import FLORAL
    from advkit.evaluation.api import attack, certify, evaluate, execute, plan, resolve
    from advkit.evaluation.certificates import certificates
    from advkit.evaluation.maite import AttackAugmentation, MaiteClassifier, MaiteDataset
    from advkit.evaluation.matrix import matrix
    from advkit.evaluation.plan import Request
    from advkit.evaluation.report.compare import compare
    from advkit.evaluation.report.document import Report
    from advkit.evaluation.report.examples import Examples
    from advkit.evaluation.report.optimality import optimality
    from advkit.evaluation.report.query import query
    from advkit.evaluation.report.text import percent
    from advkit.evaluation.run.store import read_examples, read_records
    from advkit.evaluation.scenarios.poisoning import Trials
    from advkit.evaluation.scenarios.ratios import measure_ratios
    from advkit.evaluation.scenarios.stream import Items, compare_selectors, noise_study
    from advkit.evaluation.sweep import sweep
    from advkit.evaluation.victims import protected, train_victim
    from advkit.skeleton import init_attack, init_defense

# MKL, torch's matrix library on x86, lets the last bits of a product depend on where its rows lie in memory and on how
# many there are: a sample would depend on its place in the batch (`Linear(294, 10)`, torch 2.14), and no call could be
# smaller than 16 rows. In strict mode it adds up in one order. It reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.1.0"
__all__ = [
    "FLORAL",
    "AttackAugmentation",
    "Examples",
    "Items",
    "MaiteClassifier",
    "MaiteDataset",
    "Report",
    "Request",
    "Trials",
    "__version__",
    "attack",
    "certificates",
    "certify",
    "compare",
    "compare_selectors",
    "evaluate",
    "execute",
    "init_attack",
    "init_defense",
    "matrix",
    "measure_ratios",
    "noise_study",
    "optimality",
    "percent",
    "plan",
    "protected",
    "query",
    "read_examples",
    "read_records",
    "resolve",
    "sweep",
    "train_victim",
]

_MODULES = {
    "advkit.defenses.labels.floral": ("FLORAL",),
    "advkit.evaluation.api": ("attack", "certify", "evaluate", "execute", "plan", "resolve"),
    "advkit.evaluation.certificates": ("certificates",),
    "advkit.evaluation.maite": ("AttackAugmentation", "MaiteClassifier", "MaiteDataset"),
    "advkit.evaluation.matrix": ("matrix",),
    "advkit.evaluation.plan": ("Request",),
    "advkit.evaluation.report.compare": ("compare",),
    "advkit.evaluation.report.document": ("Report",),
    "advkit.evaluation.report.examples": ("Examples",),
    "advkit.evaluation.report.optimality": ("optimality",),
    "advkit.evaluation.report.query": ("query",),
    "advkit.evaluation.report.text": ("percent",),
    "advkit.evaluation.run.store": ("read_examples", "read_records"),
    "advkit.evaluation.scenarios.poisoning": ("Trials",),
    "advkit.evaluation.scenarios.ratios": ("measure_ratios",),
    "advkit.evaluation.scenarios.stream": ("Items", "compare_selectors", "noise_study"),
    "advkit.evaluation.sweep": ("sweep",),
    "advkit.evaluation.victims": ("protected", "train_victim"),
    "advkit.skeleton": ("init_attack", "init_defense"),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}
_SUBPACKAGES = (
    "attacks",
    "cli",
    "core",
    "defenses",
    "evaluation",
    "models",
    "plots",
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
