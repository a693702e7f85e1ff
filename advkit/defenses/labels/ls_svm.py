"""Label sanitisation by nearest neighbours (Paudice, Munoz-Gonzalez and Lupu, arXiv 1803.00992)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from sklearn.neighbors import NearestNeighbors
from typing_extensions import override

from advkit.core.checks import at_least_one, fraction
from advkit.defenses.labels.cleaning import Cleaned, CleaningDefense, Floats, Ints

_SWEEPS: Final = 100


@dataclass(frozen=True, kw_only=True)
class LSSVM(CleaningDefense):
    """LS-SVM, label sanitisation: a sample whose neighbours mostly have another label is relabelled; then an SVM.

    C, kernel, gamma, degree, coef0: of the SVM
    neighbours: k, the sample itself among them, >= 1
    share:      of the neighbours that must have the other label, in (0, 1]

    Samples are gone through in their order and relabelled at once, again and again until a sweep changes nothing, at
    most 100 times: FLORAL's released code, which has it as a rival and whose k = 20 and 0.75 these are, may never end.
    """

    neighbours: int = 20
    share: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "neighbours")
        fraction(self, "share")

    @override
    def cleaned(self, x: Floats, y: Ints, rng: np.random.RandomState) -> Cleaned:
        count = min(self.neighbours, len(x))
        near = NearestNeighbors(n_neighbors=count).fit(x).kneighbors(x, return_distance=False)
        classes = int(y.max()) + 1
        labels = y.astype(np.int64)
        for _ in range(_SWEEPS):
            changed = False
            for row, around in enumerate(near):
                votes = np.bincount(labels[around], minlength=classes)
                winner = int(votes.argmax())
                if winner != labels[row] and votes[winner] >= self.share * count:
                    labels[row] = winner
                    changed = True
            if not changed:
                break
        return Cleaned(np.arange(len(x)), labels)
