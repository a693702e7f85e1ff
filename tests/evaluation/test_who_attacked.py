"""Who the attacker of a run was: in the JSON, in words, on the board and in plots; by what the oracle counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import advkit
from advkit.core.protocols import Access
from advkit.core.spaces import Box
from advkit.evaluation.report import Report
from advkit.evaluation.report import leaderboard as boards
from advkit.models.torch import TorchModel

N = {"n": 10, "device": "cpu"}
ON = {"task": "digits", **N}
RUNS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "fgsm": ({"attack": "fgsm", **ON}, "white_box", "none", "white box"),
    "defended": (
        {"attack": "fgsm", "defense": "pgd_at", **ON}, "white_box", "known", "white box, defense known",
    ),
    "scores": ({"attack": "square:queries=20", **ON}, "black_box_score", "none", "black box (scores)"),
    "scores granted": (
        {"attack": "square:queries=20", "threat_model": "linf:eps=0.1,access=scores", **ON},
        "black_box_score", "none", "black box (scores)",
    ),
    "scores of a defended model": (
        {"attack": "square:queries=20", "defense": "pgd_at", **ON},
        "black_box_score", "known", "black box (scores), defense known",
    ),
    "labels": (
        {"attack": "random_flips", "task": "digits-dvs", **N}, "black_box_decision", "none", "black box (decisions)",
    ),
    "suite": ({"attack": "lean", "defense": "pgd_at", **ON}, "white_box", "known", "white box, defense known"),
    "transfer": (
        {"attack": "fgsm", "threat_model": "transfer:sources=zoo:digits-public-mlp", **ON},
        "transfer", "none", "transfer",
    ),
    "transfer on a defended model": (
        {"attack": "fgsm", "defense": "pgd_at", "threat_model": "transfer:sources=zoo:digits-public-mlp", **ON},
        "transfer", "unknown", "transfer, oblivious",
    ),
    "bpda": ({"attack": "fgsm", "defense": "bit-depth:bits=3", **ON}, "white_box", "adaptive", "white box, adaptive"),
    "scores against a filter of inputs": (
        {"attack": "square:queries=20", "defense": "bit-depth:bits=3", **ON},
        "black_box_score", "known", "black box (scores), defense known",
    ),
    "suffix that keeps to a filter": (
        {"attack": "random_suffix:length=3,evaluations=3", "defense": "ppl_filter", "task": "prompts", "n": 2,
         "device": "cpu"},
        "black_box_score", "adaptive", "black box (scores), adaptive",
    ),
    "suffix that looks away": (
        {"attack": "random_suffix:length=3,evaluations=3,max_perplexity=inf", "defense": "ppl_filter",
         "task": "prompts", "n": 2, "device": "cpu"},
        "black_box_score", "known", "black box (scores), defense known",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_report_says_what_was_asked_and_what_was_known(name: str, tmp_path: Path) -> None:
    request, access, defense, words = RUNS[name]
    report = advkit.evaluate(out=tmp_path / "run", **request)
    threat = report.to_dict()["threat_model"]
    assert threat["attacker"] == {"access": access, "defense": defense}
    assert threat["knowledge"] == access
    assert threat["adaptive"] is (defense == "adaptive")
    assert report.threat.endswith(f", {words}")  # the title of every plot, and the terminal's second line
    assert ("No adaptive attack declared." in report.verdict()) is (defense in ("known", "unknown"))
    (group,) = boards.scan(tmp_path).groups
    (victim,) = group.victims
    assert (group.access, victim.attacker) == (access, words)
    board = boards.scan(tmp_path)
    assert f"| {boards.markdown(words)} |" in boards.markdown_of(board)
    assert f'"attacker":"{words}"' in boards.html_of(board)
    assert json.loads(board.to_json())["groups"][0]["victims"][0]["attacker"] == words
    assert victim.verified.partition(":")[0] in ("yes", "partly")


@pytest.mark.slow
def test_every_attack_of_a_suite_has_its_own_access(tmp_path: Path) -> None:
    report = advkit.evaluate(attack="thorough", defense="pgd_at", task="digits", n=20, device="cpu")
    access = {entry["stage"]: entry["access"] for entry in report.attacks}
    costs = {entry["stage"]: entry["cost"]["backward"] for entry in report.attacks}
    assert set(access.values()) == {"white_box", "black_box_score"}
    assert {stage for stage, word in access.items() if word == "white_box"} == {s for s, n in costs.items() if n}


def test_an_oblivious_companion_says_so() -> None:
    report = advkit.evaluate(attack="fgsm", defense="bit-depth:bits=3", **ON)
    found = {bool(entry["beside"]): entry["access"] for entry in report.attacks}
    assert found == {False: "white_box", True: "transfer"}


@dataclass(frozen=True)
class Shy:
    """Declares one access and takes another."""

    needs: ClassVar[Access] = Access.SCORES
    gradients: bool = False

    def __call__(self, oracle: Any, x: Any, goal: Any, ball: Any, rng: Any, /) -> Any:
        if not self.gradients:
            oracle(x)
            return x
        return ball.project(x - ball.steepest(oracle.gradient(x, goal)[1], x), x)


@dataclass(frozen=True)
class Loud(Shy):
    needs: ClassVar[Access] = Access.GRADIENTS


def test_what_the_oracle_counted_decides_over_what_was_declared() -> None:
    took = advkit.evaluate(Shy(gradients=True), **ON).to_dict()["threat_model"]["attacker"]["access"]
    left = advkit.evaluate(Loud(), **ON).to_dict()["threat_model"]["attacker"]["access"]
    assert (took, left) == ("white_box", "black_box_score")


@dataclass(frozen=True)
class MadeFor(Shy):
    adapts_to: tuple[str, ...] = ()


def test_an_attack_declares_the_defenses_that_it_was_made_for() -> None:
    for made_for, defense in (((), "known"), (("trades",), "known"), (("pgd_at", "trades"), "adaptive")):
        report = advkit.evaluate(MadeFor(gradients=True, adapts_to=made_for), "pgd_at", **ON)
        assert report.to_dict()["threat_model"]["attacker"]["defense"] == defense


def test_a_model_of_ones_own_without_a_defense_is_no_defended_one() -> None:
    torch.manual_seed(0)
    model = TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), Box(shape=(1, 8, 8)), 10)
    report = advkit.evaluate("fgsm", model=model, threat_model="linf:eps=0.1", **ON)
    assert report.to_dict()["threat_model"]["attacker"] == {"access": "white_box", "defense": "none"}


def test_what_is_granted_is_kept_and_compared(tmp_path: Path) -> None:
    """Two attacks within one threat model can be compared, whatever they made of it."""
    for name, attack in (("a", "fgsm"), ("b", "square:queries=20")):
        advkit.evaluate(attack=attack, out=tmp_path / name, **ON)
    threats = [Report.load(tmp_path / name).to_dict()["threat_model"] for name in "ab"]
    assert [threat["granted"] for threat in threats] == ["white_box", "white_box"]
    from advkit.evaluation.report.compare import compare

    assert compare(tmp_path / "a", tmp_path / "b").robust.n == 10
