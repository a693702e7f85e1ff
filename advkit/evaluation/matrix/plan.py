"""From a request to a plan: every name of a matrix resolved and checked before anything is made."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor

from advkit.core.checks import plain, whole
from advkit.core.errors import ReportError, UsageError
from advkit.core.protocols import Label, Rule, Task
from advkit.core.registry import outside
from advkit.core.rng import RowRng
from advkit.defenses.adversarial.transfer_set import check_space
from advkit.evaluation.inputs import pick_device, rule_over, task_of
from advkit.evaluation.matrix.images import LEVELS, NoVictim, Rows, SignNoise, digest_of_tensors
from advkit.evaluation.matrix.participants import (
    VICTIMS,
    NamedAttack,
    named_attacks,
    of_these_classes,
    participants,
)
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.rehearsal import preflight
from advkit.evaluation.scenarios.evasion import Evasion
from advkit.evaluation.sources import Participant, cell_of
from advkit.tasks import TASKS
from advkit.threat_models import GOALS, THREAT_MODELS
from advkit.threat_models.goals.targeted import TargetedRule
from advkit.threat_models.tapm import PUBLIC
from advkit.threat_models.transfer import Transfer

Budget = int | str | None
NOISE = NamedAttack("noise", SignNoise(), "noise")
"""What random noise of the same size does, beside the attacks; made on no source."""


@dataclass(frozen=True, kw_only=True)
class MatrixRequest:
    """What is asked for; see `advkit.matrix` for the fields.

    Command line and Python share it, and the report keeps it with every part by its name or canonical spec.
    """

    sources: Sequence[Any] | str = (PUBLIC,)
    attacks: Sequence[Any] | str = ("pgd:steps=10,step_size=0.25", "mifgsm")
    targets: Sequence[Any] | str = (VICTIMS,)
    task: Any = "fashion-mnist"
    threat_model: Any = None
    eps: float | None = None
    goal: Any = "untargeted"
    n: int | None = None
    seeds: int | Sequence[int] = 3
    equal_budget: Budget = "auto"
    similarity: bool = False
    seen: Mapping[str, Collection[str]] | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        seeds = plain(self.seeds)
        one = isinstance(seeds, int | float)
        own = {
            "seeds": whole("seeds", seeds) if one else [whole("seed", each) for each in seeds],
            "n": None if self.n is None else whole("n", self.n),
            "eps": plain(self.eps),
            "equal_budget": plain(self.equal_budget),
            "device": str(self.device),
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def check(self) -> None:
        """Raise UsageError where a number is out of its range."""
        seeds = self.each_seed()
        if not seeds or len(set(seeds)) < len(seeds):
            raise UsageError(f"seeds {self.seeds!r}; expected a number of at least 1, or different seeds")
        if isinstance(self.equal_budget, str) and self.equal_budget != "auto":
            raise UsageError(f"budget {self.equal_budget!r}; expected a number of gradients, auto or none")
        if isinstance(self.equal_budget, int) and self.equal_budget < 1:
            raise UsageError(f"a budget of {self.equal_budget} gradients; expected at least 1, auto or none")

    def each_seed(self) -> tuple[int, ...]:
        """The seeds themselves."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)

    @classmethod
    def from_report(cls, content: Mapping[str, Any], *, trust: bool = False) -> Self:
        """The request that a checked matrix.json keeps.

        Raises ReportError where it has none, UsageError where it names what is not advkit's own, unless trusted.
        """
        stored = content.get("request")
        if stored is None:
            raise ReportError("the matrix keeps no request (schema 1.0): it can't be made again from its file alone")
        texts = [text for value in stored.values() for text in (value if isinstance(value, list) else [value])]
        found = [each for text in texts if isinstance(text, str) for each in outside(text)]
        if found and not trust:
            raise UsageError(
                f"the matrix would load what is not advkit's own: {'; '.join(dict.fromkeys(found))}. A file may come "
                "from anybody: where you trust these, ask for the request with asked(trust=True)"
            )
        return cls(**stored)


@dataclass(frozen=True)
class MatrixPlan:
    """A resolved request.

    case:    the evaluation of which every cell is a part; its victim answers nothing
    targets: the victims
    seeds:   of random attacks
    seen:    target -> the sources that its training used
    wanted:  the classes that a targeted attacker wants, long [K, N]; None for an untargeted one
    data:    digest of the labelled data that the attacker holds; empty for none
    """

    request: MatrixRequest
    case: Case
    rows: Rows
    sources: tuple[Participant, ...]
    targets: tuple[Participant, ...]
    attacks: tuple[NamedAttack, ...]
    seeds: tuple[int, ...]
    seen: Mapping[str, frozenset[str]]
    wanted: Tensor | None
    data: str

    def cell(self, source: Participant, attack: NamedAttack, seed: int) -> Case:
        """The case that makes an attack's images on a source."""
        surrogates, key = source.surrogates, source.key[:16]
        return self._cell(attack, key, surrogates, seed)

    def noise(self, seed: int) -> Case:
        """The case that makes random noise: of no source, since images that query none must not depend on any."""
        return self._cell(NOISE, "", (), seed)

    def _cell(self, attack: NamedAttack, key: str, surrogates: tuple[Any, ...], seed: int) -> Case:
        threat = replace(cast(Transfer, self.case.threat), sources=(key,))
        cell = cell_of(self.case, attack.attack, Label(attack.spec, source=key), surrogates, threat)
        return replace(cell, seed=seed, specs={**self.case.specs, "data": self.data if attack.wants_data else ""})

    def stored_request(self) -> dict[str, Any]:
        """The request as the report stores it: names, canonical specs and plain values; eps is in the threat model."""
        parts: dict[str, Any] = {
            "sources": [source.name for source in self.sources],
            "attacks": [attack.name for attack in self.attacks],
            "targets": [target.name for target in self.targets],
            "task": TASKS.label(self.case.task, self.request.task),
            "threat_model": self.case.specs["threat_model"],
            "eps": None,
            "goal": self.case.specs["goal"],
            "n": self.case.n,
            "seeds": list(self.seeds),
        }
        seen = self.request.seen
        parts["seen"] = None if seen is None else {name: sorted(sources) for name, sources in seen.items()}
        # Only then is the request copied: objects that were handed over need not be copyable.
        return asdict(replace(self.request, **parts))


def resolve(request: MatrixRequest) -> MatrixPlan:
    """Find every model, bind the threat model and try each part on one row. Raises UsageError, BadModel, BadInput."""
    request.check()
    device, task = pick_device(request.device), task_of(request.task)
    check_space(task)
    n = min(request.n if request.n is not None else (task.defaults.n or len(task)), len(task))
    if n < 1:
        raise UsageError(f"n must be between 1 and {len(task)}, got {request.n}")
    sources = participants(request.sources, task, device, attacked=True)
    targets = participants(request.targets, task, device, attacked=False)
    task = of_these_classes(task, (*sources, *targets))
    attacks = named_attacks(request.attacks)
    rows = Rows.of(task, n)
    case = _case(request, task, device, n)
    case = replace(case, rule=rule_over(case.rule, rows.ids))
    data = task.training() if any(attack.wants_data for attack in attacks) else None
    models = {member.key: member.model for source in sources for member in source.members}
    case = replace(case, data=data, surrogates=tuple(models.items()))
    plan = MatrixPlan(
        request=request,
        case=case,
        rows=rows,
        sources=sources,
        targets=targets,
        attacks=attacks,
        seeds=request.each_seed(),
        seen=_seen(request, sources, targets),
        wanted=_wanted(case.rule, rows, task, request.each_seed()),
        data="" if data is None else digest_of_tensors(data.x, data.y),
    )
    _check(plan)
    return plan


def _case(request: MatrixRequest, task: Task, device: str, n: int) -> Case:
    threat, spec = _threat(request.threat_model, request.eps, task)
    rule = GOALS.build(request.goal)
    return Case(
        task=task,
        victim=NoVictim(task.space, task.classes),
        attack=NOISE.attack,
        threat=threat.bind(task.space),
        rule=rule,
        label=Label(NOISE.spec),
        n=n,
        specs={"goal": GOALS.label(rule, request.goal), "threat_model": spec},
        device=device,
        attack_misclassified=True,
    )


def _check(plan: MatrixPlan) -> None:
    """Every model answers and every attack is granted what it needs."""
    for what, group in (("source", plan.sources), ("target", plan.targets)):
        for one in group:
            for member in one.members:
                label = Label(f"{what} {one.name}")
                preflight(replace(plan.case, victim=member.model, surrogates=(), label=label), Evasion())
    for attack in plan.attacks:
        if reason := Evasion().accepts(replace(plan.case, attack=attack.attack, label=Label(attack.spec))):
            raise UsageError(reason)


def _threat(threat_model: Any, eps: float | None, task: Task) -> tuple[Transfer, str]:
    built: Any = THREAT_MODELS.build(threat_model if threat_model is not None else task.defaults.threat_model)
    ball: dict[str, Any] = built.describe()
    norm, radius = str(ball.get("norm") or "").lower(), ball.get("eps") if eps is None else eps
    if radius is None or built.scenario not in ("evasion", "grid"):
        raise UsageError(f"the threat model {threat_model} has no radius; expected a ball such as linf:eps=8/255")
    threat = Transfer(eps=float(radius), norm=cast(Any, norm), lattice=LEVELS, sources=("source",), attacks_all=True)
    return threat, f"{norm}:eps={float(radius)!r}"


def _wanted(rule: Rule, rows: Rows, task: Task, seeds: Sequence[int]) -> Tensor | None:
    """The classes that a targeted attacker wants, long [K, N]; None for an untargeted one."""
    if rule.kind == "untargeted":
        return None
    if not isinstance(rule, TargetedRule) or rule.how not in ("next", "random", "class", "each"):
        raise UsageError(
            f"the goal {GOALS.label(rule)} depends on a victim's answers; in a matrix, whose images are made before "
            "any target is queried, use untargeted or targeted:how=next, how=random, how=class,target=K or "
            "how=each,targets=..."
        )
    answers = torch.zeros(len(rows.ids), task.classes, dtype=torch.float32)
    whole = rule.of(rows.ids)
    goals = [whole(rows.labels, answers, RowRng.from_ids(seed, rows.ids).at("goal")) for seed in seeds]
    return torch.stack([goal.targets for goal in goals])


def _seen(
    request: MatrixRequest, sources: Sequence[Participant], targets: Sequence[Participant]
) -> dict[str, frozenset[str]]:
    """Target -> the sources that its training used: what the request says, else what the zoo's cards say."""
    if request.seen is None:
        return {
            target.name: frozenset(source.name for source in sources if source.was_seen_by(target.names))
            for target in targets
        }
    names = {target.name for target in targets}
    said = {name for group in request.seen.values() for name in group}
    strangers = sorted((set(request.seen) - names) | (said - {source.name for source in sources}))
    if strangers:
        raise UsageError(f"seen names {', '.join(strangers)}, not among the targets and sources")
    return {name: frozenset(request.seen.get(name, ())) for name in names}
