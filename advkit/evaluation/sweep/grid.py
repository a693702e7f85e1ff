"""The grid of a sweep: a YAML file, its shape, and the cells that it stands for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from advkit.core.errors import UsageError
from advkit.core.files import read_yaml_text
from advkit.core.registry.grammar import nearest
from advkit.core.text import first_line
from advkit.evaluation.plan import Request, registries

EVERY = "all"
"""In place of specs: every name of the registry, with its default settings."""
AXES = {
    "attack": "attacks",
    "defense": "defenses",
    "task": "tasks",
    "model": "models",
    "threat_model": "threat_models",
    "goal": "goals",
    "seed": "seeds",
}
"""Field of a request -> key of the grid that lists its values."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Pattern(_Strict):
    """Cells to leave out: all whose parts match every pattern that is given (`fab*`; case counts)."""

    attack: str | None = None
    defense: str | None = None
    task: str | None = None
    model: str | None = None
    threat_model: str | None = None
    goal: str | None = None

    def matches(self, cell: Mapping[str, Any]) -> bool:
        """Whether it leaves a cell out."""
        given = self.model_dump(exclude_none=True)
        return bool(given) and all(fnmatchcase(str(cell[name]), pattern) for name, pattern in given.items())

    def __str__(self) -> str:
        return ", ".join(f"{name}={pattern}" for name, pattern in self.model_dump(exclude_none=True).items())


class Grid(_Strict):
    """A grid: every combination of its lists is a cell. A text stands for a list of one.

    attacks, defenses, tasks, models, threat_models, goals: specs; `all` stands for every name of the registry. A null
             among models, threat models and goals takes the attack's or the task's usual one
    seeds:   of the runs
    n, batch_size, device, speed: as of `advkit evaluate`, the same for all cells
    exclude: cells to leave out, by patterns of their parts
    """

    attacks: list[str] = Field(min_length=1)
    defenses: list[str] = Field(default=["none"], min_length=1)
    tasks: list[str] = Field(default=["fashion-mnist"], min_length=1)
    models: list[str | None] = Field(default=[None], min_length=1)
    threat_models: list[str | None] = Field(default=[None], min_length=1)
    goals: list[str | None] = Field(default=[None], min_length=1)
    seeds: list[int] = Field(default=[0], min_length=1)
    n: int | None = Field(default=None, ge=1)
    batch_size: int | None = Field(default=None, ge=1)
    device: str = "auto"
    speed: str = "fp32"
    exclude: list[Pattern] = []

    @field_validator(*AXES.values(), mode="before")
    @classmethod
    def _list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value

    @field_validator("exclude", mode="before")
    @classmethod
    def _one_pattern(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value

    def cells(self) -> Iterator[dict[str, Any]]:
        """Fields of a request for every combination, in the file's order; each combination once."""
        values = [self._every(field, getattr(self, key)) for field, key in AXES.items()]
        shared = {"n": self.n, "batch_size": self.batch_size, "device": self.device, "speed": self.speed}
        for chosen in dict.fromkeys(itertools.product(*values)):
            yield dict(zip(AXES, chosen, strict=True)) | shared

    def excluded(self, cell: Mapping[str, Any]) -> str:
        """Why a cell is left out; "" where it is not."""
        found = next((pattern for pattern in self.exclude if pattern.matches(cell)), None)
        return "" if found is None else f"excluded by the grid ({found})"

    @staticmethod
    def _every(field: str, given: list[Any]) -> list[Any]:
        if EVERY not in given:
            return list(given)
        names = registries()[field].names() if field in registries() else ()
        return [each for one in given for each in (names if one == EVERY else (one,))]


def read_grid(source: str | Path | Mapping[str, Any] | Grid) -> Grid:
    """The grid of a file, a mapping or itself; raises UsageError that says what is wrong where."""
    if isinstance(source, Grid):
        return source
    if isinstance(source, Mapping):
        return _checked(dict(source), "the grid")
    return _checked(_loaded(Path(source)), str(source))


def _loaded(path: Path) -> Any:
    import yaml

    text = read_yaml_text(path, "grid")
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise UsageError(f"{path}{line}: no YAML ({getattr(error, 'problem', None) or first_line(error)})") from None


def _checked(content: Any, source: str) -> Grid:
    if not isinstance(content, dict):
        raise UsageError(f"{source}: expected keys and lists ({', '.join(Grid.model_fields)})")
    try:
        return Grid.model_validate({str(key).replace("-", "_"): value for key, value in content.items()})
    except ValidationError as error:
        found = error.errors(include_url=False)
        first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])  # a slip, not an omission
        raise UsageError(f"{source}: {_words(first)}") from None
    except RecursionError:
        raise UsageError(f"{source}: nested too deep; a grid has lists of texts") from None


def _words(error: Mapping[str, Any]) -> str:
    """What pydantic says of one value, in our words."""
    place = [str(part) for part in error["loc"]]
    where = ".".join(place)
    if error["type"] == "extra_forbidden":
        known = list(Pattern.model_fields if place[0] == "exclude" else Grid.model_fields)
        return f"unknown key {place[-1]!r}{nearest(place[-1], known) or ';'} expected {', '.join(known)}"
    if error["type"] == "missing":
        return f"no {where}; name at least one, e.g. attacks: [pgd]"
    seen = error["input"]
    if isinstance(seen, dict) and place[0] in AXES.values():
        return f"{where} is a mapping; a spec with settings is one text without a space after the colon: pgd:steps=3"
    return f"{where} is {seen!r:.60}; {first_line(error['msg'])}"


REQUEST_DEFAULTS = Request()
"""What a command line leaves out."""
