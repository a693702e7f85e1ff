"""Defenses that relabel, drop or weight suspicious samples before an SVM is trained."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from typing_extensions import override

from advkit.core.kernels import Kernel
from advkit.core.learners import Constant, scores
from advkit.defenses.labels.svm import SVM

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Cleaned:
    """What is left of a training set.

    rows:    of the samples that are kept, [k]
    labels:  of these, 0 to classes - 1, [k]
    weights: of these, at least 0, [k]; None for 1
    """

    rows: Ints
    labels: Ints
    weights: Floats | None = None


@dataclass(frozen=True, kw_only=True)
class CleaningDefense(SVM):
    """An SVM that is trained on what a subclass's `cleaned` makes of the training set."""

    defends: ClassVar[bool] = True

    @abstractmethod
    def cleaned(self, x: Floats, y: Ints, rng: np.random.RandomState) -> Cleaned:
        """What is left of samples x [n, d] with labels y [n], whole numbers from 0 on."""

    @override
    def learner(self, seed: int) -> Any:
        """SVC after cleaning."""
        return CleanedSVM(self, seed)

    def machine(self) -> Any:
        """The SVM that is trained on what is left."""
        return super().learner(0)


class CleanedSVM(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A cleaning defense as a classifier of scikit-learn.

    A class of which cleaning leaves nothing is kept whole, with a warning. Where relabelling leaves one class alone, it
    is the answer for every sample.
    """

    def __init__(self, defense: CleaningDefense, seed: int = 0) -> None:
        self.defense = defense
        self.seed = seed

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> CleanedSVM:
        """Clean samples [n, d] with labels [n], and train on what is left."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self.classes_, codes = np.unique(y, return_inverse=True)
        given = None if sample_weight is None else _check_sample_weight(sample_weight, X)
        left = self.defense.cleaned(X, codes, check_random_state(self.seed))
        left = self._with_every_class(left, codes)
        self.kept_, self.labels_, self._samples = left.rows, self.classes_[left.labels], len(X)
        weights = left.weights
        if given is not None:
            weights = given[left.rows] * (1.0 if weights is None else weights)
        self._kernel = Kernel(
            name=self.defense.kernel,
            gamma=self.defense.gamma,
            degree=self.defense.degree,
            coef0=self.defense.coef0,
        ).fitted(X[left.rows])
        if (left.labels == left.labels[0]).all():
            self._machine: Any = Constant(int(left.labels[0]))
        else:
            self._machine = self.defense.machine().fit(X[left.rows], left.labels, sample_weight=weights)
        return self

    def _with_every_class(self, left: Cleaned, codes: Ints) -> Cleaned:
        """What is left, with every class that lost all of its samples; relabelled samples are not lost."""
        gone = np.setdiff1d(np.arange(len(self.classes_)), codes[left.rows])
        if not len(gone):
            return left
        warnings.warn(
            f"{type(self.defense).__name__} would drop every sample of the classes {self.classes_[gone].tolist()}; "
            "it keeps all of theirs",
            UserWarning,
            stacklevel=3,
        )
        back = np.flatnonzero(np.isin(codes, gone))
        rows, labels = np.concatenate((left.rows, back)), np.concatenate((left.labels, codes[back]))
        order = rows.argsort()
        weights = None if left.weights is None else np.concatenate((left.weights, np.ones(len(back))))[order]
        return Cleaned(rows[order], labels[order], weights)

    def decision_function(self, X: Any) -> Floats:
        """[m] for two classes, else [m, classes]."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        every = scores(self._machine, X, len(self.classes_))
        two: Floats = every[:, 1] - every[:, 0]
        return two if len(self.classes_) == 2 else every

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each sample [m]."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        labels: NDArray[Any] = self.classes_[self._machine.predict(X)]
        return labels

    @property
    def C(self) -> float:
        """The SVM's, for a weight of 1."""
        return self.defense.C

    @property
    def duals_(self) -> Floats:
        """The dual variable of every training sample [n]; 0 of those that were dropped."""
        duals = np.zeros(self._samples)
        if not isinstance(self._machine, Constant):
            duals[self.kept_] = self._machine.duals_
        return duals

    def gram(self, x: Floats, z: Floats) -> Floats:
        """The SVM's kernel [n, m]."""
        return self._kernel(x, z)
