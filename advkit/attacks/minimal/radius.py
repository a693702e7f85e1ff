"""Perturbations cut to a length of each row's own, in L0, L1, L2 and Linf."""

from __future__ import annotations

import torch
from torch import Tensor

from advkit.attacks.base import per_row
from advkit.attacks.minimal.base import largest, lengthened
from advkit.threat_models.lp import row_sum
from advkit.threat_models.minimum import Minimum, MinimumL0


def within(move: Tensor, radius: Tensor, threat: Minimum) -> Tensor:
    """The nearest perturbations no longer than `radius` [n] in the threat model's norm, the box left aside."""
    if isinstance(threat, MinimumL0):
        return move * threat.everywhere(largest(threat.positions(move.square()), radius), move)
    if threat.least == "linf":
        size = per_row(radius, move)
        return torch.minimum(torch.maximum(move, -size), size)
    if threat.least == "l1":
        return shrunk(move, per_row(threshold(move.abs().flatten(1), radius), move))
    return torch.where(per_row(row_sum(move.square()) > radius.square(), move), lengthened(move, radius), move)


def shrunk(move: Tensor, by: Tensor) -> Tensor:
    """Every value nearer to zero by so much, at most to zero."""
    return move.sign() * (move.abs() - by).clamp_min(0)


def threshold(size: Tensor, total: Tensor, weight: Tensor | None = None) -> Tensor:
    """The least t >= 0 [n] with sum weight max(size - t, 0) <= total [n], for sizes [n, D]; weight 1 where None."""
    steepest, order = size.sort(dim=1, descending=True)
    heavy = torch.ones_like(steepest) if weight is None else weight.gather(1, order)
    mass = heavy.cumsum(1)
    level = ((heavy * steepest).cumsum(1) - total[:, None]) / mass.clamp_min(torch.finfo(size.dtype).tiny)
    # The level grows up to the last value that stays above it.
    return torch.where(mass > 0, level, 0.0).amax(1).clamp_min(0)
