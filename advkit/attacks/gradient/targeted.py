"""Auto-PGD on the DLR losses: untargeted, and towards one wrong class after the other (arXiv 2003.01690)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from advkit.attacks.base import Best, TensorGoal, TensorOracle, affords, finite_rows, per_row
from advkit.attacks.gradient.apgd import APGD, refuse_l0, start_of
from advkit.attacks.search import Search, taken
from advkit.attacks.wrappers import averaged
from advkit.core.checks import at_least, at_least_one, one_of
from advkit.core.errors import BadModel
from advkit.core.protocols import Ball, Rng

log = logging.getLogger("advkit")

Order = Literal["clean", "adversarial"]


@runtime_checkable
class HasRival(Protocol):
    """A goal that is aimed at one class per row."""

    @property
    def rival(self) -> Tensor:
        """The classes, long [B]."""
        ...


@runtime_checkable
class HasRivals(Protocol):
    """A goal that several classes reach."""

    def rivals(self, answer: Tensor, k: int, without: Sequence[Any] = ()) -> Sequence[TensorGoal]:
        """The goal aimed at the k likeliest of them each, likeliest first, but for those of `without`."""
        ...


def rivals_of(goal: TensorGoal, answer: Tensor, k: int, without: Sequence[Any] = ()) -> tuple[TensorGoal, ...]:
    """The goal aimed at the k likeliest classes that reach it, likeliest first; none where it has only one way."""
    return tuple(goal.rivals(answer, k, without)) if isinstance(goal, HasRivals) else ()


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

    The clean row counts only where it reaches the goal: an attack that failed returns where it got to.

    answer: the answers at these points, the clean rows' at first [B, C]
    """

    def __init__(self, x: Tensor, goal: TensorGoal, answer: Tensor) -> None:
        super().__init__(x, goal)
        self.answer = answer.clone()
        margin = goal.margin(answer)
        super().compare(x, answer, torch.where(goal.reached(answer), margin, torch.inf))

    def compare(
        self, z: Tensor, answer: Tensor, loss: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """As `Best.compare`; the loss that is passed does not count."""
        reached, wins = super().compare(z, answer, self.of(rows).goal.margin(answer), rows)
        if rows is None:
            self.answer = torch.where(per_row(wins, answer), answer, self.answer)
        else:
            self.answer[rows] = torch.where(per_row(wins, answer), answer, self.answer[rows])
        return reached, wins


class _SeveralRuns(LowestMargin):
    """The best points of several runs per row: a row that is broken by one of them is done in all.

    row:  which row each run belongs to, long [runs]
    rows: how many there are
    """

    def __init__(self, x: Tensor, goal: TensorGoal, answer: Tensor, row: Tensor, rows: int) -> None:
        super().__init__(x, goal, answer)
        self._row, self._count = row, rows

    def compare(
        self, z: Tensor, answer: Tensor, loss: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """As `LowestMargin.compare`, but says of every run whether its row is broken."""
        reached, wins = super().compare(z, answer, loss, rows)
        if reached is None:
            return None, wins
        row = self._row if rows is None else self._row[rows]
        broken = torch.zeros(self._count, dtype=torch.long, device=reached.device).index_add_(0, row, reached.long())
        return broken[row] > 0, wins


def _in_one(aims: Sequence[TensorGoal], row: Tensor) -> TensorGoal:
    """The aims of several runs per row as one goal; `row` long [runs * rows] names the row of each."""
    goal = aims[0].take(row)
    if not isinstance(goal, HasRival):
        return goal
    rivals = torch.cat([cast(HasRival, aim).rival for aim in aims])
    return cast(TensorGoal, replace(cast(Any, goal), rival=rivals))


@dataclass(frozen=True, kw_only=True)
class APGDDLR(APGD):
    """Auto-PGD (APGD) on the DLR loss, the difference of logits over their spread, which no scaling flattens.

    See APGD for the fields. One answer more per row tells the number of classes and which rows are done already; with
    two classes there is no DLR and the plain difference of logits takes its place.
    """

    loss: str = field(default="dlr")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        refuse_l0("apgd-dlr", ball)
        oracle = averaged(oracle, self.eot)
        if not len(x) or not affords(oracle):
            return x.clone()
        answer = oracle(x)
        loss = usable_loss("apgd-dlr", goal, answer, self.loss)
        search = Search(oracle, x, goal.under(loss), rng, stop=self.stop)
        search.drop(goal.reached(answer) & finite_rows(answer))
        return self._restarted(search, ball)


@dataclass(frozen=True, kw_only=True)
class APGDT(APGD):
    """Targeted Auto-PGD (APGD-T): APGD towards one wrong class after the other, the likeliest first.

    Costs one answer, and per target what APGD costs; rows that reach their goal, by whatever class, leave at once. The
    point returned is the one of lowest margin. A goal that has only one way to be reached is descended as it is.

    targets: wrong classes tried per row, at most all of them, >= 0; 0 aims at none in particular and descends the
             goal's own loss, with what else this attack does
    loss:    surrogate loss towards the target: "dlr", "margin" or "ce"; with fewer than four classes there is no
             targeted DLR and "margin" takes its place, which the log says
    order:   likeliest on the "clean" row, as published, or at the best "adversarial" point that the row has so far
    together: runs (targets, and restarts of each) of a row that go side by side in one batch, >= 1, so that few rows
              fill it; a row broken by one is done in all, and targets that start together are ranked at the same
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
        at_least(self, 0, "targets")
        one_of(self, "order", ("clean", "adversarial"))

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        refuse_l0("apgd-t", ball)
        oracle = averaged(oracle, self.eot)
        if not len(x) or not affords(oracle):
            return x.clone()
        clean = oracle(x)
        best = LowestMargin(x, goal, clean)
        search = Search(oracle, x, goal, rng, stop=self.stop, best=best)
        rivals = rivals_of(goal, clean, self.targets)
        loss = usable_loss("apgd-t", rivals[0] if rivals else goal, clean, self.loss)
        runs = [(target, restart) for target in range(max(1, len(rivals))) for restart in range(self.restarts)]
        targets = rivals if self.order == "clean" else ()
        # Runs side by side would spend a row's queries faster than the loop that watches them can see.
        together = 1 if oracle.left is not None else self.together
        for first in range(0, len(runs), together):
            group = runs[first : first + together]
            rows = search.drop_broken()
            targets = tuple(taken(rows, target) for target in targets)
            if not len(search):
                break
            if rivals and (more := group[-1][0] + 1 - len(targets)) > 0:
                targets = (*targets, *rivals_of(search.goal, search.of(best.answer), more, targets))
            aims = [(targets[target] if rivals else search.goal).under(loss) for target, _ in group]
            starts = [start_of(search.x, ball, search.rng.at("target", t).at("start", r)) for t, r in group]
            if len(group) == 1:
                self._run(search.toward(aims[0]), ball, starts[0])
            else:
                self._side_by_side(search, ball, aims, starts, search.of(clean))
        return search.best

    def _side_by_side(
        self, search: Search, ball: Ball[Tensor], aims: Sequence[TensorGoal], starts: Sequence[Tensor], clean: Tensor
    ) -> None:
        """One run per aim and row, all in one batch; their best points go to the rows in the order of the aims.

        clean: the answers at the clean rows
        """
        n = len(search)
        row = torch.arange(n, device=search.x.device).repeat(len(aims))
        x, goal = search.x[row], _in_one(aims, row)
        best = _SeveralRuns(x, goal, clean[row], row, n)
        runs = Search(search.oracle.take(row), x, goal, search.rng.take(row), stop=self.stop, best=best)
        self._run(runs, ball, torch.cat(list(starts)))
        # A clean row is no success: without an answer it is passed over.
        answers = torch.where(per_row(best.loss < torch.inf, best.answer), best.answer, torch.nan)
        for z, answer in zip(torch.split(best.x, n), torch.split(answers, n), strict=True):
            search.offer(z, answer)
