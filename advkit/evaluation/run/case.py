"""A frozen evaluation: who attacks what, within which threat model, on which rows."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from advkit.core.protocols import (
    AboutSamples,
    Attack,
    Batch,
    Boxed,
    Data,
    Defense,
    Judged,
    Label,
    MadeOf,
    Model,
    PerSample,
    Revised,
    Rule,
    Surrogates,
    Task,
    ThreatModel,
    ids_of,
    one_change,
    whole_batch,
)
from advkit.core.speed import Speed

if TYPE_CHECKING:
    from advkit.evaluation.run.speed import FastViews

Surrogate = tuple[str, Model[Any, Any]]
"""A model that the attacker owns, by the name that records use."""

NOT_TARGET = "samples whose label and clean answer are not the target"
"""What a goal other than untargeted is sought on, right or wrong when clean."""


def digest_of(value: Any) -> str:
    """sha256 of canonical JSON (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One evaluation, resolved.

    task:       hands out the rows
    victim:     the protected model; every verdict is its answer
    attack:     the attack asked for; None where a scenario works without one (a certificate)
    threat:     bound to the victim's space
    rule:       makes a goal of labels and clean answers
    label:      which attack the records are of
    defense:    what protects the victim; None where nobody said
    surrogates: models the oracle speaks for in place of the victim, by name; empty is white or black box on the victim
    specs:      canonical specs of attack, defense, task, model, threat_model, goal
    n:          rows evaluated
    places:     first place and the one behind the last of those of the n rows that are this shard's; None for all
    seed:       the run's only seed
    randomized: the victim's answers vary from call to call (declared or found): verdicts go by majority of draws, and
                no row stops early
    draws:      verdict draws of a randomised victim
    batch_size: rows in flight; changes no record
    device:     where it runs; part of no digest
    attack_misclassified: attack also the rows that the victim gets wrong when clean (a grid counts every image)
    data:       labelled data that the attacker holds; only where the attack wants some
    keep:       rows whose adversarial examples are written beside the records
    speed:      how the attack's oracle computes; verdicts are always full precision
    views:      the models under that speed, once a run has settled them; part of no digest
    sample_timeout: seconds after which a row that is attacked, or judged, alone is an error; None sets no limit; part
                of no digest
    propagations: forward and backward passes that an attack may spend on a row, both together; None sets no limit
    exact:      rows attacked in full precision at once, for the records before say that they are too near the boundary
                for the speed's precision; part of no digest
    """

    task: Task
    victim: Model[Any, Any]
    attack: Attack | None
    threat: ThreatModel[Any]
    rule: Rule
    label: Label
    n: int
    specs: dict[str, str] = field(default_factory=dict)
    defense: Defense | None = None
    surrogates: tuple[Surrogate, ...] = ()
    seed: int = 0
    randomized: bool = False
    draws: int = 10
    batch_size: int = 256
    device: str = "cpu"
    attack_misclassified: bool = False
    data: Data | None = None
    keep: int = 64
    speed: Speed = field(default_factory=Speed)
    views: FastViews | None = field(default=None, compare=False, repr=False)
    sample_timeout: float | None = None
    propagations: int | None = None
    places: tuple[int, int] | None = None
    exact: frozenset[str] = field(default=frozenset(), repr=False)

    @property
    def aimed(self) -> bool:
        """Whether rows that are wrong when clean are attacked too, because the attacker wants a certain answer.

        A language model has two answers here, and the wrong one is what the attacker wants: there is no third.
        """
        return self.rule.kind != "untargeted" and not isinstance(self.rule, (Judged, AboutSamples))

    @property
    def size(self) -> int:
        """How many rows are run."""
        return self.n if self.places is None else self.places[1] - self.places[0]

    def ids(self) -> list[str]:
        """The rows that are run, in the task's order."""
        return ids_of(self.task, self.n)[slice(*(self.places or (0, self.n)))]

    @property
    def together(self) -> bool:
        """Whether all samples have to come in one batch: what becomes of one depends on the others."""
        return whole_batch(self.attack) or one_change(self.threat)

    def config(self) -> dict[str, Any]:
        """All that decides a record, as plain JSON values.

        The model stands here as what it is, so that a checkpoint may move to another place during a run.
        """
        info = self.victim.describe()
        # Named only where it changes anything, so that runs in full precision keep the digests they always had.
        named = {name: spec for name, spec in self.specs.items() if name != "speed"}
        speed = {"speed": str(self.speed)} if self.speed.switches else {}
        # Records of version 0.1 left these rows out, or went by a random victim's first answer to the clean row.
        counted: dict[str, Any] = {"attacked": NOT_TARGET} if self.aimed else {}
        counted |= {"clean": "majority of draws"} if self.randomized else {}
        attack: object = self.attack
        # The first is not named, for the same reason.
        revised = {"revision": attack.revision} if isinstance(attack, Revised) and attack.revision > 1 else {}
        counted |= {"propagations": self.propagations} if self.propagations is not None else {}
        counted |= {"places": list(self.places)} if self.places is not None else {}
        return {
            "specs": {**named, "model": info.architecture or info.name, **speed},
            "label": str(self.label),
            "threat": self.threat.describe(),
            "victim": info.state_sha256,
            "surrogates": {name: model.describe().state_sha256 for name, model in self.surrogates},
            "data": self.task.digest(),
            "n": self.n,
            "seed": self.seed,
            "draws": self.draws if self.randomized else 1,
            **counted,
            **revised,
        }

    def goal(self, labels: Any, answer: Any, rng: Any, ids: Sequence[str]) -> Any:
        """What the attacker wants of a batch of these samples; see `protocols.Rule`."""
        rule = self.rule.of(ids) if isinstance(self.rule, PerSample) else self.rule
        return rule(labels, answer, rng)

    def goal_of(self, batch: Batch, answer: Any, rng: Any) -> Any:
        """The same for whole batches; where samples have no labels it is about them, or what the task says."""
        if batch.labels is not None:
            return self.goal(batch.labels, answer, rng, batch.ids)
        return self.rule.about(batch.x) if isinstance(self.rule, AboutSamples) else batch.goal

    def digest(self) -> str:
        """sha256 of the config; names the run folder."""
        return digest_of(self.config())


def lent(threat: ThreatModel[Any]) -> ThreatModel[Any]:
    """A copy of the threat model for an attack to hold: what it does to it reaches no verdict and no other batch.

    Models that the threat model names are not copied: a guard watches them.
    """
    kept = list(threat.sources) if isinstance(threat, Surrogates) else []
    return copy.deepcopy(threat, {id(each): each for each in kept})


def parameters(part: Any) -> dict[str, Any]:
    """An attack's or a defense's settings as JSON values."""
    if not is_dataclass(part) or isinstance(part, type):
        return {}
    made_of = {"made_of": part.made_of} if isinstance(part, MadeOf) and part.made_of else {}
    return {**{name: _plain(value) for name, value in asdict(part).items()}, **made_of}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no infinity
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return str(value)


def space_range(space: Any) -> tuple[float | None, float | None]:
    """Smallest and largest legal value of a box; None for spaces without one."""
    if not isinstance(space, Boxed) or space.low is None or space.high is None:
        return None, None
    return float(np.min(np.asarray(space.low))), float(np.max(np.asarray(space.high)))
