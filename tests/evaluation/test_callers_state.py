"""The caller's global state of torch, numpy and Python: no evaluation moves it, and none depends on it.

Every attack, and one evaluation of every task, defense, threat model and goal, runs once as usual and once under odd
settings: its records must be the same bits, and the settings and generators as they were.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import advkit
from advkit.attacks import ATTACKS
from advkit.core.errors import BadModel, MissingExtra
from advkit.core.registry.fields import fields_of
from advkit.core.rng import RowRng
from advkit.core.state import PLAIN, Settings, as_caller, callers_settings, plain_torch
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.testing import on_labels
from advkit.threat_models.transfer import Transfer

TWO = "transfer:sources=zoo:digits-public-mlp+zoo:digits-public-cnn,eps=0.1"
CNN = "transfer:sources=zoo:digits-public-cnn,eps=0.1"
TEXT: dict[str, Any] = {"task": "prompts", "model": "toychat", "n": 1}
EVENTS: dict[str, Any] = {"task": "digits-dvs", "n": 2}

LABELS = {
    "task": "moons:samples=80",
    "defense": "svm",
    "threat_model": "label-flips:rate=0.1,trials=1,train=40",
    "n": 40,
}
ATTACK_CASES: dict[str, dict[str, Any] | None] = {
    **{
        name: {**LABELS, "attack": name}
        for name in ATTACKS.names()
        if name[-1] != ":" and on_labels(ATTACKS.build(name))
    },
    "bpda:": {"attack": "bpda:[pgd:steps=2]", "defense": "blur:radius=1"},
    "quadattack": {"attack": "quadattack:k=3,budget=1x5"},
    "cw_topk": {"attack": "cw_topk:k=3,budget=1x5"},
    "ad_topk": {"attack": "ad_topk:k=3,budget=1x5"},
    "online": {"attack": "online:inner=fgsm,k=2", "n": 12},
    "sda": EVENTS,
    "topk_grad": EVENTS,
    "random_flips": EVENTS,
    "beast": {"attack": "beast:k=2,length=2", **TEXT},
    "gcg": {"attack": "gcg:steps=1,width=4,topk=4,length=2", **TEXT},
    "random_suffix": {"attack": "random_suffix:length=2,evaluations=4", **TEXT},
    "sampled_suffix": {"attack": "sampled_suffix:length=2,evaluations=4", **TEXT},
    "square": {"attack": "square:queries=20"},
    "one_pixel": {"attack": "one_pixel:queries=40", "threat_model": "l0:eps=2"},
    "pixle": {"attack": "pixle:queries=40", "threat_model": "l0:eps=2"},
    **{name: {"attack": f"{name}:queries=120"} for name in ("boundary", "hopskipjump", "sign_opt", "geoda")},
    "pgd": {"attack": "pgd:steps=3,restarts=2"},
    "fgsm": {"attack": "fgsm"},
    "spiking:": {
        "attack": "spiking:[pgd:steps=2],surrogate=pdsg",
        "model": "snn",
        "threat_model": "linf:eps=0.1",
        "n": 2,
    },
    "transfer:": {"attack": "transfer:ni+si+ti+di", "threat_model": CNN},
    "foolbox:": {"attack": "foolbox:LinfPGD"},
    "torchattacks:": {"attack": "torchattacks:PGD"},
    "art:": {"attack": "art:ProjectedGradientDescent"},
    "advlib:": {"attack": "advlib:ddn,settings=[steps=3]", "threat_model": "minimum-l2"},
    **{name: {"threat_model": TWO} for name in ("ens", "svre", "cwa", "lgv")},
    **{name: {"threat_model": CNN} for name in ("naa", "fia", "bfa", "ila", "ilpd", "linbp", "bpa")},
}
CASES: dict[str, dict[str, Any]] = {
    "fashion-mnist": {"attack": "fgsm", "task": "fashion-mnist"},
    "fashion-mnist-dvs": {"attack": "random_flips", "task": "fashion-mnist-dvs", "n": 1},
    "arrays": {"attack": "fgsm", "task": (torch.rand(6, 1, 8, 8), torch.arange(6) % 3), "model": "module"},
    "bit-depth": {"attack": "pgd:steps=2", "defense": "bit-depth"},
    "random-resize": {"attack": "pgd:steps=2,eot=2", "defense": "random-resize", "draws": 2},
    "pgd_at": {"attack": "pgd:steps=2", "defense": "pgd_at"},
    "trades": {"attack": "pgd:steps=2", "defense": "trades"},
    "pubdef": {"attack": "pgd:steps=2", "defense": "pubdef", "task": "fashion-mnist"},
    "ppl_filter": {"attack": "random_suffix:length=2,evaluations=4", "defense": "ppl_filter", **TEXT},
    "l2": {"attack": "pgd:steps=2", "threat_model": "l2:eps=0.5"},
    "l1": {"attack": "apgd-ce:steps=3", "threat_model": "l1:eps=3"},
    "l0": {"attack": "pgd:steps=2", "threat_model": "l0:eps=3"},
    "lattice": {"attack": "pgd:steps=2", "threat_model": "linf:eps=0.1,lattice=255"},
    "minimum-l2": {"attack": "quadattack:k=2,budget=1x4", "threat_model": "minimum-l2"},
    "tapm": {"attack": "pgd:steps=2", "threat_model": "tapm", "n": 2},
    "targeted": {"attack": "apgd-t:steps=2", "goal": "targeted:how=random"},
    "each": {"attack": "pgd:steps=2", "goal": [1, 2, 3, 4]},
    "topk": {"attack": "pgd:steps=2", "goal": "topk:k=2"},
    "ordered-topk": {"attack": "pgd:steps=2", "goal": "ordered-topk:k=2"},
    "out-of-topk": {"attack": "pgd:steps=2", "goal": "out-of-topk:k=2"},
    "bf16": {"attack": "pgd:steps=2", "speed": "bf16"},
}


def module() -> nn.Module:
    """A network in float32 on the CPU, whatever the defaults are."""
    plain: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
        made = nn.Sequential(nn.Flatten(), nn.Linear(64, 3, **plain)).eval()
    with torch.no_grad():
        made[1].weight.copy_(torch.linspace(-1, 1, 192, **plain).reshape(3, 64))
        made[1].bias.zero_()
    return made


def settings_of(name: str) -> dict[str, Any]:
    """A short evaluation that uses the attack."""
    plain: dict[str, Any] = {"attack": name, "task": "digits", "n": 4, "device": "cpu"}
    if name == "sgm":  # it needs a source with skip connections
        resnet = MODELS.build("resnet8")((1, 8, 8), 10, RowRng.from_ids(0, ["sgm"]))
        return {**plain, "attack": "sgm:steps=2", "threat_model": Transfer(eps=0.1, sources=(resnet,))}
    if "steps" in fields_of(ATTACKS.load(name)):
        plain["attack"] = f"{name}:steps=2"
    return plain | (ATTACK_CASES.get(name) or {})


def state() -> dict[str, Any]:
    """All that a caller could notice."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the legacy state is what must not move
    return {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": (kind, np.asarray(keys).tobytes(), rest),
        "settings": Settings.current(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        ),
        "cudnn": (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cuda.matmul.allow_tf32,
            torch.get_float32_matmul_precision(),
        ),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "threads": torch.get_num_threads(),
        "numpy errors": np.geterr(),
        "path": list(sys.path),
        "filters": list(warnings.filters),
    }


@contextmanager
def odd(*which: str) -> Iterator[None]:
    """The caller's settings, as odd as they come."""
    dtype = torch.get_default_dtype()
    generators = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        stack.callback(torch.use_deterministic_algorithms, False)
        stack.callback(torch.set_default_device, None)
        stack.callback(torch.set_rng_state, generators[0])
        stack.callback(np.random.set_state, generators[1])
        stack.callback(random.setstate, generators[2])
        torch.manual_seed(123)
        np.random.seed(5)  # noqa: NPY002
        random.seed(9)
        if "float64" in which:
            torch.set_default_dtype(torch.float64)
        if "float16" in which:
            torch.set_default_dtype(torch.float16)
        if "meta" in which:
            torch.set_default_device("meta")
        if "deterministic" in which:
            torch.use_deterministic_algorithms(True)
        if "no grad" in which:
            stack.enter_context(torch.no_grad())
        if "inference" in which:
            stack.enter_context(torch.inference_mode())
        if "autocast" in which:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
        if "strict" in which:
            stack.enter_context(np.errstate(all="raise"))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("error")
        yield


def records_of(settings: dict[str, Any], folder: Path) -> list[str]:
    given = {**settings, "model": module()} if settings.get("model") == "module" else settings
    report = advkit.evaluate(out=folder, **given)
    assert report.undecided == 0
    if settings.get("threat_model") != LABELS["threat_model"]:  # a poisoning changes no input
        report.adversarial()
    assert str(report)
    found = [folder / name for name in ("records.jsonl", "beside.jsonl")]
    return [line for file in found if file.is_file() for line in file.read_text().splitlines()]


def check(settings: dict[str, Any], folder: Path, *which: tuple[str, ...]) -> None:
    try:
        usual = records_of(settings, folder / "usual")
    except MissingExtra as error:
        pytest.skip(str(error))
    for number, names in enumerate(which):
        with odd(*names):
            before = state()
            found = records_of(settings, folder / str(number))
            after = state()
        assert found == usual, names
        assert {key: value for key, value in after.items() if before[key] != value} == {}, names


ODD = (("float64",), ("deterministic", "no grad"), ("float16", "meta", "inference"), ("autocast", "strict"))
FEW = ("pgd", "square", "fab", "apgd-t", "transfer:", "random_flips", "random_suffix", "foolbox:")


@pytest.mark.parametrize("name", FEW)
def test_an_attack_neither_moves_nor_feels_the_callers_state(name: str, tmp_path: Path) -> None:
    check(settings_of(name), tmp_path, ("float64", "deterministic"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list(ATTACKS.table))
def test_no_attack_does(name: str, tmp_path: Path) -> None:
    check(settings_of(name), tmp_path, *ODD)


@pytest.mark.parametrize("name", ["arrays", "random-resize", "bf16", "each"])
def test_no_part_moves_or_feels_it(name: str, tmp_path: Path) -> None:
    check({"task": "digits", "n": 4, "device": "cpu"} | CASES[name], tmp_path, ("float64", "deterministic"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_no_task_defense_threat_model_or_goal_does(name: str, tmp_path: Path) -> None:
    check({"task": "digits", "n": 4, "device": "cpu"} | CASES[name], tmp_path, *ODD)


@pytest.mark.slow
def test_matrices_and_training_do_not_either(tmp_path: Path) -> None:
    def run(folder: Path) -> tuple[Any, Any]:
        table = advkit.matrix(
            ["zoo:digits-public-mlp"], ["mifgsm"], ["zoo:digits-mlp"], task="digits", n=8, seeds=1, equal_budget=None,
            device="cpu", cache=folder / "kept",
        ).to_dict()  # fmt: skip
        from advkit.evaluation.victims import train_victim

        made = train_victim("mlp:hidden=8", "none:recipe=[epochs=1]", "digits", device="cpu", out=folder / "trained")
        return table["cells"], made["sha256"]

    usual = run(tmp_path / "usual")
    with odd("float64", "deterministic", "no grad"):
        before = state()
        assert run(tmp_path / "odd") == usual
        assert state() == before


@pytest.mark.parametrize("spec", ["cnn", "mlp", "resnet8", "snn", "timm:resnet18,pretrained=false"])
def test_networks_are_built_alike_whatever_the_default(spec: str) -> None:
    rng = RowRng.from_ids(0, ["net"])
    usual = MODELS.build(spec)((3, 32, 32), 10, rng).state_sha256()
    with odd("float64"):
        before = state()
        assert MODELS.build(spec)((3, 32, 32), 10, rng).state_sha256() == usual
        assert state() == before


class Recurrent(nn.Module):
    """A network that relies on the caller's default: its first state has no dtype of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.zeros(len(x), 64)
        return self.cell(hidden + x.flatten(1))


def test_a_network_of_the_callers_own_runs_under_his_settings() -> None:
    """Under a default of float64 its weights are float64, and so is what its forward makes."""
    with odd("float64"):
        network = Recurrent().eval()
        assert network.cell.weight.dtype == torch.float64
        report = advkit.evaluate("pgd:steps=2", task="digits", model=network, n=4, device="cpu")
        wrapped = advkit.evaluate(
            "pgd:steps=2", task="digits", model=TorchModel(network, classes=10), n=4, device="cpu"
        )
        seen: list[torch.dtype] = []

        def function(x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.get_default_dtype())
            return network(x.double())

        advkit.evaluate("fgsm", task="digits", model=function, n=4, device="cpu")
    assert report.undecided == wrapped.undecided == 0
    assert set(seen) == {torch.float64}


def test_a_network_made_in_inference_mode_is_refused_in_words() -> None:
    with torch.inference_mode():
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    with pytest.raises(BadModel, match=r"made under torch\.inference_mode"):
        advkit.evaluate("fgsm", task="digits", model=network, n=4, device="cpu")


def test_settings_are_put_aside_and_given_back() -> None:
    with odd("float64"):
        mine = Settings.current()
        assert callers_settings() == PLAIN
        with plain_torch():
            assert Settings.current() == PLAIN
            assert callers_settings() == mine
            assert as_caller(Settings.current) == mine
            with plain_torch():
                assert callers_settings() == mine
            with pytest.raises(ZeroDivisionError):
                as_caller(lambda: 1 / 0)
            assert Settings.current() == PLAIN
        assert Settings.current() == mine
    assert Settings.current() == PLAIN
