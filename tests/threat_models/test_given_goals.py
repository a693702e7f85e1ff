"""A class per sample, and goals and rules of one's own, as objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import advkit
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import PerSample
from advkit.core.rng import RowRng
from advkit.evaluation.run.store import read_records
from advkit.threat_models import GOALS
from advkit.threat_models.goals.given import GivenGoal, given
from advkit.threat_models.goals.targeted import Targeted, TargetedRule

QUICK: dict[str, Any] = {"task": "digits", "device": "cpu", "threat_model": "linf:eps=0.3"}
CLASSES = [3, 1, 4, 1, 5, 9, 2, 6]


class Far:
    """The goal of being sure of a class: its score is above every other by 1."""

    kind = "targeted"

    def __init__(self, classes: Tensor) -> None:
        self.classes = classes

    def margin(self, answer: Tensor) -> Tensor:
        mine = answer.gather(1, self.classes[:, None]).squeeze(1)
        others = answer.scatter(1, self.classes[:, None], -torch.inf).amax(1)
        return others + 1 - mine

    def reached(self, answer: Tensor) -> Tensor:
        return self.margin(answer) < 0

    def loss(self, answer: Tensor) -> Tensor:
        return self.margin(answer)

    def under(self, loss: str) -> Far:
        return self

    def take(self, rows: Tensor) -> Far:
        return Far(self.classes[rows])

    def to(self, device: Any) -> Far:
        return Far(self.classes.to(device))


def ended(folder: Path) -> dict[str, tuple[Any, ...]]:
    return {r.id: (r.outcome, r.adversarial, r.margin, r.forwards) for r in read_records(folder / "records.jsonl")}


@pytest.mark.parametrize("form", [list, tuple, np.array, torch.tensor, lambda c: Targeted(torch.tensor(c))])
def test_a_class_per_sample_is_a_goal(form: Any, tmp_path: Path) -> None:
    """In any form; every broken sample is taken for its own class, and the report can name the goal again."""
    report = advkit.evaluate("pgd:steps=10", n=8, goal=form(CLASSES), out=tmp_path / "run", **QUICK)
    spec = "targeted:how=each,targets=3+1+4+1+5+9+2+6"
    assert report.to_dict()["request"]["goal"] == spec
    records = read_records(tmp_path / "run" / "records.jsonl")
    broken = [(r, wanted) for r, wanted in zip(records, CLASSES, strict=True) if r.reached]
    assert broken
    assert all(r.adversarial == wanted for r, wanted in broken)
    advkit.evaluate("pgd:steps=10", n=8, goal=spec, out=tmp_path / "again", **QUICK)
    assert ended(tmp_path / "again") == ended(tmp_path / "run")


@pytest.mark.slow
def test_the_class_goes_with_the_sample_whatever_the_batch(tmp_path: Path) -> None:
    goal = torch.arange(40) % 10
    for size in (7, 40):
        advkit.evaluate("pgd:steps=4", n=40, goal=goal, batch_size=size, out=tmp_path / str(size), **QUICK)
    assert ended(tmp_path / "7") == ended(tmp_path / "40")
    whole = tmp_path / "40" / "records.jsonl"
    lines = whole.read_text().splitlines(keepends=True)
    whole.write_text("".join(lines[:13]))
    advkit.evaluate("pgd:steps=4", n=40, goal=goal, batch_size=9, out=tmp_path / "40", **QUICK)
    assert ended(tmp_path / "40") == ended(tmp_path / "7")


def test_next_said_one_by_one_is_next(tmp_path: Path) -> None:
    """A rule that names a class for all, written out, gives the same records."""
    labels = [int(each) for each in next(iter(advkit.tasks.TASKS.build("digits").batches(12))).labels]
    advkit.evaluate("pgd:steps=4", n=12, goal="targeted:how=next", out=tmp_path / "rule", **QUICK)
    each = [(label + 1) % 10 for label in labels]
    advkit.evaluate("pgd:steps=4", n=12, goal=each, out=tmp_path / "each", **QUICK)
    assert ended(tmp_path / "each") == ended(tmp_path / "rule")


def test_a_goal_of_ones_own(tmp_path: Path) -> None:
    goal = Far(torch.tensor(CLASSES))
    report = advkit.evaluate("pgd:steps=20", n=8, goal=goal, out=tmp_path / "run", **QUICK)
    examples, model = report.adversarial(), advkit.evaluation.api.resolve("fgsm", n=8, **QUICK).victim
    reached = goal.reached(model(examples.adversarial)) & torch.tensor([each != "wrong" for each in examples.outcomes])
    assert torch.equal(examples.broken, reached)
    assert bool(reached.any())
    advkit.evaluate("pgd:steps=20", n=8, goal=Far(torch.tensor(CLASSES)), out=tmp_path / "run", **QUICK)  # resumed
    label = report.to_dict()["request"]["goal"]
    assert label.startswith("GivenGoal:goal=Far-")
    other = advkit.evaluate("fgsm", n=8, goal=Far(torch.tensor(CLASSES[::-1])), **QUICK)
    assert other.to_dict()["request"]["goal"] != label


def test_a_rule_of_ones_own() -> None:
    def after(labels: Tensor, answer: Tensor, rng: Any) -> Targeted:
        return Targeted((labels + 1) % answer.shape[1])

    after.kind = "targeted"  # type: ignore[attr-defined]
    mine = advkit.evaluate("pgd:steps=4", n=12, goal=after, **QUICK)
    assert (
        mine.metrics["attack_success_rate"]
        == advkit.evaluate("pgd:steps=4", n=12, goal="targeted:how=next", **QUICK).metrics["attack_success_rate"]
    )


@pytest.mark.parametrize(
    ("goal", "error", "words"),
    [
        ([1, 2, 3], UsageError, "3 targets for 8 samples"),
        ([99] * 8, BadInput, "a target is 99, and the model has 10 classes"),
        ([-1] * 8, UsageError, "a target is -1"),
        ([1.5] * 8, UsageError, "whole numbers [N]"),
        ([[1] * 8], UsageError, "shape [1, 8]"),
        (torch.ones(8, dtype=torch.bool), UsageError, "whole numbers [N]"),
        (Targeted(torch.tensor([1, 2]), "margin"), UsageError, "2 rows for 8 samples"),
        ("targeted:how=each", UsageError, "0 targets"),
        ("targeted:targets=1+2", UsageError, "goes with how=each"),
    ],
)
def test_what_does_not_fit_the_samples_is_refused(goal: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as refused:
        advkit.evaluate("fgsm", n=8, goal=goal, **QUICK)
    assert words in str(refused.value)


def test_more_classes_than_samples_are_those_of_the_first() -> None:
    """n= takes the first samples of a task, and so the first classes."""
    whole = advkit.evaluate("fgsm", n=8, goal=CLASSES + [0] * 20, **QUICK)
    assert (
        whole.metrics["attack_success_rate"]
        == advkit.evaluate("fgsm", n=8, goal=CLASSES, **QUICK).metrics["attack_success_rate"]
    )


def test_a_rule_asked_for_strangers_says_so() -> None:
    rule = TargetedRule(how="each", targets=(1, 2)).over(["a", "b"])
    assert isinstance(rule, PerSample)
    rng = RowRng.from_ids(0, ["b"])
    assert rule.of(["b"])(torch.tensor([0]), torch.zeros(1, 4), rng).targets.tolist() == [2]
    with pytest.raises(UsageError, match="no entry for sample c"):
        rule.of(["c"])
    with pytest.raises(UsageError, match="ask the rule `of` the batch"):
        rule(torch.tensor([0]), torch.zeros(1, 4), rng)
    assert TargetedRule().over(["a"]).of(["a"]) == TargetedRule()
    assert GOALS.build(GOALS.spec(TargetedRule(how="each", targets=(1, 2)))).targets == (1, 2)
    assert isinstance(given(Far(torch.tensor([1]))), GivenGoal)
    assert given(object()) is None


def test_the_matrix_takes_them(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    made = advkit.matrix(
        ["zoo:digits-public-mlp"], ["mifgsm"], [net], task="digits", n=8, goal=CLASSES, seeds=1, equal_budget=None,
        device="cpu", cache=tmp_path,
    ).to_dict()  # fmt: skip
    assert made["request"]["goal"] == "targeted:how=each,targets=3+1+4+1+5+9+2+6"
    assert json.dumps(made["cells"][0]["targeted"])
