"""A sample that ends in an error says whose code raised: the victim, a surrogate, a judge, the goal or the attack."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

import advkit
from advkit.core.blame import JUDGE, MODEL, blame, blamed, code_of
from advkit.core.protocols import Access, Examines, Outcome, Record
from advkit.evaluation.counts import contested, was_right
from advkit.evaluation.report import Report
from advkit.evaluation.report.verify import verify
from advkit.evaluation.run.store import read_records
from advkit.models.torch import TorchModel
from advkit.threat_models.goals.untargeted import Untargeted, UntargetedRule
from advkit.threat_models.tapm import Tapm
from advkit.threat_models.transfer import Transfer

ERRORS = {"attack_error", "model_error", "surrogate_error", "judge_error", "goal_error"}
X = torch.tensor([[0.9, 0.2], [0.8, 0.1], [0.3, 0.7], [0.2, 0.9]])
Y = torch.tensor([0, 0, 1, 0])  # the last one is misread
ODD = 1  # the sample on which somebody raises


class Net(nn.Module):
    """The larger coordinate; raises on what `odd` says of a batch."""

    def __init__(self, odd: Any = None) -> None:
        super().__init__()
        self.odd = odd
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.odd is not None and bool(self.odd(x).any()):
            raise ValueError("no such input")
        return x * 1.0


def near_odd(x: Tensor) -> Tensor:
    """Inputs that were made of the odd sample, the sample itself excepted."""
    far = (x - X[ODD]).abs().amax(1)
    return (far > 0) & (far < 0.05)


def is_odd(x: Tensor) -> Tensor:
    return (x - X[ODD]).abs().amax(1) < 0.05


@dataclass(frozen=True)
class Blind:
    """Moves every sample without asking anything; raises on the odd one if told to."""

    fails: str = ""
    needs: ClassVar[Access] = Access.NOTHING

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Any:
        if self.fails and bool(is_odd(x).any()):
            if self.fails == "exit":
                sys.exit(3)
            raise KeyError("lost my way")
        return ball.project(x + 0.01, x)


def evaluated(
    folder: Path, attack: Any = "pgd:steps=2,step_size=1", model: nn.Module | None = None, **more: Any
) -> Report:
    asked = {"threat_model": "linf:eps=0.01", "device": "cpu", **more}
    return advkit.evaluate(attack, task=(X, Y), model=model or Net(), out=folder, **asked)


def the_odd_one(folder: Path) -> Record:
    (found,) = [r for r in read_records(folder / "records.jsonl") if r.outcome == Outcome.ERROR]
    assert found.id.endswith(str(ODD))
    return found


def flag(report: Report) -> dict[str, Any]:
    (found,) = [flag for flag in report.flags if flag["id"] in ERRORS]
    assert "incomplete_optimization" not in {flag["id"] for flag in report.flags if flag["severity"] == "unreliable"}
    return found


@pytest.mark.parametrize(
    "attack", ["pgd:steps=2,step_size=1", Blind()], ids=["asked by the attack", "asked for the verdict"]
)
def test_a_victim_that_raises_on_changed_inputs(attack, tmp_path):
    report = evaluated(tmp_path, attack, Net(near_odd))
    record, said = the_odd_one(tmp_path), flag(report)
    assert (said["id"], said["severity"]) == ("model_error", "unreliable")
    assert "the victim raised on 1 of 4 samples (ValueError: no such input)" in said["message"]
    # It was read correctly when clean: undecided, not lost.
    assert (was_right(record), contested(record)) == (True, True)
    assert report.clean_accuracy == 3 / 4
    assert report.robust_accuracy == 2 / 4
    assert report.metrics["robust_accuracy_upper"]["value"] == 3 / 4
    assert "interval [0.5000, 0.7500]" in said["message"]
    assert verify(Report.load(tmp_path)).faults == ()


def test_a_victim_that_raises_on_the_clean_sample(tmp_path):
    report = evaluated(tmp_path, model=Net(is_odd))
    assert flag(report)["id"] == "model_error"
    assert "not classified correctly" in flag(report)["message"]
    assert not was_right(the_odd_one(tmp_path))
    assert (report.clean_accuracy, report.robust_accuracy) == (2 / 4, 2 / 4)
    assert "robust_accuracy_upper" not in report.metrics


@pytest.mark.parametrize("fails", ["raise", "exit"])
def test_an_attack_that_raises(fails, tmp_path):
    report = evaluated(tmp_path, Blind(fails))
    assert flag(report)["id"] == "attack_error"
    assert "the attack ended in an error on 1 of 4 samples" in flag(report)["message"]
    assert was_right(the_odd_one(tmp_path))
    assert report.metrics["robust_accuracy_upper"]["value"] == 3 / 4


class BadBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        if bool(near_odd(ctx.saved_tensors[0]).any()):
            raise RuntimeError("no way back")
        return gradient


class OneWay(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return BadBackward.apply(x)


def test_a_backward_pass_that_raises(tmp_path):
    report = evaluated(tmp_path, model=OneWay().eval())
    said = [flag for flag in report.flags if flag["severity"] != "info"]
    assert {flag["id"] for flag in said} == {"not_differentiable"}
    assert any("the victim's backward pass raised on 1 of 4 samples" in flag["message"] for flag in said)


def test_a_victim_that_raises_beside_every_sample(tmp_path):
    report = evaluated(tmp_path, model=Net(lambda x: ((x - X[:, None]).abs().amax(2) > 0).all(0)))
    assert {flag["id"] for flag in report.flags if flag["severity"] != "info"} == {"model_error"}
    assert report.clean_accuracy == 3 / 4
    assert report.robust_accuracy == 0


def test_an_attack_that_asks_too_much_is_not_the_victims_fault(tmp_path):
    @dataclass(frozen=True)
    class Greedy:
        needs: ClassVar[Access] = Access.SCORES

        def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Any:
            for _ in range(2 if not is_odd(x).any() else 5):
                oracle(x)
            return x

    report = evaluated(tmp_path, Greedy(), threat_model="linf:eps=0.01,access=scores,queries=3")
    assert flag(report)["id"] == "attack_error"


def test_a_surrogate_that_raises(tmp_path):
    surrogate = TorchModel(Net(near_odd), name="own", classes=2)
    report = evaluated(tmp_path, threat_model=Transfer(eps=0.01, sources=(surrogate,)))
    assert flag(report)["id"] == "surrogate_error"
    assert "a surrogate raised on 1 of 4 samples" in flag(report)["message"]
    assert the_odd_one(tmp_path).notes == ("surrogate_raised",)


@dataclass(frozen=True, eq=False)
class Read(Untargeted, Examines):
    """A goal with a judge that reads the answers, and raises on one of them."""

    @override
    def examine(self, evidence: Any) -> dict[str, Any]:
        if bool(is_odd(evidence.origin).any()):
            raise RuntimeError("the judge hung up")
        return {"read": [True] * len(evidence.origin)}


@dataclass(frozen=True, eq=False)
class Choosy(Untargeted):
    @override
    def margin(self, answer: Tensor) -> Tensor:
        if bool(is_odd(answer).any()):
            raise RuntimeError("no margin")
        return super().margin(answer)


@dataclass(frozen=True)
class Own:
    made: Any
    kind: ClassVar[str] = "untargeted"

    def __call__(self, labels: Tensor, answer: Tensor, rng: Any) -> Any:
        return self.made(UntargetedRule()(labels, answer, rng).labels)


@pytest.mark.parametrize(
    ("goal", "name", "words"),
    [(Read, "judge_error", "a judge raised"), (Choosy, "goal_error", "the goal or the threat model raised")],
)
def test_a_judge_or_a_goal_that_raises(goal, name, words, tmp_path):
    report = evaluated(tmp_path, goal=Own(goal))
    assert flag(report)["id"] == name
    assert f"{words} on 1 of 4 samples" in flag(report)["message"]
    # Clean accuracy is the victim's, whatever becomes of the judge.
    assert was_right(the_odd_one(tmp_path))
    assert report.clean_accuracy == 3 / 4


def test_a_misread_sample_on_which_somebody_raises_stays_misread(tmp_path):
    """In a grid every sample meets the attack, those with nothing to win too."""
    far = X[3]
    odd = Net(lambda x: (x - far).abs().amax(1) < 0.05)
    surrogate = TorchModel(nn.Sequential(odd, nn.BatchNorm1d(2)).eval(), name="own", classes=2)
    grid = Tapm(eps=0.01, sources=(surrogate,), attacks=("fgsm",))
    report = evaluated(tmp_path, threat_model=grid, beside=False)
    (bad,) = [r for r in read_records(tmp_path / "records.jsonl") if r.outcome == Outcome.ERROR]
    assert set(bad.notes) == {"clean_wrong", "not_contested", "surrogate_raised"}
    assert (was_right(bad), contested(bad)) == (False, False)
    assert (report.clean_accuracy, report.robust_accuracy) == (3 / 4, 3 / 4)
    assert report.metrics["attack_success_rate"]["denominator"] == 3


def test_the_first_to_be_named_is_the_one_to_blame():
    error = ValueError("no")
    assert blamed(error) == ""
    with pytest.raises(ValueError, match="no") as caught, code_of(JUDGE), code_of(MODEL):
        raise error
    assert blamed(caught.value) == MODEL
    blame(error, JUDGE)
    assert blamed(error) == MODEL
    with pytest.raises(RuntimeError) as wrapped:
        raise RuntimeError("the attack gave up") from error
    assert blamed(wrapped.value) == MODEL
    assert str(wrapped.value) == "the attack gave up"
    circle = ValueError("a")
    circle.__context__ = RuntimeError("b")
    circle.__context__.__context__ = circle
    assert blamed(circle) == ""
