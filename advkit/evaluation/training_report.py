"""What is kept of a training run beside its weights: one JSON file and its curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advkit import __version__
from advkit.core.text import printable_json
from advkit.evaluation.report import write_atomic

SCHEMA = "advkit-training-report-1"
REPORT = "training.json"
CURVES = "plots/training.png"


def write_training_report(
    folder: Path, made: Mapping[str, Any], recipe: Mapping[str, Any], log: Sequence[Mapping[str, Any]]
) -> tuple[Path, Path]:
    """Write FOLDER/training.json and FOLDER/plots/training.png; returns both.

    made:   what was trained, as JSON values (`train_victim`)
    recipe: how, as JSON values
    log:    one entry per epoch, as JSON values (`advkit.training.loop.log_entries`)
    """
    from advkit.evaluation.figures.plots import save
    from advkit.evaluation.figures.training_plots import training_curves

    report = _written(folder, {**made, "recipe": dict(recipe), "log": list(log)})
    curves = save(training_curves(log, title=f"{made['defense']} on {made['task']}"), folder / CURVES)
    return report, curves


def write_solve_report(folder: Path, made: Mapping[str, Any]) -> Path:
    """Write FOLDER/training.json of a model that one solve found: it has neither a recipe nor a log."""
    return _written(folder, made)


def _written(folder: Path, told: Mapping[str, Any]) -> Path:
    document = {"schema": SCHEMA, "advkit": __version__, **told}
    report = folder / REPORT
    write_atomic(report, printable_json(json.dumps(document, indent=1, allow_nan=False)) + "\n")
    return report
