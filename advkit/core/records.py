"""What a run leaves of a row: how it ended, which attack ended it, and what was measured of it."""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, ClassVar

from msgspec import NODEFAULT, Meta, Struct, field, structs


class Outcome(StrEnum):
    """How a row ended, as the harness judged it on the protected victim."""

    WRONG = "wrong"  # nothing to win: the clean answer was already wrong, or what the attacker wants
    ROBUST = "robust"  # the attack failed
    BROKEN = "broken"  # the goal was reached inside the threat model
    INVALID = "invalid"  # the attack left the threat model: never a win, always reported
    NON_FINITE = "non_finite"  # the victim answered NaN or infinity: robust accuracy becomes an interval
    ERROR = "error"  # the row raised; the message is in the record


_STAGE = re.compile(r"[A-Za-z_][\w.-]*")


@dataclass(frozen=True)
class Label:
    """Which attack made a record.

    attack: its canonical spec
    stage:  of a suite or a stream; empty where the attack was played as a whole
    source: the surrogate it was made on; empty where it was made on the victim

    As text `attack/stage@source`.
    """

    attack: str
    stage: str = ""
    source: str = ""

    def __str__(self) -> str:
        return self.attack + (f"/{self.stage}" if self.stage else "") + (f"@{self.source}" if self.source else "")

    @classmethod
    def parse(cls, text: str) -> Label:
        """A label that was written as text.

        Marks in brackets belong to a setting, and so does a `/` before a number (`eps=8/255`). The first `@` begins the
        source, which may hold any mark itself (`path:runs/a.safetensors`); the stage is a plain name.
        """
        open_ = _outside_brackets(text)
        at = next((i for i in open_ if text[i] == "@"), len(text))
        slash = next((i for i in reversed(open_) if i < at and text[i] == "/"), None)
        if slash is None or _STAGE.fullmatch(text, slash + 1, at) is None:
            return cls(text[:at], source=text[at + 1 :])
        return cls(text[:slash], text[slash + 1 : at], text[at + 1 :])

    @property
    def streams(self) -> tuple[str, str]:
        """Names of the attack's random streams: its registry name, or its stage, and its source.

        Settings are left out, so that ten more steps start where the shorter run started. Cut at the first marks,
        wherever they stand: so were the streams of all records that there are.
        """
        attack, _, source = str(self).partition("@")
        suite, _, stage = attack.partition("/")
        return stage or suite.partition(":")[0], source


@functools.lru_cache(maxsize=4096)
def _label(attack: str, stage: str, source: str) -> Label:
    """The one label of these words: records ask for it over and over, and there are few."""
    return Label(attack, stage, source)


def _outside_brackets(text: str) -> list[int]:
    """Positions outside brackets; all of them where brackets do not pair up."""
    depth, found = 0, []
    for position, character in enumerate(text):
        depth += (character == "[") - (character == "]")
        if depth < 0:
            break
        if depth == 0 and character != "]":
            found.append(position)
    return found if depth == 0 else list(range(len(text)))


Whole = Annotated[int, Meta(ge=-(2**63) + 1, le=2**63 - 1)]
"""A whole number of 64 bits: arrays of such are made of records."""
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Real = Whole | float


def _always(default: Any) -> Any:
    """A field that a line always has: msgspec leaves out those that hold what they do by default, where it can tell."""
    return field(default_factory=lambda: default)


class Record(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How one row ended under one attack; what a report says is computed from these alone.

    `margin` is the goal's margin of the victim's answer on the returned input and `closeness` that margin over the
    spread of the scores; `eight_bit` says whether the goal is still reached after rounding to 8 bits (None where that
    has no meaning). `measures` are what the threat model measures of the change beside its distance. `figures` are what
    goal and threat model say of the row whether it was broken or not; `trace` is what the attack noted step by step,
    evidence of how it went and of nothing else; `texts` are what was said of the row in words, `scores` rows of
    numbers: those by which a task ranks the rows against each other, and what a judge says of each reply (1 or 0).
    `stage` and `source` belong to the attack's `Label`. The last six stand in a file only where there are any.

    Made and read by the million, so it is a struct of msgspec: its types are what a line of a file must have.
    `dataclasses.replace`, `fields` and `asdict` take it as a dataclass.
    """

    id: str
    attack: str
    outcome: Outcome
    label: Whole | None = _always(None)
    clean: Whole | None = _always(None)  # the victim's decision on the clean row
    adversarial: Whole | None = _always(None)  # and on the returned one
    reached: bool = _always(False)  # the goal holds on the returned row (also where the clean row was already wrong)
    distance: Real | None = _always(None)
    margin: Real | None = _always(None)
    closeness: Real | None = _always(None)
    eight_bit: bool | None = _always(None)
    forwards: Count = _always(0)
    backwards: Count = _always(0)
    queries: Count = _always(0)
    notes: tuple[str, ...] = _always(())  # findings of this row: "non_finite", "zero_gradient"...
    message: str = _always("")
    measures: dict[str, Real] = field(default_factory=lambda: {})  # noqa: PIE807 (`dict` would be left out where empty)
    figures: dict[str, Real | bool] = field(default_factory=dict)
    trace: tuple[dict[str, Any], ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, tuple[Real, ...]] = field(default_factory=dict)
    stage: str = ""
    source: str = ""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __hash__(self) -> int:
        return hash((self.id, self.attack, self.stage, self.source, self.outcome, self.message))

    @property
    def made_by(self) -> Label:
        """The label of the attack that made it."""
        return _label(self.attack, self.stage, self.source)


def _as_dataclass() -> dict[str, dataclasses.Field[Any]]:
    """The record's fields as `dataclasses` knows them."""
    known: list[tuple[str, Any, Any]] = []
    for each in structs.fields(Record):
        factory = each.default_factory
        given = dataclasses.field(default=each.default) if each.default is not NODEFAULT else dataclasses.field()
        known.append(
            (each.name, each.type, given if factory is NODEFAULT else dataclasses.field(default_factory=factory))
        )
    return {each.name: each for each in dataclasses.fields(dataclasses.make_dataclass("Record", known))}


Record.__dataclass_fields__ = _as_dataclass()
