"""`python:MODULE:NAME` names a part of the user's own in every registry, by one mechanism."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from advkit.attacks import ATTACKS
from advkit.attacks.transfer import PARTS
from advkit.core.code import own_code
from advkit.core.errors import SpecError, UnknownName, UsageError
from advkit.core.registry import Registry, outside
from advkit.defenses import DEFENSES
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.threat_models import GOALS, JUDGES, THREAT_MODELS

SOURCE = """
from dataclasses import dataclass
import functools
import torch
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.transfer.engine import Smooth
from advkit.core.protocols import Access
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.lp import Linf

@dataclass(frozen=True, kw_only=True)
class Ray:
    needs = Access.GRADIENTS
    points: int = 10
    size: float = 0.5
    inner: object = None
    def __call__(self, oracle, x, goal, ball, rng, /):
        return x

class Plain:
    needs = Access.SCORES
    def __call__(self, oracle, x, goal, ball, rng, /):
        return x

class Bare:
    def __call__(self, oracle, x, goal, ball, rng, /):
        return x

class Needy(Plain):
    def __init__(self, what):
        self.what = what

class Breaks(Plain):
    def __init__(self):
        raise ZeroDivisionError("oh")

def whole(oracle, x, goal, ball, rng, /):
    return x
whole.needs = Access.NOTHING

def make():
    return PGD(steps=3)

def number():
    return 3

ready = PGD(steps=7)
later = functools.partial(Ray, points=4)

class Inner:
    Deep = Ray

@dataclass(frozen=True, kw_only=True)
class Ball(Linf):
    pass

@dataclass(frozen=True, kw_only=True)
class Next:
    kind = "targeted"
    by: int = 1
    def __call__(self, labels, answer, rng, /):
        return Targeted((labels + self.by) % answer.shape[1])

class Open:
    needs_data, claims = False, ""
    def protect(self, model, data, rng, /):
        return model

def rows():
    return torch.rand(6, 1, 2, 2), torch.arange(6) % 3

class Half(Smooth):
    def __call__(self, gradient):
        return gradient / 2
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the working directory, which is on no path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own_parts_here.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.delitem(sys.modules, "own_parts_here", raising=False)
    return "python:own_parts_here"


@pytest.mark.parametrize(
    ("registry", "spec", "canonical"),
    [
        (ATTACKS, "Ray", "Ray"),
        (ATTACKS, "Ray,points=3,size=1/4", "Ray,points=3,size=0.25"),
        (ATTACKS, "Ray,points=10", "Ray"),
        (ATTACKS, "Inner.Deep,points=2", "Inner.Deep,points=2"),
        (ATTACKS, "Plain", "Plain"),
        (ATTACKS, "whole", "whole"),
        (ATTACKS, "make", "make"),
        (ATTACKS, "ready", "ready"),
        (ATTACKS, "later", "later"),
        (DEFENSES, "Open", "Open"),
        (THREAT_MODELS, "Ball,eps=0.1", "Ball,eps=0.1"),
        (GOALS, "Next,by=2", "Next,by=2"),
        (TASKS, "rows", "rows"),
        (PARTS, "Half", "Half"),
    ],
)
def test_a_spec_names_a_part_of_ones_own(mine: str, registry: Registry[Any], spec: str, canonical: str) -> None:
    """A class is made, with settings typed by its fields; a function is called; an object is the part itself."""
    asked = f"{mine}:{spec}"
    part = registry.build(asked)
    label = registry.label(part, asked)
    assert label == f"{mine}:{canonical}"
    again = registry.build(label)
    assert type(again) is type(part)
    assert registry.label(again, label) == label
    assert registry.names_part(asked)
    assert outside(asked), "whoever gets such a spec from a file is told"
    assert sys.path.count(str(Path.cwd())) == 0, "the path is given back"


def test_what_is_built_is_what_was_named(mine: str) -> None:
    assert ATTACKS.build(f"{mine}:Ray,points=3").points == 3
    assert ATTACKS.build(f" Python : [{mine.partition(':')[2]}:Ray] ").points == 10
    assert ATTACKS.build(f"{mine}:make").steps == 3
    assert ATTACKS.build(f"{mine}:ready") is ATTACKS.build(f"{mine}:ready")
    assert ATTACKS.build(f"{mine}:later").points == 4
    assert len(TASKS.build(f"{mine}:rows")) == 6
    assert ATTACKS.build(f"online:inner=[{mine}:Ray],k=2").attack.points == 10
    assert [type(part).__name__ for part in ATTACKS.build(f"transfer:mi+[{mine}:Half]").built] == ["MI", "Half"]


def test_objects_keep_their_labels(mine: str) -> None:
    """A part that was handed over is no `python:` spec, whatever was loaded before: its label is what folders know."""
    part = ATTACKS.build(f"{mine}:Ray,points=3")
    assert ATTACKS.label(part) == ATTACKS.label(part, part) == "Ray:points=3"


@pytest.mark.parametrize(
    ("registry", "spec", "error", "words"),
    [
        (ATTACKS, "", SpecError, "does not say which; expected python:MODULE:NAME"),
        (ATTACKS, ":", UsageError, "incomplete"),
        (ATTACKS, ":Absent", UnknownName, "has no 'Absent'"),
        (ATTACKS, ":Rya", UnknownName, "has no 'Rya'; did you mean 'Ray'"),
        (ATTACKS, ":Bare", UsageError, "is no attack: it lacks needs"),
        (ATTACKS, ":number", UsageError, "python:own_parts_here:number is no attack"),
        (ATTACKS, ":Needy", SpecError, "was refused"),
        (ATTACKS, ":Breaks", UsageError, "can't be made: ZeroDivisionError: oh"),
        (ATTACKS, ":Ray,pionts=3", SpecError, "did you mean 'points'"),
        (ATTACKS, ":Ray,points=many", SpecError, "expects int"),
        (ATTACKS, ":make,steps=3", SpecError, "takes no settings"),
        (ATTACKS, ":Plain,steps=3", SpecError, "no fields"),
        (ATTACKS, ":rows", UsageError, "python:own_parts_here:rows: 2 attacks at once"),
        (DEFENSES, ":Ray", UsageError, "is no defense"),
        (THREAT_MODELS, ":Ray", UsageError, "is no threat model"),
        (GOALS, ":Open", UsageError, "is no goal"),
        (TASKS, ":Ray", UsageError, "is no task"),
        (PARTS, ":Ray", UsageError, "lacks the base class Part"),
    ],
)
def test_what_is_no_part_is_refused_in_words(
    mine: str, registry: Registry[Any], spec: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error) as refused:
        registry.build(f"{mine}{spec}" if spec else "python:")
    assert words in str(refused.value)


def test_modules_that_do_not_import_are_said(mine: str) -> None:
    Path("raises_here.py").write_text("1 / 0\n")
    Path("wants_more.py").write_text("import no_such_package_at_all\n")
    Path("no_python.py").write_text("def (\n")
    for module, words in (
        ("no_module_here", "there is no Python module 'no_module_here'"),
        ("raises_here", "ZeroDivisionError"),
        ("wants_more", "no_such_package_at_all"),
        ("no_python", "SyntaxError"),
    ):
        with pytest.raises(UsageError, match=words):
            ATTACKS.build(f"python:{module}:Thing")


def test_registries_with_a_prefix_of_that_name_keep_it(mine: str) -> None:
    assert MODELS.build(f"{mine}:rows").target == "own_parts_here:rows"
    assert JUDGES.build(f"{mine}:number").function == "own_parts_here:number"
    assert MODELS.spec(MODELS.build(f"{mine}:rows")) == f"{mine}:rows"


def test_a_matrix_names_a_defense_before_the_model() -> None:
    assert outside("none@python:theirs:net")
    assert outside("python:theirs:Guard@zoo:a")
    assert not outside("bit-depth@zoo:a")


def test_code_of_ones_own_is_known_by_its_file(mine: str) -> None:
    """What is kept by content has to notice that a part was edited; advkit's own code has a hash of its own."""
    spec = f"{mine}:Ray"
    part = ATTACKS.build(spec)
    assert own_code(ATTACKS.build("pgd"), "pgd:steps=3", None, 3) == {}
    before = own_code(part)
    assert list(before) == ["own_parts_here"]
    assert own_code(f"online:inner=[{spec}],k=2") == before
    assert own_code(ATTACKS.build("online:inner=fgsm,k=2"), (1, (part,))) == before
    Path("own_parts_here.py").write_text(SOURCE + "\n# edited\n", encoding="utf-8")
    assert own_code(part) != before
