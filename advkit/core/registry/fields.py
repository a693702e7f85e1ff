"""Values of a spec, typed by the annotations of the dataclass's fields and never evaluated."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from weakref import WeakKeyDictionary

from advkit.core.errors import AdvkitError, SpecError
from advkit.core.registry.grammar import Argument, is_group, nearest, parse_arguments, split, ungroup

T = TypeVar("T")

_TRUE = ("true", "yes", "1", "on")
_FALSE = ("false", "no", "0", "off")


class Misfit(Exception):
    """A text that does not fit a type; turned into a SpecError by whoever knows the field."""


@dataclasses.dataclass(frozen=True)
class Named:
    """In the annotation of a field that is a dataclass: its settings may begin with a name that stands for some.

    target: "module:function" from arguments to those that they stand for, imported when it is needed
    words:  what may be written, for errors and `advkit show`
    """

    target: str
    words: str

    def __call__(self, arguments: Sequence[Argument]) -> Sequence[Argument]:
        module, _, attribute = self.target.partition(":")
        found: Sequence[Argument] = getattr(importlib.import_module(module), attribute)(arguments)
        return found


def _named(kind: Any) -> Named | None:
    """What an annotation says of names; None where it says nothing."""
    marks = typing.get_args(kind)[1:] if typing.get_origin(kind) is typing.Annotated else ()
    return next((each for each in marks if isinstance(each, Named)), None)


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _plain(kind: Any) -> Any:
    """An annotation without Annotated and NewType."""
    while True:
        if typing.get_origin(kind) is typing.Annotated:
            kind = typing.get_args(kind)[0]
        elif isinstance(kind, typing.NewType):
            kind = kind.__supertype__
        else:
            return kind


def _item_kinds(kind: Any) -> tuple[Any, ...] | None:
    """None for an annotation that is no tuple, else the kinds of its items, ending in ... where any number will do."""
    origin = typing.get_origin(kind) or kind
    if origin not in (tuple, Sequence):
        return None
    arguments = typing.get_args(kind)
    if not arguments:
        return () if kind == tuple[()] else (str, ...)
    return (arguments[0], ...) if origin is Sequence else arguments


def describe_type(kind: Any) -> str:
    """An annotation in words a user can act on."""
    named = _named(kind)
    if named is not None:
        return f"{describe_type(_plain(kind))} | {named.words}"
    kind = _plain(kind)
    if kind in (None, type(None)):
        return "none"
    if _is_union(kind):
        return " or ".join(describe_type(one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return " | ".join(_plain_text(one) for one in typing.get_args(kind))
    items = _item_kinds(kind)
    if items is not None:
        if items and items[-1] is ...:
            return f"{describe_type(items[0])}s joined by +"
        return " + ".join(describe_type(one) for one in items) or "empty"
    if isinstance(kind, type):
        if kind is bool:
            return "true | false"
        if kind is str:
            return "text"
        if issubclass(kind, Enum):
            return " | ".join(member.name.lower() for member in kind)
        if dataclasses.is_dataclass(kind):
            return f"[key=value,...] of {kind.__name__}"
        return kind.__name__.lower() if kind in (int, float) or issubclass(kind, Path) else kind.__name__
    return kind if isinstance(kind, str) else str(kind).replace("typing.", "")


def _plain_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _to_float(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise Misfit from None
    if math.isnan(value):
        raise Misfit
    return value


def _to_enum(text: str, kind: type[Enum]) -> Enum:
    wanted = text.casefold().replace("-", "_")
    for same in (
        lambda member: text == member.name,
        lambda member: wanted == member.name.casefold(),
        lambda member: text.casefold() == str(member.value).casefold(),
    ):
        for member in kind:
            if same(member):
                return member
    raise Misfit


def _union_order(kind: Any) -> int:
    """Where a union tries a member: what accepts least comes first, text last."""
    kind = _plain(kind)
    if typing.get_origin(kind) is Literal or (isinstance(kind, type) and issubclass(kind, Enum)):
        return 0
    if dataclasses.is_dataclass(kind):
        return 4
    if _item_kinds(kind) is not None:
        return 5
    return {type(None): -1, int: 1, float: 2, bool: 3, str: 9}.get(kind, 7)


def read(text: str, kind: Any, default: Any = None) -> Any:
    """The value of a text under an annotation. `default` is what a nested dataclass starts from."""
    named, kind = _named(kind), _plain(kind)
    if _is_union(kind):
        for one in sorted(typing.get_args(kind), key=_union_order):
            try:
                return read(text, one, default)
            except Misfit:
                continue
        raise Misfit
    items = _item_kinds(kind)
    if items is not None:
        return _read_tuple(text, items)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not is_group(text) and named is None:
            raise Misfit
        arguments: Sequence[Argument] = parse_arguments(ungroup(text), text)
        if not is_group(text) and [each.key for each in arguments] != [None]:
            raise Misfit
        given = read_fields(named(arguments) if named else arguments, kind, kind.__name__, default=default)
        return dataclasses.replace(default, **given) if isinstance(default, kind) else construct(kind, given, text)
    if kind in (None, type(None)):
        if text.casefold() == "none":
            return None
        raise Misfit
    text = ungroup(text)
    if typing.get_origin(kind) is Literal:
        for member in typing.get_args(kind):
            if text == _plain_text(member):
                return member
        raise Misfit
    if kind is str:
        return text
    if kind is bool:
        if text.casefold() in _TRUE + _FALSE:
            return text.casefold() in _TRUE
        raise Misfit
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise Misfit from None
    if kind is float:
        return _to_float(text)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _to_enum(text, kind)
    if isinstance(kind, type) and issubclass(kind, Path):
        return kind(text)
    raise Misfit


def _read_tuple(text: str, items: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = [part.strip() for part in split(text, "+", text)] if text else []
    if items and items[-1] is ...:
        kinds: Sequence[Any] = [items[0]] * len(parts)
    elif len(items) == len(parts):
        kinds = items
    else:
        raise Misfit
    return tuple(
        read(ungroup(part) if _item_kinds(_plain(kind)) is not None else part, kind)
        for part, kind in zip(parts, kinds, strict=True)
    )


def write(value: Any, kind: Any, *, item: bool = False, default: Any = None) -> str:
    """The text that read turns into the value; Misfit where there is none."""
    kind = _plain(kind)
    if value is None:
        return "none"
    if isinstance(value, Enum):
        return value.name.lower()
    if isinstance(value, bool):
        return _plain_text(value)
    if isinstance(value, tuple):
        one = next((each for each in _members(kind) if _item_kinds(each) is not None), None)
        items = (str, ...) if one is None else cast("tuple[Any, ...]", _item_kinds(one))
        kinds = [items[0]] * len(value) if items and items[-1] is ... else list(items)
        if len(kinds) != len(value):
            raise Misfit
        text = "+".join(write(each, one, item=True) for each, one in zip(value, kinds, strict=True))
        return f"[{text}]" if item or (len(value) == 1 and text.casefold() == "none") else text
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        start = default if type(default) is type(value) else None
        return f"[{','.join(write_fields(value, start))}]"
    if isinstance(value, float) or (isinstance(value, int) and float in _members(kind) and int not in _members(kind)):
        text = _float_text(float(value))
        return f"[{text}]" if item and "+" in text else text
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str | Path):
        return _guard(str(value), item)
    raise Misfit


def _members(kind: Any) -> tuple[Any, ...]:
    return tuple(_plain(one) for one in typing.get_args(kind)) if _is_union(kind) else (kind,)


def _float_text(value: float) -> str:
    """The shortest text, or k/255 where the value is exactly that and the decimal would be long."""
    text = repr(value)
    if len(text) > 8 and 0 < abs(value) < 1:
        numerator = round(value * 255)
        if numerator / 255 == value:
            return f"{numerator}/255"
    return text


def _guard(text: str, item: bool) -> str:
    """Text in brackets where it would be read as something else."""
    try:
        loose = len(split(text, ",", text)) > 1 or (item and len(split(text, "+", text)) > 1)
    except SpecError:
        raise Misfit from None
    special = text.casefold() == "none" or (item and not text)
    return f"[{text}]" if loose or special or is_group(text) or text != text.strip() else text


# A class is asked for its hints at every building, and telling them takes Python longer than the building.
_KNOWN_HINTS = WeakKeyDictionary[type, dict[str, Any]]()


def _hints(cls: type) -> dict[str, Any]:
    """Annotations of the dataclass fields; text where one names something that is imported for type checkers only."""
    if cls not in _KNOWN_HINTS:
        _KNOWN_HINTS[cls] = _told_hints(cls)
    return _KNOWN_HINTS[cls]


def _told_hints(cls: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except (NameError, AttributeError):
        pass
    hints: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        for name, annotation in inspect.get_annotations(base).items():
            alone = type("_Alone", (), {"__annotations__": {name: annotation}, "__module__": base.__module__})
            try:
                hints.update(typing.get_type_hints(alone, include_extras=True))
            except (NameError, AttributeError):
                hints[name] = annotation
    return hints


def fields_of(cls: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """The fields that a spec may fill, with their types, in order."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = _hints(cast(type, cls))
    return {each.name: (each, hints.get(each.name, each.type)) for each in dataclasses.fields(cls) if each.init}


def default_of(each: dataclasses.Field[Any]) -> Any:
    if each.default is not dataclasses.MISSING:
        return each.default
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return dataclasses.MISSING


def read_fields(
    arguments: Sequence[Argument],
    cls: type,
    owner: str,
    *,
    prefix: bool = False,
    default: Any = None,
    advice: Callable[[str, Collection[str]], str] | None = None,
) -> dict[str, Any]:
    """The constructor's keywords that the arguments spell.

    advice: what to say of a key that is no field, of these fields; "" for nothing
    """
    fields = fields_of(cls)
    has = f"{owner} has {', '.join(fields)}" if fields else f"{owner} has no fields"
    given: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        key, text = argument.key, argument.value
        if prefix and position == 0 and fields and key not in fields:
            key, text = next(iter(fields)), argument.text
        if key is None:
            raise SpecError(
                f"{owner}: {argument.text!r} is not of the form key=value{_meant(text, fields, owner)}; {has}"
            )
        if key not in fields:
            said = advice(key, fields) if advice is not None else ""
            raise SpecError(f"{owner} has no field {key!r}{f'; {said}' if said else nearest(key, fields)}; {has}")
        if key in given:
            raise SpecError(f"{owner}: {key} is given twice; once is enough")
        each, kind = fields[key]
        start = default_of(each) if default is None else getattr(default, key)
        try:
            given[key] = read(text, kind, start)
        except Misfit:
            raise SpecError(f"{owner}: {key} expects {describe_type(kind)}, not {text!r}; {has}") from None
        except AdvkitError as error:  # of a nested dataclass
            told_of(f"{key}={text}", error)
            raise
    return given


def _meant(text: str, fields: Mapping[str, tuple[dataclasses.Field[Any], Any]], owner: str) -> str:
    """`; did you mean linf:eps=8/255?` where one field has to be given and could be this, else nothing."""
    needed = [name for name, (each, _) in fields.items() if default_of(each) is dataclasses.MISSING]
    if len(needed) != 1:
        return ""
    try:
        read(text, fields[needed[0]][1])
    except (Misfit, AdvkitError):
        return ""
    return f"; did you mean {f'{owner}:{needed[0]}={text}'!r}?"


def told_of(part: str, error: AdvkitError) -> None:
    """Put the part that an error speaks of before its message, unless a part inside it was put there already."""
    if not isinstance(error.args[0] if error.args else None, _Told):
        error.args = (_Told(f"in {part}: {error}"), *error.args[1:])


class _Told(str):
    """A message that says of which part it speaks."""


def construct(cls: Callable[..., T], given: Mapping[str, Any], text: str) -> T:
    """Call the class; what a constructor finds wrong with a value is the user's mistake, not a crash."""
    missing = [
        name
        for name, (each, _) in fields_of(cls).items()
        if default_of(each) is dataclasses.MISSING and name not in given
    ]
    if missing:
        wanted = ", ".join(f"{name}=..." for name in missing)
        raise SpecError(f"{text!r} does not say {wanted}; {getattr(cls, '__name__', cls)} needs it")
    try:
        return cls(**given)
    except AdvkitError:
        raise
    except (TypeError, ValueError) as error:
        raise SpecError(f"{text!r} was refused: {error}") from error


def _same(one: Any, other: Any) -> bool:
    try:
        return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)
    except (TypeError, ValueError, RuntimeError):  # tensors and arrays have no single truth
        return one is other


def write_fields(value: Any, start: Any = None, *, prefix: bool = False) -> list[str]:
    """The arguments that differ from the defaults (or from `start`), in the order of the fields."""
    parts = []
    for position, (name, (each, kind)) in enumerate(fields_of(type(value)).items()):
        # What was given, where a descriptor shows what was found in its place.
        held = vars(value)[name] if name in getattr(value, "__dict__", ()) else getattr(value, name)
        default = default_of(each) if start is None else getattr(start, name)
        positional = prefix and position == 0
        if not positional and default is not dataclasses.MISSING and _same(held, default):
            continue
        try:
            text = write(held, kind, default=default)
            if not _same(read(text, kind, default), held):
                raise Misfit
        except Misfit:
            raise SpecError(
                f"{type(value).__name__}.{name} = {held!r} cannot be written in a spec; pass the object itself"
            ) from None
        if positional:
            key = text.partition("=")[0].strip().replace("-", "_")
            parts.append(f"[{text}]" if not text or ("=" in text and key in fields_of(type(value))) else text)
        else:
            parts.append(f"{name}={text}")
    return parts


def shown(value: Any, kind: Any) -> str:
    try:
        return write(value, kind)
    except Misfit:
        return repr(value)
