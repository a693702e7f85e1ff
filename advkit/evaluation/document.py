"""From a finished run to the report's document: plain JSON values, every figure from the records."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from advkit import __version__
from advkit.core.protocols import DrawsByRow, FromFile, Graded, Judged, Record, Revised, Suite, Task, answer_shape
from advkit.core.provenance import checkout
from advkit.evaluation.attacker import LESS, access_of, attacker_of
from advkit.evaluation.counts import by_label
from advkit.evaluation.plan import NO_ATTACK, NO_MODEL, Plan, Request, registries
from advkit.evaluation.report import SCHEMA_VERSION
from advkit.evaluation.report.repeat import command_line, python_call
from advkit.evaluation.report.text import MOST_CLASSES
from advkit.evaluation.run.batch import counting
from advkit.evaluation.run.case import NOT_TARGET, Case, parameters, space_range
from advkit.evaluation.run.scenario import Companion, Section
from advkit.evaluation.run.store import Store, written
from advkit.evaluation.scenarios.evasion import labelled, schedule
from advkit.evaluation.scenarios.metrics import attack_entries, cumulative, task_kind
from advkit.evaluation.trust.diagnostics import in_chat_template

PROTOCOL_VERSION = "1"
STOPPING = "a row leaves once its goal is reached on the victim; survivors spend the whole budget"
STOPPING_GRADED = "every row spends the whole budget, those included that reach the goal"


@dataclass(frozen=True)
class Run:
    """A case that was run: its records in the task's order, what they come to, and where they are.

    kept: the speed switches that each model kept; empty in full precision
    """

    case: Case
    records: Sequence[Record]
    section: Section
    store: Store
    companion: Companion | None = None
    kept: Mapping[str, str] = field(default_factory=dict)

    def attacks(self) -> list[dict[str, Any]]:
        """The report's entries, one per label; certificates are no attack."""
        if self.section.certified:
            return []
        made = attack_entries(self.case, self.records, self.section.settings, self.store.seconds(), self.store.tokens())
        groups = by_label(self.records)
        for entry, (label, records) in zip(made, groups.items(), strict=True):
            entry["access"] = access_of(self.case, records, label.stage)
        return made

    def metrics_beside(self) -> dict[str, Any]:
        """What a companion contributes to the report's metrics, by the names they have there."""
        if self.companion is None:
            return {}
        names, prefix = self.companion.metrics, self.companion.prefix
        return {
            f"{prefix}{name}": value
            for name, value in self.section.metrics.items()
            if any(fnmatchcase(name, one) for one in names)
        }


def document(
    plan: Plan, runs: Sequence[Run], flags: Sequence[dict[str, Any]], *, command: str, lasting: bool
) -> dict[str, Any]:
    """The report of a plan; the first run is the case's own, the others are its companions'."""
    run, *beside = runs
    case, section = run.case, run.section
    attacks = run.attacks()
    if len(attacks) > 1 and all(not record.source for record in run.records):
        cumulative(attacks, run.records)
    same = [other for other in beside if other.case.victim is case.victim]
    extra = [{**entry, "beside": True} for other in same for entry in other.attacks()]
    for order, entry in enumerate(extra, start=1):
        entry["order"] = order
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "created_utc": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "advkit_version": __version__,
        "title": " | ".join(f"{name}={spec}" for name, spec in case.specs.items()),
        "task": task_kind(case),
        "request": plan.kept_request(),
        "section": section.block(plan.scenario.name),
        "companions": [
            {"name": each.name, "title": each.title, "metric": each.metric}
            for each in (other.companion for other in beside)
            if each is not None
        ],
        "dataset": _dataset(case, run.records),
        "model": _model(case),
        "defense": _defense(plan, case, section.certified),
        "threat_model": threat_block(case, run.records),
        "protocol": _protocol(case, run.records),
        "attacks": [*attacks, *extra],
        "metrics": {**section.metrics, **{k: v for other in beside for k, v in other.metrics_beside().items()}},
        "diagnostics": {"flags": list(flags)},
        "reproducibility": reproducibility(case) | _repeated(plan, command),
    }
    if kept := {each.store.name: dict(each.kept) for each in runs if each.kept}:
        content["reproducibility"]["speed"] = {"asked": str(case.speed), "kept": kept}
    if lasting:
        content["per_sample"] = {
            "path": run.store.path.name,
            "sha256": run.store.sha256,
            "format": "jsonl",
            "fields": list(written(run.records)),
        }
    return content


def _repeated(plan: Plan, command: str) -> dict[str, str]:
    """The command and the call that make the run again."""
    request, usual = plan.kept_request(), asdict(Request())
    objects = [
        name
        for name, registry in registries().items()
        if not (request[name] in (NO_ATTACK, NO_MODEL) or registry.names_part(request[name]))
    ]
    return {
        "command": command or command_line(request, usual, objects),
        "python_call": python_call(request, usual, objects),
    }


def _dataset(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    # Records come in the order of the run, which a resumed one need not share: ids are sorted.
    ids = sorted({record.id for record in records})
    task, first = case.task, next(iter(case.task.batches(1)))
    block: dict[str, Any] = {
        "name": task.name,
        "version": task.version,
        "split": task.split,
        "n_total": len(task),
        "n_evaluated": len(ids),
        "selection": {
            "kind": "explicit_ids" if case.places else "all" if len(ids) == len(task) else "first_n",
            "ids_sha256": hashlib.sha256("\n".join(ids).encode()).hexdigest(),
        },
        "input_shape": list(first.x.shape[1:]),
        **({} if answer_shape(task) else _classes(task)),
        "sha256": task.digest(),
    }
    low, high = space_range(task.space)
    bounded = low is not None and high is not None and math.isfinite(low) and math.isfinite(high)
    return block | ({"input_range": [low, high]} if bounded else {})


def _classes(task: Task) -> dict[str, Any]:
    """How many classes there are, and what they are called where they are few enough to be told apart in a figure."""
    names = list(task.class_names())
    named = 1 < len(names) == task.classes <= MOST_CLASSES
    return {"n_classes": task.classes, **({"class_names": names} if named else {})}


def _model(case: Case) -> dict[str, Any]:
    info = case.victim.describe()
    told = in_chat_template(case.victim.space)
    return {
        **({} if told is None else {"chat_template": told}),
        **_queries(case.victim),
        "name": info.name,
        "architecture": info.architecture,
        "state_sha256": info.state_sha256,
        "n_parameters": info.n_parameters,
        "source": info.source,
        "license": info.license,
        "training_mode": False,
        "number_forward_passes": 1,
    }


def _queries(model: Any) -> dict[str, Any]:
    """What the model whose answers have a price has been asked for; empty where there is none."""
    found = counting(model)
    return {} if found is None else {"queries": {"answered": found.answered, "retried": found.retried}}


def _defense(plan: Plan, case: Case, certified: bool) -> dict[str, Any]:
    info = case.victim.describe()
    return {
        "name": case.specs["defense"].partition(":")[0],
        "params": parameters(plan.defense),
        "origin": plan.victim.origin,
        **({"solved": plan.victim.solved} if plan.victim.solved else {}),
        "is_randomized": case.randomized,
        "is_differentiable": info.differentiable,
        "can_abstain": info.abstains,
        "certified": certified,
    }


def _protocol(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    block: dict[str, Any] = {
        "version": PROTOCOL_VERSION,
        "name": case.specs.get("attack", case.label.attack),
        "aggregation": "worst_case_per_sample" if len(by_label(records)) > 1 else "single_attack",
        "n_eval_repeats": case.draws if case.randomized else 1,
        "stopping": STOPPING_GRADED if isinstance(case.rule, Graded) else STOPPING,
    }
    attack: object = case.attack
    if isinstance(attack, Revised):
        block["revision"] = attack.revision
    if isinstance(attack, Suite):
        ran = {record.stage for record in records}
        spared = [stage.name for stage in schedule(case.attack) if labelled(case, stage).stage not in ran]
        block |= {"not_needed": spared} if spared else {}
    if case.aimed:
        block["attacked"] = NOT_TARGET
    if isinstance(case.rule, Judged) and (cards := case.rule.cards()):
        block |= {"search": case.rule.search, "judges": cards}
    return block


def threat_block(case: Case, records: Sequence[Record]) -> dict[str, Any]:
    """The report's threat model, goal included, and who the attacker was.

    `granted` is what the threat model grants, `knowledge` what the attack made use of: one that asks for scores is no
    white box, whatever it was granted.
    """
    known = {"name", "phase", "norm", "eps", "eps_string", "goal", "knowledge", "query_budget", "adaptive", "details"}
    block = dict(case.threat.describe())
    details = {name: block.pop(name) for name in list(block) if name not in known}
    block["goal"] = case.rule.kind
    if isinstance(case.rule, FromFile):
        details["goal_sha256"] = case.rule.content_sha256  # two contents of a file are no one ranking
    if case.propagations is not None:
        details["propagations"] = case.propagations
    block["attacker"] = attacker_of(case, records)
    block["granted"] = block["knowledge"]
    if block["knowledge"] in LESS and block["attacker"]["access"] in LESS[block["knowledge"]]:
        block["knowledge"] = block["attacker"]["access"]
    block["adaptive"] = block["attacker"]["defense"] == "adaptive"
    if details:
        block["details"] = {**block.get("details", {}), **details}
    return block


def reproducibility(case: Case) -> dict[str, Any]:
    """What it takes to run this again."""
    commit, dirty = checkout()
    drawn = f"; the victim's draws: {case.victim.stream}" if isinstance(case.victim, DrawsByRow) else ""
    return {
        "seed": case.seed,
        "rng_scheme": "philox4x32-10 per row" + drawn,
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "dtype": "float32",
        "packages": dict(_packages()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": case.device,
        "threads": torch.get_num_threads(),
        "config_sha256": case.digest(),
        "git_commit": commit,
        "git_dirty": dirty,
    }


@cache
def _packages() -> tuple[tuple[str, str], ...]:
    """Name and version of those whose numbers a run depends on; read once, for many short runs in one process."""
    found = []
    for name in ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "safetensors"):
        with suppress(PackageNotFoundError):
            found.append((name, version(name)))
    return tuple(found)
