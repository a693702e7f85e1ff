"""Primal-dual proximal gradient descent, PDPGD (Matyasko and Chau, arXiv 2106.01538)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import MinimalAttack, NearestSearch
from advkit.attacks.minimal.radius import shrunk, threshold
from advkit.core.checks import at_least, at_least_one, fraction, positive
from advkit.core.rows import elementwise
from advkit.threat_models.lp import row_max, row_sum
from advkit.threat_models.minimum import Minimum, MinimumL0

BETAS = (0.9, 0.999)
NEWTON = 8


def proximal(move: Tensor, weight: Tensor, by: Tensor, threat: Minimum) -> Tensor:
    """The perturbation d that minimises by * |d| + sum weight (d - move)**2 / 2, in the threat model's norm.

    move, weight: [n, ...]; by: [n]
    """
    if isinstance(threat, MinimumL0):
        size = threat.positions(move.square()).sqrt()
        many = threat.positions(torch.ones_like(move))
        left = halved(size, by[:, None] * many / threat.positions(weight))
        return move * threat.everywhere(torch.where(size > 0, left / size, 0.0), move)
    if threat.least == "l1":
        return shrunk(move, per_row(by, move) / weight)
    if threat.least == "linf":
        top = threshold(move.abs().flatten(1), by, weight.flatten(1))
        return torch.minimum(torch.maximum(move, -per_row(top, move)), per_row(top, move))
    # d = move * weight s / (weight s + by) with s = |d|: the sum below is 1. Its root inverted is nearly linear in s.
    pull = move * weight
    size = ((row_sum(pull.square()).sqrt() - by) / row_max(weight)).clamp_min(0)  # not above the root
    for _ in range(NEWTON):
        below = (weight * per_row(size, move) + per_row(by, move)).clamp_min(1e-30)
        each = (pull / below).square()
        total, fall = row_sum(each), row_sum(each * weight / below)
        size = size + torch.where(total > 1, (total.sqrt() - 1) * total / fall, 0.0)
    heavy = weight * per_row(size, move)
    return move * heavy / (heavy + per_row(by, move)).clamp_min(1e-30)


def halved(size: Tensor, by: Tensor) -> Tensor:
    """The d >= 0 that minimises by * sqrt(d) + (d - size)**2 / 2.

    Its root is the largest one of a cubic, to which Newton's method falls from above. The closed form would do with
    fewer operations, but its cosines have other last bits in another batch.
    """
    root = size.sqrt()
    for _ in range(NEWTON):
        steep = (3 * root.square() - size).clamp_min(1e-30)
        root = (root - (root * (root.square() - size) + by / 2) / steep).clamp_min(0)
    return torch.where(size * size.square() > 3.375 * by.square(), root.square(), 0.0)


@dataclass(frozen=True, kw_only=True)
class PDPGD(MinimalAttack):
    """PDPGD: primal-dual proximal gradient descent, a minimum-norm attack in L0, L1, L2 and Linf.

    Adam descends the softplus of the margin, a proximal step shortens the perturbation, and the weight between the two
    rises where the goal is not reached and falls where it is.

    steps:     gradient steps, >= 1
    step_size: of Adam, > 0, in units of the space; rows that are nearer to the linearised boundary take shorter ones
    last:      what the step size falls to, exponentially, > 0
    ratio:     weight of the distance over that of the goal at first, > 0
    travel:    how far the logarithm of that ratio could move were the steps of the weight not to shrink, > 0
    dual_last: what these steps fall to, > 0
    average:   of the weights' moving average, in [0, 1)
    sharp:     steepness of the softplus, > 0: the margin of the clean row counts as this
    turns, secants: as in `alma`; in L0 the latter are answers that bisect how many of the changed positions are
               needed, as often as `turns` says

    Costs a gradient per step, an answer, and what `turns` and `secants` say. Raises UsageError for values out of range
    and for other threat models.

    The proximal steps are exact in Adam's metric, where the published ones iterate; in L0 the penalty is the square
    root of a position's change (the published code takes the power 2/3 there). Margins are in units of that of the
    clean row: nothing depends on the scale of the logits.
    """

    name: ClassVar[str] = "pdpgd"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l0", "minimum-l1", "minimum-l2", "minimum-linf")

    steps: int = 200
    step_size: float = 0.3
    last: float = 0.01
    ratio: float = 0.01
    travel: float = 20.0
    dual_last: float = 0.1
    average: float = 0.9
    sharp: float = 5.0
    turns: int = 3
    secants: int = 5

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        at_least(self, 0, "turns", "secants")
        positive(self, "step_size", "last", "ratio", "travel", "dual_last", "sharp")
        fraction(self, "average", ends="[)")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        self._descend(search, norm)
        search.tighten(self.turns, self.secants)

    def _descend(self, search: NearestSearch, norm: str) -> None:
        aim = search.goal.under("margin")
        z = search.x
        look = search.look(z, aim)
        away = torch.ones_like(look.loss) if norm == "l0" else search.linear_distance(look)
        unit = look.loss.abs().clamp_min(1e-30)
        loss, gradient = look.loss, look.gradient
        rows = search.leave(look.reached)
        if rows is not None:
            aim = aim.take(rows)
            z = search.x
            loss, gradient, away, unit = kept(rows, loss, gradient, away, unit)
        # A row that lies nearer than the first step is long takes shorter ones.
        pace = (away / self.step_size).clamp_max(1.0)
        dual = torch.full_like(unit, -torch.tensor(self.ratio).log().item())
        share = elementwise(torch.sigmoid, dual)  # the weight of the goal; the distance has the rest
        mean, square = torch.zeros_like(z), torch.zeros_like(z)
        for step in range(1, self.steps + 1):
            if not len(search) or not search.affords():
                return
            value = loss / unit
            pull = gradient * per_row(elementwise(torch.sigmoid, value * self.sharp) / unit * away, z)
            mean = BETAS[0] * mean + (1 - BETAS[0]) * pull
            square = BETAS[1] * square + (1 - BETAS[1]) * pull.square()
            spread = (square / (1 - BETAS[1] ** step)).sqrt() + 1e-8
            rate = self.step_size * self.last ** ((step - 1) / self.steps)
            rate = per_row(rate * pace, z)
            move = z - search.x - rate / (1 - BETAS[0] ** step) * mean / spread
            move = search.legal(search.x + move) - search.x
            move = proximal(move, spread / rate, (1 - share) / share, search.threat)
            z = search.legal(search.x + move)
            if step == self.steps:
                search.ask(z)
                return
            climb = self.travel / self.steps * (1 - (1 - self.dual_last) * (step - 1) / max(1, self.steps - 1))
            dual = (dual + climb * value.sign()).clamp(-13.8, 13.8)
            share = self.average * share + (1 - self.average) * elementwise(torch.sigmoid, dual)
            look = search.look(z, aim)
            loss, gradient = look.loss, look.gradient
