"""The spec grammar and the registries that build from it."""

from __future__ import annotations

import importlib
import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as some

from advkit.attacks.gradient.pgd import PGD
from advkit.core.errors import AdvkitError, SpecError, UnknownName, UsageError
from advkit.core.protocols import Attack
from advkit.core.registry import Argument, ParsedSpec, Registry, parse_spec
from advkit.core.registry import table as registry_module
from advkit.core.registry.contract import lacking

if TYPE_CHECKING:
    from torch import Tensor


class Colour(StrEnum):
    RED = "red"
    DARK_BLUE = "dark blue"


class Level(IntEnum):
    NOTHING = 0
    ALL = 3


@dataclass(frozen=True, kw_only=True)
class Inner:
    epochs: int = 10
    lr: float = 1e-3
    name: str = "sgd"


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base that documents what it brings.

    inherited: comes from the base
    """

    inherited: int = 1


@dataclass(frozen=True, kw_only=True)
class Everything(Base):
    """One of each, in a sentence
    that wraps.

    steps:       gradient steps, long
                 enough to wrap: twice
    eps, budget: two at once

    Note: this is no field. See arXiv 1706.06083 and 2003.01690.
    """

    needs: ClassVar[int] = 7
    steps: int = 3
    eps: float = 8 / 255
    budget: int | None = None
    on: bool = False
    text: str = "word"
    maybe: str | None = None
    start: Literal["random", "origin"] = "random"
    colour: Colour = Colour.RED
    level: Level = Level.ALL
    attacks: tuple[str, ...] = ()
    mean: tuple[float, ...] | None = None
    pair: tuple[int, str] = (1, "a")
    grid: tuple[tuple[int, ...], ...] = ()
    recipe: Inner = Inner(epochs=7)
    other: Inner | None = None
    size: Annotated[float | Literal["auto"], "hint"] = "auto"
    folder: Path = Path(".")
    many: Sequence[int] = ()
    made: tuple[int, ...] = field(default_factory=lambda: (4, 5))
    tensor: Tensor | None = None
    derived: int = field(init=False, default=0)


@dataclass(frozen=True)
class File:
    """A file by its path."""

    path: str
    strict: bool = True


@dataclass(frozen=True)
class Picky:
    """Refuses what is negative."""

    number: int = 0

    def __post_init__(self) -> None:
        if self.number < 0:
            raise ValueError("number is negative")
        if self.number > 100:
            raise UsageError("number is above 100; give less")


class Simple:
    """No dataclass."""


@pytest.fixture(scope="module")
def parts() -> Registry[Any]:
    return Registry(
        "part",
        {
            "every-thing": f"{__name__}:Everything",
            "file:": f"{__name__}:File",
            "picky_one": f"{__name__}:Picky",
            "simple": f"{__name__}:Simple",
        },
    )


def test_a_spec_is_taken_apart_at_commas_outside_brackets() -> None:
    assert parse_spec("pgd") == ParsedSpec("pgd")
    parsed = parse_spec(" pgd : steps = 3 , attacks=[pgd:steps=2,eps=1]+fgsm,step-size=1")
    assert parsed.name == "pgd"
    assert [(part.key, part.value) for part in parsed.arguments] == [
        ("steps", "3"),
        ("attacks", "[pgd:steps=2,eps=1]+fgsm"),
        ("step_size", "1"),
    ]
    assert parse_spec(str(parsed)).arguments[1] == parsed.arguments[1]
    assert parse_spec("python:package.module:make").arguments == (
        Argument(None, "package.module:make", "package.module:make"),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps=50", {"steps": 50}),
        ("eps=8/255", {"eps": 8 / 255}),
        ("eps=1e-3", {"eps": 0.001}),
        ("eps=1e-3/2", {"eps": 0.0005}),
        ("eps=-.5", {"eps": -0.5}),
        ("eps=inf", {"eps": math.inf}),
        ("eps=3", {"eps": 3.0}),
        ("budget=5", {"budget": 5}),
        ("budget=none", {"budget": None}),
        ("on=true", {"on": True}),
        ("on=Yes", {"on": True}),
        ("on=1", {"on": True}),
        ("on=0", {"on": False}),
        ("on=no", {"on": False}),
        ("text=a=b:c/d", {"text": "a=b:c/d"}),
        ("text=[a,b=c]", {"text": "a,b=c"}),
        ("text=", {"text": ""}),
        ("text=none", {"text": "none"}),
        ("maybe=none", {"maybe": None}),
        ("maybe=[none]", {"maybe": "none"}),
        ("start=origin", {"start": "origin"}),
        ("colour=red", {"colour": Colour.RED}),
        ("colour=dark-blue", {"colour": Colour.DARK_BLUE}),
        ("colour=DARK_BLUE", {"colour": Colour.DARK_BLUE}),
        ("colour=dark blue", {"colour": Colour.DARK_BLUE}),
        ("level=nothing", {"level": Level.NOTHING}),
        ("level=3", {"level": Level.ALL}),
        ("attacks=pgd", {"attacks": ("pgd",)}),
        ("attacks=[pgd:steps=20,on=[a+b]]+fgsm", {"attacks": ("pgd:steps=20,on=[a+b]", "fgsm")}),
        ("attacks=", {"attacks": ()}),
        ("attacks=[]", {"attacks": ("",)}),
        ("mean=1/2+0.25+1e-3", {"mean": (0.5, 0.25, 0.001)}),
        ("mean=none", {"mean": None}),
        ("pair=2+b", {"pair": (2, "b")}),
        ("grid=[1+2]+[3]+[]", {"grid": ((1, 2), (3,), ())}),
        ("recipe=[epochs=3,name=[a,b]]", {"recipe": Inner(epochs=3, name="a,b")}),
        ("recipe=[lr=1/4]", {"recipe": Inner(epochs=7, lr=0.25)}),
        ("other=[lr=2]", {"other": Inner(lr=2.0)}),
        ("size=auto", {"size": "auto"}),
        ("size=1/2", {"size": 0.5}),
        ("folder=a/b", {"folder": Path("a/b")}),
        ("many=1+2", {"many": (1, 2)}),
        ("inherited=4", {"inherited": 4}),
        ("steps=1,on=1", {"steps": 1, "on": True}),
    ],
)
def test_values_are_typed_by_the_fields(parts: Registry[Any], text: str, expected: dict[str, Any]) -> None:
    built = parts.build(f"every-thing:{text}")
    assert built == Everything(**expected)
    for key, value in expected.items():
        assert type(getattr(built, key)) is type(value)
    assert parts.build(parts.spec(built)) == built


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("", ["has no name"]),
        (":steps=3", ["has no name"]),
        ("every-thing,steps=3", ["every-thing:steps=3"]),
        ("steps=3", ["name:key=value"]),
        ("every-thing:step=3", ["'step'", "did you mean 'steps'", "budget", "inherited"]),
        ("every-thing:derived=3", ["no field 'derived'"]),
        ("every-thing:needs=3", ["no field 'needs'"]),
        ("every-thing:steps=many", ["steps", "int", "'many'", "budget"]),
        ("every-thing:steps=1.5", ["steps", "int", "'1.5'"]),
        ("every-thing:eps=1/0", ["eps", "float", "'1/0'"]),
        ("every-thing:eps=nan", ["eps", "float"]),
        ("every-thing:eps=__import__('os')", ["eps", "float"]),
        ("every-thing:eps=2**3", ["eps", "float"]),
        ("every-thing:on=maybe", ["on", "true | false", "'maybe'"]),
        ("every-thing:budget=x", ["int or none"]),
        ("every-thing:start=middle", ["random | origin", "'middle'"]),
        ("every-thing:colour=green", ["red | dark_blue"]),
        ("every-thing:level=2", ["nothing | all"]),
        ("every-thing:mean=1+x", ["floats joined by +"]),
        ("every-thing:pair=1", ["int + text"]),
        ("every-thing:recipe=3", ["[key=value,...] of Inner"]),
        ("every-thing:recipe=[epoch=3]", ["Inner", "'epochs'"]),
        ("every-thing:recipe=[epochs=x]", ["Inner", "epochs", "int"]),
        ("every-thing:tensor=3", ["tensor", "Tensor"]),
        ("every-thing:steps", ["'steps'", "key=value"]),
        ("every-thing:steps=3,,on=1", ["empty argument"]),
        ("every-thing:steps=3,", ["empty argument"]),
        ("every-thing:steps=3,steps=4", ["steps", "twice"]),
        ("every-thing:attacks=[pgd", ["brackets"]),
        ("every-thing:attacks=pgd]", ["brackets"]),
        ("file", ["file:PATH"]),
        ("file:", ["file:PATH"]),
        ("file:a,b", ["'b'", "key=value"]),
        ("file:strict=no", ["path=..."]),
        ("picky_one:number=-1", ["picky_one:number=-1", "number is negative"]),
        ("simple:a=1", ["'a'", "no fields"]),
    ],
)
def test_what_does_not_fit_is_named(parts: Registry[Any], spec: str, words: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        parts.build(spec)
    for word in words:
        assert word in str(caught.value)


def test_a_constructors_own_error_passes_unchanged(parts: Registry[Any]) -> None:
    with pytest.raises(UsageError, match=r"^number is above 100; give less$"):
        parts.build("picky_one:number=101")


def test_unknown_names_get_their_neighbours(parts: Registry[Any]) -> None:
    with pytest.raises(UnknownName, match=r"unknown part 'everything'.*'every-thing'.*advkit list parts"):
        parts.build("everything:steps=3")
    with pytest.raises(UnknownName, match="advkit list parts"):
        parts.load("zzzzzz")


def test_names_forgive_case_underscores_and_hyphens(parts: Registry[Any]) -> None:
    assert parts.known("EVERY_THING") == "every-thing"
    assert parts.build("Picky-One:number=3") == Picky(3)
    assert parts.load("file") is parts.load("file:") is File
    assert "every_thing" in parts
    assert "nothing" not in parts
    assert 3 not in parts


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ("file:/a/b.safetensors", "/a/b.safetensors"),
        ("file:C:\\a b\\c=d.st", "C:\\a b\\c=d.st"),
        ("file:a=b", "a=b"),
        ("file:[a,b]", "a,b"),
        ("file:path=x", "x"),
        ("file:[path=x]", "path=x"),
        ("file:[strict=x]", "strict=x"),
    ],
)
def test_a_prefix_gives_the_rest_to_the_first_field(parts: Registry[Any], spec: str, path: str) -> None:
    assert parts.build(spec) == File(path)
    assert parts.build(parts.spec(File(path, strict=False))) == File(path, strict=False)


def test_objects_pass_through(parts: Registry[Any]) -> None:
    for thing in (Picky(3), 4, None, object()):
        assert parts.build(thing) is thing


def test_specs_print_only_what_differs_in_the_order_of_the_fields(parts: Registry[Any]) -> None:
    assert parts.spec(Everything()) == "every-thing"
    assert parts.spec(parts.build("every_thing:on=yes,eps=1e-3,recipe=[lr=1e-2],inherited=2,made=4+5")) == (
        "every-thing:inherited=2,eps=0.001,on=true,recipe=[lr=0.01]"
    )
    assert parts.spec(Everything(eps=4 / 255, size=1)) == "every-thing:eps=4/255,size=1.0"
    assert parts.spec(Everything(recipe=Inner())) == "every-thing:recipe=[epochs=10]"
    assert parts.spec(File("x")) == "file:x"
    assert parts.spec(Simple()) == "simple"


def test_what_no_spec_can_say_is_refused(parts: Registry[Any]) -> None:
    for thing in (
        Everything(text="a]"),
        Everything(eps=math.nan),
        Everything(tensor=object()),  # type: ignore[arg-type]
        Everything(pair=(1, "a", 2)),  # type: ignore[arg-type]
    ):
        with pytest.raises(SpecError, match="cannot be written in a spec"):
            parts.spec(thing)
    with pytest.raises(UnknownName, match="not a registered part"):
        parts.spec(Inner())


words = some.text(max_size=12) | some.text(alphabet="[]+,=: ab/none", max_size=12)
numbers = some.floats(allow_nan=False)
inners = some.builds(Inner, epochs=some.integers(), lr=numbers, name=some.sampled_from(["a", "a,b", "[x]", "", " "]))


def balanced(text: str) -> bool:
    while re.search(r"\[[^\[\]]*\]", text):
        text = re.sub(r"\[([^\[\]]*)\]", r"\1", text)
    return "[" not in text and "]" not in text


@pytest.mark.slow
@given(
    some.builds(
        Everything,
        steps=some.integers(),
        eps=numbers | some.integers(0, 255).map(lambda k: k / 255),
        budget=some.none() | some.integers(),
        on=some.booleans(),
        text=words,
        maybe=some.none() | words,
        start=some.sampled_from(["random", "origin"]),
        colour=some.sampled_from(Colour),
        level=some.sampled_from(Level),
        attacks=some.lists(words, max_size=3).map(tuple),
        mean=some.none() | some.lists(numbers, max_size=3).map(tuple),
        pair=some.tuples(some.integers(), words),
        grid=some.lists(some.lists(some.integers(), max_size=2).map(tuple), max_size=3).map(tuple),
        recipe=inners,
        other=some.none() | inners,
        size=numbers | some.just("auto"),
    )
)
def test_every_instance_survives_the_round_trip(thing: Everything) -> None:
    parts = Registry("part", {"every-thing": f"{__name__}:Everything"})
    texts = [thing.text, thing.maybe or "", thing.pair[1], *thing.attacks]
    if not all(map(balanced, texts)):
        with pytest.raises(SpecError, match="cannot be written"):
            parts.spec(thing)
        return
    spec = parts.spec(thing)
    again = parts.build(spec)
    assert again == thing
    assert parts.spec(again) == spec


@given(words)
def test_every_path_survives_the_round_trip(path: str) -> None:
    parts = Registry("part", {"file:": f"{__name__}:File"})
    if balanced(path):
        assert parts.build(parts.spec(File(path))) == File(path)


@pytest.mark.slow
@given(some.text(max_size=40) | some.text(alphabet="every-thing:steps=[]+,1 ", max_size=40))
def test_no_text_ends_in_anything_but_an_instance_or_our_error(text: str) -> None:
    parts = Registry("part", {"every-thing": f"{__name__}:Everything", "file:": f"{__name__}:File"})
    for spec in (text, f"every-thing:{text}", f"every-thing:steps={text}", f"file:{text}"):
        try:
            built = parts.build(spec)
        except AdvkitError:
            continue
        assert parts.build(parts.spec(built)) == built


def test_a_signature_says_type_default_and_meaning(parts: Registry[Any]) -> None:
    signature = parts.signature("every_thing")
    assert signature.name == "every-thing"
    assert signature.summary == "One of each, in a sentence that wraps."
    assert signature.papers == ("arXiv:1706.06083", "arXiv:2003.01690")
    by_name = {each.name: each for each in signature.fields}
    assert [*by_name][:3] == ["inherited", "steps", "eps"]
    assert "derived" not in by_name
    assert by_name["inherited"].doc == "comes from the base"
    assert (by_name["steps"].type, by_name["steps"].default) == ("int", "3")
    assert by_name["steps"].doc == "gradient steps, long enough to wrap: twice"
    assert by_name["eps"].default == "8/255"
    assert by_name["eps"].doc == by_name["budget"].doc == "two at once"
    assert by_name["tensor"].default == "none"
    assert by_name["made"].default == "4+5"
    assert parts.signature("file").fields[0].default is None


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, points: str, **modules: str) -> None:
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    info = folder / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[test.parts]\n{points}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    registry_module.scanned.cache_clear()
    registry_module._installed.cache_clear()


def test_other_packages_add_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        '"""A module."""\nfrom dataclasses import dataclass\n'
        '@dataclass(frozen=True)\nclass Far:\n    """From far away."""\n    steps: int = 1\n'
    )
    install(
        tmp_path,
        monkeypatch,
        "far_away = elsewhere_far:Far\nmine = elsewhere_far:Far\nbroken = elsewhere_missing:Nothing",
        elsewhere_far=source,
    )
    try:
        parts: Registry[Any] = Registry("part", {"mine": f"{__name__}:Picky"}, group="test.parts")
        assert parts.names() == ("mine", "broken", "far_away")
        assert parts.build("mine:number=1") == Picky(1)  # the table's names win
        assert parts.summary("far-away") == "From far away."
        assert "elsewhere_far" not in sys.modules  # listing imports nothing
        far = parts.build("far-away:steps=3")
        assert far.steps == 3
        assert parts.spec(far) == "far_away:steps=3"
        with pytest.raises(UsageError, match="elsewhere_missing"):
            parts.load("broken")
        assert Registry("part", {}).names() == ()
    finally:
        registry_module.scanned.cache_clear()
        registry_module._installed.cache_clear()
        sys.modules.pop("elsewhere_far", None)


ATTACKS_ELSEWHERE = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Whole:
    steps: int = 1
    needs = 0
    def __call__(self, oracle, x, goal, threat, rng, /):
        return x

@dataclass(frozen=True)
class Mute:
    steps: int = 1
    def __call__(self, oracle, x, goal, threat, rng, /):
        return x

@dataclass(frozen=True)
class Needy:
    needs: int

class Late:
    def __init__(self, forgets: bool = False):
        if not forgets:
            self.needs = 0
    def __call__(self, oracle, x, goal, threat, rng, /):
        return x

def made():
    return object()
"""


def test_what_lacks_the_members_of_its_kind_is_refused_when_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("Whole", "Mute", "Needy", "Late", "made")
    points = "\n".join(f"{name.lower()} = elsewhere_attacks:{name}" for name in names)
    install(tmp_path, monkeypatch, points, elsewhere_attacks=ATTACKS_ELSEWHERE)
    try:
        parts: Registry[Attack] = Registry("attack", {}, group="test.parts", contract=Attack)
        assert isinstance(parts.build("whole:steps=3"), Attack)
        with pytest.raises(UsageError, match=r"'mute' comes from .*attacks:Mute, which lacks needs; expected "):
            parts.load("mute")
        with pytest.raises(UsageError, match=r"lacks __call__; .*protocols\.Attack: needs, __call__\(oracle, x, goal"):
            parts.load("needy")  # a field without a default is there, the call is not
        assert isinstance(parts.build("late"), Attack)
        parts.load("made")  # what a function makes is seen when it is made
        with pytest.raises(UsageError, match="lacks needs, __call__"):
            parts.build("made")
        mine: Registry[Attack] = Registry("attack", {"mute": "elsewhere_attacks:Mute"}, contract=Attack)
        assert mine.load("mute").__name__ == "Mute"  # the table is ours, and the tests hold it to the contract
    finally:
        registry_module.scanned.cache_clear()
        registry_module._installed.cache_clear()
        sys.modules.pop("elsewhere_attacks", None)


@pytest.mark.parametrize(
    "home",
    [
        "attacks:ATTACKS",
        "defenses:DEFENSES",
        "models:MODELS",
        "models.spiking:RULES",
        "tasks:TASKS",
        "threat_models:GOALS",
        "threat_models:JUDGES",
        "threat_models:THREAT_MODELS",
    ],
)
def test_every_registered_part_has_the_members_of_its_kind(home: str) -> None:
    module, _, name = home.partition(":")
    registry: Registry[Any] = vars(importlib.import_module(f"advkit.{module}"))[name]
    assert registry.contract is not None
    assert {each: lacking(registry.load(each), registry.contract) for each in registry.table} == {
        each: [] for each in registry.table
    }


def test_a_deprecated_name_builds_and_says_once_what_it_is_called_now() -> None:
    table = {"picky": f"{__name__}:Picky", "nest:": f"{__name__}:Nest"}
    parts: Registry[Any] = Registry("part", table, deprecated={"choosy": "picky", "hole:": "nest:"})
    assert "choosy" in parts
    assert "choosy" not in parts.names()
    with pytest.warns(DeprecationWarning, match="part 'choosy' is now spelled 'picky'"):
        made = parts.build("choosy:number=2")
    assert (made, parts.spec(made)) == (Picky(2), "picky:number=2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parts.build("Choosy:number=3") == Picky(3)
    with pytest.warns(DeprecationWarning, match="'nest:'"):
        assert parts.build("hole:picky:number=4") == Nest("picky:number=4")


@dataclass(frozen=True)
class Nest:
    """Builds another part, or none."""

    inner: str = ""

    def __post_init__(self) -> None:
        if self.inner:
            NESTS.build(self.inner)


NESTS: Registry[Any] = Registry("part", {"picky": f"{__name__}:Picky", "nest": f"{__name__}:Nest"})


def test_an_error_inside_a_nested_part_says_which_part_it_was() -> None:
    with pytest.raises(UsageError) as alone:
        NESTS.build("picky:number=101")
    for outer in ("nest:inner=[picky:number=101]", "nest:inner=[nest:inner=[picky:number=101]]"):
        with pytest.raises(UsageError) as nested:
            NESTS.build(outer)
        assert str(nested.value) == f"in picky:number=101: {alone.value}"
        assert type(nested.value) is type(alone.value)


def test_an_error_inside_nested_fields_says_which_field_it_was() -> None:
    from advkit.defenses import DEFENSES

    with pytest.raises(
        UsageError, match=r"^in recipe=\[epochs=0\]: epochs is 0; expected a whole number of at least 1"
    ):
        DEFENSES.build("pgd_at:recipe=[epochs=0]")


def test_summaries_are_read_without_importing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "explosive"
    (package / "inner").mkdir(parents=True)
    bomb = "raise RuntimeError('imported')\n"
    (package / "__init__.py").write_text(bomb, encoding="utf-8")
    (package / "inner" / "__init__.py").write_text("from .deep import Deep as Renamed\n" + bomb, encoding="utf-8")
    (package / "inner" / "deep.py").write_text(f'{bomb}class Deep:\n    """Deep down."""\n', encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    parts: Registry[Any] = Registry(
        "part",
        {
            "deep": "explosive.inner.deep:Deep",
            "renamed": "explosive.inner:Renamed",
            "gone": "explosive.gone:Gone",
            "nowhere": "no_such_package_at_all.module:Thing",
        },
    )
    assert parts.summary("deep") == parts.summary("renamed") == "Deep down."
    assert parts.summary("gone") == parts.summary("nowhere") == ""


def own_names() -> list[tuple[str, str]]:
    from advkit.cli.list import REGISTRIES, registry_of

    return [(kind, name) for kind in REGISTRIES for name in registry_of(kind).table]


@pytest.mark.parametrize(("kind", "name"), own_names(), ids=lambda value: str(value))
def test_every_registered_name_loads_and_explains_itself(kind: str, name: str) -> None:
    from advkit.cli.list import registry_of

    signature = registry_of(kind).signature(name)
    assert signature.summary
    undocumented = [each.name for each in signature.fields if not each.doc]
    assert not undocumented


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("attack", PGD, ("is the class PGD", "PGD()")),
        ("attack", ["pgd", "fgsm"], ("2 attacks at once", "pgd and fgsm", "autoattack")),
        ("attack", 3.5, ("3.5", "float", "needs", "such as fgsm")),
        ("attack", lambda oracle, x, goal, threat, rng: x, ("function", "needs")),
        ("threat_model", 0.1, ("0.1", "radius", "linf:eps=0.1")),
        ("goal", object(), ("object", "kind")),
        ("defense", object(), ("object", "needs_data", "protect")),
    ],
)
def test_an_object_that_is_no_part_is_refused_by_what_it_lacks(setting, value, words):
    import advkit

    with pytest.raises(UsageError) as refused:
        advkit.evaluate(**{"attack": "pgd", "task": "digits", "n": 4, "device": "cpu", setting: value})
    for word in words:
        assert word in str(refused.value)
