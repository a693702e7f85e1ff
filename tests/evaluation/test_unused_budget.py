"""Robust samples on which an attack changed nothing or used little of its budget; and attacks that lose themselves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import advkit
from advkit.attacks import ATTACKS
from advkit.core.protocols import Access, Label, Outcome, Record
from advkit.evaluation.api import resolve
from advkit.evaluation.execute import run
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import open_store
from advkit.evaluation.run.recorded import ASKED_NON_FINITE
from advkit.evaluation.trust import diagnostics
from advkit.models import MODELS
from advkit.threat_models import THREAT_MODELS

FLAGS = {"returned_unchanged", "far_inside_the_ball"}
HARDENED = "zoo:digits-mlp-pgd_at"


@dataclass(frozen=True)
class Part:
    """A step along the steepest direction, `size` eps long, and back to the input on the first `idle` rows."""

    needs: ClassVar[Access] = Access.GRADIENTS
    size: float = 1.0
    idle: int = 0

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        _, gradient, _ = oracle.gradient(x, goal)
        z = ball.project(x + self.size * ball.steepest(-gradient, x), x)
        z[: self.idle] = x[: self.idle]
        return z


def flags(attack: Any, threat: str = "linf:eps=0.1", goal: Any = None, n: int = 60, **more: Any) -> dict[str, Any]:
    report = advkit.evaluate(attack, "none", "digits", HARDENED, threat, goal, n=n, device="cpu", beside=False, **more)
    return {flag["id"]: flag for flag in report.flags if flag["id"] in FLAGS}


@pytest.mark.parametrize("threat", ["linf:eps=0.1", "l2:eps=0.5", "l1:eps=1", "l0:eps=2"])
def test_an_attack_that_does_nothing_is_flagged_on_every_robust_sample(threat: str) -> None:
    (flag,) = flags(Part(size=0.0), threat).values()
    assert (flag["id"], flag["severity"], flag["value"]) == ("returned_unchanged", "warning", 1.0)
    assert "robust samples unchanged" in flag["message"]


@pytest.mark.parametrize("threat", ["linf:eps=0.1", "l2:eps=0.5"])
def test_an_attack_that_uses_a_tenth_of_eps_is_flagged(threat: str) -> None:
    (flag,) = flags(Part(size=0.1), threat).values()
    assert (flag["id"], flag["severity"], flag["value"]) == ("far_inside_the_ball", "warning", 1.0)
    assert flags(Part(size=0.9), threat) == {}  # the box takes some of it


def test_single_samples_are_told_and_no_warning() -> None:
    assert flags(Part(idle=1))["returned_unchanged"]["severity"] == "info"
    assert flags(Part(idle=20))["returned_unchanged"]["severity"] == "warning"


@pytest.mark.parametrize("threat", ["linf:eps=0.15", "l2:eps=0.8", "l1:eps=3", "l0:eps=3"])
@pytest.mark.parametrize(
    "attack", ["pgd:steps=10", "mifgsm", "apgd-ce:steps=10", "fab:steps=10", "square:queries=100", "fgsm", "mi"]
)
def test_our_own_attacks_raise_neither_flag(attack: str, threat: str) -> None:
    if threat.startswith("l0") and attack.partition(":")[0] not in ("pgd", "mifgsm", "fgsm"):
        pytest.skip("of these three alone work in L0")
    if (attack, threat[:2]) == ("fgsm", "l1"):
        # One coordinate is all that the steepest step of L1 moves, and the box ends it: the flag tells the truth.
        assert set(flags(attack, threat)) == {"far_inside_the_ball"}
    else:
        assert flags(attack, threat) == {}


@pytest.mark.parametrize("goal", ["targeted:how=next", "untargeted"])
@pytest.mark.parametrize("threat", ["linf:eps=0.05", "linf:eps=0.1,lattice=255", "l2:eps=0.3"])
def test_pgd_fills_small_balls_and_files_for_every_goal(threat: str, goal: str) -> None:
    assert flags("pgd:steps=20", threat, goal) == {}


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["lean", "thorough", "autoattack"])
def test_our_suites_raise_neither_flag(suite: str) -> None:
    assert flags(suite, "linf:eps=0.15", n=40) == {}


def case_of(attack: str, threat: Any, **more: Any) -> Case:
    return resolve(attack, "none", threat_model=threat, device="cpu", **more)


def rows(case: Case, distances: list[float], outcome: Outcome = Outcome.ROBUST) -> list[Record]:
    return [
        Record(id=str(i), attack=case.label.attack, outcome=outcome, distance=distance)
        for i, distance in enumerate(distances)
    ]


def told(case: Case, records: list[Record]) -> dict[str, str]:
    return {f.id: f.severity for f in diagnostics.after(case, records) if f.id in FLAGS}


def test_a_search_without_a_radius_hands_the_input_back_where_it_found_nothing() -> None:
    case = case_of("sda", THREAT_MODELS.build("flips"), task="digits-dvs", model="zoo:digits-dvs-snn", n=4)
    assert told(case, rows(case, [0.0] * 4)) == {"returned_unchanged": "info"}
    case = case_of("quadattack:k=3", None, task="digits", model="zoo:digits-mlp", n=4)
    assert told(case, rows(case, [0.0] * 4)) == {"returned_unchanged": "info"}


def test_a_suffix_handed_in_empty_is_flagged() -> None:
    case = case_of("random_suffix:length=4", None, task="prompts", model="toychat", n=4)
    assert told(case, rows(case, [0.0] * 4)) == {"returned_unchanged": "warning"}
    assert told(case, rows(case, [2.0] * 4)) == {}


def test_a_ball_of_nothing_and_broken_samples_raise_no_flag() -> None:
    case = case_of("pgd", "linf:eps=0", task="digits", model="zoo:digits-mlp", n=4)
    assert told(case, rows(case, [0.0] * 4)) == {}
    case = case_of("pgd", "linf:eps=0.1", task="digits", model="zoo:digits-mlp", n=4)
    assert told(case, rows(case, [0.0] * 4, Outcome.BROKEN)) == {}


def test_stages_of_a_suite_are_told_apart() -> None:
    case = case_of("lean", "linf:eps=0.1", task="digits", model="zoo:digits-mlp", n=4)
    stages = [stage.name for stage in ATTACKS.build("lean").stages()]
    records = [
        replace(record, stage=stage, distance=0.1 if stage == stages[0] else 0.0)
        for stage in stages[:2]
        for record in rows(case, [0.1] * 4)
    ]
    (finding,) = (f for f in diagnostics.after(case, records) if f.id in FLAGS)
    assert finding.attack == str(Label(case.label.attack, stages[1]))


# Attacks that ask about NaN


@dataclass(frozen=True)
class Lost:
    """Asks about NaN on its first rows, and returns the NaN, the input, or a point that breaks the sample."""

    needs: ClassVar[Access] = Access.GRADIENTS
    returns: str = "input"
    module: bool = False

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        bad = x.clone()
        bad[:3] = torch.nan
        if self.module:
            oracle.differentiable(x)(bad)
        else:
            oracle(bad)
        if self.returns == "best":
            return ATTACKS.build("pgd:steps=20")(oracle, x, goal, ball, rng)
        return bad if self.returns == "nan" else x


def judged(attack: Any, tmp_path: Path) -> list[Record]:
    model = MODELS.build("zoo:digits-mlp")((1, 8, 8), 10, None)
    case = resolve(attack, "none", "digits", model, "linf:eps=0.4", n=8, device="cpu")
    return run(case, open_store(case, tmp_path))


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("returns", ["input", "nan"])
def test_who_asks_about_nan_and_fails_is_an_error_and_no_victim_that_answers_nan(
    returns: str, module: bool, tmp_path: Path
) -> None:
    records = judged(Lost(returns, module), tmp_path)
    assert [record.outcome for record in records[:3]] == [Outcome.ERROR] * 3
    assert {record.message for record in records[:3]} == {ASKED_NON_FINITE}
    assert {record.outcome for record in records[3:]} == {Outcome.ROBUST, Outcome.WRONG}
    assert all("met_non_finite" not in record.notes for record in records)
    assert all(("asked_non_finite" in record.notes) == (i < 3) for i, record in enumerate(records))


def test_who_asks_about_nan_and_recovers_has_its_finds(tmp_path: Path) -> None:
    records = judged(Lost("best"), tmp_path)
    assert {record.outcome for record in records} == {Outcome.BROKEN, Outcome.WRONG}
    assert "asked_non_finite" in records[0].notes


def test_the_report_says_whose_fault_it_was() -> None:
    report = advkit.evaluate(
        Lost(), "none", "digits", "zoo:digits-mlp", "linf:eps=0.1", n=8, device="cpu", beside=False
    )
    (flag,) = (flag for flag in report.flags if flag["severity"] == "unreliable")
    assert flag["id"] == "attack_error"
    assert "on 3 of 8 samples (the attack asked the victim about an input with NaN" in flag["message"]
    assert "nonfinite_gradient" not in {flag["id"] for flag in report.flags}


class Strict(torch.nn.Module):
    """A victim that raises on NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MODELS.build("zoo:digits-mlp")((1, 8, 8), 10, None).module

    def forward(self, x: Tensor) -> Tensor:
        if not bool(torch.isfinite(x).all()):
            raise ValueError("NaN in the input")
        return self.inner(x)


@pytest.mark.parametrize("module", [False, True])
def test_a_victim_that_raises_on_nan_is_not_blamed(module: bool) -> None:
    report = advkit.evaluate(Lost(module=module), "none", "digits", Strict().eval(), "linf:eps=0.1", n=4, device="cpu")
    assert "attack_error" in {flag["id"] for flag in report.flags}
    assert "model_error" not in {flag["id"] for flag in report.flags}
