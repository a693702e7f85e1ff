"""Small valid reports and their records, made from outcomes."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advkit.core.protocols import Outcome, Record
from advkit.evaluation.report import SCHEMA_VERSION
from advkit.evaluation.run.store import to_line
from advkit.evaluation.stats import rate

W, R, B = Outcome.WRONG, Outcome.ROBUST, Outcome.BROKEN


def records(outcomes: Mapping[str, Sequence[Outcome]], first: int = 0, classes: int = 2) -> list[Record]:
    """One record per attack and row; labels go round the classes."""
    return [
        Record(
            id=f"row-{first + i}",
            attack=attack,
            outcome=outcome,
            label=(first + i) % classes,
            clean=(first + i + (outcome is W)) % classes,
            adversarial=(first + i + (outcome in (W, B))) % classes,
            reached=outcome in (W, B),
            forwards=0 if outcome is W else 40,
            backwards=0 if outcome is W else 40,
        )
        for attack, column in outcomes.items()
        for i, outcome in enumerate(column)
    ]


def document(
    outcomes: Mapping[str, Sequence[Outcome]], changes: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The report of those outcomes, as a dict; `changes` are merged into its sections."""
    columns = list(outcomes.values())
    n = len(columns[0])
    right = sum(o is not W for o in columns[0])
    kept = sum(all(c[i] is R for c in columns) for i in range(n))
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "created_utc": "2026-01-02T03:04:05Z",
        "advkit_version": "0.1.0",
        "task": "classification",
        "request": {
            "attack": "+".join(outcomes),
            "defense": "none",
            "task": "digits",
            "model": "mlp",
            "threat_model": "linf:eps=8/255",
            "goal": "untargeted",
            "n": n,
            "seed": 0,
            "device": "cpu",
            "batch_size": None,
            "draws": 10,
            "keep": 64,
            "speed": "fp32",
            "beside": True,
        },
        "section": {
            "scenario": "evasion",
            "headline": {"metric": "robust_accuracy", "name": "Robust accuracy", "better": "higher"},
            "table": [
                {"label": "clean accuracy", "metric": "clean_accuracy"},
                {"label": "robust accuracy", "metric": "robust_accuracy"},
                {"label": "attack success rate", "metric": "attack_success_rate"},
            ],
            "sentence": "Robust accuracy is {robust_accuracy}: {attacks}.",
            "figures": [{"name": "per_class"}, {"name": "success_by_distance"}],
            "wording": {},
        },
        "companions": [],
        "dataset": {
            "name": "digits",
            "version": "1",
            "split": "test",
            "n_total": 1000,
            "n_evaluated": n,
            "selection": {"kind": "first_n"},
            "sha256": "a" * 64,
        },
        "model": {"name": "mlp", "architecture": "mlp:width=64", "state_sha256": "b" * 64, "n_parameters": 4810},
        "defense": {"name": "none", "params": {}},
        "threat_model": {
            "name": "linf",
            "norm": "Linf",
            "eps": 8 / 255,
            "eps_string": "8/255",
            "goal": "untargeted",
            "knowledge": "white_box",
            "adaptive": True,
        },
        "protocol": {"version": "1", "aggregation": "worst_case_per_sample" if len(columns) > 1 else "single_attack"},
        "attacks": [
            {
                "name": name,
                "attack": name.partition("@")[0],
                "source": name.partition("@")[2],
                "params": {},
                "order": order,
                "n_attacked": right,
                "robust_accuracy": rate(sum(o is R for o in column), n, "all_samples"),
                "attack_success_rate": rate(sum(o is B for o in column), right, "clean_correct"),
                "cost": {"seconds": 1.5, "forward": 40 * right, "backward": 40 * right},
            }
            for order, (name, column) in enumerate(outcomes.items())
        ],
        "metrics": {
            "clean_accuracy": rate(right, n, "all_samples"),
            "robust_accuracy": rate(kept, n, "all_samples"),
            "attack_success_rate": rate(right - kept, right, "clean_correct"),
        },
        "diagnostics": {"flags": []},
        "reproducibility": {
            "seed": 0,
            "deterministic_algorithms": False,
            "packages": {"torch": "2.6.0"},
            "python": "3.11.9",
            "platform": "Linux",
            "device": "cpu",
            "command": "advkit evaluate --attack pgd",
            "config_sha256": "c" * 64,
        },
    }
    for section, values in (changes or {}).items():
        if isinstance(data.get(section), dict):
            data[section].update(copy.deepcopy(values))
        else:
            data[section] = copy.deepcopy(values)
    return data


def old(data: Mapping[str, Any]) -> dict[str, Any]:
    """The same as version 1.0 wrote it: no section, no companions, no request, labels in one piece."""
    said = {name: copy.deepcopy(data[name]) for name in data if name not in ("section", "companions", "request")}
    for attack in said["attacks"]:
        for name in ("attack", "stage", "source"):
            attack.pop(name, None)
    return said | {"schema_version": "1.0"}


def told(page: str) -> dict[str, Any]:
    """The data of a board's page: `tabs`, `victims` and `reports`."""
    found = dict(re.findall(r'<script type="[a-z/]+" id="(board|details)">(.*?)</script>', page, re.DOTALL))
    more = gzip.decompress(base64.b64decode(found["details"]))
    return {**json.loads(found["board"]), **json.loads(more)}


def run_folder(
    folder: Path,
    outcomes: Mapping[str, Sequence[Outcome]],
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    first: int = 0,
    classes: int = 2,
) -> Path:
    """report.json and records.jsonl in a folder."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(document(outcomes, changes)), encoding="utf-8")
    lines = "".join(to_line(record) + "\n" for record in records(outcomes, first, classes))
    (folder / "records.jsonl").write_text(lines, encoding="utf-8")
    return folder
