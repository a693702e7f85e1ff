"""Label flips: the attacker changes training labels, at most so many, and nothing else (Xiao et al., ECAI 2012)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from advkit.core.checks import at_least_one, check
from advkit.core.errors import UsageError
from advkit.core.protocols import Access
from advkit.core.spaces import Box
from advkit.threat_models.capability import KNOWLEDGE


@dataclass(frozen=True, kw_only=True)
class LabelFlips:
    """Label flips: the attacker moves before training and changes the labels of at most so many training samples.

    Samples are never changed, and test samples are never seen. Say rate or k, and not both.

    rate:      share of the training labels, in (0, 1]: of n labels floor(rate * n) may be flipped
    k:         how many labels may be flipped, >= 1
    trials:    repetitions, >= 1, each with a split, an attack and trainings of its own seed; intervals are over them
    train:     training samples of a trial, >= 2. A task of one pool, or without a training set, is split anew in every
               trial: none takes half. Of a task with a training set of its own so many are drawn: none takes all
    attacker:  "adaptive" knows the defense and trains it to choose labels; "oblivious" trains a surrogate
    surrogate: what the oblivious attacker trains, as a defense's spec, in brackets where it holds commas; empty takes
               the attack's own

    Raises UsageError for a rate or a k that flips nothing, and for both or none of them.
    """

    scenario: ClassVar[str] = "poisoning"
    norm: ClassVar[str] = "labels"
    access: ClassVar[Access] = Access.GRADIENTS
    queries: ClassVar[int | None] = None

    rate: float | None = None
    k: int | None = None
    trials: int = 8
    train: int | None = None
    attacker: Literal["adaptive", "oblivious"] = "adaptive"
    surrogate: str = ""

    def __post_init__(self) -> None:
        if (self.rate is None) == (self.k is None):
            seen = "neither rate nor k" if self.rate is None else f"both rate={self.rate:g} and k={self.k}"
            raise UsageError(f"label-flips says {seen}; expected one of them: rate=0.1, or k=20 labels")
        inside = self.rate is None or (math.isfinite(self.rate) and 0 < self.rate <= 1)
        check(self, "rate", inside, "a share of the training labels above 0 and at most 1, such as 0.1")
        at_least_one(self, "k", "trials")
        check(self, "train", self.train is None or self.train >= 2, "a number of training samples of at least 2")
        check(self, "attacker", self.attacker in ("adaptive", "oblivious"), "adaptive or oblivious")

    def budget(self, n: int) -> int:
        """How many of n labels may be flipped; UsageError where that is none, or more than there are."""
        if self.k is not None:
            if self.k > n:
                raise UsageError(f"k is {self.k} and there are {n} training labels; expected at most as many")
            return self.k
        assert self.rate is not None
        flips = math.floor(self.rate * n + 1e-9)  # 0.29 of 100 is 29, not the float below it
        if flips < 1:
            raise UsageError(
                f"rate={self.rate:g} of {n} training labels flips nothing; expected at least {1 / n:.2g}, or k=1"
            )
        return flips

    def describe(self) -> dict[str, Any]:
        """The report's threat_model block, without the goal."""
        text = f"{self.k} labels" if self.rate is None else f"{100 * self.rate:g} % of the labels"
        return {
            "name": "label-flips",
            "phase": "training_time",
            "norm": self.norm,
            "eps": self.k if self.rate is None else self.rate,
            "eps_string": text,
            "knowledge": KNOWLEDGE[self.access],
            "query_budget": self.queries,
            "details": {
                "rate": self.rate,
                "k": self.k,
                "trials": self.trials,
                "train": self.train,
                "attacker": self.attacker,
                "surrogate": self.surrogate,
            },
        }

    def bind(self, space: Any) -> Self:
        """Itself; UsageError for a space that is no box of numbers."""
        if not isinstance(space, Box):
            raise UsageError(f"labels are flipped of samples in a Box, and this model's space is {space!r}")
        return self

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [n]: whether labels x [n] may be handed in for the clean labels; all of them, or none."""
        fine = x.shape == origin.shape and not x.is_floating_point() and x.dim() == 1
        fine = fine and bool((x >= 0).all()) and int((x != origin).sum()) <= self.budget(len(origin))
        return torch.full((len(origin),), fine, dtype=torch.bool, device=origin.device)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """Float [n]: 1 for every label that was changed."""
        return (x != origin).double()

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """x."""
        return x
