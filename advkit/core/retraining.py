"""The oracle of attacks on training labels: it trains what the attacker asks for, and counts how often."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advkit.core.errors import BadInput
from advkit.core.learners import Floats, Ints, fitted


def locked(values: NDArray[Any]) -> NDArray[Any]:
    """A copy that can't be written to."""
    held = values.copy()
    held.setflags(write=False)
    return held


class Retraining:
    """All that an attack on labels sees: the training samples, their clean labels, and models trained on request.

    What is trained is the attacker's: the defense itself (adaptive), or a surrogate (oblivious). Test samples are out
    of reach.

    x:       training samples, float64 [n, d]
    y:       their clean labels, whole numbers [n] from 0 to classes - 1
    classes: of the task
    learner: makes an unfitted classifier of a seed
    seed:    of the attacker's trainings; the defender has another one

    `trainings` is how often something was trained.
    """

    def __init__(self, x: Floats, y: Ints, classes: int, learner: Callable[[int], Any], seed: int) -> None:
        self.x, self.y = locked(x), locked(y)
        self.classes = classes
        self.trainings = 0
        self._x, self._learner, self._seed = x, learner, seed

    def train(self, y: Ints) -> Any:
        """A fitted classifier on all training samples with labels y [n], with scikit-learn's interface.

        Raises BadInput where there is not one label, from 0 to classes - 1, for each sample.
        """
        labels = np.asarray(y)
        if labels.shape != (len(self._x),) or labels.dtype.kind not in "iu":
            raise BadInput(
                f"asked to train on labels of shape {list(labels.shape)}, type {labels.dtype}; expected one whole "
                f"number for each of {len(self._x)} samples"
            )
        if labels.min() < 0 or labels.max() >= self.classes:
            raise BadInput(
                f"asked to train on labels from {labels.min()} to {labels.max()}; expected 0 to {self.classes - 1}"
            )
        self.trainings += 1
        return fitted(self._learner(self._seed), self._x, labels.astype(np.int64))
