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
_FAR = 1e30


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
    return close_gaps(point[None], normal, value[None], low, high, norm, rounds)[0]


def close_gaps(
    points: Tensor, normal: Tensor, values: Tensor, low: Bound, high: Bound, norm: Norm, rounds: int | None = None
) -> Tensor:
    """`close_gap` for several points [P, B, ...] and values [P, B] of rows with one normal each [B, ...]."""
    weight = normal.abs().flatten(1)
    gap = values
    if norm == "L2":
        # Squares of gradients around 1e-25 would vanish in float32.
        scale = weight.amax(1)
        weight = weight / scale.clamp_min(torch.finfo(scale.dtype).tiny)[:, None]
        gap = values / scale
    gap = torch.where(gap.abs() < torch.inf, gap, 0.0)
    forwards = normal.sign() * gap.sign().neg_().view(*gap.shape, *(1 for _ in normal.shape[1:]))
    # From here on lengths are counted along the way that closes the gap. No masks: on a CPU picking by one takes 30
    # times as long as a product. A wall at infinity would make a NaN of features without weight.
    far, near = (torch.as_tensor(wall, dtype=points.dtype, device=points.device) for wall in (high, low))
    room = torch.maximum(
        (far.clamp_max(_FAR) - points).mul_(forwards), (near.clamp_min(-_FAR) - points).mul_(forwards)
    ).flatten(2)
    gap = gap.abs_()[..., None]
    if norm == "L1":
        size = torch.stack([_fill(weight, each, left[:, 0]) for each, left in zip(room, gap, strict=True)])
    elif norm == "Linf":
        size = torch.minimum(_climb(weight, None, room, gap, rounds), room)
    else:
        size = torch.minimum(_climb(weight, weight, room, gap, rounds) * weight, room)
    return size.view_as(points).mul_(forwards)


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
    """The t [P, B, 1] with sum weight min(t unit, room) = gap, by Newton's method from below; unit None is one.

    The first round starts at 0, where features without room drop out. A fixed number of rounds never asks whether
    all rows have arrived, which would be a synchronisation each; one that has stays where it is, up to round-off.
    """
    rate = weight if unit is None else weight * unit
    t = torch.zeros_like(gap)
    missing, left = gap, room
    for round_ in range(weight.shape[1] + 1 if rounds is None else rounds):
        if round_:
            far = t if unit is None else t * unit
            missing = gap - _row_total(torch.minimum(room, far).mul_(weight))
            left = room - far
        slope = _row_total(left.clamp_min(0.0).sign_().mul_(rate))
        # Where nothing has room left there is no slope and no further to go.
        further = missing.clamp_min(0.0).div_(slope).nan_to_num_(0.0, 0.0, 0.0).add_(t)
        if rounds is None and not bool((further > t).any()):
            break
        t = further
    return t


def _row_total(values: Tensor) -> Tensor:
    """Sums over the features, [P, B, D] to [P, B, 1]; see `row_sum` for why a single long row goes in twice."""
    if values.shape[0] * values.shape[1] == 1:
        return row_sum(values[0]).view(1, 1, 1)
    return values.sum(2, keepdim=True)


def _fill(weight: Tensor, room: Tensor, gap: Tensor) -> Tensor:
    """Sizes [B, D] with sum weight size = gap: the largest weights first, each as far as there is room."""
    steepest, order = weight.sort(dim=1, descending=True, stable=True)
    space = room.gather(1, order)
    share = torch.where(steepest > 0, steepest * space, 0.0)
    before = torch.cat([torch.zeros_like(share[:, :1]), share.cumsum(1)[:, :-1]], 1)
    wanted = (gap[:, None] - before) / torch.where(steepest > 0, steepest, 1.0)
    size = torch.where(steepest > 0, torch.minimum(wanted.clamp_min(0), space), 0.0)
    return torch.zeros_like(size).scatter(1, order, size)
