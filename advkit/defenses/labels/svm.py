"""Plain classifiers, the references that defenses against poisoned labels are compared with.

Support vector machines: Cortes and Vapnik, Machine Learning 20, 1995. Both are scikit-learn's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from typing_extensions import override

from advkit.core.checks import positive
from advkit.core.kernels import Kernel
from advkit.defenses.labels.base import LabelDefense

Floats = NDArray[np.float64]


class SVMClassifier(SVC):  # type: ignore[misc]
    """scikit-learn's SVC whose dual variables can be read sample by sample."""

    @property
    def duals_(self) -> Floats:
        """The dual variable of every training sample [n], in [0, C]; of several classes the largest of any machine."""
        duals = np.zeros(self.shape_fit_[0])
        duals[self.support_] = np.abs(self.dual_coef_).max(0)
        return duals

    def gram(self, x: Floats, z: Floats) -> Floats:
        """The kernel matrix k(x_i, z_j) [n, m]."""
        return Kernel(name=self.kernel, gamma=self._gamma, degree=self.degree, coef0=self.coef0)(x, z)


@dataclass(frozen=True, kw_only=True)
class SVM(LabelDefense):
    """Support vector machine (scikit-learn's SVC): no defense, the reference for those against poisoned labels.

    C:      weight of the hinge loss, above 0; every dual variable lies in [0, C]
    kernel: "rbf", "linear" or "poly"
    gamma:  of rbf and poly, above 0; none is 1 / (d * variance of the training values)
    degree, coef0: of poly
    """

    duals: ClassVar[bool] = True
    defends: ClassVar[bool] = False

    C: float = 1.0
    kernel: Literal["rbf", "linear", "poly"] = "rbf"
    gamma: float | None = None
    degree: int = 3
    coef0: float = 0.0

    def __post_init__(self) -> None:
        positive(self, "C", "gamma", "degree")

    @override
    def learner(self, seed: int) -> SVMClassifier:
        """SVC; what it learns does not depend on the seed."""
        return SVMClassifier(
            C=self.C,
            kernel=self.kernel,
            gamma="scale" if self.gamma is None else self.gamma,
            degree=self.degree,
            coef0=self.coef0,
            random_state=seed,  # without one it draws one from numpy's global generator, and never uses it
        )


@dataclass(frozen=True, kw_only=True)
class LogReg(LabelDefense):
    """Logistic regression (scikit-learn's): no defense, and the surrogate of attacks by distance to the boundary.

    C: inverse weight of the L2 penalty, above 0
    """

    defends: ClassVar[bool] = False

    C: float = 1.0

    def __post_init__(self) -> None:
        positive(self, "C")

    @override
    def learner(self, seed: int) -> Any:
        """LogisticRegression with at most 1,000 iterations of L-BFGS; what it learns does not depend on the seed."""
        return LogisticRegression(C=self.C, max_iter=1000, random_state=seed)
