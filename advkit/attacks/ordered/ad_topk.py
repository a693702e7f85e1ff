"""Adversarial Distillation: imitate a distribution whose top classes are the wanted ones (arXiv 1905.10695)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle
from advkit.attacks.ordered.loop import MinimumNorm, head_of
from advkit.core.checks import not_negative, one_of
from advkit.threat_models.goals.ordered_topk import OutOfTopK, TopK


def cosines(weight: Tensor) -> Tensor:
    """Cosine similarities of the rows [C, C]; a row of zeros is similar to nothing."""
    unit = torch.nn.functional.normalize(weight.double(), dim=1)
    return (unit @ unit.T).clamp(-1, 1)


@dataclass(frozen=True, kw_only=True)
class ADTopK(MinimumNorm):
    """Adversarial distillation, ordered top-K (AD^K): descends the divergence from an ordered target distribution.

    alpha:      logit of the first target
    beta:       difference between the logits of targets that follow one another, >= 0; the last must stay above every
                mean similarity, which holds for alpha 10, beta 0.3 up to 30 targets
    similarity: between classes: "head" the cosine of the rows of the victim's last layer (no knowledge of the classes
                where it shows none); "none" every class is similar to itself alone; or a matrix [C, C] in [-1, 1], such
                as the cosines of word vectors that the paper takes

    The other fields, costs and errors are those of the loop (`MinimumNorm`): k, budget, lr, coefficient, decay, warmup,
    noise, weight_decay, expand, eval_last, eot. Serves the goals ordered-topk, topk and targeted.
    """

    name: ClassVar[str] = "ad_topk"
    without_head: ClassVar[str] = "classes are taken to be similar to themselves alone"
    serves: ClassVar[tuple[str, ...]] = ("ordered-topk", "topk", "targeted")

    alpha: float = 10.0
    beta: float = 0.3
    similarity: Literal["head", "none"] | Tensor = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.similarity, Tensor):
            one_of(self, "similarity", ("head", "none"))
        not_negative(self, "beta", what="difference of logits")

    @property
    def asks_for_head(self) -> bool:
        """Whether classes are compared by the rows of the last layer."""
        return not isinstance(self.similarity, Tensor) and self.similarity == "head"

    def objective(self, goal: TopK | OutOfTopK, oracle: TensorOracle) -> TensorGoal:
        """The goal with the divergence as loss."""
        similarity = self.similarity if isinstance(self.similarity, Tensor) else None
        weight = head_of(oracle) if self.asks_for_head else None
        if weight is not None:
            similarity = cosines(weight)
        return replace(goal, surrogate="ad", similarity=similarity, alpha=self.alpha, beta=self.beta)
