"""matrix.json: the figures of a matrix per target, source, attack and group."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, cast

import torch

import advkit
from advkit.core.errors import UsageError
from advkit.core.strict_json import read_object
from advkit.evaluation.matrix.budget import HOW
from advkit.evaluation.matrix.images import ImageSet, write_tensors
from advkit.evaluation.matrix.plan import MatrixPlan, MatrixRequest
from advkit.evaluation.matrix.rates import NO_DECISION, Decisions, accuracy, cell_rates, errors_of, over_seeds
from advkit.evaluation.matrix.table import Pair, Table
from advkit.evaluation.report import write_atomic
from advkit.evaluation.report.matrix import SCHEMA_VERSION, ball_line, check, page, shortened
from advkit.evaluation.sources import Participant, grid_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT_NAME = "matrix.json"
NOT_FINITE = "the target's answers are not finite"


@dataclass(frozen=True)
class Results:
    """What a plan comes to.

    clean:      [T, N] decisions about the rows as they are
    table:      of the attacks as they were asked for
    budget:     gradients per image of the second table; None for no such table
    budgeted:   of the attacks scaled to it
    similarity: cosines between perturbations, where they were asked for
    """

    clean: Decisions
    table: Table
    budget: int | None = None
    budgeted: Table | None = None
    similarity: dict[str, Any] | None = None


def document(plan: MatrixPlan, results: Results, command: str = "") -> dict[str, Any]:
    """The matrix as plain JSON values."""
    task, threat = plan.case.task, plan.case.threat.describe()
    labels = plan.rows.labels.numpy()
    targets = list(zip(plan.targets, results.clean, results.table.noise, strict=True))
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "transfer_matrix",
        "advkit_version": advkit.__version__,
        "torch_version": str(torch.__version__),
        "command": command,
        "request": plan.stored_request(),
        "dataset": {"name": task.name, "version": task.version, "split": task.split, "sha256": task.digest()},
        "n": len(labels),
        "eps": threat["eps"],
        "norm": threat["norm"],
        "goal": plan.case.specs["goal"],
        "quantised": True,
        "levels": threat["lattice"],
        "seeds": list(plan.seeds),
        "sources": [_named(source) for source in plan.sources],
        "targets": [{**_named(target), "clean": accuracy(clean, labels)} for target, clean, _ in targets],
        "noise": [{"t": target.name, **_rates(plan, noise, clean)} for target, clean, noise in targets],
        **_part(plan, results.table, results.clean),
        "equal_budget": None,
        "similarity": results.similarity,
    }
    if results.budgeted is not None:
        part = _part(plan, results.budgeted, results.clean)
        content["equal_budget"] = {"budget": results.budget, "how": HOW, **part}
    return content


def _named(one: Participant) -> dict[str, Any]:
    return {"name": one.name, "sha256": one.key, "group": one.group}


def _rates(plan: MatrixPlan, decisions: Decisions, clean: Decisions) -> dict[str, Any]:
    """The figures of decisions [K, N] of one target."""
    wanted = None if plan.wanted is None else plan.wanted.numpy()
    return cell_rates(decisions, clean, plan.rows.labels.numpy(), wanted)


def _part(plan: MatrixPlan, table: Table, clean: Decisions) -> dict[str, Any]:
    """Attacks, sets, cells, missing cells and the summary of one table."""
    cells, missing = [], [_missing(None, pair, pair.missing) for pair in table.pairs if pair.missing]
    for t, target in enumerate(plan.targets):
        for pair in table.pairs:
            if (pair.decisions[t] == NO_DECISION).all(1).any():
                missing += [] if pair.missing else [_missing(target, pair, NOT_FINITE)]
            else:
                cells.append(_cell(plan, pair, t, clean[t]))
    return {
        "attacks": _attacks(plan, table),
        "sets": [_set(plan, pair, k, images) for pair in table.pairs for k, images in enumerate(pair.sets)],
        "cells": cells,
        "missing": missing,
        "summary": {target.name: _summary(plan, table, t, clean[t]) for t, target in enumerate(plan.targets)},
    }


def _missing(target: Participant | None, pair: Pair, reason: str) -> dict[str, Any]:
    name = None if target is None else target.name
    return {"t": name, "s": pair.source.name, "a": pair.attack.name, "reason": reason}


def _attacks(plan: MatrixPlan, table: Table) -> list[dict[str, Any]]:
    """The attacks, what they cost on all sources, and whether a second seed changed any image."""
    entries = []
    for attack in table.attacks:
        sets = [pair.sets for pair in table.of(attack) if pair.sets]
        costs = [_mean(images.backwards) for by_seed in sets for images in by_seed]
        known = len(plan.seeds) > 1 and sets
        random = any(len(by_seed) > 1 for by_seed in sets) if known else None
        entries.append({**attack.to_dict(), "grads_per_image": fmean(costs) if costs else None, "random": random})
    return entries


def _set(plan: MatrixPlan, pair: Pair, k: int, images: ImageSet) -> dict[str, Any]:
    return {
        "s": pair.source.name,
        "a": pair.attack.name,
        "seed": plan.seeds[k],
        "file_hash": images.key,
        "images_sha256": images.sha256,
        "grads_per_image": _mean(images.backwards),
        "forwards_per_image": _mean(images.forwards),
        "eps_used": float(images.distance.max()),
        "outside": int((~images.admitted).sum()),
        "raised": int((~images.usable).sum()),
        "seconds": round(images.seconds, 4),
    }


def _mean(passes: torch.Tensor) -> float:
    return float(passes.double().mean())


def _cell(plan: MatrixPlan, pair: Pair, t: int, clean: Decisions) -> dict[str, Any]:
    target = plan.targets[t]
    return {
        "t": target.name,
        "s": pair.source.name,
        "a": pair.attack.name,
        **_rates(plan, pair.decisions[t], clean),
        "whitebox": pair.source.holds(target.weights),
        "seen": pair.source.name in plan.seen[target.name],
        "seeds": list(plan.seeds[: len(pair.sets)]),
        "file_hash": pair.sets[0].key,
    }


def _summary(plan: MatrixPlan, table: Table, t: int, clean: Decisions) -> dict[str, Any]:
    """A target's accuracies over the cells of the table."""
    labels, target = plan.rows.labels.numpy(), plan.targets[t]
    names = [attack.name for attack in table.attacks]
    grid = grid_of(plan.sources, names, plan.seen[target.name], target.weights)
    errors = errors_of(table.decisions[t].transpose(2, 0, 1, 3), labels)
    return {"clean": accuracy(clean, labels), "white_box": sorted(grid.white_box), **over_seeds(grid, errors)}


@dataclass(frozen=True)
class Matrix:
    """A validated transfer matrix.

    text:  canonical JSON of the document
    table: decisions and image sets behind it, where this process made them
    """

    text: str
    table: Table | None = None

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], table: Table | None = None) -> Matrix:
        """Raises ReportError where the document breaks the schema or contradicts itself."""
        check(content)
        return cls(json.dumps(content, indent=1, sort_keys=False) + "\n", table)

    def to_dict(self) -> dict[str, Any]:
        """The document, a copy."""
        return cast("dict[str, Any]", json.loads(self.text))

    def to_json(self) -> str:
        """The document as text."""
        return self.text

    @property
    def request(self) -> MatrixRequest:
        """What was asked for, to be run again; see `asked`."""
        return self.asked()

    def asked(self, *, trust: bool = False) -> MatrixRequest:
        """What was asked for, to be run again.

        trust: also where a file that was read names what is not advkit's own (python:, hf:, path:...)

        Raises ReportError for a matrix of schema 1.0, which does not keep it, UsageError for such names without trust.
        """
        return MatrixRequest.from_report(self.to_dict(), trust=trust or self.table is not None)

    @property
    def summary(self) -> dict[str, Any]:
        """Figures per target."""
        return cast("dict[str, Any]", self.to_dict()["summary"])

    def cell(self, target: str, source: str, attack: str) -> dict[str, Any]:
        """One cell; UsageError where it is missing or unknown."""
        for one in self.to_dict()["cells"]:
            if (one["t"], one["s"], one["a"]) == (target, source, attack):
                return cast("dict[str, Any]", one)
        raise UsageError(f"the matrix has no cell {attack} on {source} for {target}")

    def markdown(self, brief: bool = False) -> str:
        """The matrix as a page; `brief` leaves out intervals, groups and single cells."""
        return page(self.to_dict(), brief)

    def plot(self, *, equal_budget: bool = False) -> Figure:
        """Heat maps of accuracy, one for each target; UsageError where there is no such table."""
        from advkit.evaluation.figures.plots import matrix_heatmap  # matplotlib is slow to import

        content = self.to_dict()
        part = content["equal_budget"] if equal_budget else content
        if part is None:
            raise UsageError("this matrix has no table at an equal budget; make it with equal_budget=auto")
        sources, targets = ([one["name"] for one in content[key]] for key in ("sources", "targets"))
        attacks = [one["name"] for one in part["attacks"]]
        title = f"Accuracy under transfer, {ball_line(content)}"
        return matrix_heatmap(part["cells"], targets, sources, attacks, short=shortened(content), title=title)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write matrix.json, matrix.md and, where this process made them, the answers; returns the JSON's path."""
        place = Path(folder)
        write_atomic(place / REPORT_NAME, self.text)
        write_atomic(place / "matrix.md", self.markdown())
        if self.table is not None:
            decisions = {"decisions": self.table.decisions, "noise": self.table.noise}
            tensors = {name: torch.from_numpy(one.copy()) for name, one in decisions.items()}
            notes = {"axes": "target, source, attack, seed, row", "missing": str(NO_DECISION)}
            write_tensors(place / "decisions.safetensors", tensors, notes)
        return place / REPORT_NAME


def read_matrix(path: str | Path) -> Matrix:
    """A stored matrix, from its file or folder."""
    file = Path(path)
    file = file / REPORT_NAME if file.is_dir() else file
    try:
        return Matrix.from_dict(read_object(file.read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} holds no matrix ({error})") from error
