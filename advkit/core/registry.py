"""Names for parts: lazy tables, entry points, and the spec grammar `name:key=value,key=value`.

A spec is a name, then after a colon comma-separated `key=value` pairs that fill the fields of a dataclass. Values are
typed by the fields' annotations and never evaluated. Brackets group: `attacks=[pgd:steps=20,restarts=2]+fgsm` is a
tuple of two texts, `recipe=[epochs=3]` sets fields of a nested dataclass, and `name=[a,b]` is the text `a,b`. A name
that ends in a colon in its table (`timm:`) is a prefix: what follows fills the first field.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from importlib.metadata import EntryPoint, EntryPoints, entry_points
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, cast

from advkit.core.errors import AdvkitError, SpecError, UnknownName, UsageError
from advkit.core.labels import settings_text

T = TypeVar("T")

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_TRUE = ("true", "yes", "1", "on")
_FALSE = ("false", "no", "0", "off")


@dataclass(frozen=True)
class Argument:
    """One comma-separated part of a spec.

    key:   the field it names, None where the part is a bare value
    value: the text after the `=`, brackets still on
    text:  the whole part as it was written
    """

    key: str | None
    value: str
    text: str


@dataclass(frozen=True)
class ParsedSpec:
    """A spec taken apart, before any type is known; str() gives it back in canonical spacing."""

    name: str
    arguments: tuple[Argument, ...] = ()

    def __str__(self) -> str:
        parts = [part.value if part.key is None else f"{part.key}={part.value}" for part in self.arguments]
        return f"{self.name}:{','.join(parts)}" if parts else self.name


@dataclass(frozen=True)
class FieldInfo:
    """A field as `advkit show` prints it; default is None where the field must be given."""

    name: str
    type: str
    default: str | None
    doc: str


@dataclass(frozen=True)
class Signature:
    """What a registered name stands for.

    doc:    the class docstring
    papers: arXiv identifiers that the module and class docstrings cite, in order
    """

    kind: str
    name: str
    target: str
    summary: str
    doc: str
    papers: tuple[str, ...]
    fields: tuple[FieldInfo, ...]


def parse_spec(text: str) -> ParsedSpec:
    """Take `name:key=value,...` apart; SpecError where it is not of that form."""
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not name:
        raise SpecError(f"{text!r} has no name; expected name:key=value,key=value")
    if any(mark in name for mark in ",=[]+"):
        hint = re.sub(r",", ":", text, count=1) if "," in name else None
        raise SpecError(
            f"{text!r} does not start with a name and a colon; expected name:key=value,key=value"
            + (f", perhaps {hint!r}" if hint else "")
        )
    return ParsedSpec(name, parse_arguments(rest, text) if colon else ())


def parse_arguments(text: str, whole: str | None = None) -> tuple[Argument, ...]:
    """Split `key=value,key=value` at the commas outside brackets; `whole` is the spec that an error quotes."""
    whole = text if whole is None else whole
    if not text.strip():
        return ()
    arguments = []
    for part in _split(text, ",", whole):
        part = part.strip()
        if not part:
            raise SpecError(f"{whole!r} has an empty argument; expected key=value between commas")
        key, equals, value = part.partition("=")
        if equals and _KEY.fullmatch(key.strip()):
            arguments.append(Argument(key.strip().replace("-", "_"), value.strip(), part))
        else:
            arguments.append(Argument(None, part, part))
    return tuple(arguments)


def _split(text: str, mark: str, whole: str) -> list[str]:
    """Split at `mark` outside brackets."""
    parts, depth, start = [], 0, 0
    for position, character in enumerate(text):
        if character == "[":
            depth += 1
        elif character == "]":
            depth -= 1
            if depth < 0:
                break
        elif character == mark and depth == 0:
            parts.append(text[start:position])
            start = position + 1
    if depth != 0:
        raise SpecError(f"{whole!r} has unbalanced brackets; every [ needs its ]")
    return [*parts, text[start:]]


def _is_group(text: str) -> bool:
    """Whether the first bracket of the text closes at its very end."""
    if not (text.startswith("[") and text.endswith("]")):
        return False
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth == 0:
            return position == len(text) - 1
    return False


def _ungroup(text: str) -> str:
    return text[1:-1] if _is_group(text) else text


class _Misfit(Exception):
    """A text that does not fit a type; turned into a SpecError by whoever knows the field."""


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
        raise _Misfit from None
    if math.isnan(value):
        raise _Misfit
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
    raise _Misfit


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


def _read(text: str, kind: Any, default: Any = None) -> Any:
    """The value of a text under an annotation. `default` is what a nested dataclass starts from."""
    kind = _plain(kind)
    if _is_union(kind):
        for one in sorted(typing.get_args(kind), key=_union_order):
            try:
                return _read(text, one, default)
            except _Misfit:
                continue
        raise _Misfit
    items = _item_kinds(kind)
    if items is not None:
        return _read_tuple(text, items)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not _is_group(text):
            raise _Misfit
        given = _read_fields(parse_arguments(_ungroup(text), text), kind, kind.__name__, default=default)
        return dataclasses.replace(default, **given) if isinstance(default, kind) else _construct(kind, given, text)
    if kind in (None, type(None)):
        if text.casefold() == "none":
            return None
        raise _Misfit
    text = _ungroup(text)
    if typing.get_origin(kind) is Literal:
        for member in typing.get_args(kind):
            if text == _plain_text(member):
                return member
        raise _Misfit
    if kind is str:
        return text
    if kind is bool:
        if text.casefold() in _TRUE + _FALSE:
            return text.casefold() in _TRUE
        raise _Misfit
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise _Misfit from None
    if kind is float:
        return _to_float(text)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _to_enum(text, kind)
    if isinstance(kind, type) and issubclass(kind, Path):
        return kind(text)
    raise _Misfit


def _read_tuple(text: str, items: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = [part.strip() for part in _split(text, "+", text)] if text else []
    if items and items[-1] is ...:
        kinds: Sequence[Any] = [items[0]] * len(parts)
    elif len(items) == len(parts):
        kinds = items
    else:
        raise _Misfit
    return tuple(
        _read(_ungroup(part) if _item_kinds(_plain(kind)) is not None else part, kind)
        for part, kind in zip(parts, kinds, strict=True)
    )


def _write(value: Any, kind: Any, *, item: bool = False, default: Any = None) -> str:
    """The text that _read turns into the value; _Misfit where there is none."""
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
            raise _Misfit
        text = "+".join(_write(each, one, item=True) for each, one in zip(value, kinds, strict=True))
        return f"[{text}]" if item or (len(value) == 1 and text.casefold() == "none") else text
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        start = default if type(default) is type(value) else None
        return f"[{','.join(_write_fields(value, start))}]"
    if isinstance(value, float) or (isinstance(value, int) and float in _members(kind) and int not in _members(kind)):
        text = _float_text(float(value))
        return f"[{text}]" if item and "+" in text else text
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str | Path):
        return _guard(str(value), item)
    raise _Misfit


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
        loose = len(_split(text, ",", text)) > 1 or (item and len(_split(text, "+", text)) > 1)
    except SpecError:
        raise _Misfit from None
    special = text.casefold() == "none" or (item and not text)
    return f"[{text}]" if loose or special or _is_group(text) or text != text.strip() else text


def _hints(cls: type) -> dict[str, Any]:
    """Annotations of the dataclass fields; text where one names something that is imported for type checkers only."""
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


def _fields(cls: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """The fields that a spec may fill, with their types, in order."""
    if not dataclasses.is_dataclass(cls):
        return {}
    hints = _hints(cast(type, cls))
    return {each.name: (each, hints.get(each.name, each.type)) for each in dataclasses.fields(cls) if each.init}


def _default(each: dataclasses.Field[Any]) -> Any:
    if each.default is not dataclasses.MISSING:
        return each.default
    if each.default_factory is not dataclasses.MISSING:
        return each.default_factory()
    return dataclasses.MISSING


def _nearest(name: str, names: Iterable[str]) -> str:
    """`; did you mean 'x' or 'y'?` or nothing."""
    typed, known = name.casefold(), list(names)
    # Somebody who types the beginning of a name means that name, whatever else is a letter away.
    begun = [one for one in known if typed and one.casefold().startswith(typed)]
    # Two letters swapped is the commonest slip of a quick hand, and the matcher counts it as two.
    swapped = [one for one in known if sorted(one.casefold()) == sorted(typed)]
    close = list(dict.fromkeys([*begun, *swapped, *difflib.get_close_matches(typed, known, n=3, cutoff=0.5)]))[:3]
    return f"; did you mean {' or '.join(repr(one) for one in close)}?" if close else ""


def _read_fields(
    arguments: Sequence[Argument], cls: type, owner: str, *, prefix: bool = False, default: Any = None
) -> dict[str, Any]:
    """The constructor's keywords that the arguments spell."""
    fields = _fields(cls)
    has = f"{owner} has {', '.join(fields)}" if fields else f"{owner} has no fields"
    given: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        key, text = argument.key, argument.value
        if prefix and position == 0 and fields and key not in fields:
            key, text = next(iter(fields)), argument.text
        if key is None:
            raise SpecError(f"{owner}: {argument.text!r} is not of the form key=value; {has}")
        if key not in fields:
            raise SpecError(f"{owner} has no field {key!r}{_nearest(key, fields)}; {has}")
        if key in given:
            raise SpecError(f"{owner}: {key} is given twice; once is enough")
        each, kind = fields[key]
        start = _default(each) if default is None else getattr(default, key)
        try:
            given[key] = _read(text, kind, start)
        except _Misfit:
            raise SpecError(f"{owner}: {key} expects {describe_type(kind)}, not {text!r}; {has}") from None
    return given


def _construct(cls: Callable[..., T], given: Mapping[str, Any], text: str) -> T:
    """Call the class; what a constructor finds wrong with a value is the user's mistake, not a crash."""
    missing = [
        name for name, (each, _) in _fields(cls).items() if _default(each) is dataclasses.MISSING and name not in given
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


def _write_fields(value: Any, start: Any = None, *, prefix: bool = False) -> list[str]:
    """The arguments that differ from the defaults (or from `start`), in the order of the fields."""
    parts = []
    for position, (name, (each, kind)) in enumerate(_fields(type(value)).items()):
        held = getattr(value, name)
        default = _default(each) if start is None else getattr(start, name)
        positional = prefix and position == 0
        if not positional and default is not dataclasses.MISSING and _same(held, default):
            continue
        try:
            text = _write(held, kind, default=default)
            if not _same(_read(text, kind, default), held):
                raise _Misfit
        except _Misfit:
            raise SpecError(
                f"{type(value).__name__}.{name} = {held!r} cannot be written in a spec; pass the object itself"
            ) from None
        if positional:
            key = text.partition("=")[0].strip().replace("-", "_")
            parts.append(f"[{text}]" if not text or ("=" in text and key in _fields(type(value))) else text)
        else:
            parts.append(f"{name}={text}")
    return parts


@functools.cache
def _installed() -> EntryPoints:
    """Every entry point of the environment, read once: the scan costs milliseconds per registry otherwise."""
    return cast(EntryPoints, entry_points())  # 3.11 returns its deprecated mapping, which selects all the same


def _fold(name: str) -> str:
    """Names differ neither by case nor by underscore against hyphen."""
    return name.casefold().replace("_", "-")


class Registry(Generic[T]):
    """One kind of part by name: a table of lazy targets, and the entry points of other packages.

    kind:  what an entry is called, singular ("attack", "threat model")
    table: name -> "module:attribute"; a name that ends in ":" is a prefix whose rest fills the first field
    group: entry-point group that adds names, "" for none; the table's names win
    """

    def __init__(self, kind: str, table: Mapping[str, str], group: str = "") -> None:
        self.kind = kind
        self.table = dict(table)
        self.group = group
        self._folded = {_fold(name): name for name in self.table}
        self._found: dict[str, EntryPoint] | None = None

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {len(self.table)} names, group={self.group!r})"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    @property
    def plural(self) -> str:
        """The word that `advkit list` takes."""
        return f"{self.kind}s".replace(" ", "-")

    def names(self) -> tuple[str, ...]:
        """Every name: the table's in their order, then those of other packages."""
        return (*self.table, *sorted(name for name in self._entries() if _fold(name) not in self._folded))

    def target(self, name: str) -> str:
        """The `module:attribute` behind a name; UnknownName where there is none."""
        known = self.known(name)
        return self.table[known] if known in self.table else self._entries()[known].value

    def known(self, name: str) -> str:
        """The name as the registry spells it; UnknownName with the nearest ones where there is none."""
        found = self._find(name)
        if found is None:
            near = _nearest(_fold(name), self.names())
            raise UnknownName(f"unknown {self.kind} {name!r}{near or ';'} `advkit list {self.plural}` lists them all")
        return found

    def load(self, name: str) -> type[T]:
        """The class behind a name, imported now."""
        known = self.known(name)
        module, _, attribute = self.target(known).partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            if known in self.table:
                raise
            raise UsageError(
                f"{self.kind} {known!r} comes from the installed entry point {module}:{attribute}, which does not "
                f"load ({error}); repair or uninstall that package"
            ) from error
        return cast("type[T]", found)

    def build(self, spec: str | T) -> T:
        """The instance that a spec describes; an object that is no text is handed back as it is."""
        if not isinstance(spec, str):
            return spec
        parsed = parse_spec(spec)
        known = self.known(parsed.name)
        cls = self.load(known)
        prefix = known.endswith(":")
        if prefix and not parsed.arguments:
            first = next(iter(_fields(cls)), "a value")
            raise SpecError(f"{spec!r} does not say which; expected {known}{first.upper()}")
        given = _read_fields(parsed.arguments, cls, known.rstrip(":"), prefix=prefix)
        return _construct(cls, given, spec)

    def name_of(self, part: object) -> str:
        """The name under which an object's class is registered; UnknownName where it is not."""
        cls = part if isinstance(part, type) else type(part)
        home = f"{cls.__module__}:{cls.__qualname__}"
        names = self.names()
        for name in names:
            if self.target(name) == home:
                return name
        for name in names:  # a target may be an alias of the class; only modules already imported can hold it
            module, _, attribute = self.target(name).partition(":")
            if getattr(sys.modules.get(module), attribute, None) is cls:
                return name
        raise UnknownName(
            f"{cls.__module__}.{cls.__qualname__} is not a registered {self.kind}; pass the object itself"
        )

    def spec(self, part: object) -> str:
        """The canonical spec of an object: only what differs from the defaults, in the order of the fields."""
        name = self.name_of(part)
        prefix = name.endswith(":")
        parts = _write_fields(part, prefix=prefix) if dataclasses.is_dataclass(part) else []
        return f"{name.rstrip(':')}:{','.join(parts)}" if parts else name

    def label(self, part: object) -> str:
        """The canonical spec; a name and settings for a part that holds objects or that no registry holds.

        Parts with other settings get other labels: records and run folders are known by them.
        """
        try:
            return self.spec(part)
        except SpecError:
            name = self.name_of(part)
        except UnknownName:
            name = getattr(part, "__name__", type(part).__name__)
        settings = settings_text(part)
        return f"{name}:{settings}" if settings else name

    def summary(self, name: str) -> str:
        """What a name stands for: the first paragraph of its docstring, read without importing the module."""
        module, _, attribute = self.target(name).partition(":")
        doc = _glimpse(module, attribute) or self._docstrings(name)[1]
        return " ".join(doc.split("\n\n", 1)[0].split())

    def signature(self, name: str) -> Signature:
        """Everything that `advkit show` prints; imports the module."""
        known = self.known(name)
        cls = self.load(known)
        module_doc, doc = self._docstrings(known)
        described = _field_docs(cls)
        fields = []
        for key, (each, kind) in _fields(cls).items():
            default = _default(each)
            text = None if default is dataclasses.MISSING else _shown(default, kind)
            fields.append(FieldInfo(key, describe_type(kind), text, described.get(key, "")))
        cited = re.findall(r"\b\d\d(?:0[1-9]|1[0-2])\.\d{4,5}\b", f"{module_doc}\n{doc}")
        papers = tuple(dict.fromkeys(f"arXiv:{each}" for each in cited))
        return Signature(self.kind, known, self.target(known), self.summary(known), doc, papers, tuple(fields))

    def _entries(self) -> dict[str, EntryPoint]:
        if self._found is None:
            found = _installed().select(group=self.group) if self.group else ()
            self._found = {each.name: each for each in found}
        return self._found

    def _find(self, name: str) -> str | None:
        wanted = _fold(name.strip())
        for each in (wanted, f"{wanted.rstrip(':')}:"):
            if each in self._folded:
                return self._folded[each]
        for entry in self._entries():
            if _fold(entry) in (wanted, f"{wanted.rstrip(':')}:"):
                return entry
        return None

    def _docstrings(self, name: str) -> tuple[str, str]:
        """Docstrings of the module and of the class, from the source alone."""
        module, _, attribute = self.target(name).partition(":")
        return _read_docstrings(module, attribute.split(".")[0])


def _shown(value: Any, kind: Any) -> str:
    try:
        return _write(value, kind)
    except _Misfit:
        return repr(value)


def source_file(module: str) -> Path | None:
    """The file of a module, found without importing its parent packages."""
    top, *rest = module.split(".")
    try:
        found = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None
    if found is None:
        return None
    if not rest:
        return Path(found.origin) if found.origin and found.origin.endswith(".py") else None
    for folder in found.submodule_search_locations or ():
        base = Path(folder, *rest)
        for path in (base.with_name(f"{base.name}.py"), base / "__init__.py"):
            if path.is_file():
                return path
    return None


def _glimpse(module: str, attribute: str) -> str:
    """The docstring of a class, parsed without the rest of its file; "" where that is not enough to find it.

    Listing every name parses every file otherwise, which is most of the time that `advkit list` takes.
    """
    path = source_file(module)
    try:
        source = path.read_text(encoding="utf-8") if path else ""
    except (OSError, ValueError):
        return ""
    start = re.search(rf"^(?:class|def) {re.escape(attribute)}\b", source, re.MULTILINE)
    if start is None:
        return ""
    opening = source.find('"""', start.start())
    closing = source.find('"""', opening + 3)
    try:
        node = ast.parse(source[start.start() : closing + 3]).body[0]
    except (SyntaxError, ValueError, IndexError):
        return ""
    return (ast.get_docstring(node) or "") if isinstance(node, ast.ClassDef | ast.FunctionDef) else ""


def imported_from(node: ast.ImportFrom, module: str) -> str:
    """The full name of the module that an import statement of another one names."""
    if not node.level:
        return node.module or ""
    path = source_file(module)
    package = module if path and path.name == "__init__.py" else module.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return ".".join(filter(None, (package, node.module)))


def _read_docstrings(module: str, attribute: str, hops: int = 4) -> tuple[str, str]:
    path = source_file(module)
    if path is None:
        return "", ""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return "", ""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == attribute:
            return ast.get_docstring(tree) or "", ast.get_docstring(node) or ""
    for node in tree.body:  # re-exported: follow the import to where the class is written
        if isinstance(node, ast.ImportFrom) and hops:
            for alias in node.names:
                if (alias.asname or alias.name) == attribute:
                    return _read_docstrings(imported_from(node, module), alias.name, hops - 1)
    return ast.get_docstring(tree) or "", ""


def _field_docs(cls: type) -> dict[str, str]:
    """`name: meaning` paragraphs of the class docstrings; a deeper indented line goes on with the one above."""
    found: dict[str, str] = {}
    for base in cls.__mro__:
        names: list[str] = []
        indent = 0
        for line in inspect.cleandoc(base.__doc__).splitlines() if base.__doc__ else ():
            start = re.match(r"(\s*)([a-z]\w*(?:, [a-z]\w*)*):\s+(\S.*)", line)
            depth = len(line) - len(line.lstrip())
            if start and (not names or depth <= indent):
                names = [name for name in start[2].split(", ") if name not in found]
                indent = depth
                found.update(dict.fromkeys(names, start[3].strip()))
            elif names and line.strip() and depth > indent:
                found.update({name: f"{found[name]} {line.strip()}" for name in names})
            else:
                names = []
    return found
