"""What users of other packages write, and what it is called here.

A registry looks here only where it would refuse a name, a setting or an object anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def bare(name: str) -> str:
    """Letters and digits of a name in lower case: `C&W`, `c_w` and `CW` are one."""
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _nothing(_: Any) -> None:
    return None


@dataclass(frozen=True)
class Setting:
    """A setting by its name elsewhere.

    here:  the fields that it may be here
    words: what to know of them, a sentence of its own
    otherwise: advice where the part has none of these fields, "" for none
    """

    here: tuple[str, ...] = ()
    words: str = ""
    otherwise: str = ""

    def advice(self, fields: Collection[str]) -> str:
        """What to say to whoever wrote it for a part with these fields."""
        found = next((name for name in self.here if name in fields), None)
        if found is None:
            return self.otherwise
        return f"did you mean {found!r}?" + (f" {self.words}" if self.words else "")


def settings(*groups: tuple[str, Setting]) -> dict[str, Setting]:
    """Names, blanks between them, that stand for one setting each."""
    return {name: setting for names, setting in groups for name in names.split()}


@dataclass(frozen=True)
class Familiar:
    """Advice for one kind of part.

    names:    name (`bare`) -> advice, without a full stop at its end
    settings: name of a setting elsewhere -> what it is here
    guess:    advice for a name that is not in the table, None for none
    other:    a part made of an object that is none (a pair of tensors is a task), or None. Raises UsageError with
              advice where it knows what the object is
    """

    names: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Setting] = field(default_factory=dict)
    guess: Callable[[str], str | None] = _nothing
    other: Callable[[Any], Any] = _nothing

    def named(self, name: str) -> str:
        """Advice for an unknown name, "" for none."""
        if advice := self.names.get(bare(name)) or self.guess(name):
            return advice
        own = name.isidentifier() and Path(f"{name}.py").is_file()
        return f"what {name}.py holds is python:{name}:NAME" if own else ""

    def set(self, key: str, fields: Collection[str]) -> str:
        """Advice for a setting that a part with these fields does not have, "" for none."""
        known = self.settings.get(key.casefold())
        return "" if known is None else known.advice(fields)


def respelled(name: str, names: Collection[str]) -> str | None:
    """Advice where a known name has the same letters and digits: `apgdce` for `apgd-ce`."""
    same = next((known for known in names if bare(known) == bare(name)), None)
    return None if same is None else f"did you mean {same.rstrip(':')!r}?"
