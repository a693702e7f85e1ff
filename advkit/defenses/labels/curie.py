"""Curie, a filter against poisoned SVMs (Laishram and Phoha, arXiv 1606.01584)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from sklearn.cluster import DBSCAN
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from typing_extensions import override

from advkit.core.checks import at_least_one, not_negative, positive
from advkit.defenses.labels.cleaning import Cleaned, CleaningDefense, Floats, Ints

_WIDE: Final = 10
"""Features beyond which principal components are taken."""


@dataclass(frozen=True, kw_only=True)
class Curie(CleaningDefense):
    """Curie: samples far from others of their cluster, the label being a feature, are dropped; then an SVM.

    C, kernel, gamma, degree, coef0: of the SVM
    weight:      of the label among the features, >= 0
    eps:         radius of DBSCAN, in units of the features; none is the 0.9 quantile of the distances to the
                 `min_samples`-th neighbour, so that about a tenth of the samples is noise at most
    min_samples: of DBSCAN, >= 1
    count:       members of its cluster that a sample's distance is averaged over, drawn at random, >= 1
    theta:       samples are kept whose mean distance is at most so many standard deviations above the mean of all

    Of more than 10 features the principal components are taken that hold 95 % of the variance. In FLORAL's released
    code, which has Curie as a rival, the radius is 0.5 whatever the data: of digits most samples are noise then. That
    code also divides by the size of the cluster instead of the number drawn, draws fewer for good once a cluster is
    smaller than `count`, and takes noise for a cluster; here noise is dropped. Where there is no cluster at all nothing
    is dropped, with a warning.
    """

    weight: float = 0.05
    eps: float | None = None
    min_samples: int = 5
    count: int = 20
    theta: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "min_samples", "count")
        positive(self, "eps", what="radius")
        not_negative(self, "weight", "theta")

    @override
    def cleaned(self, x: Floats, y: Ints, rng: np.random.RandomState) -> Cleaned:
        points = PCA(0.95, svd_solver="full").fit_transform(x) if x.shape[1] > _WIDE and len(x) > 1 else x
        clusters = DBSCAN(eps=self._radius(points), min_samples=self.min_samples).fit_predict(points)
        # Two labels are 2 * weight apart, as -1 and +1 are.
        marks = np.sqrt(2) * self.weight * np.eye(int(y.max()) + 1)[y]
        labelled = np.concatenate((points, marks), axis=1)
        distance = np.full(len(x), np.inf)
        for cluster in range(int(clusters.max()) + 1):
            members = np.flatnonzero(clusters == cluster)
            for row in members:
                drawn = rng.choice(members, min(self.count, len(members)), replace=False)
                distance[row] = np.linalg.norm(labelled[drawn] - labelled[row], axis=1).mean()
        finite = np.isfinite(distance)
        if not finite.any():  # `CleanedSVM` keeps the classes that lose everything, and says so
            return Cleaned(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
        spread = distance[finite].std() or 1.0
        kept = np.flatnonzero((distance - distance[finite].mean()) / spread <= self.theta)
        return Cleaned(kept, y[kept])

    def _radius(self, points: Floats) -> float:
        if self.eps is not None:
            return self.eps
        count = min(self.min_samples, len(points))
        distances, _ = NearestNeighbors(n_neighbors=count).fit(points).kneighbors(points)
        return float(np.quantile(distances[:, -1], 0.9)) or 1.0
