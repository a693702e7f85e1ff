"""Small neural networks as learners from labels: plain, and adversarially trained on features (arXiv 1706.06083)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import at_least_one, check, positive
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses.adversarial.pgd_at import PGDAT
from advkit.defenses.labels.base import LabelDefense
from advkit.models.mlp import MLP
from advkit.training.loop import Recipe, fit

Floats = NDArray[np.float64]


class Network(MLPClassifier):  # type: ignore[misc]
    """scikit-learn's MLPClassifier that trains for `max_iter` epochs as asked, without a warning that it did."""

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Network:
        """Train on samples [n, d] and labels [n]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            super().fit(X, y, sample_weight)
        return self


@dataclass(frozen=True, kw_only=True)
class NN(LabelDefense):
    """A small neural network (scikit-learn's MLPClassifier): no defense, a reference.

    hidden: units of the hidden layers, joined by +. FLORAL's released code has 32+32 for points in the plane and 32+10
            for images
    lr:     of SGD with momentum 0.9, above 0
    epochs: >= 1
    """

    defends: ClassVar[bool] = False

    hidden: tuple[int, ...] = (32, 32)
    lr: float = 0.05
    epochs: int = 100

    def __post_init__(self) -> None:
        check(self, "hidden", all(units >= 1 for units in self.hidden), "units of at least 1 in every hidden layer")
        positive(self, "lr")
        at_least_one(self, "epochs")

    @override
    def learner(self, seed: int) -> Any:
        """MLPClassifier with batches of 32; it draws weights and the order of samples."""
        return Network(
            self.hidden,
            solver="sgd",
            momentum=0.9,
            nesterovs_momentum=False,
            learning_rate_init=self.lr,
            batch_size=32,
            max_iter=self.epochs,
            n_iter_no_change=self.epochs,  # as many epochs as were asked for
            random_state=seed,
        )


@dataclass(frozen=True, kw_only=True)
class NNPGDAT(NN):
    """The same network with PGD adversarial training on the samples: a defense against another attack, as a reference.

    hidden, lr, epochs: of the network; 40 epochs by default, each of which costs as many passes as `steps` and two more
    eps:   radius of the Linf ball, above 0, in units of the features
    steps: of PGD, each of a quarter of eps, >= 1
    """

    epochs: int = 40

    eps: float = 8 / 255
    steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "eps", what="radius")
        at_least_one(self, "steps")

    @override
    def learner(self, seed: int) -> RobustNetwork:
        """A torch network with batches of 32; it draws weights, the order of samples, and PGD's starts."""
        return RobustNetwork(self, seed)


class RobustNetwork(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """PGD adversarial training as a classifier of scikit-learn; samples are cut off at the training set's range."""

    def __init__(self, defense: NNPGDAT, seed: int = 0) -> None:
        self.defense = defense
        self.seed = seed

    def fit(self, X: Any, y: Any) -> RobustNetwork:
        """Train on samples [n, d] and labels [n]."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_, codes = np.unique(y, return_inverse=True)
        given = self.defense
        low, high = float(X.min()), float(X.max())
        self._range = low, high if high > low else low + 1.0
        space = Box(*self._range, (X.shape[1],))
        rng = RowRng.from_ids(self.seed, ["nn_pgd_at"])
        model = MLP(hidden=given.hidden)((X.shape[1],), len(self.classes_), rng.at("weights"), space=space)
        data = Data(self._samples(X), torch.from_numpy(codes), space, len(self.classes_))
        recipe = Recipe(epochs=given.epochs, batch_size=32, optimizer="sgd", lr=given.lr, validation=0.0, select="last")
        objective = PGDAT(eps=given.eps, steps=given.steps, step_size=0.25).objective()
        self._model = fit(model, data, objective, recipe, rng, progress=False).model
        return self

    def _samples(self, X: Floats) -> Tensor:
        low, high = self._range
        return torch.from_numpy(X.astype(np.float32)).clamp(low, high)  # a copy: X may not be writable

    def predict_proba(self, X: Any) -> Floats:
        """Probabilities [m, classes]."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            logits = self._model(self._samples(X))
        return np.asarray(logits.double().softmax(1).numpy())

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each sample [m]."""
        labels: NDArray[Any] = self.classes_[self.predict_proba(X).argmax(1)]
        return labels
