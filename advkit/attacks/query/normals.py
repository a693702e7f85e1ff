"""Normals of the boundary, estimated from decisions at random points (Monte Carlo), and the directions of these."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import per_row
from advkit.attacks.query.decisions import Decisions, row_length, unit
from advkit.core.noise import normal_block
from advkit.core.protocols import Rng
from advkit.threat_models.lp import row_max

BLOCK = 64
_NUMBERS = 1 << 18
"""Most numbers of a row that are drawn at a time."""


def estimated_normal(
    asks: Decisions,
    z: Tensor,
    delta: Tensor,
    number: Tensor,
    rng: Rng,
    draw: Directions | None = None,
    place: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The direction out of the clean class at boundary points z [n, ...], estimated by Monte Carlo; any length.

    The mean of the moves to random points around z, each with the sign of its decision, less the mean decision.
    Moves are what is left of them in the box.

    delta:  L2 length of the moves, [n]
    number: how many points each row asks about, long [n], no more than it has left
    draw:   makes directions of normal numbers; None takes them as they are
    place:  (points [m, ...], of [m]) -> where to ask in their place; None asks there
    """
    make = Directions(z) if draw is None else draw
    most, step = int(number.max()), max(1, min(BLOCK, _NUMBERS // max(1, make.like[0].numel())))
    signed, moved = torch.zeros_like(z), torch.zeros_like(z)
    signs = torch.zeros_like(delta)
    for block in range(-(-most // step)):
        # Whole blocks: a shorter one would hold other numbers, and rows ask as often as each can.
        drawn = numbers_of(rng, block, step, make.like)
        count = min(step, most - block * step)
        directions = make(drawn[:, :count])
        asked = block * step + torch.arange(count, device=z.device) < number[:, None]
        of = asked.nonzero()[:, 0]
        directions = directions[asked]
        points = z[of] + per_row(delta[of], z) * directions
        points = asks.legal(points if place is None else place(points, of), of)
        decision = torch.where(asks.ask(points, of), 1.0, -1.0).to(z.dtype)
        move = z.new_zeros((*asked.shape, *z.shape[1:]))
        sign = z.new_zeros(asked.shape)
        move[asked], sign[asked] = points - z[of], decision
        # A product of matrices may sum in another order in another batch.
        signed += (sign.view(*sign.shape, *(1 for _ in z.shape[1:])) * move).sum(1)
        moved += move.sum(1)
        signs += sign.sum(1)
    mean = signs / number.clamp_min(1)
    return torch.where(per_row(mean.abs() < 1, z), signed - per_row(mean, z) * moved, signed)


def numbers_of(rng: Rng, block: int, count: int, like: Tensor) -> Tensor:
    """Standard normal numbers [n, count, ...] of each row's stream; like: rows [n, ...]."""
    keys = rng.keys().tolist()
    drawn = [normal_block(key, block, count, row) for key, row in zip(keys, like, strict=True)]
    return torch.stack(drawn).to(like.dtype)


class Directions:
    """Random directions of L2 length 1, of normal numbers shaped like the rows.

    like: [n, ...], what the numbers of a direction are shaped like
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like

    def __call__(self, numbers: Tensor) -> Tensor:
        """Directions [n, K, ...] of normal numbers [n, K, ...]."""
        return unit(numbers.flatten(0, 1)).view(numbers.shape)


class LowFrequencies(Directions):
    """Random directions in the span of the lowest frequencies of the discrete cosine transform.

    z:           rows [n, C, L] or [n, ..., H, W]; rows [n, D] have no neighbours, and all of their space is spanned
    frequencies: along each axis, >= 1
    """

    def __init__(self, z: Tensor, frequencies: int) -> None:
        self.axes = () if z.ndim < 3 else ((2,) if z.ndim == 3 else (z.ndim - 2, z.ndim - 1))
        shape = [min(size, frequencies) if axis in self.axes else size for axis, size in enumerate(z.shape)]
        super().__init__(z.new_zeros(shape))
        self.waves = [_cosines(z.shape[axis], shape[axis]).to(z) for axis in self.axes]

    @override
    def __call__(self, numbers: Tensor) -> Tensor:
        """Directions [n, K, ...] of normal numbers [n, K, ...], one per frequency."""
        for axis, waves in zip(self.axes, self.waves, strict=True):
            # A product of matrices may sum in another order in another batch.
            total: Tensor | None = None
            for each, wave in zip(numbers.unbind(axis + 1), waves, strict=True):
                part = each.unsqueeze(axis + 1) * wave.view(-1, *(1 for _ in range(numbers.ndim - axis - 2)))
                total = part if total is None else total.add_(part)
            assert total is not None
            numbers = total
        return super().__call__(numbers)


def _cosines(size: int, frequencies: int) -> Tensor:
    """The first rows of the orthonormal discrete cosine transform [frequencies, size]."""
    place, number = torch.arange(size).double() + 0.5, torch.arange(frequencies).double()
    waves = torch.cos(math.pi / size * place * number[:, None]) * math.sqrt(2 / size)
    waves[0] /= math.sqrt(2)
    return waves


def smallest_move(z: Tensor) -> Tensor:
    """The L2 length [n] of moves that single precision still tells apart in every coordinate."""
    size = row_max(z.abs()).clamp_min(1)
    return size * 64 * torch.finfo(z.dtype).eps * math.sqrt(z[0].numel())


def move_length(z: Tensor, x: Tensor, sigma: float) -> Tensor:
    """L2 lengths [n] of moves from boundary points z to random points: a share sigma of their distance."""
    return torch.maximum(sigma * row_length(z - x), smallest_move(z))


def resolution(x: Tensor, sigma: float) -> float:
    """How near to the boundary a point is to be, as a share of its distance, so that such moves cross it."""
    return sigma / math.sqrt(x[0].numel())
