"""Auto-PGD on the DLR losses: untargeted, and towards one wrong class after the other (arXiv 2003.01690)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor

from advkit.attacks.base import Best, Live, TensorGoal, TensorOracle, finite_rows, lp_ball, per_row
from advkit.attacks.gradient.apgd import APGD, start_of
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
        hit = super().offer(z, answer, self.of(rows).goal.margin(answer), rows)
        if rows is None:
            self.answer = torch.where(self.won[:, None], answer, self.answer)
        else:
            self.answer[rows] = torch.where(self.won[:, None], answer, self.answer[rows])
        return hit


class _Walks(LowestMargin):
    """The best points of several walks per row: a row that falls on one of them has fallen on all.

    row:  which row each walk belongs to, long [walks]
    rows: how many there are
    """

    def __init__(self, x: Tensor, goal: TensorGoal, answer: Tensor, row: Tensor, rows: int) -> None:
        super().__init__(x, goal, answer)
        self._row, self._count = row, rows

    def offer(self, z: Tensor, answer: Tensor, loss: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """As `LowestMargin.offer`, but says of every walk whether its row has fallen."""
        hit = super().offer(z, answer, loss, rows)
        if self.quiet:
            return hit
        row = self._row if rows is None else self._row[rows]
        fallen = torch.zeros(self._count, dtype=torch.long, device=hit.device).index_add_(0, row, hit.long())
        return fallen[row] > 0


def _in_one(aims: Sequence[TensorGoal], row: Tensor) -> TensorGoal:
    """The aims of several walks per row as one goal; `row` long [walks * rows] names the row of each."""
    goal = aims[0].take(row)
    if not hasattr(goal, "rival"):
        return goal
    rivals = torch.cat([cast(Any, aim).rival for aim in aims])
    return cast(TensorGoal, replace(cast(Any, goal), rival=rivals))


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

    targets: wrong classes tried per row, at most all of them, >= 0; 0 walks toward none in particular, down the goal's
             own loss, with what else this attack does
    loss:    surrogate loss towards the target: "dlr", "margin" or "ce"; with fewer than four classes there is no
             targeted DLR and "margin" takes its place, which the log says
    order:   likeliest on the "clean" row, as published, or at the best "adversarial" point that the row has so far
    together: walks (targets, and restarts of each) of a row that go side by side in one batch, >= 1, so that few rows
              fill it; a row that falls on one leaves with all, and targets that start together are ranked at the same
              point. One by one where the threat model limits queries

    steps, restarts (per target), stop and eot are as in APGD. Raises UsageError for values out of range and for L0.
    """

    loss: str = field(default="dlr")
    targets: int = 9
    order: Order = "clean"
    together: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "together")
        if self.targets < 0:
            raise UsageError(f"targets is {self.targets}; expected a number of classes, 0 for none in particular")
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
        jobs = [(target, restart) for target in range(max(1, len(ways))) for restart in range(self.restarts)]
        chosen = ways if self.order == "clean" else ()
        # Walks side by side would spend a row's queries faster than the loop that watches them can see.
        together = 1 if live.oracle.left is not None else self.together
        for first in range(0, len(jobs), together):
            group = jobs[first : first + together]
            if stopping:
                reached = best.reached if live.index is None else best.reached[live.index]
                if (stay := live.left(reached)) is not None:
                    live, chosen = live.take(stay), tuple(way.take(stay) for way in chosen)
            if not len(live):
                return best.x
            if ways and (more := group[-1][0] + 1 - len(chosen)) > 0:
                answer = best.answer if live.index is None else best.answer[live.index]
                chosen = (*chosen, *rivals_of(live.goal, answer, more, chosen))
            aims = [(chosen[target] if ways else live.goal).under(loss) for target, _ in group]
            starts = [start_of(live.x, ball, live.rng.at("target", t).at("start", r)) for t, r in group]
            if len(group) == 1:
                self._run(replace(live, goal=aims[0]), ball, best, starts[0], stopping)
            else:
                self._side_by_side(live, ball, best, aims, torch.cat(starts), clean, stopping)
        return best.x

    def _side_by_side(
        self,
        live: Live,
        ball: Ball[Tensor],
        best: LowestMargin,
        aims: Sequence[TensorGoal],
        starts: Tensor,
        clean: Tensor,
        stopping: bool,
    ) -> None:
        """One walk per aim and row, all in one batch; what they found goes to the rows in the order of the aims."""
        n = len(live)
        row = torch.arange(n, device=live.x.device).repeat(len(aims))
        walks = live.take(row)
        goal = _in_one(aims, row)
        origin = clean if live.index is None else clean[live.index]
        found = _Walks(walks.x, goal, origin[row], row, n)
        self._run(replace(walks, goal=goal, index=None), ball, found, starts, stopping)
        # An untouched row is no find: without an answer it is passed over.
        answers = torch.where(per_row(found.loss < torch.inf, found.answer), found.answer, torch.nan)
        for walk in range(len(aims)):
            part = slice(walk * n, (walk + 1) * n)
            best.offer(found.x[part], answers[part], rows=live.index)
