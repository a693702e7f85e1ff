"""CONTRIBUTING's worked example is a real attack that keeps the laws."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from advkit.attacks.gradient.pgd import PGD
from advkit.core.errors import UsageError
from advkit.core.registry import Registry
from advkit.testing import check_attack

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of the example, imported from a file as a contributor would write it."""
    folder = tmp_path_factory.mktemp("contributed")
    source = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)[0]
    (folder / "contributed_ray.py").write_text(source, encoding="utf-8")
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module("contributed_ray")
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop("contributed_ray", None)


def test_the_loop_of_pgd_is_the_one_that_it_has() -> None:
    (loop,) = re.findall(r"^```python\n( +search = Search.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    assert inspect.getsource(PGD.__call__).endswith(loop)


@pytest.mark.slow
def test_the_example_keeps_the_laws(ray: Any) -> None:
    check_attack(ray.Ray(points=10))


def test_the_example_on_labels_keeps_the_laws() -> None:
    from dataclasses import dataclass

    from advkit.attacks.labels.base import LabelAttack, largest, with_flips
    from advkit.core.learners import margins

    (source,) = re.findall(r"^```python\n(@dataclass[^`]*class Loudest.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"LabelAttack": LabelAttack, "largest": largest, "with_flips": with_flips}
    names |= {"dataclass": dataclass, "margins": margins, "__name__": "builtins"}
    exec(source, names)
    check_attack(names["Loudest"]())


def test_the_example_is_built_and_explained_by_its_registry_line(ray: Any) -> None:
    (line,) = re.findall(r'^\s*("ray": "advkit\.attacks\.[\w.]+:\w+",)$', TEXT, re.MULTILINE)
    ((name, target),) = ast.literal_eval("{" + line + "}").items()
    assert target.replace(".", "/").startswith("advkit/attacks/gradient/ray:")
    attacks: Registry[Any] = Registry("attack", {name: f"contributed_ray:{target.partition(':')[2]}"})
    assert attacks.build("ray:points=20") == ray.Ray(points=20)
    assert all(field.doc for field in attacks.signature("ray").fields)
    with pytest.raises(UsageError, match="at least 1"):
        attacks.build("ray:points=0")


def test_the_example_of_a_scenario_keeps_the_laws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from advkit.evaluation.api import resolve
    from advkit.evaluation.scenarios import SCENARIOS
    from advkit.testing import check_scenario

    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
    (source,) = [block for block in blocks if "class Scouting(" in block]
    (tmp_path / "contributed_scouting.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("contributed_scouting")
    monkeypatch.setitem(SCENARIOS.table, "scouting", "contributed_scouting:Scouting")
    monkeypatch.setitem(SCENARIOS._folded, "scouting", "scouting")
    case = resolve("pgd:steps=3", task="digits", model="zoo:digits-mlp", threat_model=own.ScoutingLinf(eps=0.1), n=30)
    check_scenario(own.Scouting(), case)
    sys.modules.pop("contributed_scouting", None)
