"""K-LID-SVM: weights from local intrinsic dimensionality (Weerasinghe et al., IEEE TIFS 16, 2021)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from typing_extensions import override

from advkit.core.checks import at_least
from advkit.core.kernels import Kernel
from advkit.defenses.labels.cleaning import Cleaned, CleaningDefense, Floats, Ints


def local_dimension(distances: Floats) -> Floats:
    """Local intrinsic dimensionality [n] by maximum likelihood, of the distances to k neighbours [n, k], sorted.

    -k / sum_i log(d_i / d_k) (Amsaleg et al., KDD 2015). Neighbours at distance 0 are left out; where all are equally
    far it is infinite.
    """
    last = distances[:, -1:]
    away = distances > 0
    logs = np.log(
        np.where(away, distances, 1.0) / np.where(last > 0, last, 1.0), where=away, out=np.zeros_like(distances)
    )
    total = -logs.sum(axis=1)
    found: Floats = np.divide(away.sum(axis=1), total, out=np.full(len(distances), np.inf), where=total > 0)
    return found


@dataclass(frozen=True, kw_only=True)
class KLIDSVM(CleaningDefense):
    """K-LID-SVM: samples that lie oddly among those of their label, in the kernel's space, weigh less; then an SVM.

    C, kernel, gamma, degree, coef0: of the SVM
    neighbours: of the same label over which the local intrinsic dimensionality (LID) is estimated, >= 2

    A sample with a wrong label is far from all others of this label, so that its distances are nearly equal and its LID
    is high. Its weight is the median LID of its label over its own, at most 1. That is a simplification: the paper
    weights by how likely the LID is among flipped and among other labels.
    """

    neighbours: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "neighbours")

    @override
    def cleaned(self, x: Floats, y: Ints, rng: np.random.RandomState) -> Cleaned:
        kernel = Kernel(name=self.kernel, gamma=self.gamma, degree=self.degree, coef0=self.coef0).fitted(x)
        weights = np.ones(len(x))
        for label in np.unique(y):
            rows = np.flatnonzero(y == label)
            if len(rows) < 3:
                continue
            gram = kernel(x[rows], x[rows], "K-LID")
            own = gram.diagonal()
            apart = np.sqrt(np.maximum(own[:, None] + own[None] - 2 * gram, 0.0))
            np.fill_diagonal(apart, np.inf)
            apart.sort(axis=1)
            dimension = local_dimension(apart[:, : min(self.neighbours, len(rows) - 1)])
            middle = np.median(dimension)
            odd = dimension > middle
            weights[rows[odd]] = middle / dimension[odd]
        weights = np.maximum(weights, np.finfo(float).eps)  # of an infinite LID; SVC wants weights above 0
        return Cleaned(np.arange(len(x)), y, weights)
