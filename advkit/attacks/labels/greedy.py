"""Greedy label flips: one after the other, each the one that costs most after a training.

Biggio, Nelson and Laskov (ACML 2011) and Xiao et al. (Neurocomputing 2015) describe the greedy search for two classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from advkit.attacks.labels.base import LabelAttack
from advkit.core.checks import at_least_one
from advkit.core.learners import Ints, margins
from advkit.core.retraining import Retraining


@dataclass(frozen=True, kw_only=True)
class LFAGreedy(LabelAttack):
    """Greedy label flips (LFA): again and again the single flip after whose training most clean labels are missed.

    Each candidate is one training: all samples that are not flipped yet, with every other class as their new label.
    That is about budget * n trainings, so by default 20 candidates are drawn at every step. What is missed is counted
    on the training samples with their clean labels, for the attacker has no others; among equals the larger mean hinge
    loss decides, then the order of the samples. Any number of classes.

    candidates: drawn at each step, >= 1; none tries them all
    surrogate:  what an attacker trains who does not know the defense
    """

    candidates: int | None = 20
    surrogate: str = "svm"

    def __post_init__(self) -> None:
        at_least_one(self, "candidates")

    @override
    def flip(self, oracle: Retraining, y: Ints, budget: int, rng: np.random.Generator) -> Ints:
        labels = y.copy()
        for _ in range(budget):
            left = np.flatnonzero(labels == y)
            moves = [(int(row), to) for row in left for to in range(oracle.classes) if to != y[row]]
            if self.candidates is not None and self.candidates < len(moves):
                moves = [moves[i] for i in np.sort(rng.permutation(len(moves))[: self.candidates])]
            tried = [(*self.harm(oracle, y, _moved(labels, row, to)), -i) for i, (row, to) in enumerate(moves)]
            row, to = moves[-max(tried)[2]]
            labels[row] = to
        return labels

    @staticmethod
    def harm(oracle: Retraining, y: Ints, labels: Ints) -> tuple[int, float]:
        """What a training on `labels` costs: clean labels y [n] missed, and their mean hinge loss."""
        model = oracle.train(labels)
        found = margins(model, oracle.x, y, oracle.classes)
        return int((model.predict(oracle.x) != y).sum()), float(np.maximum(0.0, 1.0 - found).mean())


def _moved(labels: Ints, row: int, to: int) -> Ints:
    moved = labels.copy()
    moved[row] = to
    return moved
