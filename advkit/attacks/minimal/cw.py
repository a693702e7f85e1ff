"""Carlini and Wagner's attacks in L2, Linf and L0 (arXiv 1608.04644)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import Look, MinimalAttack, NearestSearch
from advkit.attacks.minimal.faces import Margin
from advkit.attacks.minimal.hyperplane import dual_length
from advkit.attacks.optimiser import Bracket, RowAdam, check_budget, effort_of
from advkit.core.checks import positive
from advkit.core.rows import elementwise
from advkit.threat_models.minimum import MinimumL0

END = 0.02  # of the first learning rate, at the end of a run
SHRINK = 0.9  # of the bound in Linf, once a point is within it
DROPPED = 0.3  # of the changed positions in L0, once a point is found
FINEST = 1 / 64  # of the bound or of the positions: a row that fails with less is finished


@dataclass(frozen=True, kw_only=True)
class CW(MinimalAttack):
    """C&W (Carlini and Wagner), a minimum-norm attack in L2, Linf and L0: Adam on weight * margin + distance.

    In L2 the weight is searched by bisection. In Linf only what exceeds a bound costs, and the bound falls while points
    within it are found. In L0 the margin alone is descended, over a set of positions from which those that contribute
    least are dropped while points are found.

    budget: weights tried x gradient steps for each, such as 9x100; in Linf and L0 their product is the most steps, and
            so many in a row without success make a bound or a set of positions a failure
    lr:     first learning rate, > 0, in units of what every value would have to change by in a linear model; in L2 it
            falls along a cosine within a run, in Linf with the steps of the bound
    weight: of the margin in the first run (L2), > 0; None is twice what a linear model would need

    Costs a gradient per step and one more. A row leaves once its weight is known up to a factor of two; a run ends
    early where its loss has stopped falling, and the next begins without waiting for other rows. Raises UsageError for
    values out of range and for other threat models.

    Points are projected onto the box where published is a change of variables, whose gradient vanishes at its walls.
    Published learning rate and first weight are numbers (0.01, 0.001), which suit some scales of images and logits.
    There is no confidence: what is wanted is the nearest point.
    """

    name: ClassVar[str] = "cw"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l0", "minimum-l2", "minimum-linf")

    budget: str = "9x100"
    lr: float = 0.5
    weight: float | None = None

    def __post_init__(self) -> None:
        check_budget(self)
        positive(self, "lr", "weight")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        first = search.look(search.x, Margin(search.goal))
        rows = search.leave(first.reached)
        if rows is not None:
            first = first.take(rows)
        if not len(search):
            return
        {"l2": self._l2, "linf": self._linf, "l0": self._l0}[norm](search, first)

    def _l2(self, search: NearestSearch, first: Look) -> None:
        searches, steps = effort_of(self.budget)
        margin, slope = finite(first.loss), dual_length(first.gradient, "L2")
        weight = divided(4 * margin, slope.square())
        bracket = Bracket.of(weight if self.weight is None else torch.full_like(weight, self.weight))
        size = self.lr * divided(margin, dual_length(first.gradient, "Linf"))
        z, adam = search.x, RowAdam.of(search.x)
        for _ in range(searches * steps):
            if not len(search) or not search.affords():
                return
            look, weight, step = search.look(z, Margin(search.goal)), bracket.weight, bracket.step + 1
            ended = bracket.after(look.distance.square() + weight * look.loss.clamp_min(0), look.reached, steps)
            wants = torch.where(look.loss >= 0, weight, 0.0)
            rate = size * (END + (1 - END) * (1 + elementwise(torch.cos, math.pi * step / steps)) / 2)
            z = search.legal(z + adam.move(2 * (z - search.x) + per_row(wants, z) * look.gradient, rate))
            z = torch.where(per_row(ended, z), search.x, z)
            adam.restart(ended)
            rows = search.leave(bracket.finished(searches))
            if rows is not None:
                bracket, adam, z, size = bracket.take(rows), adam.take(rows), *kept(rows, z, size)

    def _linf(self, search: NearestSearch, first: Look) -> None:
        searches, steps = effort_of(self.budget)
        slope = dual_length(first.gradient, "Linf")
        bound, weight = (
            divided(finite(first.loss), slope),
            divided(torch.full_like(slope, first.gradient[0].numel()), slope),
        )
        z, adam = search.x, RowAdam.of(search.x)
        shrink, tried = torch.full_like(bound, SHRINK), torch.zeros_like(bound)
        for _ in range(searches * steps):
            if not len(search) or not search.affords():
                return
            look, delta = search.look(z, Margin(search.goal)), z - search.x
            tried = tried + 1
            within = look.reached & (look.distance <= bound * (1 + 1e-3))
            failed = ~within & (tried >= steps)
            found = search.away < torch.inf
            # A weight that is too small shows in nothing found; once something is, in a bound that no point keeps.
            weight = torch.where(failed, 2 * weight, weight)
            shrink = torch.where(failed & found, shrink.sqrt(), shrink)
            bound = torch.where(within | (failed & found), shrink * search.away, bound)
            bound = torch.where(failed & ~found, 2 * bound, bound)
            tried = tried.masked_fill(within | failed, 0.0)
            over = delta.sign() * (delta.abs() > per_row(bound, z))
            wants = torch.where(look.loss >= 0, weight, 0.0)
            rate = self.lr * (1 - shrink) * bound
            z = search.legal(z + adam.move(over + per_row(wants, z) * look.gradient, rate))
            again = failed & found
            z = torch.where(per_row(again, z), search.nearest, z)
            adam.restart(again)
            rows = search.leave(found & (1 - shrink < FINEST))
            if rows is not None:
                adam, z, bound, weight, shrink, tried = adam.take(rows), *kept(rows, z, bound, weight, shrink, tried)

    def _l0(self, search: NearestSearch, first: Look) -> None:
        threat = search.threat
        assert isinstance(threat, MinimumL0)
        searches, steps = effort_of(self.budget)
        z, adam, last = search.x, RowAdam.of(search.x), first.gradient
        open_ = torch.ones_like(threat.positions(search.x), dtype=torch.bool)
        kept_open, share = open_.clone(), torch.full_like(first.loss, DROPPED)
        tried, size = torch.zeros_like(first.loss), self.lr * self._size(first, first.gradient)
        for _ in range(searches * steps):
            if not len(search) or not search.affords():
                return
            look = search.look(z, Margin(search.goal))
            tried = tried + 1
            failed = ~look.reached & (tried >= steps)
            finest = failed & (share * kept_open.sum(1) <= 1)
            share = torch.where(failed, share / 2, share)
            # What a position contributes is judged where the goal is reached; after a failure by the last such point.
            kept_open = torch.where(
                look.reached[:, None], open_ & (threat.positions((z != search.x).to(z)) > 0), kept_open
            )
            last = torch.where(per_row(look.reached, z), look.gradient, last)
            worth = threat.positions(-last * (search.nearest - search.x))
            again = look.reached | failed
            open_ = torch.where(again[:, None], without_least(worth, kept_open, share), open_)
            tried = tried.masked_fill(again, 0.0)
            allowed = threat.everywhere(open_, z)
            gradient = torch.where(allowed, look.gradient, 0.0)
            size = torch.where(again | (tried == 1), self.lr * self._size(look, gradient), size)
            moved = search.legal(z + adam.move(gradient, size))
            z = torch.where(allowed, torch.where(per_row(again, z), search.nearest, moved), search.x)
            adam.restart(again)
            rows = search.leave(finest & (search.away < torch.inf))
            if rows is not None:
                adam = adam.take(rows)
                z, last, open_, kept_open = kept(rows, z, last, open_, kept_open)
                share, tried, size = kept(rows, share, tried, size)

    @staticmethod
    def _size(look: Look, gradient: Tensor) -> Tensor:
        return divided(finite(look.loss), dual_length(gradient, "Linf"))


def without_least(worth: Tensor, open_: Tensor, share: Tensor) -> Tensor:
    """The open positions, bool [n, P], without the share [n] of them that is worth least, one at the least."""
    many = open_.sum(1)
    drop = (share * many).floor().clamp_min(1)
    ranked = torch.where(open_, worth, torch.inf).argsort(dim=1, stable=True).argsort(1)
    return open_ & (ranked >= drop[:, None])


def finite(loss: Tensor) -> Tensor:
    """Losses [n], 0 where they are not finite."""
    return torch.where(torch.isfinite(loss), loss, 0.0)


def divided(value: Tensor, by: Tensor) -> Tensor:
    """The quotient [n]; 1 where there is none."""
    quotient = value / by.clamp_min(torch.finfo(by.dtype).tiny)
    return torch.where((by > 0) & torch.isfinite(quotient) & (quotient > 0), quotient, 1.0)
