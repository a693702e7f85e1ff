"""A recipe as a YAML file: what a run trains, under which defense, and how.

    about: TRADES on digits, ten minutes on one core.   # text
    defense: trades:eps=0.1,beta=6                        # specs, as on the command line
    task: digits
    model: cnn:width=16
    recipe:                                               # fields of advkit.training.loop.Recipe
      epochs: 20
      lr: 1e-3

Values are read as texts and mean what they mean on the command line, so that none of YAML's own readings get in the way
(1e-3 is a text to YAML 1.1, `on` a truth value, 010 the number eight). Aliases, tags, repeated keys and files of more
than 64 KiB are refused: the file is data, from whomever it came.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from advkit.core.errors import AdvkitError, UnknownName, UsageError
from advkit.core.files import read_yaml_text
from advkit.core.registry import Argument, outside, parse_arguments, parse_spec
from advkit.core.registry.grammar import is_group, nearest, ungroup
from advkit.core.text import first_line

if TYPE_CHECKING:
    from advkit.training.loop import Recipe

PARTS = ("defense", "task", "model")
KEYS = ("about", *PARTS, "recipe")
ENDINGS = (".yaml", ".yml")
_EMPTY = ("", "~", "null", "Null", "NULL")
_ARCHITECTURES = ("timm", "torchvision")


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe as it was written.

    about:    text
    defense, task, model: specs; "" where the recipe does not say
    settings: fields of `Recipe` with their values as texts
    source:   the name or file it came from; "" for settings alone
    """

    about: str = ""
    defense: str = ""
    task: str = ""
    model: str = ""
    settings: tuple[Argument, ...] = ()
    source: str = ""

    @property
    def parts(self) -> dict[str, str]:
        """The specs by kind."""
        return {kind: getattr(self, kind) for kind in PARTS}

    def said(self, kind: str) -> str:
        """The spec of a kind of part, "" for none, where it names advkit's own parts or untrained networks alone.

        Raises UsageError for others: a file may not choose what code runs or what is fetched.
        """
        text = self.parts[kind]
        if found := [] if kind == "model" and _architecture(text) else outside(text):
            raise UsageError(
                f"{self.source}: {kind}: {text} names what is not advkit's own ({'; '.join(found)}); where you trust "
                f"the file, say it yourself: --{kind} {text}"
            )
        return text

    @property
    def papers(self) -> tuple[str, ...]:
        """arXiv identifiers that `about` cites."""
        return tuple(dict.fromkeys(f"arXiv:{each}" for each in re.findall(r"\b\d{4}\.\d{4,5}\b", self.about)))

    @property
    def text(self) -> str:
        """The settings as `key=value,...`."""
        return ",".join(each.text for each in self.settings)

    def recipe(self) -> Recipe:
        """The settings over the defaults of `Recipe`; raises UsageError where one is out of range."""
        from advkit.core.registry.fields import read_fields
        from advkit.training.loop import Recipe

        return Recipe(**read_fields(self.settings, Recipe, "recipe"))


def opened(text: str, shipped: Callable[[str], RecipeFile]) -> RecipeFile:
    """What `NAME[,key=value...]`, `FILE.yaml[,key=value...]` or `key=value,...` says; the latter settings win.

    shipped: the recipe of a name
    """
    first, *rest = parse_arguments(text) or (None,)
    if first is None or first.key is not None:
        return RecipeFile(settings=tuple(each for each in (first, *rest) if each is not None))
    name = ungroup(first.value)
    if name.casefold().endswith(ENDINGS):
        held = read_file(Path(name).expanduser(), name)
    elif "/" in name or Path(name).is_file():
        raise UsageError(f"recipe {name!r}: the name of a recipe file ends in .yaml")
    else:
        try:
            held = shipped(name)
        except UnknownName as error:
            raise UnknownName(f"{error}; a recipe is key=value,..., a name or FILE.yaml") from None
    given = {each.key for each in rest}
    kept = (each for each in held.settings if each.key not in given)
    return replace(held, settings=(*kept, *rest))


def read_file(path: Path, source: str, *, checked: bool = True) -> RecipeFile:
    """A recipe file; raises UsageError that names the file, the line and what is wrong with it.

    source:  what to call it
    checked: hold the settings against the fields of `Recipe`, which imports the training loop
    """
    text = read_yaml_text(path, "recipe", source)
    try:
        return _made(_mapping(text), source, checked)
    except _Fault as fault:
        raise UsageError(f"{source}, line {fault.line}: {fault}") from None


class _Fault(Exception):
    """What is wrong with a file, and in which line."""

    def __init__(self, line: int, words: str) -> None:
        super().__init__(words)
        self.line = line


@dataclass(frozen=True)
class _Value:
    """A value of the file: a text, the texts of a list, or the values of a mapping. None where nothing was written."""

    line: int
    held: str | list[str] | dict[str, _Value] | None


def _mapping(text: str) -> dict[str, _Value]:
    """The keys and values of the one document of the file."""
    import yaml

    try:
        events = _allowed(iter(yaml.parse(text, Loader=yaml.SafeLoader)))
        next(events)  # of the stream
        start = next(events)
        if not isinstance(start, yaml.DocumentStartEvent):
            raise _Fault(1, f"the file is empty; expected {', '.join(KEYS)}")
        top = _value(events, depth=0)
        next(events)  # the document's end
        further = next(events)
        if isinstance(further, yaml.DocumentStartEvent):
            raise _Fault(_line(further), "a second document; a recipe is one")
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or first_line(error)
        raise _Fault(1 if mark is None else mark.line + 1, f"no YAML ({said})") from None
    if not isinstance(top.held, dict):
        raise _Fault(top.line, f"expected keys and values: {', '.join(KEYS)}")
    return top.held


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _allowed(events: Iterator[Any]) -> Iterator[Any]:
    """The events of a file without aliases and tags."""
    import yaml

    for event in events:
        if anchor := getattr(event, "anchor", None):
            mark = f"*{anchor}" if isinstance(event, yaml.AliasEvent) else f"&{anchor}"
            raise _Fault(_line(event), f"{mark}: no anchors and aliases are read; write the value out")
        if getattr(event, "tag", None):
            raise _Fault(_line(event), f"the tag {event.tag!r}; tags are not read, only texts, lists and mappings")
        yield event


def _value(events: Iterator[Any], depth: int) -> _Value:
    """The value that begins with the next event."""
    import yaml

    event = next(events)
    line = _line(event)
    if isinstance(event, yaml.ScalarEvent):
        return _Value(line, None if event.style is None and event.value in _EMPTY else " ".join(event.value.split()))
    if isinstance(event, yaml.SequenceStartEvent):
        items: list[str] = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _Fault(_line(event), "a list of lists or of mappings; a recipe has lists of values alone")
            items.append(event.value.strip())
        return _Value(line, items)
    if depth > 1:
        raise _Fault(line, "keys and values too deep; a recipe has them at its top and below recipe:")
    found: dict[str, _Value] = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        if not isinstance(event, yaml.ScalarEvent):
            raise _Fault(_line(event), "a key that is no text")
        key = event.value.strip().replace("-", "_")
        if key in found:
            raise _Fault(_line(event), f"{key} is given twice; once is enough (first in line {found[key].line})")
        found[key] = _value(events, depth + 1)
    return _Value(line, found)


def _made(held: dict[str, _Value], source: str, checked: bool) -> RecipeFile:
    """The recipe, where all that it says can be read."""
    texts: dict[str, str] = {}
    settings: tuple[Argument, ...] = ()
    for key, value in held.items():
        if key not in KEYS:
            raise _Fault(value.line, f"unknown key {key!r}{_meant(key)}; expected {', '.join(KEYS)}")
        if value.held is None:
            raise _Fault(value.line, f"{key} has no value; write one or leave the line out")
        if key == "recipe":
            if not isinstance(value.held, dict):
                raise _Fault(value.line, "recipe expects keys and values below it, such as epochs: 30")
            settings = tuple(_setting(name, each) for name, each in value.held.items())
        elif not isinstance(value.held, str):
            raise _Fault(value.line, f"{key} expects a text, not a list or a mapping")
        else:
            texts[key] = value.held
    for kind in PARTS:
        if kind in texts:
            _check_spec(kind, texts[kind], held[kind].line)
    made = RecipeFile(**texts, settings=settings, source=source)
    if checked:
        _check(made, held)
    return made


def _check_spec(kind: str, text: str, line: int) -> None:
    try:
        spec = parse_spec(text)
    except AdvkitError as error:
        raise _Fault(line, f"{kind}: {error}") from None
    if kind == "defense" and any(each.key == "recipe" for each in spec.arguments):
        raise _Fault(line, "the defense has a recipe of its own; write its settings under recipe:")


def _check(made: RecipeFile, held: dict[str, _Value]) -> None:
    """Each setting alone, so that an error names its line, then all of them."""
    from advkit.core.registry.fields import read_fields
    from advkit.training.loop import Recipe

    settings: Any = held["recipe"].held if "recipe" in held else {}
    for each, value in zip(made.settings, settings.values(), strict=True):
        try:
            read_fields([each], Recipe, "recipe")
        except AdvkitError as error:
            raise _Fault(value.line, str(error)) from None
    try:
        made.recipe()
    except AdvkitError as error:
        raise _Fault(held["recipe"].line, f"recipe: {error}") from None


def _meant(key: str) -> str:
    """`; did you mean ...?` for a key that is none of the file's, or that belongs below `recipe`."""
    from advkit.core.registry.fields import fields_of
    from advkit.training.loop import Recipe

    return "; it is a setting: write it below recipe:" if key in fields_of(Recipe) else nearest(key, KEYS)


def _setting(key: str, value: _Value) -> Argument:
    """A line below `recipe:` as an argument of a spec."""
    if value.held is None:
        raise _Fault(value.line, f"{key} has no value; write one or leave the line out")
    if isinstance(value.held, dict):
        raise _Fault(value.line, f"{key} expects one value or a list, not keys and values")
    texts, item = ([value.held], False) if isinstance(value.held, str) else (value.held, True)
    text = "+".join(_guarded(each, item) for each in texts)
    return Argument(key, text, f"{key}={text}")


def _guarded(text: str, item: bool) -> str:
    """In brackets where a spec would cut it apart."""
    return f"[{text}]" if any(mark in text for mark in ("," + "+" * item)) and not is_group(text) else text


def _architecture(spec: str) -> bool:
    """Whether a spec is a network of timm or torchvision without weights, which fetches nothing."""
    if not spec:
        return False
    parsed = parse_spec(spec)
    name = [each for each in parsed.arguments if each.key is None]
    others = {each.key: each.value.casefold() for each in parsed.arguments if each.key is not None}
    return parsed.name in _ARCHITECTURES and len(name) == 1 and others in ({"pretrained": v} for v in ("false", "no"))
