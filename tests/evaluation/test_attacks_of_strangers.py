"""What an attack does to the objects it holds changes no verdict; one that leaves the program has none."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import advkit
from advkit.core.protocols import Access

N = 24


@dataclass(frozen=True, kw_only=True)
class Widens:
    """Sets the radius of the ball that it was handed to 1 and hands in far points."""

    needs: ClassVar[Access] = Access.GRADIENTS

    def __call__(self, oracle: Any, x: Any, goal: Any, ball: Any, rng: Any, /) -> Any:
        object.__setattr__(ball, "eps", 1.0)
        return 1 - x


@dataclass(frozen=True, kw_only=True)
class Lifts:
    """Grants itself what the threat model does not."""

    what: str
    needs: ClassVar[Access] = Access.LABELS

    def __call__(self, oracle: Any, x: Any, goal: Any, ball: Any, rng: Any, /) -> Any:
        if self.what == "access":
            oracle.access = Access.GRADIENTS
        else:
            oracle.queries = None
        return x


@dataclass(frozen=True, kw_only=True)
class Leaves:
    needs: ClassVar[Access] = Access.GRADIENTS

    def __call__(self, oracle: Any, x: Any, goal: Any, ball: Any, rng: Any, /) -> Any:
        sys.exit(0)


def run(attack: Any, threat_model: str = "linf:eps=0.1") -> advkit.Report:
    return advkit.evaluate(attack=attack, task="digits", threat_model=threat_model, n=N, device="cpu")


def test_points_are_judged_in_the_ball_of_the_case() -> None:
    report = run(Widens())
    attack = report.attacks[0]
    assert attack["perturbation"]["n_outside_budget"] == report.metrics["clean_accuracy"]["numerator"] > 0
    assert report.attack_success_rate == 0
    assert report.to_dict()["threat_model"]["eps"] == 0.1


@pytest.mark.parametrize("what", ["access", "queries"])
def test_an_oracle_that_grants_more_than_the_case_gives_no_verdict(what: str) -> None:
    report = run(Lifts(what=what), "linf:eps=0.1,access=labels,queries=5")
    assert report.undecided == report.metrics["clean_accuracy"]["numerator"] > 0
    assert not report.trustworthy


def test_an_attack_that_leaves_the_program_gives_no_verdict() -> None:
    report = run(Leaves())
    assert report.undecided == report.metrics["clean_accuracy"]["numerator"] > 0
    assert not report.trustworthy
    assert "SystemExit" in str(report.flags)
    assert torch.is_grad_enabled()
