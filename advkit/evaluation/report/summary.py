"""From records to a report: every figure is recomputed here from the per-row records alone."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from advkit import __version__
from advkit.core.protocols import Outcome, Record
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.store import written
from advkit.evaluation.stats import DenominatorKind, rate

PROTOCOL_VERSION = "1"
MOST_CLASSES_LISTED = 20
UNKNOWN = frozenset({Outcome.NON_FINITE, Outcome.ERROR})


@dataclass(frozen=True)
class Counts:
    """Rows by how they ended, worst case over the attacks that met them.

    n:         rows evaluated
    sound:     rows that the untouched victim gets right
    contested: of those, rows on which the attacker had something to win (all, unless a target is the row's own class)
    broken:    contested rows that some attack broke
    unknown:   contested rows not broken whose answer was not finite or whose attack raised
    robust:    the rest of the contested rows; an attack that left the threat model has failed there
    eight_bit: contested rows not broken by the returned input rounded to 8 bits; None where that has no meaning
    """

    n: int
    sound: int
    contested: int
    broken: int
    unknown: int
    robust: int
    eight_bit: int | None


def untouched(record: Record) -> str:
    """How the row stood before any attack: "sound", "wrong", or "settled" (right, with nothing left to win)."""
    if "clean_non_finite" in record.notes:
        return "wrong"
    if record.outcome != Outcome.WRONG:
        return "sound"
    return "settled" if record.label is not None and record.clean == record.label else "wrong"


def count(records: Iterable[Record]) -> Counts:
    """Worst case per row id over all records given."""
    rows: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        rows[record.id].append(record)
    sound = broken = unknown = robust = contested = eight = 0
    rounded = True
    for found in rows.values():
        state = untouched(found[0])
        sound += state in ("sound", "settled")
        if state != "sound":
            continue
        contested += 1
        outcomes = {r.outcome for r in found}
        if Outcome.BROKEN in outcomes:
            broken += 1
        elif outcomes & UNKNOWN:
            unknown += 1
        else:
            robust += 1
        rounded = rounded and all(r.eight_bit is not None for r in found)
        eight += not any(r.eight_bit for r in found) and not outcomes & UNKNOWN
    return Counts(len(rows), sound, contested, broken, unknown, robust, eight if rounded and contested else None)


def _asr_kind(case: Case) -> DenominatorKind:
    return "clean_correct" if case.rule.kind == "untargeted" else "clean_not_target"


def headline(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """Clean accuracy, robust accuracy and attack success rate as the schema's rates."""
    c = count(records)
    settled = c.sound - c.contested
    metrics: dict[str, Any] = {
        "clean_accuracy": rate(c.sound, c.n, "all_samples"),
        "robust_accuracy": rate(c.robust + settled, c.n, "all_samples"),
        "attack_success_rate": rate(c.broken, c.contested, _asr_kind(case)),
    }
    if c.unknown:
        metrics["robust_accuracy_upper"] = rate(c.robust + settled + c.unknown, c.n, "all_samples")
    if c.eight_bit is not None and not getattr(case.threat, "lattice", 0):
        metrics["robust_accuracy_8bit"] = rate(c.eight_bit + settled, c.n, "all_samples")
    if len(by_label(records)) == 1:
        metrics |= figured(case, records)
        for name, found in measured(records).items():
            for kind in ("mean", "median"):
                metrics[f"{name}_{kind}"] = {"value": found[kind], "n": int(found["n"])}
    return metrics | within_levels(case, records)


def figured(case: Case, records: Iterable[Record]) -> dict[str, Any]:
    """What goal and threat model said of the rows, those included on which the attack failed.

    Truth values become rates over the rows of which they were said, numbers their mean.
    """
    values: dict[str, list[float | bool]] = defaultdict(list)
    for record in records:
        for name, value in record.figures.items():
            values[name].append(value)
    kind: DenominatorKind = getattr(case.rule, "denominator", "all_samples")
    return {
        name: rate(sum(map(bool, found)), len(found), kind)
        if all(isinstance(value, bool) for value in found)
        else {"value": float(np.mean(found)), "n": len(found)}
        for name, found in values.items()
    }


def within_levels(case: Case, records: Iterable[Record]) -> dict[str, Any]:
    """The share of the attacked rows broken within each threshold of a measure that the threat model names (`levels`).

    One run gives them all: `attack_success_rate_l0_200` is the share that fell to at most 200 flips. The denominator
    holds every row on which the attacker had something to win, those included on which the attack failed.
    """
    levels = getattr(case.threat, "levels", None)
    if levels is None:
        return {}
    records = list(records)
    contested = count(records).contested
    least: dict[str, dict[str, float]] = defaultdict(dict)
    for record in records:
        if record.outcome == Outcome.BROKEN:
            for name, value in record.measures.items():
                least[name][record.id] = min(value, least[name].get(record.id, value))
    return {
        f"attack_success_rate_{name}_{level:g}": rate(
            sum(value <= level for value in least[name].values()), contested, _asr_kind(case)
        )
        for name, thresholds in levels().items()
        for level in thresholds
    }


def per_class(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """Robust accuracy of every class, for tasks with few classes."""
    if case.task.classes > MOST_CLASSES_LISTED or getattr(case.task, "kind", "classification") != "classification":
        return {}
    names = case.task.class_names()
    groups: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        if record.label is not None:
            groups[record.label].append(record)
    metrics = {}
    for label in sorted(groups):
        c = count(groups[label])
        word = names[label].lower().replace(" ", "_").replace("/", "_")
        metrics[f"robust_accuracy_class_{word}"] = rate(c.robust + c.sound - c.contested, c.n, "all_samples")
    return metrics


def attack_entry(
    case: Case,
    label: str,
    records: Sequence[Record],
    params: dict[str, Any],
    order: int,
    seconds: float,
    tokens: int = 0,
) -> dict[str, Any]:
    """One line of the report's attack list."""
    c = count(records)
    settled = c.sound - c.contested
    # Rows never handed to the attack cost nothing and moved nowhere.
    attacked = [r for r in records if r.forwards or r.outcome in (Outcome.BROKEN, Outcome.INVALID, Outcome.ERROR)]
    distances = np.array([r.distance for r in attacked if r.distance is not None])
    queries = np.array([r.queries for r in attacked])
    entry: dict[str, Any] = {
        "name": label,
        "params": params,
        "order": order,
        "n_attacked": len(attacked),
        "robust_accuracy": rate(c.robust + settled, c.n, "all_samples"),
        "attack_success_rate": rate(c.broken, c.contested, _asr_kind(case)),
        "cost": {
            "seconds": round(seconds, 3),
            "forward": sum(r.forwards for r in records),
            "backward": sum(r.backwards for r in records),
        },
    }
    if tokens:
        entry["cost"]["tokens"] = tokens
    if c.unknown:
        entry["undecided"] = c.unknown
    if len(queries):
        entry["cost"]["queries_median"] = float(np.median(queries))
        entry["cost"]["queries_max"] = float(queries.max())
    if len(distances):
        entry["perturbation"] = {
            "norm": str(case.threat.describe().get("norm")),
            "max": float(distances.max()),
            "mean": float(distances.mean()),
            "median": float(np.median(distances)),
            "n_outside_budget": sum(r.outcome == Outcome.INVALID for r in records),
        }
    if measures := measured(records):
        entry["measures"] = measures
    if figures := figured(case, records):
        entry["figures"] = figures
    if within := within_levels(case, records):
        entry["within"] = within
    return entry


def measured(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """What the threat model measured of the changes that reached their goal: mean, median and range by name."""
    values: dict[str, list[float]] = defaultdict(list)
    for record in records:
        if record.outcome == Outcome.BROKEN:
            for name, value in record.measures.items():
                values[name].append(value)
    return {
        name: {
            "mean": float(np.mean(found)),
            "median": float(np.median(found)),
            "min": min(found),
            "max": max(found),
            "n": len(found),
        }
        for name, found in values.items()
    }


def by_label(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records per attack label, in order of first appearance."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.attack, []).append(record)
    return groups


def reproducibility(case: Case, command: str) -> dict[str, Any]:
    """What it takes to run this again."""
    import torch

    packages = {}
    for name in ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "safetensors"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    commit, dirty = _git()
    return {
        "seed": case.seed,
        "rng_scheme": "philox4x32-10 per row",
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "dtype": "float32",
        "packages": packages,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": case.device,
        "threads": torch.get_num_threads(),
        "command": command,
        "config_sha256": case.digest(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


def _git() -> tuple[str | None, bool | None]:
    """The commit advkit itself was run from, when it was run from a checkout."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None, None
    try:
        ask = {"cwd": root, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **ask).stdout.strip()  # type: ignore[call-overload]
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], **ask).stdout  # type: ignore[call-overload]
    except (OSError, subprocess.SubprocessError):
        return None, None
    return commit, bool(dirty.strip())


def threat_block(case: Case) -> dict[str, Any]:
    """The report's threat model, goal included."""
    known = {"name", "phase", "norm", "eps", "eps_string", "goal", "knowledge", "query_budget", "adaptive", "details"}
    block = dict(case.threat.describe())
    details = {k: block.pop(k) for k in list(block) if k not in known}
    block["goal"] = case.rule.kind
    block["adaptive"] = case.victim.attacker_view() is case.victim or not case.surrogates
    if details:
        block["details"] = {**block.get("details", {}), **details}
    return block


def build(
    case: Case,
    records: Sequence[Record],
    *,
    defense: dict[str, Any],
    flags: Sequence[dict[str, Any]],
    seconds: dict[str, float],
    params: dict[str, dict[str, Any]],
    extra_metrics: dict[str, Any],
    extra_attacks: Sequence[dict[str, Any]],
    per_sample: Path | None,
    command: str = "",
    indicators: dict[str, Any] | None = None,
    tokens: dict[str, int] | None = None,
) -> dict[str, Any]:
    """The report of one case, with the figures that stand beside it."""
    info = case.victim.describe()
    # Records come in playing order, which a resumed run need not share: ids are sorted into the task's order.
    ids = sorted({r.id for r in records})
    labels = by_label(records)
    attacks = [
        attack_entry(
            case, label, found, params.get(label, {}), order, seconds.get(label, 0.0), (tokens or {}).get(label, 0)
        )
        for order, (label, found) in enumerate(labels.items())
    ]
    if len(labels) > 1 and case.attack is not None:
        seen: list[Record] = []
        for entry, found in zip(attacks, labels.values(), strict=True):
            seen += found
            c = count(seen)
            entry["cumulative_robust_accuracy"] = rate(c.robust + c.sound - c.contested, c.n, "all_samples")
    first = next(iter(case.task.batches(1)))
    space = case.task.space
    report: dict[str, Any] = {
        "schema_version": "1.0",
        "kind": "evaluation",
        "created_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "advkit_version": __version__,
        "title": " | ".join(f"{k}={v}" for k, v in case.specs.items()),
        "task": getattr(case.task, "kind", "classification"),
        "dataset": {
            "name": case.task.name,
            "version": case.task.version,
            "split": case.task.split,
            "n_total": len(case.task),
            "n_evaluated": len(ids),
            "selection": {
                "kind": "all" if len(ids) == len(case.task) else "first_n",
                "ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
            },
            "input_shape": list(first.x.shape[1:]),
            "n_classes": case.task.classes,
            "sha256": case.task.digest(),
        },
        "model": {
            "name": info.name,
            "architecture": info.architecture,
            "state_sha256": info.state_sha256,
            "n_parameters": info.n_parameters,
            "source": info.source,
            "license": info.license,
            "training_mode": False,
            "number_forward_passes": 1,
        },
        "defense": {
            **defense,
            "is_randomized": case.randomized,
            "is_differentiable": info.differentiable,
            "can_abstain": info.abstains,
            "certified": False,
        },
        "threat_model": threat_block(case),
        "protocol": {
            "version": PROTOCOL_VERSION,
            "name": case.specs.get("attack", case.label),
            "aggregation": "worst_case_per_sample" if len(labels) > 1 else "single_attack",
            "n_eval_repeats": case.draws if case.randomized else 1,
            "stopping": "a row leaves once its goal is reached on the victim; survivors spend the whole budget",
        },
        "attacks": [*attacks, *extra_attacks],
        "metrics": {**headline(case, records), **per_class(case, records), **extra_metrics},
        "diagnostics": {"flags": list(flags)},
        "reproducibility": reproducibility(case, command or " ".join(["advkit", *sys.argv[1:]])),
    }
    if cards := getattr(case.rule, "cards", None):
        report["protocol"] |= {"search": case.rule.search, "judges": cards()}
    low, high = space_range(space)
    if low is not None and high is not None:
        report["dataset"]["input_range"] = [low, high]
    if indicators:
        report["diagnostics"]["indicators"] = indicators
    if per_sample is not None:
        report["per_sample"] = {
            "path": per_sample.name,
            "sha256": hashlib.sha256(per_sample.read_bytes()).hexdigest(),
            "format": "jsonl",
            "fields": list(written(records)),
        }
    return report


def space_range(space: Any) -> tuple[float | None, float | None]:
    """Smallest and largest legal value of a box; None for spaces without one."""
    low, high = getattr(space, "low", None), getattr(space, "high", None)
    if low is None or high is None:
        return None, None
    return float(np.min(np.asarray(low))), float(np.max(np.asarray(high)))


def tally(records: Iterable[Record]) -> Counter[Outcome]:
    """How many records ended how."""
    return Counter(r.outcome for r in records)
