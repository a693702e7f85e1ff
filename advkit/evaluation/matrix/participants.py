"""Sources, targets and attacks of a matrix, from specs or objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from advkit.attacks import ATTACKS
from advkit.core.errors import BadModel, UsageError
from advkit.core.protocols import Attack, Task, WantsData
from advkit.defenses import DEFENSES
from advkit.evaluation.run.case import parameters
from advkit.evaluation.sources import Member, Participant, card_of, defense_name, zoo_specs
from advkit.evaluation.victims import protected
from advkit.models import MODELS
from advkit.threat_models.tapm import PUBLIC
from advkit.threat_models.transfer import source_name

VICTIMS = "victims"
_ROLES = {PUBLIC: "public", VICTIMS: "victim"}


@dataclass(frozen=True)
class NamedAttack:
    """An attack of the matrix.

    name: as it was asked for
    spec: canonical
    note: how it was changed to fit a budget
    """

    name: str
    attack: Attack
    spec: str
    note: str = ""

    @property
    def wants_data(self) -> bool:
        """Whether it works with labelled data of the attacker's own."""
        return isinstance(self.attack, WantsData) and self.attack.wants_data

    def to_dict(self) -> dict[str, Any]:
        """As the report names it."""
        params = parameters(self.attack)
        made_of = params.pop("made_of", "")
        entry = {"name": self.name, "spec": self.spec, "params": params, "note": self.note}
        return entry | ({"made_of": made_of} if made_of else {})


def named_attacks(attacks: Sequence[Any] | str) -> tuple[NamedAttack, ...]:
    """The attacks that specs or objects stand for; a sum of parts (`ni+ti`) is the composition `transfer:ni+ti`."""
    named = [_named_attack(one) for one in ([attacks] if isinstance(attacks, str) else attacks)]
    if not named:
        raise UsageError("a matrix needs at least one attack")
    _all_different("attacks", [one.name for one in named])
    _all_different("attacks", [one.spec for one in named])
    return tuple(named)


def _named_attack(given: Any) -> NamedAttack:
    if not isinstance(given, str):
        return NamedAttack(ATTACKS.label(given), given, ATTACKS.label(given))
    text = given.strip()
    head = text.partition(":")[0]
    attack: Any = ATTACKS.build(f"transfer:{text}" if "+" in head and head not in ATTACKS else text)
    return NamedAttack(text, attack, ATTACKS.label(attack, text))


def participants(given: Sequence[Any] | str, task: Task, device: str, *, attacked: bool) -> tuple[Participant, ...]:
    """The sources (`attacked`) or targets that specs or models stand for, those of the zoo for `public` and `victims`.

    Raises UsageError, BadModel.
    """
    asked: list[Any] = []
    for one in [given] if isinstance(given, str) else given:
        role = _ROLES.get(one) if isinstance(one, str) else None
        asked += [one] if role is None else zoo_specs(task, role, "path:FILE")
    if not asked:
        raise UsageError(f"a matrix needs at least one {'source' if attacked else 'target'}")
    named = tuple(_participant(one, task, device, attacked) for one in asked)
    _all_different("sources" if attacked else "targets", [one.name for one in named])
    return named


def _participant(given: Any, task: Task, device: str, attacked: bool) -> Participant:
    models = split_sum(given) if isinstance(given, str) else given if isinstance(given, (tuple, list)) else (given,)
    if len(models) > 1 and not attacked:
        raise UsageError(f"{given} is several targets; name them one by one")
    name = given.strip() if isinstance(given, str) else "+".join(source_name(one) for one in models)
    return Participant(name, tuple(_member(one, task, device, attacked) for one in models))


def _member(given: Any, task: Task, device: str, attacked: bool) -> Member:
    text = given if isinstance(given, str) else ""
    defense, at, spec = text.partition("@")
    if not at or not (DEFENSES.names_part(defense) and MODELS.names_part(spec)):
        defense, spec = "none", text
    victim = protected(spec if text else given, defense, task, device=device)
    model = victim.model.attacker_view() if attacked else victim.model
    info = model.describe()
    if info.classes is not None and info.classes != task.classes:
        raise BadModel(f"{text or info.name} answers {info.classes} classes, the task has {task.classes}")
    return Member.of(model, card_of(spec) or card_of(victim.origin), defense_name(defense))


def split_sum(text: str) -> tuple[str, ...]:
    """The models of `a+b`: split at each + outside brackets, where a model's name starts on either side."""
    parts, depth = [""], 0
    for mark in text.strip():
        depth += (mark == "[") - (mark == "]")
        parts += [""] if mark == "+" and depth == 0 else []
        parts[-1] += "" if mark == "+" and depth == 0 else mark
    parts = [part[1:-1] if part.startswith("[") and part.endswith("]") else part for part in parts]
    heads = [part.partition(":")[0] for part in parts]
    whole = all((head.partition("@")[2] or head) in MODELS for head in heads)
    return tuple(parts) if whole else (text.strip(),)


def _all_different(what: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(f"{what} hold {', '.join(twice)} more than once; once is enough")
