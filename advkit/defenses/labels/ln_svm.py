"""LN-SVM, the SVM under label noise (Biggio, Nelson and Laskov, ACML 2011, PMLR 20)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.svm import SVC
from sklearn.utils.validation import check_is_fitted, validate_data
from typing_extensions import override

from advkit.core.checks import check
from advkit.core.kernels import Kernel
from advkit.defenses.labels.svm import SVM

Floats = NDArray[np.float64]


class LNSVMClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """SVC on the expected kernel matrix where every label is flipped with probability mu, independently.

    Of the products y_i y_j k(x_i, x_j) those of different samples keep (1 - 2 mu)^2 = 1 - 4 mu (1 - mu) in expectation,
    those of a sample with itself all.

    kernel: of samples; the rest: see `LNSVM`
    """

    def __init__(self, kernel: Kernel | None = None, C: float = 1.0, mu: float = 0.25) -> None:
        self.kernel = kernel
        self.C = C
        self.mu = mu

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LNSVMClassifier:
        """Train on samples [n, d] and labels [n]."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        self._rows = X
        self._kernel = (self.kernel or Kernel()).fitted(X)
        machine = SVC(C=self.C, kernel="precomputed", random_state=0)  # draws nothing; see `SVM`
        self._machine = machine.fit(self.gram(X, X), y, sample_weight=sample_weight)
        self.classes_ = self._machine.classes_
        return self

    def gram(self, x: Floats, z: Floats) -> Floats:
        """The expected kernel [n, m]: diminished, but for the diagonal where x is z."""
        values = self._kernel(x, z, "LN-SVM")
        diminished = values * (1 - 4 * self.mu * (1 - self.mu))
        if x is z or np.array_equal(x, z):
            np.fill_diagonal(diminished, values.diagonal())
        return diminished

    def decision_function(self, X: Any) -> Floats:
        """[m] for two classes, else [m, classes]; the whole kernel is diminished, of training samples, too."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        cross = self._kernel(X, self._rows, "LN-SVM") * (1 - 4 * self.mu * (1 - self.mu))
        return np.asarray(self._machine.decision_function(cross))

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each sample [m]."""
        scores = self.decision_function(X)
        chosen: NDArray[Any] = self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]
        return chosen

    @property
    def duals_(self) -> Floats:
        """The dual variable of every training sample [n], in [0, C]; of several classes the largest of any machine."""
        duals = np.zeros(len(self._rows))
        duals[self._machine.support_] = np.abs(self._machine.dual_coef_).max(0)
        return duals


@dataclass(frozen=True, kw_only=True)
class LNSVM(SVM):
    """LN-SVM: an SVM for labels of which each is flipped with a known probability.

    C, kernel, gamma, degree, coef0: of the SVM
    mu: the probability, in [0, 0.5); 0 is the SVM. FLORAL's released code has 0.05 and 0.25

    The paper's noise is random; attackers choose their flips.
    """

    defends: ClassVar[bool] = True

    mu: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "mu", 0 <= self.mu < 0.5, "a probability in [0, 0.5)")

    @override
    def learner(self, seed: int) -> LNSVMClassifier:
        """SVC on the expected kernel; it draws nothing."""
        kernel = Kernel(name=self.kernel, gamma=self.gamma, degree=self.degree, coef0=self.coef0)
        return LNSVMClassifier(kernel, self.C, self.mu)
