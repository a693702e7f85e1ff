"""The registry: parts by name, from a table of lazy targets and from the entry points of other packages."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import EntryPoint
from typing import Any, Generic, TypeVar, cast

from advkit.core.checks import plain
from advkit.core.errors import AdvkitError, SpecError, UnknownName, UsageError
from advkit.core.labels import settings_text
from advkit.core.registry.contract import lacking, lacking_in, members_text
from advkit.core.registry.docs import FieldInfo, Signature, docstrings, field_docs, glimpse
from advkit.core.registry.familiar import Familiar, respelled
from advkit.core.registry.fields import (
    construct,
    default_of,
    describe_type,
    fields_of,
    read_fields,
    shown,
    told_of,
    write_fields,
)
from advkit.core.registry.grammar import ParsedSpec, fold, nearest, parse_spec
from advkit.core.registry.outside import scanned
from advkit.core.registry.own import PYTHON, imported, part_of, target_of

T = TypeVar("T")


@functools.cache
def _installed(group: str) -> dict[str, EntryPoint]:
    return {each.name: each for each in scanned().select(group=group)} if group else {}


@functools.cache
def _warn(kind: str, old: str, new: str) -> None:
    """Once per process: specs are built over and over."""
    warnings.warn(f"{kind} {old!r} is now spelled {new!r}", DeprecationWarning, stacklevel=4)


_inside: ContextVar[bool] = ContextVar("inside another part's construction", default=False)


@contextmanager
def _building(spec: str) -> Iterator[None]:
    """The construction of a part. An error inside a part that another one builds says which part it was, once."""
    nested = _inside.get()
    token = _inside.set(True)
    try:
        yield
    except AdvkitError as error:
        if nested:
            told_of(spec, error)
        raise
    finally:
        _inside.reset(token)


def _imported(target: str) -> Any:
    """What a `module:attribute` names."""
    module, _, attribute = target.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def _with_plain_numbers(part: Any) -> Any:
    """A frozen dataclass with Python's numbers in place of numpy's, which its spec and its report can't write."""
    parameters = getattr(type(part), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        return part
    given = {each.name: getattr(part, each.name, None) for each in dataclasses.fields(part) if each.init}
    numbers = {name: number for name, value in given.items() if (number := plain(value)) is not value}
    return dataclasses.replace(part, **numbers) if numbers else part


def _home(cls: type) -> str:
    """The `module:attribute` where a class is defined."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _short(part: object) -> str:
    """What an object looks like, on one line."""
    text = " ".join(repr(part).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


class Registry(Generic[T]):
    """One kind of part by name: a table of lazy targets, and the entry points of other packages.

    kind:       what an entry is called, singular ("attack", "threat model")
    table:      name -> "module:attribute"; a name that ends in ":" is a prefix whose rest fills the first field
    group:      entry-point group that adds names, "" for none; the table's names win
    contract:   what every part has: a protocol, a base class, or "module:attribute" of one, which is imported when it
                is needed. What an entry point names is refused (UsageError) where it lacks any; None: nothing is asked
    deprecated: old name -> new one; an old one builds what the new one does, with a DeprecationWarning
    objects:    objects handed over in place of a spec have every member of the contract, too
    familiar:   "module:attribute" of what users of other packages write (`Familiar`); "" for none

    `python:MODULE:NAME` names a part of the user's own in every registry that has no prefix of that name itself.
    """

    def __init__(
        self,
        kind: str,
        table: Mapping[str, str],
        group: str = "",
        *,
        contract: object = None,
        deprecated: Mapping[str, str] | None = None,
        objects: bool = False,
        familiar: str = "",
    ) -> None:
        self.kind = kind
        self.table = dict(table)
        self.group = group
        self.deprecated = dict(deprecated or {})
        self._contract = contract
        self._objects = objects
        self._familiar = familiar
        self._homes = frozenset(self.table.values())
        self._folded = {fold(name): name for name in self.table}
        self._older = {fold(name): name for name in self.deprecated}

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {len(self.table)} names, group={self.group!r})"

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._find(name) is not None or self._deprecated(name) is not None)

    @property
    def contract(self) -> type | None:
        """The protocol or base class of the parts."""
        return _imported(self._contract) if isinstance(self._contract, str) else cast("type | None", self._contract)

    @property
    def familiar(self) -> Familiar:
        """What users of other packages write."""
        return cast(Familiar, _imported(self._familiar)) if self._familiar else Familiar()

    @property
    def plural(self) -> str:
        """The word that `advkit list` takes."""
        return f"{self.kind}s".replace(" ", "-")

    def names(self) -> tuple[str, ...]:
        """Every name: the table's in their order, then those of other packages."""
        return (*self.table, *sorted(name for name in self._entries() if fold(name) not in self._folded))

    def target(self, name: str) -> str:
        """The `module:attribute` behind a name; UnknownName where there is none."""
        return self._target(self.known(name))

    def _target(self, known: str) -> str:
        return self.table[known] if known in self.table else self._entries()[known].value

    def known(self, name: str) -> str:
        """The name as the registry spells it; UnknownName with the nearest ones where there is none."""
        found = self._find(name)
        if found is None and (old := self._deprecated(name)) is not None:
            _warn(self.kind, old, self.deprecated[old])
            found = self._find(self.deprecated[old])
        if found is None:
            raise UnknownName(self._unknown(name))
        return found

    def _unknown(self, name: str) -> str:
        every = f"`advkit list {self.plural}` lists them all"
        if advice := respelled(name, self.names()) or self.familiar.named(name):
            end = "" if advice.endswith("?") else "." if "? " in advice else ";"
            return f"unknown {self.kind} {name!r}; {advice}{end} {every}"
        return f"unknown {self.kind} {name!r}{nearest(fold(name), self.names()) or ';'} {every}"

    def load(self, name: str) -> type[T]:
        """The class behind a name, imported now."""
        known = self.known(name)
        target = self.target(known)
        try:
            found = _imported(target)
        except (ImportError, AttributeError) as error:
            if known in self.table:
                raise
            raise UsageError(
                f"{self.kind} {known!r} comes from the installed entry point {target}, which does not "
                f"load ({error}); repair or uninstall that package"
            ) from error
        self._held_to_contract(known, found, lacking)
        return cast("type[T]", found)

    def _held_to_contract(self, known: str, part: object, missing: Callable[[object, type], list[str]]) -> None:
        """Refuse a part of another package that lacks members of its kind."""
        contract = None if known in self.table else self.contract
        if contract is not None and (names := missing(part, contract)):
            raise UsageError(
                f"{self.kind} {known!r} comes from the installed entry point {self.target(known)}, which lacks "
                f"{', '.join(names)}; expected {members_text(contract)}: update or uninstall that package"
            )

    def build(self, spec: str | T) -> T:
        """The instance that a spec describes; an object that is no text is handed back as it is.

        Raises UsageError for a class, and for an object that can't be a part of this kind.
        """
        if not isinstance(spec, str):
            return self._object(spec)
        try:
            return self._built(spec)
        except RecursionError:
            if _inside.get():
                raise
            raise SpecError(f"{spec!r} is nested too deeply: a part in a part in a part is enough") from None

    def _built(self, spec: str) -> T:
        parsed = parse_spec(spec)
        if self._is_own(parsed.name):
            return self._own(parsed, spec)
        known = self.known(parsed.name)
        cls = self.load(known)
        prefix = known.endswith(":")
        if prefix and not parsed.arguments:
            first = next(iter(fields_of(cls)), "a value")
            raise SpecError(f"{spec!r} does not say which; expected {known}{first.upper()}")
        advice = None if not self._familiar else self.familiar.set
        given = read_fields(parsed.arguments, cls, known.rstrip(":"), prefix=prefix, advice=advice)
        with _building(spec):
            part = construct(cls, given, spec)
        self._held_to_contract(known, part, lacking_in)
        return part

    def names_part(self, spec: str) -> bool:
        """Whether a spec begins with a name of this registry, or with `python:`."""
        name = spec.partition(":")[0]
        return name in self or self._is_own(name)

    def _is_own(self, name: str) -> bool:
        return fold(name.strip()) == PYTHON and self._find(PYTHON) is None

    def _own(self, parsed: ParsedSpec, spec: str) -> T:
        """The part of the user's own that a `python:` spec describes."""
        contract, target = self.contract, target_of(parsed)
        with _building(spec):
            found = imported(target)
            complete = contract is not None and not lacking_in(found, contract)
            if contract is not None and isinstance(found, type) and (names := lacking(found, contract)):
                raise UsageError(self._lacks(f"python:{target}", names, contract))
            return self._object(part_of(parsed, complete), f"python:{target}")

    def _object(self, part: Any, shown: str = "") -> T:
        """An object handed over or made by a module of the user's, once it is a part of this kind."""
        if not self._objects and not shown:
            return cast(T, part)
        if isinstance(part, type):
            raise UsageError(f"the {self.kind} is the class {part.__name__}; expected an object: {part.__name__}()")
        part = _with_plain_numbers(part)
        contract = None if _home(type(part)) in self._homes else self.contract
        if contract is None or not (names := lacking_in(part, contract)):
            return cast(T, part)
        try:
            other = self.familiar.other(part)
        except UsageError as error:
            error.args = (f"{shown}: {error}" if shown else str(error),)
            raise
        if other is not None:
            return cast(T, other)
        raise UsageError(self._lacks(shown or f"{_short(part)} ({type(part).__name__})", names, contract))

    def _lacks(self, shown: str, names: list[str], contract: type) -> str:
        example = next(iter(self.table), "name")
        return (
            f"{shown} is no {self.kind}: it lacks {', '.join(names)}; expected a spec such as {example}, or an object "
            f"with {members_text(contract)}"
        )

    def name_of(self, part: object) -> str:
        """The name under which an object's class is registered; UnknownName where it is not."""
        cls = part if isinstance(part, type) else type(part)
        home = _home(cls)
        names = self.names()
        for name in names:
            if self._target(name) == home:
                return name
        for name in names:  # a target may be an alias of the class; only modules already imported can hold it
            module, _, attribute = self._target(name).partition(":")
            if getattr(sys.modules.get(module), attribute, None) is cls:
                return name
        raise UnknownName(
            f"{cls.__module__}.{cls.__qualname__} is not a registered {self.kind}; pass the object itself"
        )

    def spec(self, part: object) -> str:
        """The canonical spec of an object: only what differs from the defaults, in the order of the fields."""
        name = self.name_of(part)
        prefix = name.endswith(":")
        parts = write_fields(part, prefix=prefix) if dataclasses.is_dataclass(part) else []
        return f"{name.rstrip(':')}:{','.join(parts)}" if parts else name

    def label(self, part: object, asked: object = None) -> str:
        """The canonical spec; a name and settings for a part that holds objects or that no registry holds.

        Parts with other settings get other labels: records and run folders are known by them.

        asked: what the part was built from; a `python:` spec names it again
        """
        if isinstance(asked, str) and self._is_own(asked.partition(":")[0]):
            return self._own_label(part, target_of(parse_spec(asked)))
        try:
            return self.spec(part)
        except SpecError:
            name = self.name_of(part)
        except UnknownName:
            name = getattr(part, "__name__", type(part).__name__)
        settings = settings_text(part)
        return f"{name.rstrip(':')}:{settings}" if settings else name

    def _own_label(self, part: object, target: str) -> str:
        """`python:MODULE:NAME`, with the settings of a dataclass."""
        name, settings = f"{PYTHON}:{target}", ""
        if dataclasses.is_dataclass(part) and imported(target) is type(part):
            try:
                settings = ",".join(write_fields(part))
            except SpecError:
                settings = settings_text(part)
        return f"{name},{settings}" if settings else name

    def summary(self, name: str) -> str:
        """What a name stands for: the first paragraph of its docstring, read without importing the module."""
        module, _, attribute = self.target(name).partition(":")
        doc = glimpse(module, attribute) or self._docstrings(name)[1]
        return " ".join(doc.split("\n\n", 1)[0].split())

    def signature(self, name: str) -> Signature:
        """Everything that `advkit show` prints; imports the module."""
        known = self.known(name)
        cls = self.load(known)
        module_doc, doc = self._docstrings(known)
        described = field_docs(cls)
        fields = []
        for key, (each, kind) in fields_of(cls).items():
            default = default_of(each)
            text = None if default is dataclasses.MISSING else shown(default, kind)
            fields.append(FieldInfo(key, describe_type(kind), text, described.get(key, "")))
        cited = re.findall(r"\b\d\d(?:0[1-9]|1[0-2])\.\d{4,5}\b", f"{module_doc}\n{doc}")
        papers = tuple(dict.fromkeys(f"arXiv:{each}" for each in cited))
        return Signature(self.kind, known, self.target(known), self.summary(known), doc, papers, tuple(fields))

    def _entries(self) -> dict[str, EntryPoint]:
        return _installed(self.group)

    def _deprecated(self, name: str) -> str | None:
        """A deprecated name as the registry spells it."""
        wanted = fold(name.strip()).rstrip(":")
        return self._older.get(wanted) or self._older.get(f"{wanted}:")

    def _find(self, name: str) -> str | None:
        wanted = fold(name.strip())
        for each in (wanted, f"{wanted.rstrip(':')}:"):
            if each in self._folded:
                return self._folded[each]
        for entry in self._entries():
            if fold(entry) in (wanted, f"{wanted.rstrip(':')}:"):
                return entry
        return None

    def _docstrings(self, name: str) -> tuple[str, str]:
        """Docstrings of the module and of the class, from the source alone."""
        module, _, attribute = self.target(name).partition(":")
        return docstrings(module, attribute.split(".")[0])
