"""Augmented Lagrangian method for adversarial attacks, ALMA (Rony et al., arXiv 2011.11857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import NORMS, MinimalAttack, NearestSearch
from advkit.attacks.minimal.hyperplane import length
from advkit.core.checks import at_least, at_least_one, check, fraction, positive
from advkit.core.rows import elementwise
from advkit.threat_models.lp import row_sum

FIRST = {"l1": 0.2, "l2": 0.5}


def slope(value: Tensor, rho: Tensor, mu: Tensor) -> Tensor:
    """The derivative of the penalty P2 at constraint values [n]: mu at zero, growing with the violation."""
    beyond = mu * (1 + 2 * rho * value) + (rho * value).square() / 2
    return torch.where(value >= 0, beyond, mu / (1 - rho * value.clamp_max(0)).square())


@dataclass(frozen=True, kw_only=True)
class ALMA(MinimalAttack):
    """ALMA: the augmented Lagrangian method, a minimum-norm attack in L1 and L2.

    The distance is descended by RMSProp with momentum under the constraint that the goal is reached; multipliers per
    row follow the penalty P2.

    steps:       gradient steps, >= 1
    first:       length of the first step, > 0, as a share of the distance to the linearised boundary; None is 0.2 in
                 L1 and 0.5 in L2
    last:        what the step size falls to, exponentially, after a row's first success, > 0
    alpha:       of the moving averages: multiplier, squared gradients, momentum; in (0, 1)
    check_every: steps after which the penalty grows where the goal was never reached and the margin is above `tau` of
                 what it was, >= 1
    tau:         see `check_every`, in (0, 1]
    gamma:       factor by which it grows, >= 1
    turns:       looks at the end, each with two answers more: the boundary as the nearest point sees it is projected
                 onto from the clean row; >= 0
    secants:     answers along the line to the nearest point after that, after two for its ends; >= 0

    Costs a gradient per step, an answer, and what `turns` and `secants` say. Raises UsageError for values out of range
    and for other threat models.

    Unlike the published code, the constraint is the margin over that of the clean row (the published ratio of logits
    needs three classes and an untargeted or targeted goal), and distances are in units of that to the linearised
    boundary: nothing depends on the scale of the logits. The published attack ends with its last step.
    """

    name: ClassVar[str] = "alma"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l1", "minimum-l2")

    steps: int = 200
    first: float | None = None
    last: float = 0.01
    alpha: float = 0.9
    check_every: int = 10
    tau: float = 0.95
    gamma: float = 1.2
    turns: int = 3
    secants: int = 3

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "check_every")
        at_least(self, 0, "turns", "secants")
        positive(self, "first", "last")
        fraction(self, "alpha", ends="()")
        fraction(self, "tau")
        check(self, "gamma", self.gamma >= 1, "a factor of at least 1")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        self._descend(search, norm)
        search.tighten(self.turns, self.secants)

    def _descend(self, search: NearestSearch, norm: str) -> None:
        first = FIRST[norm] if self.first is None else self.first
        aim = search.goal.under("margin")
        look = search.look(search.x, aim)
        loss, gradient, found = look.loss, look.gradient, look.reached
        away, unit = search.linear_distance(look), look.loss.abs()
        rows = search.leave(look.reached)
        if rows is not None:
            aim = aim.take(rows)
            loss, gradient, found, away, unit = kept(rows, loss, gradient, found, away, unit)
        z = search.x
        mu = rho = value = before = rate = torch.ones_like(away)
        when = torch.full_like(away, self.steps)
        slow, square = torch.zeros_like(z), torch.zeros_like(z)
        for step in range(1, self.steps + 1):
            if not len(search) or not search.affords():
                return
            value = loss / unit
            if step % self.check_every == 0:
                worse = ~found & (value >= self.tau * before)
                rho, before = torch.where(worse, self.gamma * rho, rho), value
            steepness = slope(value, rho, mu)
            mu = (self.alpha * mu + (1 - self.alpha) * steepness).clamp(1e-6, 1e12)
            # In units of the distance to the linearised boundary, and of the clean row's margin.
            pull = per_row(slope(value, rho, mu) * away / unit, z) * gradient + _way(z - search.x, norm)
            if step == 1:
                # The first step follows the gradient: RMSProp starts with the same scale for all features of a row.
                square = per_row(pull.square().flatten(1).mean(1), z).expand_as(z)
                size = length(search.legal(z - pull / square.sqrt().clamp_min(1e-30)) - z, NORMS[norm])
                rate = torch.where(size > 0, first * away / size, 0.0)
            square = self.alpha * square + (1 - self.alpha) * pull.square()
            slow = self.alpha * slow + pull / square.sqrt().clamp_min(1e-30)
            past = (step - when).clamp_min(0) / (self.steps - when).clamp_min(1)
            fall = elementwise(lambda share: self.last**share, past)
            z = search.legal(z - per_row(rate * fall, z) * slow)
            if step == self.steps:
                search.ask(z)
                return
            look = search.look(z, aim)
            loss, gradient = look.loss, look.gradient
            when = torch.where(look.reached & ~found, float(step), when)
            found = found | look.reached


def _way(move: Tensor, norm: str) -> Tensor:
    """The gradient of the distance."""
    if norm == "l1":
        return move.sign()
    return move / per_row(row_sum(move.square()).sqrt().clamp_min(1e-30), move)
