"""What attacks on training labels share: `flip` gets numpy labels and a budget, and returns the labels to train on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.errors import UsageError
from advkit.core.learners import Floats, Ints, scores, seed_of
from advkit.core.protocols import Access, FlipsLabels, MadeForThreatModel, Rng, Serves
from advkit.core.retraining import Retraining
from advkit.threat_models.labels import LabelFlips


@dataclass(frozen=True, kw_only=True)
class LabelAttack(FlipsLabels, MadeForThreatModel, Serves, ABC):
    """An attack that flips training labels before anything is trained; frozen, and the same seed flips the same.

    `needs` says what it reads of the models that it trains: nothing, scores, or (gradients) the dual variables of a
    kernel machine.
    """

    needs: ClassVar[Access] = Access.SCORES
    default_threat_model: ClassVar[str] = "label-flips:rate=0.1"
    serves: ClassVar[tuple[str, ...]] = ("untargeted",)

    @abstractmethod
    @override
    def flip(self, oracle: Retraining, y: Ints, budget: int, rng: np.random.Generator) -> Ints:
        """The labels y [n] with exactly `budget` of them changed, within 0 to oracle.classes - 1."""

    def __call__(self, oracle: Any, x: Tensor, goal: Any, threat: Any, rng: Rng, /) -> Tensor:
        """The labels x, long [n], as they would be handed to the training; see `flip`.

        Raises UsageError under any threat model but label flips.
        """
        if not isinstance(threat, LabelFlips) or not isinstance(oracle, Retraining):
            kind = threat.describe().get("name", "this threat model")
            raise UsageError(
                f"{type(self).__name__} flips training labels, which {kind} has none of: name a threat model such as "
                f"{self.default_threat_model}, and a defense that learns from labels, such as svm"
            )
        labels = x.detach().cpu().numpy().astype(np.int64)
        flipped = self.flip(oracle, labels.copy(), threat.budget(len(labels)), np.random.default_rng(seed_of(rng)))
        return torch.from_numpy(np.asarray(flipped)).to(x.device)


def two_classes(attack: LabelAttack, oracle: Retraining) -> Ints:
    """The clean labels as -1 and 1 [n]; UsageError where the task has more than two classes."""
    if oracle.classes != 2:
        raise UsageError(
            f"{type(attack).__name__} is defined for two classes and the task has {oracle.classes}; take two of them "
            "(digits-pair:classes=1+7), or svflip, farfirst, nearfirst, random_labels or lfa_greedy"
        )
    return 2 * np.asarray(oracle.y) - 1


def others(model: Any, oracle: Retraining, y: Ints) -> Ints:
    """For every training sample the class other than y [n] that a model scores highest: what its label becomes."""
    every = scores(model, oracle.x, oracle.classes)
    every[np.arange(len(y)), y] = -np.inf
    found: Ints = every.argmax(1)
    return found


def with_flips(y: Ints, chosen: Ints, to: Ints) -> Ints:
    """The labels y [n] with those at `chosen` changed to what `to` [n] has there."""
    flipped = y.copy()
    flipped[chosen] = to[chosen]
    return flipped


def largest(values: Floats, k: int, rng: np.random.Generator) -> Ints:
    """Positions of the k largest values [n]; ties are broken by a draw."""
    found: Ints = np.lexsort((rng.permutation(len(values)), -values))[:k]
    return found


def hinge(margins: Floats) -> Floats:
    """max(0, 1 - margin), elementwise."""
    loss: Floats = np.maximum(0.0, 1.0 - margins)
    return loss


def sides(model: Any, oracle: Retraining) -> Floats:
    """The decision value f [n] of every training sample under a model of two classes, positive for class 1."""
    every = scores(model, oracle.x, 2)
    found: Floats = every[:, 1] - every[:, 0]
    return found
