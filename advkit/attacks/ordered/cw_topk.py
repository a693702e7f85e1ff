"""CW^K: the Carlini-Wagner hinge on an order of classes (Zhang and Wu, arXiv 1905.10695)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from advkit.attacks.base import TensorGoal, TensorOracle
from advkit.attacks.ordered.loop import MinimumNorm
from advkit.core.checks import not_negative
from advkit.threat_models.goals.ordered_topk import OutOfTopK, TopK


@dataclass(frozen=True, kw_only=True)
class CWTopK(MinimumNorm):
    """C&W, ordered top-K (CW^K): descends the mean hinge between the lowest target placed and the best class behind.

    kappa: what the hinge wants between the logits, >= 0; at 0 its gradient ends where the order holds

    The other fields, costs and errors are those of the loop (`MinimumNorm`): k, budget, lr, coefficient, decay, warmup,
    noise, weight_decay, expand, eval_last, eot. Serves the goals ordered-topk, topk, out-of-topk and targeted.
    """

    name: ClassVar[str] = "cw_topk"

    kappa: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "kappa", what="difference of logits")

    def objective(self, goal: TopK | OutOfTopK, oracle: TensorOracle) -> TensorGoal:
        """The goal with the hinge as loss."""
        return replace(goal, surrogate="cw", kappa=self.kappa)
