"""Auto-PGD on the DLR losses: untargeted, and towards one wrong class after the other (arXiv 2003.01690)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from advkit.attacks.base import Best, Live, TensorGoal, TensorOracle, finite_rows, lp_ball
from advkit.attacks.gradient.apgd import APGD
from advkit.attacks.gradient.pgd import at_least_one, one_of
from advkit.attacks.wrappers import averaged
from advkit.core.errors import BadModel, UsageError
from advkit.core.protocols import Ball, Rng
from advkit.threat_models.sparse import L0

log = logging.getLogger("advkit")

Order = Literal["clean", "adversarial"]


def rivals_of(goal: TensorGoal, answer: Tensor, k: int, without: Sequence[Any] = ()) -> tuple[TensorGoal, ...]:
    """The goal aimed at the k likeliest classes that reach it, likeliest first; none where it has only one way."""
    rivals = getattr(goal, "rivals", None)
    return () if rivals is None else tuple(rivals(answer, k, without))


def usable_loss(attack: str, goal: TensorGoal, answer: Tensor, loss: str) -> str:
    """The loss, or "margin" where this model has too few classes for it; the log says so."""
    if loss == "margin":
        return loss
    try:
        goal.under(loss).loss(answer)
    except BadModel as why:
        log.warning("%s uses loss=margin in place of loss=%s: %s", attack, loss, why)
        return "margin"
    return loss


class LowestMargin(Best):
    """The best point of every row by the goal's margin, whatever losses led there.

    The untouched row counts only where it reaches the goal: an attack that failed hands in where it got to.

    answer: the answers at these points, the untouched rows' at first [B, C]
    """

    def __init__(self, x: Tensor, goal: TensorGoal, answer: Tensor) -> None:
        super().__init__(x, goal)
        self.answer = answer.clone()
        margin = goal.margin(answer)
        super().offer(x, answer, torch.where(goal.reached(answer), margin, torch.inf))

    def offer(self, z: Tensor, answer: Tensor, loss: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """As `Best.offer`; the loss that is handed in does not count."""
        if rows is not self._rows:
            self._rows, self._goal_of_rows = rows, self._goal if rows is None else self._goal.take(rows)
        margin = self._goal_of_rows.margin(answer).to(self.loss.dtype)
        reached, before = self.reached.clone(), self.loss.clone()
        hit = super().offer(z, answer, margin, rows)
        wins = (self.loss != before) | (self.reached != reached)
        if rows is None:
            self.answer = torch.where(wins[:, None], answer, self.answer)
        else:
            self.answer[rows] = torch.where(wins[rows][:, None], answer, self.answer[rows])
        return hit


def refuse_l0(name: str, ball: Ball[Tensor]) -> None:
    """Raise UsageError for the L0 ball."""
    if isinstance(lp_ball(ball), L0):
        raise UsageError(f"{name} was asked for an L0 ball; it works in Linf, L2 and L1 (use `pgd` for L0)")


@dataclass(frozen=True, kw_only=True)
class APGDDLR(APGD):
    """APGD on the DLR loss, the difference of logits over their spread, which no scaling flattens.

    See APGD for the fields. One answer more per row tells the number of classes and which rows are done already; with
    two classes there is no DLR and the plain difference of logits takes its place.
    """

    loss: str = field(default="dlr")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        refuse_l0("apgd-dlr", ball)
        live = Live(averaged(oracle, self.eot), x, goal, rng)
        if not len(x) or not live.affords():
            return x.clone()
        answer = live.oracle(x)
        loss = usable_loss("apgd-dlr", goal, answer, self.loss)
        out = x.clone()
        stay = live.left(goal.reached(answer) & finite_rows(answer)) if self.stop and oracle.decides else None
        if stay is None:
            return APGD.__call__(replace(self, loss=loss), oracle, x, goal, ball, rng)
        if len(stay):
            out[stay] = APGD.__call__(
                replace(self, loss=loss), oracle.take(stay), x[stay], goal.take(stay), ball, rng.take(stay)
            )
        return out


@dataclass(frozen=True, kw_only=True)
class APGDT(APGD):
    """APGD towards one wrong class after the other, the likeliest first.

    Costs one answer, and per target what APGD costs; rows that reach their goal, by whatever class, leave at once. The
    point returned is the one of lowest margin. A goal that has only one way to be reached is walked towards as it is.

    targets: wrong classes tried per row, at most all of them, >= 1
    loss:    surrogate loss towards the target: "dlr", "margin" or "ce"; with fewer than four classes there is no
             targeted DLR and "margin" takes its place, which the log says
    order:   likeliest on the "clean" row, as published, or at the best "adversarial" point that the row has so far

    steps, restarts (per target), stop and eot are as in APGD. Raises UsageError for values out of range and for L0.
    """

    loss: str = field(default="dlr")
    targets: int = 9
    order: Order = "clean"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "targets")
        one_of(self, "order", ("clean", "adversarial"))

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        refuse_l0("apgd-t", ball)
        live = Live(averaged(oracle, self.eot), x, goal, rng)
        if not len(x) or not live.affords():
            return x.clone()
        clean = live.oracle(x)
        best = LowestMargin(x, goal, clean)
        stopping = self.stop and oracle.decides
        ways = rivals_of(goal, clean, self.targets)
        loss = usable_loss("apgd-t", ways[0] if ways else goal, clean, self.loss)
        tried: tuple[TensorGoal, ...] = ()
        for target in range(max(1, len(ways))):
            for restart in range(self.restarts):
                if stopping:
                    reached = best.reached if live.index is None else best.reached[live.index]
                    if (stay := live.left(reached)) is not None:
                        live = live.take(stay)
                        ways, tried = (tuple(way.take(stay) for way in goals) for goals in (ways, tried))
                if not len(live):
                    return best.x
                if ways and self.order == "adversarial" and restart == 0:
                    answer = best.answer if live.index is None else best.answer[live.index]
                    ways = (*tried, *rivals_of(live.goal, answer, 1, tried), *ways[target + 1 :])
                    tried = ways[: target + 1]
                aim = (ways[target] if ways else live.goal).under(loss)
                walk = replace(live, goal=aim, rng=live.rng.at("target", target))
                self._run(walk, ball, best, restart, stopping)
        return best.x
