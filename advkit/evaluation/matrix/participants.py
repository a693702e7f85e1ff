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
from advkit.evaluation.victims import protected, with_classes_of
from advkit.models import MODELS
from advkit.threat_models.tapm import PUBLIC
from advkit.threat_models.transfer import source_names

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
    named = [_named_attack(one) for one in several(attacks)]
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
    for one in several(given):
        role = _ROLES.get(one) if isinstance(one, str) else None
        asked += [one] if role is None else zoo_specs(task, role, "path:FILE")
    if not asked:
        raise UsageError(f"a matrix needs at least one {'source' if attacked else 'target'}")
    names = _names(asked)
    named = tuple(_participant(one, name, task, device, attacked) for one, name in zip(asked, names, strict=True))
    _all_different("sources" if attacked else "targets", [one.name for one in named])
    return named


def several(given: Any) -> list[Any]:
    """The parts of a list; a single one (a network of torch, too, which is a sequence of its layers) stands for one."""
    return list(given) if isinstance(given, (list, tuple)) else [given]


def _names(asked: Sequence[Any]) -> list[str]:
    """What participants are called; models that share a name are numbered: Sequential, Sequential-2."""
    found: list[str] = []
    for one in asked:
        if isinstance(one, str):
            found.append(one.strip())
            continue
        name = plain = "+".join(source_names(several(one)))
        number = 2
        while name in found:
            name, number = f"{plain}-{number}", number + 1
        found.append(name)
    return found


def _participant(given: Any, name: str, task: Task, device: str, attacked: bool) -> Participant:
    models = split_sum(given) if isinstance(given, str) else several(given)
    if len(models) > 1 and not attacked:
        raise UsageError(f"{given} is several targets; name them one by one")
    return Participant(name, tuple(_member(one, task, device, attacked) for one in models))


def _member(given: Any, task: Task, device: str, attacked: bool) -> Member:
    text = given if isinstance(given, str) else ""
    defense, at, spec = text.partition("@")
    if not at or not (DEFENSES.names_part(defense) and MODELS.names_part(spec)):
        defense, spec = "none", text
    victim = protected(spec if text else given, defense, task, device=device)
    model = victim.model.attacker_view() if attacked else victim.model
    return Member.of(model, card_of(spec) or card_of(victim.origin), defense_name(defense))


def of_these_classes(task: Task, groups: Sequence[Participant]) -> Task:
    """The task with the models' number of classes, where it knows no more than the labels that occur.

    Raises BadModel where a model answers others.
    """
    known = [(one.name, member.model) for one in groups for member in one.members]
    for _, model in known:
        task = with_classes_of(task, model)
    for name, model in known:
        classes = model.describe().classes
        if classes is not None and classes != task.classes:
            raise BadModel(f"{name} answers {classes} classes, the task {task.name} has {task.classes}")
    return task


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
