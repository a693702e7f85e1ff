"""The models that a transfer attacker owns, and what the zoo's cards tell of them.

Grids (one victim) and matrices (many) name, group and judge their sources here: which stand for `public`, which the
defense was trained on, which hold the victim's weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, cast

from advkit.core.code import own_code
from advkit.core.errors import UsageError
from advkit.core.protocols import (
    Attack,
    BringsAttacks,
    Composite,
    Describes,
    Label,
    Model,
    Surrogates,
    Task,
    ThreatModel,
    Wraps,
)
from advkit.evaluation.run.case import Case, Surrogate, digest_of
from advkit.evaluation.victims import ready
from advkit.models import MODELS, zoo
from advkit.models.ensemble import Ensemble
from advkit.threat_models.tapm import PUBLIC, TransferGrid
from advkit.threat_models.transfer import source_names

ZOO = "zoo:"


def zoo_specs(task: Task, role: str, example: str) -> list[str]:
    """Specs of the zoo's models of a task that have this role; where there are none, UsageError with the example."""
    cards = zoo.find(task.name, role=role)
    if not cards:
        what = {"public": "public surrogates", "victim": "victims"}[role]
        raise UsageError(f"the zoo has no {what} for task {task.name}: name models, e.g. {example}")
    return [f"{ZOO}{card.name}" for card in cards]


def card_of(spec: str) -> zoo.Card | None:
    """The zoo card of a spec; None for a model from elsewhere."""
    return next((card for card in zoo.cards() if spec == f"{ZOO}{card.name}"), None)


def defense_name(spec: str) -> str:
    """The name of a defense without its settings; empty for `none`."""
    name = spec.partition(":")[0]
    return "" if name == "none" else name


def weights_of(model: Any) -> frozenset[str]:
    """State hashes of a model and of the models inside it: behind a transformation it still has the same weights."""
    inside = [model.model] if isinstance(model, Wraps) else []
    inside += list(model.models) if isinstance(model, Composite) else []
    own = frozenset({model.describe().state_sha256})
    return own.union(*(weights_of(one) for one in inside if isinstance(one, Describes)))


@dataclass(frozen=True)
class Member:
    """One model of a participant.

    key:     hash of its weights and architecture
    weights: state hashes of all that is inside
    card:    its zoo card; None for a model from elsewhere
    defense: name of the defense that was asked for or that the card tells; empty for none
    """

    key: str
    model: Model[Any, Any]
    weights: frozenset[str]
    card: zoo.Card | None = None
    defense: str = ""

    @classmethod
    def of(cls, model: Any, card: zoo.Card | None = None, defense: str = "") -> Self:
        """A model as it is described; without a defense asked for, with the one of its card."""
        if card is not None and not defense:
            defense = defense_name(card.defense)
        info = model.describe()
        key = hashlib.sha256(f"{info.state_sha256}|{info.architecture}{_computes(model)}".encode()).hexdigest()
        return cls(key, model, weights_of(model), card, defense)


def _computes(model: Any) -> str:
    """What weights and a name do not tell of a model: layers and code of the user's own; empty for advkit's."""
    around, inside = [model], model
    while isinstance(inside, Wraps):
        inside = inside.model
        around.append(inside)
    tops = list(model.modules())
    layers = {type(each) for top in tops for each in top.modules()}
    code = own_code(*(type(each) for each in around), *sorted(layers, key=repr))
    named = MODELS.names_part(inside.describe().architecture)
    return "" if named and not code else f"|{[repr(top) for top in tops]}|{code}"


@dataclass(frozen=True)
class Participant:
    """A source or a target.

    name:    as it was asked for
    members: several where a source is an ensemble
    """

    name: str
    members: tuple[Member, ...]

    @property
    def key(self) -> str:
        """Hash of what it computes."""
        keys = [member.key for member in self.members]
        return keys[0] if len(keys) == 1 else digest_of(keys)

    @property
    def model(self) -> Any:
        """The model; of an ensemble the mean of its logits."""
        models = tuple(member.model for member in self.members)
        return models[0] if len(models) == 1 else Ensemble(models=models)

    @property
    def surrogates(self) -> tuple[Surrogate, ...]:
        """Its models, as a case has them."""
        return tuple((member.key, member.model) for member in self.members)

    @property
    def weights(self) -> frozenset[str]:
        """State hashes of all that is inside."""
        return frozenset[str]().union(*(member.weights for member in self.members))

    @property
    def group(self) -> str:
        """Training group of its zoo card; "given" without a card, "ensemble" for several models."""
        if len(self.members) > 1:
            return "ensemble"
        card = self.members[0].card
        return card.group if card is not None else "given"

    @property
    def names(self) -> frozenset[str]:
        """The zoo's names of its models, and the name of its defense: what cards call it where they were trained on."""
        cards = {member.card.name for member in self.members if member.card is not None}
        return frozenset(cards | ({self.members[0].defense} if len(self.members) == 1 else set())) - {""}

    def holds(self, weights: frozenset[str]) -> bool:
        """Whether it has any of these weights: an attack on it is an attack in white box."""
        return bool(self.weights & weights)

    def was_seen_by(self, names: Iterable[str]) -> bool:
        """Whether its cards say that the training of a victim or a defense of this name used it."""
        seen_by = {name for member in self.members if member.card is not None for name in member.card.seen_by}
        return bool(seen_by & set(names))


def participants_of(surrogates: Sequence[Surrogate]) -> tuple[Participant, ...]:
    """The sources of a case, each one model under the name that records use."""
    return tuple(Participant(name, (Member.of(model, card_of(name)),)) for name, model in surrogates)


def grid_of(
    sources: Sequence[Participant], attacks: Sequence[str], seen: Iterable[str], victim: frozenset[str]
) -> TransferGrid:
    """The grid of these sources and attacks, seen from a victim of these weights."""
    return TransferGrid(
        sources=tuple(source.name for source in sources),
        attacks=tuple(attacks),
        groups=tuple(source.group for source in sources),
        seen=frozenset(seen),
        white_box=frozenset(source.name for source in sources if source.holds(victim)),
    )


def cell_of(
    case: Case, attack: Attack, label: Label, surrogates: Sequence[Surrogate], threat: ThreatModel[Any]
) -> Case:
    """One attack on one source, of a case on many: all rows count, also those that the victim gets wrong when clean."""
    return replace(
        case, attack=attack, label=label, surrogates=tuple(surrogates), threat=threat, attack_misclassified=True
    )


def with_public_sources(threat: ThreatModel[Any], task: Task, defense: str) -> ThreatModel[Any]:
    """The threat model with `public` replaced by the zoo's surrogates of the task, those the defense trained on marked.

    Raises UsageError when the zoo has none for the task.
    """
    if not isinstance(threat, Surrogates) or PUBLIC not in threat.sources:
        return threat
    specs = zoo_specs(task, "public", "tapm:sources=zoo:NAME+path:FILE")
    named = [source for source in threat.sources if source != PUBLIC]
    known = threat.seen if isinstance(threat, BringsAttacks) else ()
    seen = known or [spec for spec in specs if (card := card_of(spec)) is not None and defense in card.seen_by]
    return cast("ThreatModel[Any]", threat.with_sources([*specs, *named], seen=seen))


def surrogates_of(threat: ThreatModel[Any], task: Task, device: str) -> tuple[Surrogate, ...]:
    """The models a transfer threat model speaks of, by the names that records use."""
    sources = threat.surrogates if isinstance(threat, Surrogates) else ()
    names = source_names(sources)
    return tuple((name, ready(source, task).to(device)) for name, source in zip(names, sources, strict=True))
