"""Numbers that JSON and specs can't write (numpy's, tensors) in what a caller asks for, and values that are none."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import advkit
from advkit.attacks import ATTACKS
from advkit.attacks.gradient.pgd import PGD
from advkit.core.errors import UsageError
from advkit.evaluation.matrix.plan import MatrixRequest
from advkit.evaluation.plan import Request
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.lp import Linf

ONE: dict[str, Any] = {"attack": "fgsm", "task": "digits", "threat_model": "linf:eps=0.1", "n": 2}


def test_a_run_asked_for_with_numbers_of_numpy_is_the_run_of_pythons() -> None:
    numbers = {"seed": np.int64(0), "draws": np.int32(10), "keep": torch.tensor(64), "batch_size": np.uint8(2)}
    given = numbers | {"n": np.int64(2), "sample_timeout": np.float32(60), "device": torch.device("cpu")}
    asked = ONE | {"batch_size": 2, "sample_timeout": 60.0, "device": "cpu"}
    one, other = (advkit.evaluate(**ONE | each, beside=False).to_dict() for each in (given, asked))
    assert one["request"] == other["request"]
    assert one["metrics"] == other["metrics"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("n", 1.5, "n is 1.5; expected a whole number"),
        ("n", "4", "n is '4'; expected a whole number"),
        ("n", True, "n is True; expected a whole number"),
        ("seed", None, "seed is None; expected a whole number"),
        ("seed", 2**63, "expected a whole number of at most 64 bits"),
        ("batch_size", 2.5, "batch_size is 2.5; expected a whole number"),
        ("batch_size", 0, "batch_size is 0; expected a whole number of at least 1"),
        ("draws", 2.5, "draws is 2.5; expected a whole number"),
        ("keep", "all", "keep is 'all'; expected a whole number"),
        ("sample_timeout", "3", "sample_timeout is '3'; expected a number of seconds above 0"),
        ("sample_timeout", True, "sample_timeout is True; expected a number of seconds above 0"),
        ("speed", None, "speed is None; expected fp32"),
        ("beside", "no", "beside is 'no'; expected True or False"),
        ("workers", 1.5, "workers is 1.5; expected a whole number of at least 1"),
        ("workers", "2", "workers is '2'; expected a whole number of at least 1"),
        ("device", None, "unknown device 'None'"),
    ],
)
def test_a_value_that_no_report_could_hold_is_refused_before_anything_is_run(name: str, value: Any, said: str) -> None:
    ran: list[Any] = []
    with pytest.raises(UsageError) as caught:
        advkit.evaluate(**ONE | {name: value}, watch=lambda *told: ran.append(told))
    assert said in str(caught.value)
    assert not ran


def test_a_whole_number_may_be_a_float() -> None:
    asked = Request(n=1e3, seed=4.0)  # type: ignore[arg-type]
    assert (asked.n, asked.seed) == (1000, 4)
    assert isinstance(asked.n, int)


def test_settings_of_parts_are_written_as_pythons_numbers() -> None:
    pgd = ATTACKS.build(PGD(steps=np.int64(3)))  # type: ignore[arg-type]
    ball = THREAT_MODELS.build(Linf(eps=np.float32(0.25)))  # type: ignore[arg-type]
    assert ATTACKS.label(pgd) == "pgd:steps=3"
    assert THREAT_MODELS.label(ball) == "linf:eps=0.25"
    assert THREAT_MODELS.label(THREAT_MODELS.build(Linf(eps=torch.tensor(0.25)))) == "linf:eps=0.25"  # type: ignore[arg-type]


def test_a_matrix_takes_them_too() -> None:
    asked = MatrixRequest(n=np.int64(4), seeds=np.arange(2), eps=np.float32(0.25), device=torch.device("cpu"))  # type: ignore[arg-type]
    assert json.dumps([asked.n, asked.each_seed(), asked.eps, asked.device]) == '[4, [0, 1], 0.25, "cpu"]'
    with pytest.raises(UsageError, match="n is 0"):
        MatrixRequest(n=0.5)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_training_is_asked_for_with_a_whole_seed(tmp_path: Any) -> None:
    asked: dict[str, Any] = {"model": "mlp:hidden=2", "defense": "none", "task": "digits", "recipe": "epochs=1"}
    with pytest.raises(UsageError, match="seed is 'x'; expected a whole number"):
        advkit.train_victim(**asked, seed="x", out=tmp_path)
    with pytest.raises(UsageError, match="seed is 1"):
        advkit.train_victim(**asked, seed=1.5, out=tmp_path)
    made = advkit.train_victim(**asked, seed=np.int64(1), out=tmp_path)
    assert json.loads((tmp_path / "training.json").read_text())["seed"] == 1
    assert made["file"]


def test_a_protected_model_takes_the_tasks_spec() -> None:
    found = advkit.protected("zoo:digits-mlp", "none", "digits")
    assert found.model.classes == 10
    with pytest.raises(UsageError, match="unknown task"):
        advkit.protected("zoo:digits-mlp", "none", "no-task")


@pytest.mark.parametrize("eps", [0.1, ["a"], [None], [], [0.0], [-1.0], [float("nan")]])
def test_radii_that_are_none_are_refused(eps: Any, tmp_path: Any) -> None:
    with pytest.raises(UsageError, match="expected finite radii"):
        advkit.sweep(eps=eps, out=tmp_path, **ONE)
    assert not [*tmp_path.iterdir()]


def test_radii_that_differ_in_round_off_are_one(tmp_path: Any) -> None:
    curve = advkit.sweep(eps=["0.1", 0.1, 0.1 + 1e-14], out=tmp_path, **ONE)
    assert isinstance(curve, advkit.evaluation.sweep.curve.Curve)
    assert [eps for eps, _ in curve.points] == [0.1]
