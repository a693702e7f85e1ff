"""Brendel and Bethge's attack along the boundary, in L0, L1, L2 and Linf (arXiv 1907.01003)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import Look, MinimalAttack, NearestSearch, lengthened
from advkit.attacks.minimal.faces import Margin
from advkit.core.checks import at_least_one, positive
from advkit.threat_models.lp import row_max, row_sum
from advkit.threat_models.minimum import Minimum, MinimumL0

log = logging.getLogger("advkit")

AHEAD = 1.3  # of a start's steps: each is so much longer than the one before it
BEYOND = 0.02  # of the trust region's radius, how far behind the linear boundary a step aims
TOLERANCE = 0.01  # of the radius, how far from the plane a point counts as on it
RADIUS = {"l0": 1.0, "l1": 0.5, "l2": 0.1, "linf": 0.2}
FAR = 8.0  # of the largest change, the largest shrinkage in L1


def shaped(w: Tensor, bold: Tensor, threat: Minimum, low: Tensor, high: Tensor, largest: Tensor) -> Tensor:
    """The changes [n, ...] next to `w` once the norm pulls at them, 0 <= `bold` <= 1 as much as it can.

    What `nearest_on_plane` is made of: in L2 a change is scaled, in L1 shrunk, in Linf bounded, and in L0 left out
    where its position is worth less than a threshold. low, high: the walls, as changes; largest: [n], of the change now
    """
    least = threat.least
    if least == "l2":
        return w.clamp(low, high)
    edge = per_row(largest * ((1 - bold) if least == "linf" else bold), w)
    if least == "linf":
        return torch.minimum(torch.maximum(w.clamp(low, high), -edge), edge)
    if least == "l1":
        return (w.sign() * (w.abs() - FAR * edge).clamp_min(0)).clamp(low, high)
    assert isinstance(threat, MinimumL0)
    inside = w.clamp(low, high)
    worth = threat.everywhere(threat.positions(w.square() - (w - inside).square()), w)
    return torch.where(worth > (FAR * edge).square(), inside, 0.0)


def nearest_on_plane(
    change: Tensor,
    normal: Tensor,
    value: Tensor,
    radius: Tensor,
    threat: Minimum,
    low: Tensor,
    high: Tensor,
    rounds: int = 6,
) -> Tensor:
    """The change u [n, ...] of least norm with <normal, u - change> = -value, inside box and trust region.

    change:      the change of the clean rows now [n, ...]
    normal:      of the linear boundary [n, ...]
    value:       what has to be lost along it [n]
    radius:      of the trust region, in L2 [n]
    low, high:   the box's walls, as changes
    rounds:      of the search for the multiplier, and for how much the norm may pull; 6 leave some per cent of the
                 radius unused

    The dual of a separable problem: u is a shape of `pull * change - multiplier * normal`, feature by feature
    (`shaped`). The multiplier that meets the plane is found by Newton's method inside a bracket; how much the norm may
    pull, until the radius is used up, by bisection. Where even the nearest point of the plane is out of reach, the step
    towards it is cut to the radius. In L0 it is a heuristic: what is left out is decided position by position.
    """
    largest, target = row_max(change.abs()), row_sum(normal * change) - value
    scale = row_sum(normal.square()).sqrt().clamp_min(torch.finfo(normal.dtype).tiny)

    def at(bold: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        start = change * per_row(1 - bold, change) if threat.least == "l2" else change
        under, over = torch.full_like(bold, -torch.inf), torch.full_like(bold, torch.inf)
        u = sure = change
        for _ in range(rounds + 1):
            u = shaped(start - per_row(multiplier, normal) * normal, bold, threat, low, high, largest)
            gap = row_sum(normal * u) - target
            under = torch.where(gap > 0, multiplier, under)
            over = torch.where(gap <= 0, multiplier, over)
            if threat.least == "l0":  # positions come and go at once: the plane may lie between two multipliers
                sure = torch.where(per_row(gap <= 0, u), u, sure)
            inner = u.abs() < per_row(largest * (1 - bold), u) if threat.least == "linf" else u != 0
            free = (u > low) & (u < high) & (inner if threat.least != "l2" else torch.ones_like(inner))
            slope = row_sum(torch.where(free, normal.square(), 0.0))
            slope = torch.where(slope > 0, slope, scale.square() / normal[0].numel())
            newton = multiplier + gap / slope
            middle = torch.where(torch.isfinite(under + over), (under + over) / 2, newton)
            multiplier = torch.where((newton > under) & (newton < over), newton, middle)
        if threat.least == "l0":
            u, gap = sure, (row_sum(normal * sure) - target).clamp_min(0)
        return u, gap / scale, multiplier

    timid, bold = torch.zeros_like(value), torch.ones_like(value)
    found, _, multiplier = at(timid, timid)
    for _ in range(rounds + 1):
        tried = (timid + bold) / 2
        u, gap, ended = at(tried, multiplier)
        fits = (row_sum((u - change).square()).sqrt() <= radius) & (gap.abs() <= TOLERANCE * radius)
        # Where the norm pulled too hard the multiplier ran away: the next search begins where the last good one ended.
        found, multiplier = torch.where(per_row(fits, u), u, found), torch.where(fits, ended, multiplier)
        timid, bold = torch.where(fits, tried, timid), torch.where(fits, bold, tried)
    step = found - change
    size = row_sum(step.square()).sqrt()
    return change + torch.where(per_row(size > radius, step), lengthened(step, radius), step)


@dataclass(frozen=True, kw_only=True)
class BrendelBethge(MinimalAttack):
    """Brendel & Bethge (B&B), a minimum-norm attack in all norms: follows the boundary from an adversarial start.

    Each step linearises the margin and goes to the nearest point to the clean row on that plane, inside the box and a
    trust region around the present point.

    steps:    gradient steps, those of the start included, >= 1
    starts:   most of them that look for a start: down the gradient with longer and longer steps, and by noise of the
              whole box in every other one of the last half; >= 1
    lr:       radius of the trust region in units of the nearest point's L2 distance, > 0; None is 0.1 in L2, 0.2
              in Linf, 0.5 in L1, and 1 in L0, where a position that is undone costs all of its change
    halvings: how often the radius halves over the steps, >= 0

    Costs a gradient per step. Rows without a start come back unchanged; the log says how many (at info). Raises
    UsageError for values out of range and for other threat models.

    Published starts are noise alone, or given, and are first moved to the boundary by bisection; here the first steps
    lead there. The published radius is a number, here it is relative. The subproblem is solved for all rows at once by
    a few rounds of its dual (`nearest_on_plane`), published by an optimiser per row.
    """

    name: ClassVar[str] = "brendel_bethge"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l0", "minimum-l1", "minimum-l2", "minimum-linf")

    steps: int = 200
    starts: int = 40
    lr: float | None = None
    halvings: float = 6.0

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "starts")
        positive(self, "lr")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        origin, first = search.x, RADIUS[norm] if self.lr is None else self.lr
        z, length = search.x, torch.zeros_like(search.away)
        for step in range(self.steps):
            if not len(search) or not search.affords():
                break
            look = search.look(z, Margin(search.goal))
            found = search.away < torch.inf
            rows = search.leave((search.away <= 0) | (~found & (step >= self.starts)))
            if rows is not None:
                z, length, found = kept(rows, z, length, found)
                look = look.take(rows)
                if not len(search):
                    break
            noisy = 2 * step >= self.starts and step % 2 == 0 and not bool(found.all())
            start, length = self._start(search, z, look, length, step, noisy)
            radius = first * 0.5 ** (self.halvings * step / self.steps)
            along = self._along(search, z, look, radius)
            z = torch.where(per_row(found, z), along, start)
        if log.isEnabledFor(logging.INFO):
            lost = int((search.best == origin).flatten(1).all(1).sum())
            log.info("brendel_bethge: %d of %d rows have no start and come back unchanged", lost, len(origin))

    def _along(self, search: NearestSearch, z: Tensor, look: Look, lr: float) -> Tensor:
        """The next point along the boundary."""
        change = z - search.x
        low, high = (wall - search.x for wall in search.threat.box.bounds_like(z))
        # Of the nearest point, not of this one: a step too far towards the clean row would leave none to come back by.
        radius = lr * row_sum((search.nearest - search.x).square()).sqrt()
        slope = row_sum(look.gradient.square()).sqrt()
        # Closer than rounding the side of the boundary is a matter of the batch's shape.
        beyond = torch.maximum(BEYOND * radius, 4 * torch.finfo(z.dtype).eps * row_sum(z.square()).sqrt())
        value = torch.where(torch.isfinite(look.loss), look.loss, 0.0) + beyond * slope
        return search.legal(search.x + nearest_on_plane(change, look.gradient, value, radius, search.threat, low, high))

    def _start(
        self, search: NearestSearch, z: Tensor, look: Look, length: Tensor, step: int, noisy: bool
    ) -> tuple[Tensor, Tensor]:
        """A point where rows without a start look next, and the length of the step there."""
        slope = row_sum(look.gradient.square()).sqrt()
        away = torch.where((slope > 0) & torch.isfinite(look.loss), look.loss.abs() / slope, 0.0)
        length = torch.maximum(AHEAD * length, AHEAD * away)
        walked = search.legal(z - lengthened(look.gradient, length))
        if not noisy:
            return walked, length
        noise = search.rng.at("start", step).uniform(z)
        low, high = search.threat.box.bounds_like(z)
        bounded = torch.isfinite(high - low)
        spread = per_row(length.clamp_min(1.0), z) * (2 * noise - 1)
        return search.legal(torch.where(bounded, low + (high - low) * noise, search.x + spread)), length
