"""`advkit rerun` of a stranger's report: nothing that it names runs unasked, and no edit of it passes for a rerun."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from advkit.core.registry import OUTSIDE, outside
from advkit.models import MODELS

MARKER = "open('MARK', 'w').close()\ndef make(shape, classes):\n    raise SystemExit\n"
EVALUATE = ("evaluate", "--attack", "fgsm", "--task", "digits", "--n", 20, "--device", "cpu")


def edit(change: Callable[[dict[str, Any]], object]) -> None:
    file = Path("run/report.json")
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.fixture
def stranger(advkit: Any) -> Any:
    """The command line in a folder with a run, and a module that leaves a mark where it is imported."""
    assert advkit(*EVALUATE, "--out", "run").code == 0
    Path("leaves_a_mark.py").write_text(MARKER)
    return advkit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "spec", "shown"),
    [
        ("model", "python:leaves_a_mark:make", "python:leaves_a_mark:make"),
        ("model", "PYTHON:[leaves_a_mark:make]", "PYTHON:[leaves_a_mark:make]"),
        ("attack", "python:leaves_a_mark:make", "attack=python:leaves_a_mark:make"),
        ("attack", "online:inner=[python:leaves_a_mark:make],k=2", "attack=python:leaves_a_mark:make"),
        ("attack", "transfer:mi+[python:leaves_a_mark:make]", "attack=python:leaves_a_mark:make"),
        ("defense", "python:leaves_a_mark:make,bits=3", "defense=python:leaves_a_mark:make"),
        ("defense", "pubdef:attack=[python:leaves_a_mark:make]", "defense=python:leaves_a_mark:make"),
        ("threat_model", "Python:leaves_a_mark:make", "threat_model=Python:leaves_a_mark:make"),
        ("goal", "python:leaves_a_mark:make", "goal=python:leaves_a_mark:make"),
        ("goal", "says:judges=[python:leaves_a_mark:make]", "goal=python:leaves_a_mark:make"),
        ("task", "python:leaves_a_mark:make", "task=python:leaves_a_mark:make"),
        ("attack", "suite:attacks=[fgsm]+[python:leaves_a_mark:make]", "attack=python:leaves_a_mark:make"),
        (
            "threat_model",
            "transfer:sources=zoo:digits-public-mlp+python:leaves_a_mark:make",
            "threat_model=python:leaves_a_mark:make",
        ),
        ("model", "hf:nobody/nothing", "hf:nobody/nothing"),
        ("model", "timm:resnet18", "timm:resnet18"),
        ("model", "path:their.safetensors", "path:their.safetensors"),
        ("task", "cifar10:root=here,download=true", "download=true"),
        ("task", "cifar10:root=here,download=[true]", "download=true"),
    ],
)
def test_what_a_report_names_is_not_loaded_unasked(part: str, spec: str, shown: str, stranger: Any) -> None:
    edit(lambda data: data["request"].update({part: spec}))
    said = stranger("rerun", "run", "--out", "again")
    assert said.code == 2
    assert said.err.count("\n") == 1
    assert "--trust" in said.err
    assert shown in said.err
    assert not Path("MARK").exists()
    assert not Path("again").exists()


@pytest.mark.slow
def test_its_title_names_nothing_either(stranger: Any) -> None:
    """Reports of schema 1.0 say their parts in the title alone."""

    def of_schema_1_0(data: dict[str, Any]) -> None:
        del data["request"]
        data["title"] = data["title"].replace("model=mlp", "model=python:leaves_a_mark:make,mean=")

    edit(of_schema_1_0)
    said = stranger("rerun", "run", "--out", "again")
    assert said.code == 2
    assert "python:leaves_a_mark:make" in said.err
    assert "--trust" in said.err
    assert not Path("MARK").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["threat_model"].update(eps=0.3),
        lambda data: data["request"].update(threat_model="linf:eps=0.1"),
        lambda data: data["dataset"].update(sha256="0" * 64),
        lambda data: data["reproducibility"].update(seed=3),
    ],
)
def test_an_edited_report_is_not_run(change: Callable[[dict[str, Any]], object], stranger: Any) -> None:
    edit(change)
    said = stranger("rerun", "run", "--out", "again")
    assert said.code == 2
    assert "does not agree" in said.err
    assert not Path("again").exists()


@pytest.mark.slow
def test_a_file_of_another_case_is_noticed(stranger: Any) -> None:
    """Request, title, case and hash forged alike: the case that the request resolves to is another."""
    case = Path("run/records.case.json")
    config = json.loads(case.read_text())
    config["victim"] = "0" * 64
    case.write_text(json.dumps(config))
    from advkit.evaluation.run.case import digest_of

    edit(lambda data: data["reproducibility"].update(config_sha256=digest_of(config)))
    edit(lambda data: data["model"].update(state_sha256="0" * 64))
    said = stranger("rerun", "run", "--out", "again")
    assert said.code == 2
    assert "weights are not those of the report" in said.err


def test_every_prefix_of_models_but_the_zoo_comes_from_outside() -> None:
    """A new prefix has to be looked at: is what it loads advkit's own?"""
    assert {name.rstrip(":") for name in MODELS.table if name.endswith(":")} - {"zoo"} == set(OUTSIDE)
    assert all(outside(f"ensemble:models=zoo:a+[{prefix}:b]") for prefix in OUTSIDE)


def test_the_file_of_a_front_comes_from_outside() -> None:
    assert outside("zo_ae_ds:sigma=0.5,weights=a/b.safetensors") == ["weights=a/b.safetensors (opens a file)"]
    assert outside("zo_ae_ds:sigma=0.5") == []
    assert outside("raw_isp:images=a/b,w=1") == ["images=a/b (reads a folder and trains on it)"]
    assert not outside("pgd:steps=3,loss=[dlr:python=3]")


@pytest.mark.slow
def test_an_error_that_quotes_a_file_does_not_steer_the_terminal(stranger: Any) -> None:
    edit(lambda data: data["request"].update(model="python:\x1b]0;own\x9b:make\u202e"))
    said = stranger("rerun", "run", "--out", "again")
    assert said.code == 2
    assert "python:\\x1b" in said.err
    assert not set("\x1b\x9b\u202e") & set(said.err + said.out)


def test_a_part_that_leaves_the_program_is_never_exit_0(advkit: Any) -> None:
    """A module that exits while it is imported: there is no report, and the exit status says so."""
    Path("leaves.py").write_text("import sys\nsys.exit(0)\n")
    said = advkit(*EVALUATE, "--model", "python:leaves:make", "--out", "run")
    assert said.code == 1
    assert "left the program" in said.err
    assert not Path("run/report.json").exists()
