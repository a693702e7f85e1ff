"""The minimum-norm loop of the ordered top-K attacks: AdamW on loss plus energy, coefficients searched per row.

Published with QuadAttacK (arXiv 2312.11510), whose released file lacks two lines of it; where what is written here
differs, the comments say why.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, affords, finite_rows, per_row
from advkit.attacks.optimiser import AdamW, check_budget, effort_of
from advkit.attacks.wrappers import averaged
from advkit.core.checks import at_least_one, fraction, not_negative, positive
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, MadeForGoal, MadeForThreatModel, Rng
from advkit.threat_models.goals.ordered_topk import OrderedTopK, OutOfTopK, TopK
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.lp import row_sum, wide
from advkit.threat_models.minimum import MinimumL2

log = logging.getLogger("advkit")

LARGE_ROW = 10_000  # values; from there on the learning rate is the one published for 224 x 224 images
RATES = (0.03, 2.2e-3)  # small rows, large rows


@dataclass(frozen=True)
class Found:
    """What the loop knows per row; the harness asks the victim again and believes none of it.

    x:       the nearest point seen that reached the goal, the clean row where none did [B, ...]
    reached: whether one did, bool [B]
    energy:  its L2 distance [B], +inf where none did
    first:   gradient steps of the whole attack until the first success, long [B], -1 where there was none
    """

    x: Tensor
    reached: Tensor
    energy: Tensor
    first: Tensor


@dataclass(frozen=True, kw_only=True)
class MinimumNorm(MadeForGoal, MadeForThreatModel, ABC):
    """Find the nearest point that orders the classes as wanted, by AdamW on coefficient * loss + squared distance.

    k:            places of the goal that is played where none is named
    budget:       coefficients tried x gradient steps for each, such as 1x60 or 9x60. The first coefficient is half the
                  upper bound; later ones halve the bracket, upwards after failure and downwards after success
    lr:           learning rate in units of the space, > 0; None is 2.2e-3 for rows of 10,000 values and more (published
                  for 224 x 224 images) and 0.03 for smaller ones: lr * steps * sqrt(values) must well exceed the
                  distance needed
    coefficient:  upper bound of the coefficients, > 0
    decay:        what a row's coefficient is multiplied by when it comes nearer, in (0, 1]
    warmup:       step at which the optimiser starts afresh
    noise:        standard deviation of the start around the row, >= 0
    weight_decay: of AdamW, on the perturbation, >= 0
    expand:       double the bracket's upper end after every failure of a row that has not succeeded yet; else the
                  bound is never raised, as published
    eval_last:    ask for one answer more per coefficient, after its last step
    eot:          gradients averaged per step, for victims whose answers vary from call to call

    Costs a gradient per step and coefficient. No row leaves early: it goes on to come nearer. Rows that never reach the
    goal come back unchanged. What an attack knows of itself is no figure of a report: the log tells the median step of
    the first success (at info), and `find`, called as the attack is, gives it for every row (`Found.first`). The
    solver's rounds and certificates are those of `goals.polyhedron.solve`.

    Raises UsageError for values out of range, for goals that it does not serve, and for threat models with a radius
    (there, `pgd:loss=quad` or any other gradient attack serves these goals).

    Unlike the released code, the starting point lies in the box before it is asked about, and success means that the
    logits are in strict order.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    name: ClassVar[str]
    serves: ClassVar[tuple[str, ...]] = ("ordered-topk", "topk", "out-of-topk", "targeted")
    default_threat_model: ClassVar[str] = "minimum-l2"
    without_head: ClassVar[str] = ""

    k: int = 5
    budget: str = "1x60"
    lr: float | None = None
    coefficient: float = 20.0
    decay: float = 0.75
    warmup: int = 5
    noise: float = 2e-3
    weight_decay: float = 0.01
    expand: bool = False
    eval_last: bool = False
    eot: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "k", "eot")
        check_budget(self)
        positive(self, "lr", "coefficient")
        fraction(self, "decay", what="factor")
        not_negative(self, "warmup", "noise", "weight_decay")

    @property
    def default_goal(self) -> str:
        """The goal played where none is named."""
        return f"ordered-topk:k={self.k}"

    @property
    def effort(self) -> tuple[int, int]:
        """Coefficients tried, and steps for each."""
        return effort_of(self.budget)

    @property
    def asks_for_head(self) -> bool:
        """Whether the loss is made from the victim's last linear layer, where it shows one."""
        return False

    @abstractmethod
    def objective(self, goal: TopK | OutOfTopK, oracle: TensorOracle) -> TensorGoal:
        """The goal with this attack's loss."""

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng, /) -> Tensor:
        return self.find(oracle, x, goal, threat, rng).x

    def find(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng) -> Found:
        """The attack, and what it knows of the rows."""
        if not isinstance(threat, MinimumL2):
            raise UsageError(
                f"{self.name} was asked for {type(threat).__name__}; it looks for the nearest point and works in "
                "minimum-l2 (within a radius use `pgd:loss=quad`, `apgd-margin` or another gradient attack)"
            )
        aim = self.objective(self._served(goal), oracle)
        best = self._search(averaged(oracle, self.eot), x, goal, aim, threat, rng)
        # Said at the end: a rehearsal of the attack has no victim behind its oracle and ends at the second question.
        if self.asks_for_head and head_of(oracle) is None:
            log.info("%s: the victim shows no linear last layer; %s", self.name, self.without_head)
        if log.isEnabledFor(logging.INFO) and bool(best.reached.any()):
            first = int(best.first[best.reached].median())
            log.info(
                "%s: reached the goal on %d of %d rows in its own view, first after %d steps in the median, budget %s",
                self.name, int(best.reached.sum()), len(x), first + 1, self.budget,
            )  # fmt: skip
        return best

    def _served(self, goal: TensorGoal) -> TopK | OutOfTopK:
        """The goal as one of those with the losses of ordered attacks."""
        if isinstance(goal, Targeted):
            return OrderedTopK(goal.targets[:, None])
        if isinstance(goal, TopK) or (isinstance(goal, OutOfTopK) and "out-of-topk" in self.serves):
            return goal
        raise UsageError(
            f"{self.name} was given the goal {type(goal).__name__}; it serves {', '.join(self.serves)}: choose one of "
            "them, or another attack"
        )

    def _search(
        self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, aim: TensorGoal, threat: MinimumL2, rng: Rng
    ) -> Found:
        searches, _ = self.effort
        energy = torch.full((len(x),), torch.inf, dtype=wide(x), device=x.device)
        best = Found(x.clone(), torch.zeros_like(energy, dtype=torch.bool), energy, torch.full_like(energy, -1).long())
        low, high = torch.zeros_like(energy), torch.full_like(energy, self.coefficient)
        for search in range(searches):
            if not len(x) or not affords(oracle):
                break
            middle = (low + high) / 2
            run = self._run(oracle, x, goal, aim, threat, middle, rng.at("start", search))
            nearer = run.energy < best.energy
            before = search * self.effort[1]
            first = torch.where((best.first < 0) & run.reached, before + run.first, best.first)
            best = Found(
                torch.where(per_row(nearer, x), run.x, best.x),
                best.reached | run.reached,
                torch.where(nearer, run.energy, best.energy),
                first,
            )
            low, high = torch.where(run.reached, low, middle), torch.where(run.reached, middle, high)
            if self.expand:
                high = torch.where(best.reached, high, 2 * high)
        return best

    def _run(
        self,
        oracle: TensorOracle,
        x: Tensor,
        goal: TensorGoal,
        aim: TensorGoal,
        threat: MinimumL2,
        coefficient: Tensor,
        rng: Rng,
    ) -> Found:
        """One coefficient: a run from a fresh start."""
        _, steps = self.effort
        rate = self.lr if self.lr is not None else RATES[x[0].numel() >= LARGE_ROW]
        # In the box before the first look: the published loop could keep a start outside of it.
        z = threat.project(x + self.noise * rng.normal(x), x)
        best = Found(
            x.clone(),
            torch.zeros_like(coefficient, dtype=torch.bool),
            torch.full_like(coefficient, torch.inf),
            torch.full_like(coefficient, -1).long(),
        )
        optimiser = AdamW(x, rate, self.weight_decay)
        for step in range(steps):
            if not affords(oracle):
                return best
            if step == self.warmup:
                optimiser = AdamW(x, rate, self.weight_decay)
            _, gradient, answer = oracle.gradient(z, aim)
            best, nearer = _nearest(best, z, x, goal, answer, step)
            delta = z - x
            delta = optimiser.step(delta, per_row(coefficient, x).to(x.dtype) * gradient + 2 * delta)
            coefficient = torch.where(nearer, coefficient * self.decay, coefficient)
            z = threat.project(x + delta, x)
        if self.eval_last and affords(oracle):
            best, _ = _nearest(best, z, x, goal, oracle(z), steps)
        return best


def _nearest(best: Found, z: Tensor, x: Tensor, goal: TensorGoal, answer: Tensor, step: int) -> tuple[Found, Tensor]:
    """The best points with those of z taken that reach the goal no further away, and which these are, bool [B]."""
    reached = goal.reached(answer) & finite_rows(answer)
    energy = row_sum((z.to(wide(z)) - x.to(wide(x))).square()).sqrt()
    nearer = reached & (energy <= best.energy)
    return (
        Found(
            torch.where(per_row(nearer, z), z, best.x),
            best.reached | reached,
            torch.where(nearer, energy, best.energy),
            torch.where(reached & (best.first < 0), step, best.first),
        ),
        nearer,
    )


def head_of(oracle: TensorOracle) -> Tensor | None:
    """The weight [C, d] of the victim's last linear layer; None where it shows none."""
    return oracle.head()
