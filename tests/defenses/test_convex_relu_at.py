"""`convex_relu_at` through the harness: trained, certified, attacked on its training samples; what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advkit.core.errors import BadInput, BadModel, NoTrainingData, UsageError
from advkit.core.protocols import Data, Solves
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.evaluation import api
from advkit.models.two_layer import TwoLayer
from advkit.tasks.arrays import Arrays
from advkit.testing import check_defense

EXTRA = "convex training needs the extra convex: pip install 'advkit[convex]'"
pytest.importorskip("cvxpy", reason=EXTRA)
pytest.importorskip("clarabel", reason=EXTRA)

SPEC = "convex_relu_at:eps=0.05,patterns=60"
RNG = RowRng.from_ids(0, ["test"])


def plane(n: int = 30, seed: int = 0, apart: float = 0.15) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of the unit square whose label is that of an exclusive or, none within `apart` / 2 of its borders."""
    drawn = np.random.default_rng(seed)
    x = drawn.uniform(0, 1, (20 * n, 2))
    x = x[(np.abs(x - 0.5) > apart / 2).all(1)][:n]
    return torch.from_numpy(x).float(), torch.from_numpy((x[:, 0] > 0.5) ^ (x[:, 1] > 0.5)).long()


def data(n: int = 30, classes: int = 2) -> Data:
    x, y = plane(n)
    return Data(x, y, Box(0.0, 1.0, (2,)), classes, name="plane")


def task(n: int = 30) -> Arrays:
    """The training samples are the ones that are attacked."""
    x, y = plane(n)
    return Arrays(x, y, name="plane", training=(x, y))


@pytest.mark.slow
def test_the_laws_of_a_defense_hold() -> None:
    assert isinstance(DEFENSES.build(SPEC), Solves)
    check_defense(DEFENSES.build("convex_relu_at:eps=0.02,patterns=8,components=2,rows=24"))


def test_one_network_for_two_classes() -> None:
    model, told = DEFENSES.build(SPEC).solve(data(), RNG)
    (network,) = told["networks"]
    assert network["status"] == "optimal"
    assert network["gap"] < 1e-6
    assert network["solver"].startswith("CLARABEL ")
    assert 2 < network["patterns_usable"] < network["patterns_sampled"] == 60
    assert network["certified"] == told["certified_training_samples"] == told["samples"] == 30
    assert told["summary"].startswith(f"optimum {network['optimum']:.6g} (optimal, duality gap ")
    assert told["summary"].endswith("patterns usable, 30 of 30 training samples certified")
    json.dumps(told, allow_nan=False)
    # the exported network has the values of the program: logits -f/2 and f/2
    x, y = plane()
    logits = model(x).detach().double()
    assert torch.allclose(logits[:, 0], -logits[:, 1])
    f = logits[:, 1] - logits[:, 0]
    hinge = (1 - (2 * y - 1) * f).clamp_min(0).mean()
    assert float(hinge) <= network["optimum"] + 1e-5
    assert bool((logits.argmax(1) == y).all())


@pytest.mark.slow
def test_one_network_per_class_where_there_are_more() -> None:
    x, y = plane()
    y = torch.where((y == 1) & (x[:, 0] > 0.5), 2, y)
    held = Data(x, y, Box(0.0, 1.0, (2,)), 3)
    model, told = DEFENSES.build(SPEC).solve(held, RNG)
    assert len(told["networks"]) == 3
    assert model(x).shape == (30, 3)
    assert bool((model(x).argmax(1) == y).float().mean() > 0.9)
    certified = TwoLayer.around(model, "linf", 0.05).margins(x, y) > 0
    assert int(certified.sum()) == told["certified_training_samples"] > 15


@pytest.mark.parametrize("attack", ["pgd:steps=20,restarts=2", pytest.param("autoattack", marks=pytest.mark.slow)])
def test_no_attack_breaks_a_certified_training_sample(attack: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    # wider than it was trained for: some samples are certified, and some fall
    report = api.evaluate(
        attack=attack,
        defense="convex_relu_at:eps=0.09,patterns=60",
        task=task(),
        threat_model="linf:eps=0.09",
        out=tmp_path / "run",
        device="cpu",
    )
    document = json.loads((tmp_path / "run" / "report.json").read_text())
    solved = document["defense"]["solved"]
    assert document["request"]["model"] == "none"  # the network is the defense's own
    assert document["defense"]["origin"] == f"solved here, seed 0: {solved['summary']}"
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    certified = {each["id"] for each in records if each["figures"]["certified"]}
    broken = {each["id"] for each in records if each["outcome"] == "broken"}
    assert len(certified) >= solved["certified_training_samples"] >= 10
    assert len(broken) >= 1
    assert not certified & broken
    assert not any(each["figures"].get("certificate_broken") for each in records)
    assert "certificate_violated" not in {flag["id"] for flag in report.flags}


@pytest.mark.slow
def test_a_broken_certificate_is_flagged(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TwoLayer, "margins", lambda self, x, y: torch.ones(len(x)))
    settings: Any = {"defense": "convex_relu_at:eps=0.09,patterns=60", "task": task(), "device": "cpu"}
    report = api.evaluate(attack="pgd:steps=20", threat_model="linf:eps=0.09", out=tmp_path / "run", **settings)
    flags = {flag["id"]: flag for flag in report.flags}
    assert flags["certificate_violated"]["severity"] == "unreliable"


@pytest.mark.slow
def test_the_second_evaluation_takes_the_network_from_the_cache(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("ADVKIT_CACHE", str(tmp_path / "cache"))
    settings: Any = {"attack": "fgsm", "defense": SPEC, "task": task(), "threat_model": "linf:eps=0.05"}
    first = api.evaluate(**settings, out=tmp_path / "one", device="cpu")
    monkeypatch.setitem(sys.modules, "cvxpy", None)
    second = api.evaluate(**settings, out=tmp_path / "two", device="cpu")
    assert first.metrics["robust_accuracy"] == second.metrics["robust_accuracy"]
    assert second.metrics["certificate_broken"]["value"] == 0
    assert second.metrics["certified"]["value"] == 1
    assert second.metrics["certificate_eps"]["value"] == pytest.approx(
        float(SPEC.partition("eps=")[2].partition(",")[0])
    )


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("eps=-0.1", "eps is -0.1; expected a radius of at least 0"),
        ("beta=0", "beta is 0.0; expected a number above 0"),
        ("norm=l0", "l0"),
        ("patterns=-1", "patterns is -1; expected a whole number of at least 0"),
    ],
)
def test_bad_settings(spec: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        DEFENSES.build(f"convex_relu_at:{spec}")


def test_bad_data() -> None:
    x, y = plane()
    one = Data(x[y == 1], y[y == 1], Box(0.0, 1.0, (2,)), 2)
    with pytest.raises(BadInput, match=r"all \d+ training labels are 1; expected samples of two classes or more"):
        DEFENSES.build(SPEC).solve(one, RNG)
    many = Data(x.repeat(30, 1), y.repeat(30), Box(0.0, 1.0, (2,)), 2)
    with pytest.raises(BadInput, match=r"900 samples x 100 patterns are 90,000 rows; .* method=admm or method=scp"):
        DEFENSES.build("convex_relu_at:eps=0,patterns=100").solve(many, RNG)
    with pytest.raises(UsageError, match=r"method=admm trains without an attacker \(eps=0\)"):
        DEFENSES.build("convex_relu_at:method=admm").solve(data(), RNG)
    with pytest.raises(NoTrainingData):
        DEFENSES.build(SPEC).protect(None, None, RNG)
    other = Arrays(x, y, name="plane")
    with pytest.raises(NoTrainingData, match="the task plane has no training data"):
        api.plan(api_request(other))
    with pytest.raises(BadModel, match="finds a network of its own"):
        api.plan(api_request(task(), model="cnn"))


def api_request(work: Any, model: Any = None) -> Any:
    from advkit.evaluation.plan import Request

    return Request(attack="fgsm", defense=SPEC, task=work, model=model, threat_model="linf:eps=0.05", device="cpu")


def test_a_radius_that_leaves_no_pattern_warns(caplog: pytest.LogCaptureFixture) -> None:
    _, told = DEFENSES.build("convex_relu_at:eps=0.6,patterns=40").solve(data(), RNG)
    assert told["networks"][0]["patterns_usable"] == 1
    assert "1 of 40 activation patterns are usable under the attack" in caplog.text


def test_rows_are_the_first_of_every_class() -> None:
    _, told = DEFENSES.build(f"{SPEC},rows=10").solve(data(), RNG)
    assert told["samples"] == 10


@pytest.mark.parametrize("spec", ["norm=l2,eps=0.05", "loss=logistic", "method=admm,eps=0", "method=scp,eps=0"])
def test_settings_reach_the_program(spec: str) -> None:
    defense = DEFENSES.build(f"convex_relu_at:patterns=40,{spec}")
    assert DEFENSES.build(DEFENSES.spec(defense)) == defense
    model = defense.protect(None, data(), RNG)
    x, y = plane()
    assert float((model(x).argmax(1) == y).float().mean()) > 0.9
    assert (defense.claims == "") == (defense.eps == 0)
