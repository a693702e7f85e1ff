"""QuadAttacK: move to the nearest features that order the classes as wanted (arXiv 2312.11510)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle
from advkit.attacks.gradient.pgd import one_of
from advkit.attacks.ordered.loop import MinimumNorm, head_of
from advkit.core.errors import UsageError
from advkit.threat_models.goals.ordered_topk import OutOfTopK, TopK
from advkit.threat_models.goals.polyhedron import gram, solve

log = logging.getLogger("advkit")


@dataclass(frozen=True)
class _Projected:
    """A goal whose loss is the squared distance to its polyhedron; it says once when no logits can satisfy a row."""

    kind: ClassVar[str] = "projected"
    goal: TopK | OutOfTopK
    gram: Tensor | None
    margin_wanted: float
    told: list[bool]

    def reached(self, answer: Tensor) -> Tensor:
        return self.goal.reached(answer)

    def margin(self, answer: Tensor) -> Tensor:
        return self.goal.margin(answer)

    def loss(self, answer: Tensor) -> Tensor:
        solution = solve(answer, self.gram, self.goal.pairs(answer), self.margin_wanted)
        if not self.told and answer.device.type == "cpu":  # elsewhere looking would mean waiting
            hopeless = int((~solution.feasible & torch.isfinite(answer).all(1)).sum())
            if hopeless:
                self.told.append(True)
                log.warning(
                    "quadattack: no features of this head order the classes of %d of %d rows as wanted; they follow "
                    "the least violated order instead",
                    hopeless,
                    len(answer),
                )
        return solution.surrogate(answer)

    def under(self, loss: str) -> Self:
        return self

    def take(self, rows: Tensor) -> Self:
        return replace(self, goal=self.goal.take(rows))

    def to(self, device: torch.device | str) -> Self:
        return replace(self, goal=self.goal.to(device), gram=None if self.gram is None else self.gram.to(device))


@dataclass(frozen=True, kw_only=True)
class QuadAttack(MinimumNorm):
    """Descend the squared distance from the features to the nearest ones that order the classes as wanted.

    The quadratic program behind it is solved exactly at every step, in the logits, from the Gram matrix of the last
    layer alone.

    margin: what the program wants between the logits of a pair, > 0
    head:   "auto" asks the victim for its last linear layer and measures distances in the features before it, or in
            the logits where it has none; "identity" always in the logits

    The other fields, costs and errors are those of the loop (`MinimumNorm`): k, budget, lr, coefficient, decay, warmup,
    noise, weight_decay, expand, eval_last, eot. Serves the goals ordered-topk, topk, out-of-topk and targeted.
    """

    name: ClassVar[str] = "quadattack"
    without_head: ClassVar[str] = "distances are measured in the logits"

    margin: float = 0.2
    head: Literal["auto", "identity"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "head", ("auto", "identity"))
        if not self.margin > 0:
            raise UsageError(f"margin is {self.margin}; give a positive difference of logits such as 0.2")

    @property
    def asks_for_head(self) -> bool:
        """Whether distances are measured in the features before the last layer."""
        return self.head == "auto"

    def objective(self, goal: TopK | OutOfTopK, oracle: TensorOracle) -> TensorGoal:
        """The goal with the distance to its polyhedron as loss."""
        weight = head_of(oracle) if self.asks_for_head else None
        if weight is None:
            return _Projected(goal, None, self.margin, [])
        return _Projected(goal.for_classes(len(weight)), gram(weight), self.margin, [])
