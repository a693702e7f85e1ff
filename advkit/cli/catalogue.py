"""What `advkit list` tells of a part beside its first line, read from the source so that nothing is imported.

A class says most of it itself: an attack which access it needs (`needs`), which goals it `serves` and the one threat
model it may be made for; a defense whether it trains (`needs_data`); a task its default threat model. What no class
says stands in the tables below, by the longest beginning of a target. A test imports every part and compares.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Mapping
from typing import Any, Final

from advkit.core.registry import imported_from, parse_spec, source_file
from advkit.threat_models import THREAT_MODELS
from advkit.training.recipes import RECIPES

Words = tuple[str, ...]
Facts = dict[str, str | Words]

ANY: Final = ("any",)
VARIES: Final = "varies"  # with the settings: an attack around another one needs what that one needs
OTHER: Final = "other"
IMAGES, EVENTS, TEXT = "images", "events", "text"

LABELS = "learns from labels"
"""Defenses that are ways to learn, and need data without training a model that is handed over."""

# In the order in which they are listed. Parts of other packages follow, under the name of their module's folder.
GROUPS: dict[str, Words] = {
    "attacks": (
        "gradient", "adaptive", "minimum norm", "query", "spatial", "universal", "corruptions", "ordered", "transfer",
        "events", "text", "stream", "labels", "suites", "peers",
    ),
    "defenses": (
        "none", "trains the model", "in front of any model", "inside the model", "smoothing", "filter", LABELS,
    ),
    "threat-models": ("ball", "minimum", "images", "events", "text", "transfer", "stream", "certificates", "labels"),
    "tasks": (IMAGES, EVENTS, TEXT),
    "recipes": ("cifar10", "cifar100", "imagenet"),
}  # fmt: skip

_GROUP: dict[str, str] = {
    "advkit.attacks.minimal": "minimum norm",
    "advkit.attacks.peers": "peers",
    "advkit.attacks.suites": "suites",
    "advkit.defenses.none": "none",
    "advkit.defenses.adversarial": "trains the model",
    "advkit.defenses.inputs": "in front of any model",
    "advkit.defenses.labels": LABELS,
    "advkit.defenses.inputs.ppl_filter": "filter",
    "advkit.defenses.representations": "inside the model",
    "advkit.defenses.smoothing": "smoothing",
    "advkit.threat_models.lp": "ball",
    "advkit.threat_models.sparse": "ball",
    "advkit.threat_models.minimum": "minimum",
    "advkit.threat_models.warps": IMAGES,
    "advkit.threat_models.patch": IMAGES,
    "advkit.threat_models.shared": IMAGES,
    "advkit.threat_models.corruptions": IMAGES,
    "advkit.threat_models.perceptual": IMAGES,
    "advkit.threat_models.events": "events",
    "advkit.threat_models.tokens": "text",
    "advkit.threat_models.transfer": "transfer",
    "advkit.threat_models.tapm": "transfer",
    "advkit.threat_models.online": "stream",
    "advkit.threat_models.certified": "certificates",
    "advkit.threat_models.labels": "labels",
}

_LP: Words = ("linf", "l2", "l1")
_NORMS: dict[str, Words] = {
    "advkit.attacks.gradient": (*_LP, "l0"),
    "advkit.attacks.adaptive": (*_LP, "l0"),
    "advkit.attacks.gradient.apgd": _LP,
    "advkit.attacks.gradient.targeted": _LP,
    "advkit.attacks.minimal": _LP,
    "advkit.attacks.query": _LP,
    "advkit.attacks.query.spsa": ("linf", "l2"),
    "advkit.attacks.query.simba": ("linf", "l2"),
    "advkit.attacks.query.one_pixel": ("l0",),
    "advkit.attacks.query.pixle": ("l0",),
    "advkit.attacks.transfer": _LP,
    "advkit.attacks.transfer.presets:PI": ("linf",),
    "advkit.attacks.suites": _LP,
    "advkit.attacks.stream": (*_LP, "l0"),
    "advkit.attacks.events.spiking": (*_LP, "l0"),
    "advkit.attacks.peers": (*_LP, "l0", "minimum-l2"),
}
_GOALS: dict[str, Words] = {
    "advkit.attacks.text": ("says",),
    "advkit.attacks.peers": ("untargeted", "targeted"),
}
_INPUTS: dict[str, Words] = {
    "advkit.threat_models": (IMAGES,),
    "advkit.threat_models.events": (EVENTS,),
    "advkit.threat_models.tokens": (TEXT,),
    "advkit.threat_models.online": (IMAGES, EVENTS),
    "advkit.defenses": (IMAGES,),
    "advkit.defenses.none": (IMAGES, EVENTS, TEXT),
    "advkit.defenses.labels": (IMAGES, EVENTS),
    "advkit.defenses.inputs.bit_depth": (IMAGES, EVENTS),
    "advkit.defenses.inputs.ppl_filter": (TEXT,),
    "advkit.tasks.npz": (IMAGES,),
    "advkit.tasks.maite": (IMAGES,),
    "advkit.tasks.prompts": (TEXT,),
}


def facts(kind: str, target: str) -> Facts:
    """Group and columns of the part behind a target, by the plural of its kind; {} for kinds without groups."""
    return _FACTS[kind](target) if kind in _FACTS else {}


def inputs_of_threat(spec: str) -> Words:
    """What the inputs are in which a threat model works, by its spec; () where that is not known."""
    if not spec or spec == VARIES:
        return ()
    name = parse_spec(spec).name
    return (_longest(_INPUTS, THREAT_MODELS.target(name)) or ()) if name in THREAT_MODELS else ()


def _attack(target: str) -> Facts:
    made_for = _text(_declared(target, "default_threat_model"))
    made = (parse_spec(made_for).name,) if made_for not in ("", VARIES) else ()
    norms = _words(_declared(target, "norms")) or made or _longest(_NORMS, target) or ()
    goals = _words(_declared(target, "serves")) or _longest(_GOALS, target) or ANY
    inputs = tuple(dict.fromkeys(each for norm in norms for each in inputs_of_threat(norm)))
    return {
        "group": _group("attacks", target),
        "access": _text(_declared(target, "needs")),
        "norms": norms,
        "goals": goals,
        "inputs": inputs,
    }


def _defense(target: str) -> Facts:
    trains, group = _text(_declared(target, "needs_data")) == "true", _group("defenses", target)
    return {
        "group": "trains the model" if trains and group != LABELS else group,
        "inputs": _longest(_INPUTS, target) or (),
    }


def _threat_model(target: str) -> Facts:
    return {
        "group": _group("threat-models", target),
        "inputs": _longest(_INPUTS, target) or (),
        "scenario": _text(_declared(target, "scenario")),
    }


def _task(target: str) -> Facts:
    default = _declared(target, "defaults")
    given = {each.arg: _text(each.value) for each in default.keywords} if isinstance(default, ast.Call) else {}
    threat = given.get("threat_model", "")
    inputs = inputs_of_threat(threat) or _longest(_INPUTS, target) or ()
    return {
        "group": inputs[0] if inputs else _group("tasks", target),
        "inputs": inputs,
        "threat_model": threat,
        "model": _short(given.get("model", "")),
    }


def _recipe(target: str) -> Facts:
    """What its file says, in groups by task."""
    parts = RECIPES.shipped(target.partition(":")[2].removesuffix(".yaml"), checked=False).parts
    return {"group": parse_spec(parts["task"]).name, **parts}


def _short(spec: str) -> str:
    """A spec without settings; what a prefix loads (`torchvision:resnet50`) is part of the name."""
    name, _, rest = spec.partition(":")
    return name if "=" in rest else spec


_FACTS: dict[str, Callable[[str], Facts]] = {
    "attacks": _attack,
    "defenses": _defense,
    "threat-models": _threat_model,
    "tasks": _task,
    "recipes": _recipe,
}


def _group(kind: str, target: str) -> str:
    listed: str | None = _longest(_GROUP, target)
    if listed is not None:
        return listed
    folders = target.partition(":")[0].split(".")[1:-1]
    return folders[-1] if folders and folders[-1] != kind.replace("-", "_") else OTHER


def _longest(table: Mapping[str, Any], target: str) -> Any:
    """The entry of the longest key that the target is or lies below; None where there is none."""
    below = [key for key in table if target == key or target.startswith((f"{key}.", f"{key}:"))]
    return table[max(below, key=len)] if below else None


def _text(value: ast.AST | None) -> str:
    """A text, a truth value or the member of an enum as one word; VARIES for what is computed, "" for None."""
    if value is None:
        return ""
    if isinstance(value, ast.Constant):
        return str(value.value) if isinstance(value.value, str) else str(value.value).lower()
    return value.attr.lower() if isinstance(value, ast.Attribute) else VARIES


def _words(value: ast.AST | None) -> Words:
    """The texts of a tuple or list; () for anything else."""
    if not isinstance(value, ast.Tuple | ast.List):
        return ()
    return tuple(_text(each) for each in value.elts)


def _declared(target: str, attribute: str) -> ast.AST | None:
    """What a class or the nearest of its bases says of an attribute: the value, or the function that computes it."""
    module, _, name = target.partition(":")
    found = _class(module, name)
    if found is None:
        return None
    home, cls = found
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name == attribute:
            return node
        if isinstance(node, ast.AnnAssign) and node.value and _is(node.target, attribute):
            return node.value
        if isinstance(node, ast.Assign) and any(_is(each, attribute) for each in node.targets):
            return node.value
    for base in cls.bases:
        named = base.value if isinstance(base, ast.Subscript) else base
        # protocols (advkit.core) say that there is such an attribute, not what it is
        if isinstance(named, ast.Name) and not home.startswith("advkit.core."):
            value = _declared(f"{home}:{named.id}", attribute)
            if value is not None:
                return value
    return None


def _is(target: ast.expr, name: str) -> bool:
    return isinstance(target, ast.Name) and target.id == name


def _class(module: str, name: str, hops: int = 4) -> tuple[str, ast.ClassDef] | None:
    """A class and its module: the one named, or the one that it imports the name from."""
    for node in _tree(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and hops:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _class(imported_from(node, module), alias.name, hops - 1)
    return None


@functools.cache
def _tree(module: str) -> tuple[ast.stmt, ...]:
    """The statements of a module's source, none where it has no source that can be read."""
    path = source_file(module)
    try:
        return tuple(ast.parse(path.read_text(encoding="utf-8")).body) if path else ()
    except (OSError, SyntaxError, ValueError):
        return ()
