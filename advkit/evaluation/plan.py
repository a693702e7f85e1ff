"""From a request to a plan: every name resolved, the victim found or trained, the threat model bound to its space."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

import torch

from advkit.attacks import ATTACKS
from advkit.core.checks import at_least_one, check, plain, whole
from advkit.core.errors import BadInput, ReportError, RunInterrupted, UsageError
from advkit.core.protocols import (
    Batched,
    FlipsLabels,
    Graded,
    Label,
    Learns,
    MadeForGoal,
    MadeForTask,
    MadeForThreatModel,
    PerSample,
    Solves,
    Task,
    ThroughView,
    Votes,
    WantsData,
    one_change,
)
from advkit.core.registry import Registry
from advkit.core.speed import Speed
from advkit.defenses import DEFENSES
from advkit.evaluation.inputs import pick_device, rule_over, task_of
from advkit.evaluation.run.case import Case, digest_of
from advkit.evaluation.run.scenario import Companion, Parts, Scenario
from advkit.evaluation.scenarios import SCENARIOS
from advkit.evaluation.sources import surrogates_of, with_public_sources
from advkit.evaluation.victims import Victim, bound, model_part, protected, with_classes_of
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.tasks.base import ClassificationTask
from advkit.threat_models import GOALS, THREAT_MODELS
from advkit.threat_models.transfer import Transfer

NO_ATTACK = "none"
"""The attack of a request whose scenario works without one: a certificate."""
NO_MODEL = "none"
"""The model of a request whose defense brings its own: what it learns from labels."""
PARTS = ("attack", "defense", "task", "model", "threat_model", "goal")
USUAL_TASK = "fashion-mnist"
"""The task of a request that names none, where its attack names none either."""


def registries() -> dict[str, Registry[Any]]:
    """Where the parts of a request are found by name."""
    return dict(zip(PARTS, (ATTACKS, DEFENSES, TASKS, MODELS, THREAT_MODELS, GOALS), strict=True))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for; see `advkit.evaluate` for the fields.

    Command line, Python and `advkit rerun` share it, and the report keeps it with every part by its canonical spec.
    """

    attack: Any = "pgd"
    defense: Any = "none"
    task: Any = ""
    model: Any = None
    threat_model: Any = None
    goal: Any = None
    n: int | None = None
    seed: int = 0
    device: str = "auto"
    batch_size: int | None = None
    draws: int = 10
    keep: int = 64
    speed: str | Speed = "fp32"
    beside: bool = True
    sample_timeout: float | None = None
    budget: str | None = None
    rows: str | None = None

    def __post_init__(self) -> None:
        # The report keeps the request as JSON, and is written last: what JSON can't hold would lose the whole run.
        own: dict[str, Any] = {name: whole(name, getattr(self, name)) for name in ("seed", "draws", "keep")}
        own |= {name: whole(name, value) for name in ("n", "batch_size") if (value := getattr(self, name)) is not None}
        own |= {"sample_timeout": plain(self.sample_timeout), "device": str(self.device)}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """Raise UsageError where a value is out of its range, or of another type."""
        seconds = self.sample_timeout
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        check(self, "sample_timeout", seconds is None or (number and 0 < seconds < 1e8), "a number of seconds above 0")
        self.propagations  # noqa: B018 - raises where the budget can't be read
        self.places  # noqa: B018 - raises where the rows can't be read
        at_least_one(self, "batch_size", "draws")
        check(self, "seed", -(2**63) <= self.seed < 2**63, "a whole number of at most 64 bits")
        check(self, "speed", isinstance(self.speed, str | Speed), "fp32, or switches joined by +")
        check(self, "beside", isinstance(self.beside, bool), "True or False")

    @property
    def propagations(self) -> int | None:
        """Passes that the budget allows per sample; UsageError where it says something else."""
        if self.budget is None:
            return None
        name, _, number = str(self.budget).partition("=")
        if name.strip() != "propagations" or not number.strip().isdecimal() or int(number) < 1:
            raise UsageError(
                f"the budget is {self.budget!r}; expected propagations=N, N >= 1: forward and backward passes per "
                "sample (a budget of queries belongs to the threat model: linf:eps=0.1,queries=1000)"
            )
        return int(number)

    @property
    def places(self) -> tuple[int, int] | None:
        """First place and the one behind the last of the rows asked for; None for all n of them."""
        if self.rows is None:
            return None
        first, colon, last = (part.strip() for part in str(self.rows).partition(":"))
        if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise UsageError(f"rows is {self.rows!r}; expected START:STOP, places among the n rows, e.g. 0:500")
        return int(first), int(last)

    @classmethod
    def from_report(cls, data: Mapping[str, Any]) -> Self:
        """The request that a report keeps; raises ReportError where it has none, or one of another shape."""
        kept = data.get("request")
        if kept is None:
            kept = _from_title(data)
        unknown = sorted(set(kept) - {field.name for field in fields(cls)})
        if unknown or not all(isinstance(kept.get(name), str) for name in PARTS):
            missing = [name for name in PARTS if not isinstance(kept.get(name), str)]
            raise ReportError(
                f"the report's request names no {', '.join(missing)}"
                if missing
                else f"the report's request has fields that this version does not know: {', '.join(unknown)}"
            )
        return cls(**kept)


def _from_title(data: Mapping[str, Any]) -> dict[str, Any]:
    """Reports of schema 1.0 kept the specs in their title alone."""
    parts = dict(part.split("=", 1) for part in str(data.get("title", "")).split(" | ") if "=" in part)
    if missing := [name for name in PARTS if name not in parts]:
        raise ReportError(f"the report does not say its {', '.join(missing)}: it can't be run again from names alone")
    speed = {"speed": parts["speed"]} if "speed" in parts else {}
    numbers = {"n": data["dataset"]["n_evaluated"], "seed": data["reproducibility"]["seed"]}
    return {name: parts[name] for name in PARTS} | numbers | speed


@dataclass(frozen=True)
class Plan:
    """A resolved request: the case asked for, and what is evaluated beside it."""

    request: Request
    case: Case
    scenario: Scenario
    victim: Victim
    defense: Any  # as the victim was really trained
    companions: tuple[Companion, ...] = ()

    def kept_request(self) -> dict[str, Any]:
        """The request as the report keeps it: canonical specs and plain values."""
        values = asdict(replace(self.request, **_UNNAMED))
        specs = {name: self.case.specs[name] for name in PARTS}
        if self.request.rows is None:
            del values["rows"]
        return {**values, **specs, "n": self.case.n, "speed": str(self.case.speed)}

    def digest(self) -> str:
        """Names the default run folder: sha256 over the configs of the case and of what stands beside it."""
        return digest_of([self.case.config(), *(each.case.config() for each in self.companions if each.case)])


_UNNAMED: dict[str, Any] = dict.fromkeys(PARTS) | {"speed": "fp32"}
"""Parts may be objects that can't be copied: their specs take their place."""


def plan(request: Request, *, progress: bool = False) -> Plan:
    """Resolve every name, find or train the victim, and bind the threat model to its space.

    progress: a progress bar while a model has to be trained first
    """
    device = pick_device(request.device)
    begun = outline(request)
    parts, asked, scenario, n = begun.parts, begun.asked, begun.scenario, begun.n
    work = parts.task
    try:
        victim = protected(
            _model_asked(request.model, parts.defense),
            parts.defense,
            work,
            seed=request.seed,
            device=device,
            progress=progress,
            sample_timeout=request.sample_timeout,
        )
    except torch.OutOfMemoryError as error:
        raise RunInterrupted(
            "out of memory before anything was attacked: take a smaller model, or another --device"
        ) from error
    work = with_classes_of(work, victim.model)
    case = _case(request, parts, asked, work, victim, n, device)
    case = with_data(case, scenario)
    companions = tuple(scenario.companions(case)) if request.beside else ()
    trained = DEFENSES.build(victim.defense) if victim.defense else parts.defense
    return Plan(request, case, scenario, victim, trained, companions)


@dataclass(frozen=True)
class Outline:
    """A request as far as it is known before a victim is found or trained.

    parts: as the scenario takes them
    asked: what each part was made of
    n:     rows
    """

    request: Request
    parts: Parts
    asked: Mapping[str, Any]
    scenario: Scenario
    n: int

    @functools.cached_property
    def specs(self) -> dict[str, str]:
        """Canonical specs of all parts but the model."""
        return _specs(self.parts, self.asked)


def outline(request: Request) -> Outline:
    """Every part built, and the rows counted; nothing is trained or loaded but the data."""
    request.check()
    parts, asked = _built(request)
    scenario = SCENARIOS.build(parts.threat.scenario)
    parts = scenario.resolve(replace(parts, seed=request.seed))
    return Outline(request, parts, asked, scenario, _rows(request, parts.task))


def task_of_request(request: Request) -> Task:
    """The task of a request as its scenario takes it; nothing is trained or loaded but the data."""
    return outline(request).parts.task


def _specs(parts: Parts, asked: Mapping[str, Any]) -> dict[str, str]:
    return {
        "attack": NO_ATTACK if parts.attack is None else ATTACKS.label(parts.attack, asked["attack"]),
        "defense": DEFENSES.label(parts.defense, asked["defense"]),
        "task": TASKS.label(asked["task_object"], asked["task"]),
        "threat_model": THREAT_MODELS.label(parts.threat, asked["threat_model"]),
        "goal": GOALS.label(parts.rule, asked["goal"]),
    }


def _model_asked(model: Any, defense: Any) -> Any:
    """The model that was asked for; UsageError where the defense brings its own, or where none would do."""
    none = isinstance(model, str) and model.strip() == NO_MODEL
    if isinstance(defense, Solves):  # it finds a network of its own, or takes one that it found before
        return None if none else model
    if not isinstance(defense, Learns):
        if none:
            raise UsageError(f"the defense {DEFENSES.label(defense)} protects a model: name one, such as mlp or cnn")
        return model
    if model is not None and not none:
        raise UsageError(f"the defense {DEFENSES.label(defense)} is itself what learns a model: leave --model out")
    return None


def with_data(case: Case, scenario: Scenario) -> Case:
    """The case with the attacker's data, the task's training set, where an attack of it wants some."""
    wanted = any(_wants_data(each.attack) for each in (case, *scenario.cells(case)))
    data = case.task.training() if wanted else None
    return replace(case, data=None if data is None else replace(data, rule=case.rule))


def _wants_data(attack: object) -> bool:
    return isinstance(attack, WantsData) and attack.wants_data


def _rows(request: Request, work: Task) -> int:
    total = len(work)
    rows = min(request.n if request.n is not None else (work.defaults.n or total), total)
    if rows < 1:
        raise BadInput(f"n must be between 1 and {total}, got {request.n}")
    return rows


def _places(request: Request, n: int) -> tuple[int, int] | None:
    places = request.places
    if places is not None and places[1] > n:
        raise UsageError(f"rows is {request.rows!r} and there are {n} rows: expected START:STOP within 0:{n}")
    return places


def _ids(task: Task, n: int) -> tuple[str, ...]:
    """The samples that are evaluated, in the task's order."""
    if isinstance(task, ClassificationTask):
        return task.ids[:n]  # without a look at the samples
    return tuple(row for batch in task.batches(1024, n=n) for row in batch.ids)


def _built(request: Request) -> tuple[Parts, dict[str, Any]]:
    """The parts that are asked for, and what each was made of; what is not said, the attack or the task says."""
    attack: Any = None if request.attack == NO_ATTACK else ATTACKS.build(request.attack)
    made_for = attack.default_task if isinstance(attack, MadeForTask) else ""
    # None is refused: where a task was to come from somewhere, another one in its place would go unnoticed.
    unsaid = isinstance(request.task, str) and not request.task
    task = _said(None, made_for, USUAL_TASK) if unsaid else request.task
    work = task_of(task)
    defense: Any = DEFENSES.build(request.defense)
    made_for = attack.default_threat_model if isinstance(attack, MadeForThreatModel) else ""
    threat_model = _said(request.threat_model, made_for, work.defaults.threat_model)
    if threat_model == "":
        raise UsageError(
            f"the task {work.name} has no usual radius, since its features have no one range ({work.space!r}): name a "
            "threat model, e.g. --threat-model linf:eps=0.1"
        )
    threat = THREAT_MODELS.build(threat_model)
    made_for = attack.default_goal if isinstance(attack, MadeForGoal) else ""
    goal = _said(request.goal, made_for, work.defaults.goal)
    rule = GOALS.build(goal)
    threat = with_public_sources(threat, work, DEFENSES.label(defense).partition(":")[0])
    asked = {"attack": request.attack, "defense": request.defense, "threat_model": threat_model, "goal": goal}
    return Parts(attack, defense, work, threat, rule), {**asked, "task": task, "task_object": work}


def _said(given: Any, made_for: str, usual: str) -> Any:
    """What was asked for, else what the attack is made for, else what the task is usually evaluated under.

    Where an attack and the task name the same part, and the attack by its name alone, the task says how.
    """
    if given is not None:
        return given
    return usual if made_for in ("", usual.partition(":")[0]) else made_for


def _case(
    request: Request, parts: Parts, asked: Mapping[str, Any], work: Task, victim: Victim, n: int, device: str
) -> Case:
    task = bound(work, victim.model.space)
    speed = Speed.parse(request.speed)
    own = isinstance(parts.defense, Learns) or (isinstance(parts.defense, Solves) and request.model in (None, NO_MODEL))
    model = NO_MODEL if own else request.model
    model = model if model is not None else task.defaults.model
    seen, surrogates = victim.model, surrogates_of(parts.threat, task, device)
    if isinstance(parts.rule, ThroughView):
        if surrogates:
            raise UsageError(
                f"the goal {GOALS.label(parts.rule, asked['goal'])} reads a view of the victim, which surrogates do "
                "not have: attack the victim itself, e.g. --threat-model linf"
            )
        seen = parts.rule.view(seen)
    if request.budget is not None and (parts.attack is None or isinstance(parts.attack, FlipsLabels)):
        raise UsageError(
            "a budget of propagations is for attacks on samples: a certificate makes its passes itself, an attack on "
            "labels is counted in trainings; leave --budget out"
        )
    named = _specs(parts, asked) | {"model": NO_MODEL if model == NO_MODEL else spec_of_model(model, victim.model)}
    specs = {name: named[name] for name in PARTS} | ({"speed": str(speed)} if speed.switches else {})
    return Case(
        task=task,
        victim=seen,
        attack=parts.attack,
        threat=parts.threat.bind(victim.model.space),
        rule=rule_over(parts.rule, _ids(task, n)) if isinstance(parts.rule, PerSample) else parts.rule,
        label=Label(specs["attack"]),
        n=n,
        specs=specs,
        defense=parts.defense,
        surrogates=surrogates,
        seed=request.seed,
        randomized=victim.model.describe().randomized,
        draws=1 if isinstance(victim.model, Votes) else request.draws,
        batch_size=request.batch_size or (victim.model.batch if isinstance(victim.model, Batched) else 256),
        device=device,
        keep=request.keep,
        speed=speed,
        sample_timeout=request.sample_timeout,
        propagations=request.propagations,
        places=_places(request, n),
        attack_misclassified=isinstance(parts.rule, Graded)
        or one_change(parts.threat)
        or (isinstance(parts.threat, Transfer) and parts.threat.attacks_all),
    )


def spec_of_model(asked: Any, model: Any) -> str:
    """How the model can be named again: the spec asked for, or what a model of the caller's own says of itself."""
    part, builder = model_part(asked)
    if builder:
        return MODELS.label(part)
    info = model.describe()
    return str(info.architecture or info.name)
