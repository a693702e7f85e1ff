"""The embedded zoo: small models with a card each; the weights' hash is checked before they are opened.

A card is NAME.json beside NAME.safetensors. Listing cards loads no torch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.core.errors import BadModel, CheckpointError, UnknownName, UsageError
from advkit.core.protocols import Rng
from advkit.core.strict_json import read_object

if TYPE_CHECKING:
    from advkit.models.projected import Projected
    from advkit.models.torch import TorchModel

FOLDER = Path(__file__).parent / "weights"
GROUPS = ("normal", "linf")
ROLES = ("victim", "public")


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a stored model is, how it was made and what it measured.

    name:     also the weights' file name
    task:     spec of the task it was trained for
    model:    spec of the architecture
    defense:  spec of the defense that trained it ("none")
    seed:     of the training
    sha256:   of the weights file
    size:     of the weights file, bytes
    licence:  of the weights
    group:    training procedure: "normal" or "linf"
    role:     "victim" of evaluations, or "public": a surrogate that anybody may query and differentiate
    seen_by:  names of the victims whose training used this model
    measured: figures by name, such as {"clean accuracy": 0.85}
    base:     name of the card whose model this one is a spectral filter in: the file holds the filter alone
    command:  makes the weights again
    notes:    anything else worth knowing
    """

    name: str
    task: str
    model: str
    defense: str = "none"
    seed: int = 0
    sha256: str
    size: int
    licence: str = "MIT"
    group: str = "normal"
    role: str = "victim"
    seen_by: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)
    base: str = ""
    command: str = ""
    notes: str = ""

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            kind = {"size": int, "seed": int, "seen_by": tuple, "measured": Mapping}.get(each.name, str)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise CheckpointError(f"card {self.name!r:.60}: {each.name} is {value!r:.60}; expected {kind.__name__}")
        if not all(isinstance(each, str) for each in self.seen_by) or not all(map(_figure, self.measured.values())):
            raise CheckpointError(f"card {self.name!r:.60}: seen_by holds names, and measured finite numbers")
        if not self.name or any(mark in self.name for mark in "/\\:,[]") or self.name.startswith("."):
            raise CheckpointError(f"card name {self.name!r} is no plain file name")
        if len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef"):
            raise CheckpointError(f"card {self.name}: sha256 is {self.sha256!r}; expected 64 hexadecimal digits")
        if self.group not in GROUPS:
            raise CheckpointError(f"card {self.name}: group is {self.group!r}; expected one of {', '.join(GROUPS)}")
        if self.role not in ROLES:
            raise CheckpointError(f"card {self.name}: role is {self.role!r}; expected one of {', '.join(ROLES)}")

    def to_json(self) -> str:
        """The card file's text."""
        told = {**asdict(self), "seen_by": list(self.seen_by)}
        if not self.base:
            del told["base"]
        return json.dumps(told, indent=2, ensure_ascii=True) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "card") -> Card:
        """Raises CheckpointError where the text is no card."""
        try:
            read = read_object(text)
            unknown = sorted(set(read) - {each.name for each in fields(cls)})
            if unknown:
                raise ValueError(f"unknown keys {', '.join(unknown)}")
            return cls(**{**read, "seen_by": tuple(read.get("seen_by", ()))})
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{source} is no model card: {error}") from error


def _figure(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def cards(folder: Path | None = None) -> tuple[Card, ...]:
    """Every card, by name."""
    where = FOLDER if folder is None else folder
    found = []
    for path in sorted(where.glob("*.json")):
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} can't be read as a model card: {error}") from error
        one = _card(text, str(path))
        if one.name != path.stem:
            raise CheckpointError(f"{path} is the card of {one.name!r}; a card's file is named after the model")
        found.append(one)
    return tuple(found)


@lru_cache(maxsize=256)
def _card(text: str, source: str) -> Card:
    return Card.from_json(text, source)


def card(name: str, folder: Path | None = None) -> Card:
    """The card of a model; UnknownName with the nearest where there is none."""
    known = {each.name: each for each in cards(folder)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        said = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; `advkit zoo` lists them all"
        raise UnknownName(f"the zoo has no model {name!r}{said}")
    return known[name]


def load(name: str, folder: Path | None = None) -> Any:
    """The model of a card, in evaluation mode on the CPU; CheckpointError where the weights are not the card's.

    A `TorchModel`, or a `Projected` around one where the card has a base.
    """
    where = FOLDER if folder is None else folder
    described = card(name, where)
    return _filtered(described, where) if described.base else _weights(described, where)


def _filtered(described: Card, where: Path) -> Projected:
    """The model of the card's base with the filter in the card's file."""
    from advkit.models.projected import load_projected

    base = card(described.base, where)
    if base.base or (base.model, base.task) != (described.model, described.task):
        raise CheckpointError(
            f"card {described.name}: its base {base.name} is {base.model} for {base.task}; expected weights of "
            f"{described.model} for {described.task}"
        )
    return load_projected(where / f"{described.name}.safetensors", _weights(base, where), sha256=described.sha256)


def _weights(described: Card, where: Path) -> TorchModel:
    from advkit.models.checkpoint import load_checkpoint

    name = described.name
    _check_own(described.model, f"card {name}")
    model = load_checkpoint(where / f"{name}.safetensors", sha256=described.sha256, architecture=described.model)
    model.name, model.license, model.source = described.name, described.licence, "advkit zoo"
    return model


def _check_own(spec: str, source: str) -> None:
    """Raise CheckpointError where a card names an architecture that is not advkit's own; cards may be others'."""
    from advkit.models import own_architecture

    if not own_architecture(spec):
        raise CheckpointError(f"{source} names the architecture {spec!r}; expected one of advkit's own, such as cnn")


def find(
    task: str = "", model: str = "", defense: str = "", *, role: str = "", folder: Path | None = None
) -> tuple[Card, ...]:
    """Cards whose task, model, defense and role are the ones said, "" standing for any; exact matches come first.

    A task or defense without arguments ("pgd_at") stands for every setting of it. A model's spec is taken literally:
    "cnn" is the CNN with default settings, and no other network answers to it.
    """
    found = [
        each
        for each in cards(folder)
        if _fits(task, each.task)
        and model in ("", each.model)
        and _fits(defense, each.defense)
        and role in ("", each.role)
    ]
    return tuple(sorted(found, key=lambda each: (defense not in ("", each.defense), task not in ("", each.task))))


def _fits(wanted: str, held: str) -> bool:
    return not wanted or wanted == held or (":" not in wanted and wanted == held.partition(":")[0])


def public(task: str = "", folder: Path | None = None) -> tuple[Card, ...]:
    """The surrogates of a task."""
    return find(task, role="public", folder=folder)


def publish(
    model: TorchModel | Projected, described: Mapping[str, Any], folder: Path | None = None, *, half: bool = True
) -> Card:
    """Write weights and card into a zoo folder and return the card.

    model:     of a `Projected` the filter alone is written, and the card names its model's card as the base
    described: the card's fields without sha256, size and model, which are taken from what is written
    half:      store the weights in float16; they are loaded as float32 with the rounded values. Filters stay float64
    """
    from advkit.models.checkpoint import save_checkpoint, write_atomically
    from advkit.models.projected import Projected

    where = FOLDER if folder is None else folder
    told = dict(described)
    if taken := sorted({"sha256", "size", "model"} & set(told)):
        raise UsageError(f"{', '.join(taken)} of a card come from the weights; leave them out")
    _check_own(model.architecture, "the model")
    draft = Card(**told, model=model.architecture, sha256="0" * 64, size=0)
    path = where / f"{draft.name}.safetensors"
    extra = {"task": draft.task, "defense": draft.defense, "seed": draft.seed}
    sha256 = (
        model.save(path, **extra)
        if isinstance(model, Projected)
        else save_checkpoint(model, path, extra=extra, half=half)
    )
    final = Card(**told, model=model.architecture, sha256=sha256, size=path.stat().st_size)
    write_atomically(where / f"{draft.name}.json", final.to_json().encode())
    return final


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """Zoo model: trained, shipped with the package, by the name on its card.

    name: as `advkit zoo` lists it
    """

    name: str

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> Any:
        model = load(self.name)
        held = model.space.shape
        if held is not None and tuple(shape) != tuple(held):
            raise BadModel(
                f"zoo:{self.name} was trained on samples of shape {list(held)}, this task's are {list(shape)}; "
                f"its task is {card(self.name).task}"
            )
        if classes != model.classes:
            wanted = f"has {classes}" if classes else "wants reconstructed samples"
            raise BadModel(f"zoo:{self.name} answers {model.classes} classes, this task {wanted}")
        return model
