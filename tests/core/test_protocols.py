"""Labels of attacks as values, and what an ability means to the type checker."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest
from typing_extensions import get_protocol_members, is_protocol

from advkit.core import protocols
from advkit.core.protocols import Label, Outcome, Record, WholeBatch, whole_batch


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("pgd", Label("pgd")),
        ("thorough/near-fab", Label("thorough", "near-fab")),
        ("thorough:targets=5/apgd-t", Label("thorough:targets=5", "apgd-t")),
        ("pgd:step_size=2/255", Label("pgd:step_size=2/255")),
        ("suite:eps=2/255/square", Label("suite:eps=2/255", "square")),
        ("pgd:steps=20,step_size=0.25@zoo:public-mlp", Label("pgd:steps=20,step_size=0.25", source="zoo:public-mlp")),
        ("mifgsm@path:runs/a@b/model.safetensors", Label("mifgsm", source="path:runs/a@b/model.safetensors")),
        ("online:inner=[pgd:step_size=1/4],k=5/submitted", Label("online:inner=[pgd:step_size=1/4],k=5", "submitted")),
        ("x:of=[a@b/c],n=3/last@here", Label("x:of=[a@b/c],n=3", "last", "here")),
        ("Mine:name=a[b/last@here", Label("Mine:name=a[b", "last", "here")),
        ("apgd-ce:steps=100@undefended", Label("apgd-ce:steps=100", source="undefended")),
        ("spiking:pgd,surrogate=ensemble/pdsg", Label("spiking:pgd,surrogate=ensemble", "pdsg")),
    ],
)
def test_a_label_is_read_as_it_was_written(text, label):
    assert Label.parse(text) == label
    assert str(label) == text


@pytest.mark.parametrize(
    ("text", "streams"),
    [
        ("pgd:steps=3", ("pgd", "")),
        ("pgd:steps=3@zoo:m", ("pgd", "zoo:m")),
        ("thorough:targets=5/apgd-t", ("apgd-t", "")),
        ("pgd:step_size=2/255", ("255", "")),  # so the streams of its records were always called
    ],
)
def test_random_streams_are_named_as_those_of_all_earlier_records(text, streams):
    assert Label.parse(text).streams == streams


def test_a_record_says_who_made_it():
    made = Record("a", "lean", Outcome.BROKEN, stage="near-fab", source="zoo:m")
    assert str(made.made_by) == "lean/near-fab@zoo:m"
    assert Record("a", "pgd:step_size=2/255", Outcome.BROKEN).made_by == Label("pgd:step_size=2/255")


def test_a_number_called_together_is_no_wish_for_the_whole_batch():
    @dataclass(frozen=True)
    class Several:
        together: int = 1

    assert isinstance(Several(), WholeBatch)
    assert not whole_batch(Several())
    assert whole_batch(Several(together=True))
    assert not whole_batch(Several(together=False))


MISSPELT = """
from advkit.core.protocols import Measures, Surrogates, Undefended
from torch import Tensor
from typing_extensions import override


class Reversed(Undefended):
    @property
    def undefendet(self) -> object:
        return None


class Told(Measures):
    @override
    def mesures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        return {}

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        return {}


def asked(threat: object) -> object:
    return threat.surogates if isinstance(threat, Surrogates) else Reversed()
"""


@pytest.mark.slow
def test_the_type_checker_sees_a_misspelt_ability(tmp_path):
    (tmp_path / "misspelt.py").write_text(MISSPELT, encoding="utf-8")
    root = Path(__file__).parents[2]
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file", str(root / "pyproject.toml"),
         "--cache-dir", str(root / ".mypy_cache"), str(tmp_path / "misspelt.py")],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    found = sorted(line for line in checked.stdout.splitlines() if "misspelt.py" in line and ": error: " in line)
    assert len(found) == 3, checked.stdout
    for line, words in zip(
        found, (("mesures", "[misc]"), ("surogates", "[attr-defined]"), ("Reversed", "[abstract]")), strict=True
    ):
        assert all(word in line for word in words), found
    with pytest.raises(TypeError, match="undefended"):
        exec(MISSPELT + "asked(None)", {})


def test_the_design_page_lists_every_ability_with_its_members():
    """And nothing that is none: the table is what one reads, so it must be true."""
    nouns = {"Attack", "Ball", "Model", "Perturb"}
    abilities = {
        name: set(get_protocol_members(each))
        for name, each in vars(protocols).items()
        if isinstance(each, type) and is_protocol(each) and each.__module__ == protocols.__name__
        if getattr(each, "_is_runtime_protocol", False) and name not in nouns
    }
    abilities["OnlineAttack"] -= {"needs", "__call__"}  # those of every attack
    page = (Path(__file__).parents[2] / "docs" / "design.md").read_text(encoding="utf-8")
    rows = [
        row.split("|") for row in page.partition("## Abilities")[2].partition("## ")[0].splitlines() if "| `" in row
    ]
    assert {row[2].strip(" `"): set(re.findall(r"`(\w+)`", row[3])) for row in rows} == abilities


def test_isinstance_of_a_protocol_asks_for_its_members_and_those_of_its_bases() -> None:
    """The same on Python 3.11, where members are gathered when the protocol is made, and later."""

    @protocols.runtime_checkable
    class Named(Protocol):
        name: str

        def call(self) -> int: ...

    @protocols.runtime_checkable
    class Aged(Named, Protocol):
        age: int

    class Whole:
        def __init__(self, **more: int) -> None:
            self.name = "whole"
            vars(self).update(more)

        def call(self) -> int:
            return 1

    class Blocked(Whole):
        call = None

    class Heir(Aged):
        def call(self) -> int:
            return 2

    assert isinstance(Whole(), Named)
    assert not isinstance(Whole(), Aged)
    assert isinstance(Whole(age=3), Aged)
    assert not isinstance(Blocked(), Named)
    assert not isinstance(3, Named)
    assert isinstance(Heir(), Aged)
    assert isinstance(Heir(), Named)
    assert isinstance(Heir(), Heir)
    assert not isinstance(Whole(age=3), Heir)
    assert get_protocol_members(Aged) == {"name", "call", "age"}
