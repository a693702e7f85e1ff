"""Adversarial training with PGD (Madry et al., arXiv 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from advkit.core.protocols import Rng
from advkit.defenses.adversarial.base import AdversarialTraining, Misclassified
from advkit.training.loop import Objective


@dataclass(frozen=True, kw_only=True)
class PGDAT(AdversarialTraining):
    """PGD adversarial training: cross-entropy on PGD's adversarial example of every image, from a random start in the
    ball.

    The attack runs in evaluation mode; the authors' code runs it in training mode (`mode=train`).
    """

    @override
    def objective(self) -> Objective:
        return _Objective(self)


class _Objective(Misclassified):
    @override
    def loss_on(self, made: Tensor, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        return functional.cross_entropy(model(made), y)
