"""Changed specs of every registry, and what is done with those that are taken."""

from __future__ import annotations

import re
from functools import cache
from random import Random
from typing import Any

from advkit.attacks import ATTACKS
from advkit.core.errors import AdvkitError
from advkit.core.registry import Registry, parse_spec
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.evaluation.execute import preflight
from advkit.evaluation.plan import Request, plan
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.threat_models import GOALS, JUDGES, THREAT_MODELS

REGISTRIES: dict[str, Registry[Any]] = {
    "attack": ATTACKS, "defense": DEFENSES, "model": MODELS, "task": TASKS, "threat model": THREAT_MODELS,
    "goal": GOALS, "judge": JUDGES,
}  # fmt: skip
ROUNDS = 560
FETCH = ("hf:", "timm:", "torchvision:", "robustbench:", "python:", "classifier:")
"""Names that load what is not here: how the rest of their spec reads is the same grammar."""
WHOLE = {
    kind: tuple(filter(None, map(str.strip, lines.splitlines())))
    for kind, lines in {
        "attack": """
            spiking:pgd,surrogate=pdsg
            transfer:ni+si+ti+di
            foolbox:LinfPGD,settings=[steps=3]
            online:inner=[pgd:steps=3],k=10
            thorough
            pgd:steps=20,restarts=2,loss=margin,stop=false
            quadattack:k=5,budget=1x30
            beast:k=15,length=8""",
        "defense": """
            trades:eps=0.1,beta=6,recipe=[epochs=3,lr=0.1]
            pubdef:sources=zoo:digits-public-cnn+zoo:digits-public-mlp
            bit-depth:bits=3
            random-resize""",
        "model": """
            cnn:width=16
            mlp:hidden=64+32
            snn:widths=12+24,down=stride,hidden=0
            zoo:digits-mlp
            path:a.safetensors,architecture=[cnn:width=8]
            gguf:x.gguf,dtype=bfloat16""",
        "task": """
            digits
            fashion-mnist:size=14,test=20
            npz:path=a.npz,low=0,high=255
            folder:path=x,resize=32,crop=28,order=name
            prompts:set=general,room=20
            digits-dvs:frames=4,noise_rate=0.1
            events:path=x,frames=3""",
        "threat model": """
            linf:eps=8/255
            l2:eps=0.5,lattice=255
            l0:eps=10
            linf:eps=0.1,access=scores,queries=100
            flips:n=20
            transfer:sources=zoo:digits-public-cnn,eps=0.1
            tapm:eps=0.1
            minimum-l2
            online:k=5,ball=[linf:eps=0.1]
            suffix:length=20""",
        "goal": """
            untargeted
            targeted:how=next
            targeted:how=class,target=3
            ordered-topk:k=5
            says:judges=refusal+exact,max_tokens=30""",
        "judge": """
            refusal:phrases=[I am sorry]+[no]
            exact""",
    }.items()
}
ODD = (
    "", " ", "nan", "-nan", "inf", "-inf", "1e400", "-1", "0", "-0.0", "1/0", "8/", "/8", "1/2/3", "0x10", "1_000",
    "5.5", "1e3", "true", "none", "None", "[]", "[", "]", "[[1]]", "+", "1+2", "=", ",", ":", "\u0661\u0662",
    "9" * 5000, "1" + "0" * 30, "x" * 100_000,
    "\x1b[2J", "\u2028", "\ud800", "\0", "../../x", "pgd", "eps", "{}", "__class__", "%s" * 50, "[" * 4000,
    "[a=" * 3000,
)  # fmt: skip


def changed_specs(seed: int) -> list[tuple[int, str, str]]:
    """Number, kind and text of every spec."""
    found = []
    kinds = list(REGISTRIES)
    for turn in range(ROUNDS):
        rng = Random(f"{seed}|spec|{turn}")
        kind = kinds[turn % len(kinds)]
        seeds = [*WHOLE[kind], *(name for name in REGISTRIES[kind].names() if not name.startswith(FETCH))]
        text = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 1, 2))):
            try:
                text = rng.choice(_CHANGES)(text, kind, rng)
            except AdvkitError:  # no spec any more, by the change before
                break
        if not any(each in text for each in FETCH):
            found.append((turn, kind, text))
    return found


def _value(text: str, kind: str, rng: Random) -> str:
    places = [match.span() for match in re.finditer(r"(?<==)[^,\]]*", text)]
    if not places:
        return f"{text}{',' if ':' in text else ':'}{_key(kind, rng)}={rng.choice(ODD)}"
    start, end = rng.choice(places)
    return text[:start] + rng.choice(ODD) + text[end:]


@cache
def _keys(kind: str) -> tuple[str, ...]:
    registry = REGISTRIES[kind]
    names = {
        field.name
        for name in registry.names()
        if not name.startswith(FETCH)
        for field in registry.signature(name).fields
    }
    return (*sorted(names), "x", "Steps", "")


def _key(kind: str, rng: Random) -> str:
    return rng.choice(_keys(kind))


def _argument(text: str, kind: str, rng: Random) -> str:
    return f"{text}{',' if ':' in text else ':'}{_key(kind, rng)}={rng.choice(ODD)}"


def _likely(text: str, kind: str, rng: Random) -> str:
    """A number in place of another, or a setting with a number that it may well have."""
    number = rng.choice(
        ("0", "1", "2", "3", "7", "0.01", "0.3", "1.0", "12", "60", "8/255", "1e-3", "-2", "1000000000000")
    )
    places = [match.span() for match in re.finditer(r"(?<==)[0-9./e-]+(?=[,\]]|$)", text)]
    if places and rng.random() < 0.5:
        start, end = rng.choice(places)
        return text[:start] + number + text[end:]
    own = parse_spec(text).name if text.partition(":")[0] else ""
    fields = REGISTRIES[kind].signature(own).fields if own in REGISTRIES[kind] else ()
    keys = [field.name for field in fields if field.type.startswith(("int", "float"))]
    return f"{text}{',' if ':' in text else ':'}{rng.choice(keys)}={number}" if keys else text


def _character(text: str, kind: str, rng: Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice((",", ":", "=", "[", "]", "+", " ", "\n", "\u2028", "\x07", "e", "1")) + text[at:]


def _dropped(text: str, kind: str, rng: Random) -> str:
    at = rng.randrange(len(text) + 1)
    return text[:at] + text[at + 1 :]


def _twice(text: str, kind: str, rng: Random) -> str:
    return text + "," + text.partition(":")[2] if rng.random() < 0.5 else text + text


def _other_kind(text: str, kind: str, rng: Random) -> str:
    return rng.choice([each for specs in WHOLE.values() for each in specs])


def _nested(text: str, kind: str, rng: Random) -> str:
    outer = rng.choice(
        (
            "online:inner=[{}]",
            "spiking:[{}]",
            "online:ball=[{}]",
            "path:x,architecture=[{}]",
            "pubdef:sources=[{}]+[{}]",
            "trades:recipe=[{}]",
        )
    )
    for _ in range(rng.choice((1, 2, 12))):
        text = outer.replace("{}", text)[:300_000]
    return text


def _deep(text: str, kind: str, rng: Random) -> str:
    """Inside one another, deeper than Python can call."""
    return "online:inner=[" * 600 + text + "]" * 600 if rng.random() < 0.3 else text


_CHANGES = (
    _value,
    _value,
    _likely,
    _likely,
    _likely,
    _likely,
    _likely,
    _argument,
    _character,
    _dropped,
    _twice,
    _other_kind,
    _nested,
    _deep,
)


def build(kind: str, spec: str) -> None:
    """Build a part and use it as far as that costs nothing: its own spec reads back, and it is planned on digits."""
    registry = REGISTRIES[kind]
    part = registry.build(spec)
    label = registry.label(part)
    assert registry.label(registry.build(label)) == label
    asked = {"attack": "fgsm", "task": "digits", "model": "zoo:digits-mlp", "n": 4, "device": "cpu", "beside": False}
    if kind == "attack":
        preflight(plan(Request(**{**asked, "attack": spec})).case)
    elif kind in ("threat model", "goal"):
        made = plan(Request(**{**asked, kind.replace(" ", "_"): spec}))
        preflight(made.case)
        made.case.digest()
    elif kind == "task" and part.space is not None:
        assert isinstance(part.space, Box) or part.space.shape
        str(part.defaults)
    elif kind == "judge":
        from advkit.threat_models.judges import Exchange

        assert len(part([Exchange("a", "I am sorry", "b")])) == 1
