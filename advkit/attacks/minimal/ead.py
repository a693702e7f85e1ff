"""Elastic-net attack (Chen et al., arXiv 1709.04114)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import MinimalAttack, NearestSearch
from advkit.attacks.minimal.cw import divided, finite
from advkit.attacks.minimal.faces import Margin
from advkit.attacks.minimal.hyperplane import dual_length
from advkit.attacks.optimiser import Bracket, check_budget, effort_of
from advkit.core.checks import not_negative, positive
from advkit.threat_models.lp import row_sum


def shrunk(z: Tensor, x: Tensor, by: Tensor) -> Tensor:
    """The changes z - x [n, ...], each nearer to zero by `by` [n] and zero where it was smaller than that."""
    delta = z - x
    return x + delta.sign() * (delta.abs() - per_row(by, z)).clamp_min(0)


@dataclass(frozen=True, kw_only=True)
class EAD(MinimalAttack):
    """EAD (elastic-net attack), a minimum-norm attack in L1: descends weight * margin + squared L2 + beta * L1.

    Each step follows the gradient of the smooth part from a point extrapolated by momentum (FISTA), shrinks the change
    of every value by beta times the step, and projects onto the box. The weight is searched by bisection.

    budget: weights tried x gradient steps for each, such as 9x100
    beta:   weight of L1 against squared L2, >= 0, in units of the L1 distance to the boundary as the gradient at the
            clean row sees it
    lr:     first step, > 0: how far the steepest value would get in a run of such steps, in units of that distance;
            steps fall as the root of what is left of the run
    weight: of the margin in the first run, > 0; None is twice what a linear model would need

    Costs a gradient per step and one more; rows leave as in `cw`. Raises UsageError for values out of range and for
    other threat models.

    Published rules of decision are L1 and the elastic net; here the threat model decides, by L1. The published beta
    of 0.01 is less than the square for changes of more than that, and so gives points that are nearest in L2 rather
    than in L1. Success is asked about at the extrapolated points, which spares a forward pass per step.
    """

    name: ClassVar[str] = "ead"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l1",)
    default_threat_model: ClassVar[str] = "minimum-l1"

    budget: str = "9x100"
    beta: float = 10.0
    lr: float = 2.0
    weight: float | None = None

    def __post_init__(self) -> None:
        check_budget(self)
        not_negative(self, "beta")
        positive(self, "lr", "weight")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        searches, steps = effort_of(self.budget)
        first = search.look(search.x, Margin(search.goal))
        slope = dual_length(first.gradient, "L1")
        away = divided(finite(first.loss), slope)
        pull = 2 * away + self.beta * away
        weight = divided(2 * pull, slope) if self.weight is None else torch.full_like(slope, self.weight)
        rows = search.leave(first.reached)
        if rows is not None:
            away, pull, weight = kept(rows, away, pull, weight)
        bracket, z, last = Bracket.of(weight), search.x, search.x
        size, beta = self.lr / steps * divided(away, 2 * pull), self.beta * away
        for _ in range(searches * steps):
            if not len(search) or not search.affords():
                return
            look, weight, step = search.look(z, Margin(search.goal)), bracket.weight, bracket.step
            delta = z - search.x
            elastic = row_sum(delta.square()) + beta * row_sum(delta.abs())
            ended = bracket.after(elastic + weight * look.loss.clamp_min(0), look.reached, steps)
            wants = torch.where(look.loss >= 0, weight, 0.0)
            rate = size * (1 - step / steps).sqrt()
            smooth = 2 * delta + per_row(wants, z) * look.gradient
            moved = search.legal(shrunk(z - per_row(rate, z) * smooth, search.x, rate * beta))
            z = search.legal(moved + per_row(step / (step + 3), z) * (moved - last))
            z, last = (torch.where(per_row(ended, z), search.x, each) for each in (z, moved))
            rows = search.leave(bracket.finished(searches))
            if rows is not None:
                bracket = bracket.take(rows)
                z, last, size, beta = kept(rows, z, last, size, beta)
