"""Shortest moves onto a hyperplane inside a box, in Linf, L2 and L1 (the projections of FAB, arXiv 1907.02044).

With a = |normal| and v >= 0 the length moved along the way that closes the gap, feature by feature, the optimum is
v = min(t, room) in Linf, v = min(t a, room) in L2, and in L1 the steepest features filled up one after the other. The
gap closed is a concave, increasing, piecewise linear function of t in the first two, so Newton's method started at the
solution without the box climbs to the root without overshooting and ends on it: no sort is needed.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from advkit.threat_models.lp import row_max, row_sum, wide

Norm = Literal["Linf", "L2", "L1"]
Bound = Tensor | float


def project(
    point: Tensor, normal: Tensor, offset: Tensor, low: Bound, high: Bound, norm: Norm, rounds: int | None = None
) -> Tensor:
    """The shortest delta [B, ...] with <normal, point + delta> + offset = 0 and low <= point + delta <= high.

    point:     points inside the box [B, ...]
    normal:    the hyperplanes' normals [B, ...]; rows that are zero do not move
    offset:    [B]
    low, high: the box, broadcastable to a row; may be infinite
    norm:      what is shortest: "Linf", "L2" or "L1"
    rounds:    most Newton steps (Linf, L2); None goes on until every row has arrived

    Where the box does not meet the hyperplane, delta leads to the point of the box nearest to it: a corner.
    """
    precise = wide(point)
    value = row_sum(normal.to(precise) * point.to(precise)) + offset.to(precise)
    return close_gap(point, normal, value.to(point.dtype), low, high, norm, rounds)


def close_gap(
    point: Tensor, normal: Tensor, value: Tensor, low: Bound, high: Bound, norm: Norm, rounds: int | None = None
) -> Tensor:
    """`project` where value = <normal, point> + offset [B] is known; rows whose value is not finite do not move."""
    weight = normal.abs().flatten(1)
    # Squares of gradients around 1e-25 would vanish in float32.
    scale = weight.amax(1)
    usable = (scale > 0) & torch.isfinite(value)
    scale = torch.where(usable, scale, 1.0)
    weight = weight / scale[:, None]
    gap = torch.where(usable, value / scale, 0.0)
    forwards = normal.sign() * -gap.sign().view(-1, *(1 for _ in point.shape[1:]))
    room = torch.where(forwards > 0, high - point, point - low).clamp_min(0).flatten(1)
    gap = gap.abs()
    if norm == "L1":
        size = _fill(weight, room, gap)
    elif norm == "Linf":
        size = torch.minimum(_climb(weight, None, room, gap, rounds)[:, None], room)
    else:
        size = torch.minimum(_climb(weight, weight, room, gap, rounds)[:, None] * weight, room)
    return size.view_as(point) * forwards


def length(move: Tensor, norm: Norm) -> Tensor:
    """The norm of every row [B]."""
    if norm == "Linf":
        return row_max(move.abs())
    return row_sum(move.abs()) if norm == "L1" else row_sum(move.square()).sqrt()


def dual_length(normal: Tensor, norm: Norm) -> Tensor:
    """The dual norm of every row [B]: a value divided by it is the distance to the hyperplane, the box left aside."""
    duals: dict[Norm, Norm] = {"Linf": "L1", "L2": "L2", "L1": "Linf"}
    return length(normal, duals[norm])


def _climb(weight: Tensor, unit: Tensor | None, room: Tensor, gap: Tensor, rounds: int | None) -> Tensor:
    """The t [B] with sum weight min(t unit, room) = gap, by Newton's method from below; unit None is one everywhere.

    A row that has arrived stays where it is, whatever the others do. Looking whether all have costs a synchronisation,
    so with a fixed number of rounds only the CPU looks.
    """
    rate, filled = weight if unit is None else weight * unit, weight * room
    t = gap / row_sum(rate).clamp_min(torch.finfo(gap.dtype).tiny)
    looking = rounds is None or gap.device.type == "cpu"
    for _ in range(weight.shape[1] + 1 if rounds is None else rounds):
        full = (t[:, None] if unit is None else t[:, None] * unit) >= room
        slope = row_sum(rate.masked_fill(full, 0.0))
        spent = row_sum(filled.masked_fill(~full, 0.0))
        further = torch.where(slope > 0, (gap - spent) / slope, t)
        if looking and not bool((further > t).any()):
            break
        t = torch.maximum(t, further)
    return t


def _fill(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """Sizes [B, D] with sum weight size = gap: the largest weights first, each as far as there is room."""
    steepest, order = weight.sort(dim=1, descending=True, stable=True)
    space = room.gather(1, order)
    share = torch.where(steepest > 0, steepest * space, 0.0)
    before = torch.cat([torch.zeros_like(share[:, :1]), share.cumsum(1)[:, :-1]], 1)
    wanted = (gap[:, None] - before) / torch.where(steepest > 0, steepest, 1.0)
    size = torch.where(steepest > 0, torch.minimum(wanted.clamp_min(0), space), 0.0)
    return torch.zeros_like(size).scatter(1, order, size)
