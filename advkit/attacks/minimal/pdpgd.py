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
from advkit.threat_models.lp import row_sum
from advkit.threat_models.minimum import Minimum, MinimumL0

BETAS = (0.9, 0.999)
NEWTON = 8


def proximal(move: Tensor, weight: Tensor, by: Tensor, threat: Minimum) -> Tensor:
    """The perturbation d that minimises by * |d| + sum weight (d - move)**2 / 2, in the threat model's norm.

    move, weight: [n, ...]; by: [n]
    """
    if isinstance(threat, MinimumL0):
        worth = threat.positions(weight * move.square()) / 2
        return move * threat.everywhere(worth > by[:, None], move)
    if threat.least == "l1":
        return shrunk(move, per_row(by, move) / weight)
    if threat.least == "linf":
        top = threshold(move.abs().flatten(1), by, weight.flatten(1))
        return torch.minimum(torch.maximum(move, -per_row(top, move)), per_row(top, move))
    # d = move * weight / (weight + by / |d|): the length is the root of an increasing function of itself.
    size = row_sum(move.square()).sqrt()
    for _ in range(NEWTON):
        each = move * weight / (weight + per_row(by / size.clamp_min(1e-30), move))
        size = row_sum(each.square()).sqrt()
    return move * weight / (weight + per_row(by / size.clamp_min(1e-30), move))


@dataclass(frozen=True, kw_only=True)
class PDPGD(MinimalAttack):
    name: ClassVar[str] = "pdpgd"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l0", "minimum-l1", "minimum-l2", "minimum-linf")

    steps: int = 200
    step_size: float = 0.1
    last: float = 0.01
    ratio: float = 0.01
    dual_step: float = 0.1
    dual_last: float = 0.1
    average: float = 0.9
    secants: int = 3
    sharp: float = 5.0

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        at_least(self, 0, "secants")
        positive(self, "step_size", "last", "ratio", "dual_step", "dual_last")
        fraction(self, "average", ends="[)")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        self._descend(search, norm)
        if self.secants and norm != "l0":
            search.tighten(self.secants)

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
        dual = torch.full_like(unit, -torch.tensor(self.ratio).log().item())
        share = torch.sigmoid(dual)  # the weight of the goal; the distance has the rest
        mean, square = torch.zeros_like(z), torch.zeros_like(z)
        for step in range(1, self.steps + 1):
            if not len(search) or not search.affords():
                return
            value = loss / unit
            pull = gradient * per_row(torch.sigmoid(value * self.sharp) / unit * away, z)
            mean = BETAS[0] * mean + (1 - BETAS[0]) * pull
            square = BETAS[1] * square + (1 - BETAS[1]) * pull.square()
            spread = (square / (1 - BETAS[1] ** step)).sqrt() + 1e-8
            rate = self.step_size * self.last ** ((step - 1) / self.steps)
            move = z - search.x - rate / (1 - BETAS[0] ** step) * mean / spread
            move = search.legal(search.x + move) - search.x
            move = proximal(move, spread / rate, (1 - share) / share, search.threat)
            z = search.legal(search.x + move)
            if step == self.steps:
                search.ask(z)
                return
            pace = self.dual_step * (1 - (1 - self.dual_last) * (step - 1) / max(1, self.steps - 1))
            dual = (dual + pace * value.sign()).clamp(-13.8, 13.8)
            share = self.average * share + (1 - self.average) * torch.sigmoid(dual)
            look = search.look(z, aim)
            loss, gradient = look.loss, look.gradient
