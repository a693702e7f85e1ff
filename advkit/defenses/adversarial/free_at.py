"""Free adversarial training: one backward pass for weights and perturbation (Shafahi et al., arXiv 1904.12843)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from advkit.core.checks import at_least_one, check, positive
from advkit.core.errors import UsageError
from advkit.core.protocols import Rng
from advkit.defenses.adversarial.watched import WatchedObjective, WatchedTraining
from advkit.training.loop import Objective


@dataclass(frozen=True, kw_only=True)
class FreeAT(WatchedTraining):
    """Free adversarial training: several steps in a row on every batch, and each backward pass also moves the
    perturbation.

    The perturbation belongs to places in the batch, not to images: it lives on from batch to batch, and a smaller batch
    uses the first of its rows. Of several processes each has a perturbation for its own share of the batch. The
    recipe's epochs are divided by the replays, rounded up, so that the number of passes is that of plain training.
    Linf.

    replays:   m, optimiser steps in a row on every batch, >= 1
    step_size: of the perturbation, in units of eps
    """

    replays: int = 8
    step_size: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "norm", self.norm == "linf", "linf, the only norm of free_at")
        at_least_one(self, "replays")
        positive(self, "step_size", what="length in units of eps")

    @override
    def objective(self) -> Objective:
        return FreeObjective(self)


class FreeObjective(WatchedObjective):
    """Cross-entropy at the row plus the perturbation, which moves up the gradient after every step."""

    def __init__(self, defense: FreeAT) -> None:
        super().__init__(defense)
        self.replays = defense.replays
        self.eps, self.length = defense.eps, defense.step_size * defense.eps
        self.whole = "free_at has one perturbation per place of the batch, moved once a step"
        self.delta: Tensor | None = None
        self._leaf: Tensor | None = None

    @override
    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        if self.delta is None:
            self.delta = torch.zeros_like(x)
        if len(self.delta) < len(x):
            self.delta = torch.cat((self.delta, torch.zeros_like(x[len(self.delta) :])))
        self._leaf = self.delta[: len(x)].clone().requires_grad_()
        low, high = model.space.bounds_like(x)
        return functional.cross_entropy(model(torch.clamp(x + self._leaf, low, high)), y)

    @override
    def stepped(self, model: Any) -> None:
        """Move the perturbation with the gradient that the loop's one backward pass left."""
        leaf, self._leaf = self._leaf, None
        if self.delta is None or leaf is None or leaf.grad is None:
            raise UsageError("free_at: stepped without a backward pass of its loss before")
        # float16 gradients of a step that is left out may be no numbers
        moved = leaf.detach() + self.length * leaf.grad.sign().nan_to_num()
        self.delta[: len(leaf)] = moved.clamp(-self.eps, self.eps)

    @override
    def state(self) -> dict[str, Tensor]:
        """The perturbation, which lives on from epoch to epoch."""
        return {} if self.delta is None else {"delta": self.delta}

    @override
    def load(self, state: dict[str, Tensor]) -> None:
        """Take the perturbation back."""
        self.delta = state.get("delta")
