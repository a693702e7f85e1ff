"""What is asked of a classifier with scikit-learn's interface: fitted to labels of one class too, scores per class."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from advkit.core.errors import BadInput
from advkit.core.protocols import Rng

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def seed_of(rng: Rng) -> int:
    """A seed for libraries that want a number: 31 bits of a stream."""
    return int(rng.generator().initial_seed()) % 2**31


class Constant:
    """A fitted classifier that knows one class only: what is learned of labels that are all equal."""

    def __init__(self, label: int) -> None:
        self.classes_ = np.array([label], dtype=np.int64)

    def predict(self, x: Floats) -> Ints:
        """That class for every sample, [m]."""
        return np.repeat(self.classes_, len(x))

    def predict_proba(self, x: Floats) -> Floats:
        """Ones, [m, 1]."""
        return np.ones((len(x), 1))


def fitted(learner: Any, x: Floats, y: Ints) -> Any:
    """The learner, fitted to samples x [n, d] with labels y [n]; a `Constant` where all labels are equal.

    The arrays are copied, so that no learner can change what the next one sees.
    """
    if not len(y):
        raise BadInput("there are no training samples; expected at least one")
    if (y == y[0]).all():
        return Constant(int(y[0]))
    return learner.fit(np.array(x, dtype=np.float64), np.array(y, dtype=np.int64))


def scores(model: Any, x: Floats, classes: int) -> Floats:
    """A score for every class [m, classes], larger where the model is surer; of a fitted classifier.

    The decision function, of two classes f as (-f/2, f/2), or else the log of the probabilities, at least -50. Classes
    that the model never saw get a score below all others: the row's smallest less 1.
    """
    if hasattr(model, "decision_function"):
        found = np.asarray(model.decision_function(x), dtype=np.float64)
        if found.ndim == 1:
            found = np.stack((-found / 2, found / 2), axis=1)
    else:
        found = np.log(np.maximum(np.asarray(model.predict_proba(x), dtype=np.float64), np.exp(-50.0)))
    known = np.asarray(model.classes_, dtype=np.int64)
    if found.shape != (len(x), len(known)):
        raise BadInput(
            f"{type(model).__name__} scores {len(x)} samples of {len(known)} classes in an array {list(found.shape)}; "
            f"expected {[len(x), len(known)]}: give it decision_function_shape='ovr', or predict_proba"
        )
    full = np.repeat(found.min(1, keepdims=True) - 1.0, classes, axis=1)
    full[:, known] = found
    return full


def margins(model: Any, x: Floats, y: Ints, classes: int) -> Floats:
    """By how much the score of each sample's class y [m] exceeds the largest other one, [m]; of two classes y f."""
    every = scores(model, x, classes)
    rows = np.arange(len(y))
    own = every[rows, y]
    every[rows, y] = -np.inf
    margin: Floats = own - every.max(1)
    return margin
