"""Confident learning by cleanlab (Northcutt, Jiang and Chuang, arXiv 1911.00068)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Final

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from typing_extensions import override

from advkit.core.checks import at_least
from advkit.core.errors import MissingExtra
from advkit.defenses.labels.cleaning import Cleaned, CleaningDefense, Floats, Ints

_CALIBRATION: Final = 3


@dataclass(frozen=True, kw_only=True)
class ConfidentLearning(CleaningDefense):
    """Confident learning (cleanlab): samples whose label is probably wrong, by cross-validation, go; then an SVM.

    C, kernel, gamma, degree, coef0: of the SVM
    folds: of the cross-validation, >= 2

    The probabilities are those of the same SVM, calibrated (Platt), on folds that it was not trained on;
    `cleanlab.filter.find_label_issues` says which labels are wrong. Classes of fewer samples than 2 * folds can't be
    cross-validated: then nothing is dropped, with a warning.

    Raises MissingExtra without cleanlab: pip install 'advkit[labels]'.
    """

    folds: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "folds")

    @override
    def cleaned(self, x: Floats, y: Ints, rng: np.random.RandomState) -> Cleaned:
        try:
            from cleanlab.filter import find_label_issues
        except ImportError as error:
            raise MissingExtra("confident learning needs the package cleanlab: pip install 'advkit[labels]'") from error
        everything = np.arange(len(x))
        smallest = int(np.bincount(y).min())
        if smallest < 2 * self.folds:
            warnings.warn(
                f"confident learning drops nothing: the smallest class has {smallest} samples, and {self.folds} folds "
                f"need {2 * self.folds}",
                UserWarning,
                stacklevel=4,
            )
            return Cleaned(everything, y)
        machine = CalibratedClassifierCV(self.machine(), cv=_CALIBRATION, ensemble=False)
        folds = StratifiedKFold(self.folds, shuffle=True, random_state=rng)
        probabilities = cross_val_predict(machine, x, y, cv=folds, method="predict_proba")
        wrong = np.asarray(find_label_issues(y, probabilities, n_jobs=1))
        kept = np.flatnonzero(~wrong)
        return Cleaned(kept, y[kept])
