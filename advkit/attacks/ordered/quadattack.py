"""QuadAttacK: move to the nearest features that order the classes as wanted (arXiv 2312.11510)."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle
from advkit.attacks.ordered.loop import MinimumNorm, head_of
from advkit.core.checks import one_of, positive
from advkit.threat_models.goals.ordered_topk import OutOfTopK, TopK
from advkit.threat_models.goals.polyhedron import gram, solve

log = logging.getLogger("advkit")


@dataclass(eq=False)
class _Memory:
    """The solver's multipliers at the last step, for all rows of a batch.

    A row starts from its own last solution, whichever rows it is asked about with: they may change its time, never its
    bits.

    rows:        of the batch
    multipliers: of every row's last program [rows, R]; None before the first
    warned:        whether it was said that some row has no solution
    """

    rows: int
    multipliers: Tensor | None = None
    warned: bool = False

    def of(self, rows: Tensor | None) -> Tensor | None:
        """The multipliers of some rows, or of all."""
        return self.multipliers if self.multipliers is None or rows is None else self.multipliers[rows]

    def keep(self, rows: Tensor | None, multipliers: Tensor) -> None:
        """Remember the multipliers of some rows, or of all; those never asked about stay at 0, a cold start."""
        if rows is None:
            self.multipliers = multipliers
        else:
            if self.multipliers is None:
                self.multipliers = multipliers.new_zeros(self.rows, multipliers.shape[1])
            self.multipliers[rows] = multipliers


@dataclass(eq=False)
class _Projected:
    """A goal whose loss is the squared distance to its polyhedron; it says once when no logits can satisfy a row.

    rows: which rows of the memory the goal's are, long; None for all of them in order
    """

    kind: ClassVar[str] = "projected"
    goal: TopK | OutOfTopK
    gram: Tensor | None
    margin_wanted: float
    memory: _Memory
    rows: Tensor | None = None

    def reached(self, answer: Tensor) -> Tensor:
        return self.goal.reached(answer)

    def margin(self, answer: Tensor) -> Tensor:
        return self.goal.margin(answer)

    def loss(self, answer: Tensor) -> Tensor:
        self.goal = self.goal.for_classes(answer.shape[1])
        # Which pairs keep the true class out of the top K changes with the answer, so there a solution is no start.
        fixed = isinstance(self.goal, TopK)
        warm = self.memory.of(self.rows) if fixed else None
        solution = solve(answer, self.gram, self.goal.pairs(answer), self.margin_wanted, warm=warm)
        if fixed:
            self.memory.keep(self.rows, solution.multipliers)
        if not self.memory.warned and answer.device.type == "cpu":  # elsewhere looking would mean waiting
            hopeless = int((~solution.feasible & torch.isfinite(answer).all(1)).sum())
            if hopeless:
                self.memory.warned = True
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
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        return replace(self, goal=self.goal.take(rows), rows=rows if self.rows is None else self.rows[rows])

    def to(self, device: torch.device | str) -> Self:
        moved = None if self.gram is None else self.gram.to(device)
        rows = None if self.rows is None else self.rows.to(device)
        return replace(self, goal=self.goal.to(device), gram=moved, memory=_Memory(self.memory.rows), rows=rows)


@dataclass(frozen=True, kw_only=True)
class QuadAttack(MinimumNorm):
    """QuadAttacK, ordered top-K: descends the distance to the nearest features that order the classes as targeted.

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
        positive(self, "margin", what="difference of logits")

    @property
    def asks_for_head(self) -> bool:
        """Whether distances are measured in the features before the last layer."""
        return self.head == "auto"

    def objective(self, goal: TopK | OutOfTopK, oracle: TensorOracle) -> TensorGoal:
        """The goal with the distance to its polyhedron as loss."""
        weight = head_of(oracle) if self.asks_for_head else None
        memory = _Memory(len(goal.targets if isinstance(goal, TopK) else goal.labels))
        return _Projected(goal, None if weight is None else gram(weight), self.margin, memory)
