"""Randomized smoothing of a network trained under Gaussian noise (Cohen et al., arXiv 1902.02918)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from advkit.core.protocols import Rng, Trains
from advkit.defenses.smoothing.base import SmoothingDefense
from advkit.training.loop import Objective, Recipe, correct


class UnderNoise(Objective):
    """Cross-entropy on rows under normal noise, drawn from their streams; judged by correctness under noise."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.sigma = sigma

    def _noisy(self, x: Tensor, rng: Rng) -> Tensor:
        return x + self.sigma * rng.at("noise").normal(x)

    @override
    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        return F.cross_entropy(model(self._noisy(x, rng)), y)

    @override
    def score(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        return correct(model, self._noisy(x, rng), y)


@dataclass(frozen=True, kw_only=True)
class GaussianSmoothing(SmoothingDefense, Trains):
    """Randomized smoothing: trains a network under Gaussian noise and answers by the vote of its noisy copies.

    Certify it with `advkit certify`. Under `advkit evaluate` an answer is PREDICT with `n_predict` draws; abstaining
    counts as wrong. A model that is trained already is smoothed as it is. Training noise is normal for either `noise`.

    recipe: how an architecture without weights is trained
    """

    recipe: Recipe = field(default_factory=Recipe)

    @override
    def objective(self) -> Objective:
        """Cross-entropy under noise."""
        return UnderNoise(self.sigma)
