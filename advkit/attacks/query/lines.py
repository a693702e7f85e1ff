"""Searches for the boundary along lines, by decisions alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from advkit.attacks.base import per_row
from advkit.attacks.query.decisions import Decisions, row_length
from advkit.threat_models.lp import row_max

HALVINGS = 40

Points = Callable[[Tensor, Tensor], Tensor]
"""(lengths [m], of [m]) -> points [m, ...]: where each row is, that far along its line."""


def bisect(asks: Decisions, points: Points, low: Tensor, high: Tensor, want: Tensor, tolerance: float) -> Tensor:
    """The least length known to reach the goal [n], by halving.

    low, high: lengths [n]: high reaches the goal, low does not
    want:      rows to search for, bool [n]
    tolerance: ends where high - low is at most this share of high
    """
    for _ in range(HALVINGS):
        of = (want & (asks.left > 0) & (high - low > tolerance * high)).nonzero().squeeze(1)
        if not len(of):
            break
        middle = (low[of] + high[of]) / 2
        reached = asks.ask(asks.legal(points(middle, of), of), of)
        high[of] = torch.where(reached, middle, high[of])
        low[of] = torch.where(reached, low[of], middle)
    return high


def nearest_on(
    asks: Decisions,
    points: Points,
    guess: Tensor,
    most: Tensor,
    want: Tensor,
    tolerance: float,
    reach: float = 0.01,
    known: bool = False,
) -> tuple[Tensor, Tensor]:
    """The least length known to reach the goal near a guess [n], and whether there is one.

    most:  the longest length to try [n]
    reach: first step away from the guess, as a share of it; every next one is three times as long
    known: the longest is known to reach the goal
    """
    length, reached = torch.minimum(guess, most), want & known
    low, high = torch.zeros_like(guess), most.clone()
    open_ = want & (length > 0) & ((length < most) | (not known))
    down = open_
    for number in range(HALVINGS):
        if not bool((open_ & (asks.left > 0)).any()):
            break
        of = (open_ & (asks.left > 0)).nonzero().squeeze(1)
        hit = torch.zeros_like(want)
        hit[of] = asks.ask(asks.legal(points(length[of], of), of), of)
        high, low = torch.where(hit, length, high), torch.where(open_ & ~hit, length, low)
        reached = reached | hit
        down = hit if number == 0 else down
        # Going down ends at the first length that fails, going up at the first that holds.
        open_ = open_ & (hit == down) & (asks.left > 0) & (hit | (length < most))
        if known:  # the end need not be asked about
            open_ = open_ & (hit | (length * (1 + min(0.5, reach * 3.0**number)) < most))
        share = min(0.5, reach * 3.0**number)
        length = torch.where(open_, torch.where(down, length * (1 - share), (length * (1 + share))), length)
        length = torch.minimum(length, most)
    return bisect(asks, points, low, high, want & reached, tolerance), reached


def towards(asks: Decisions, z: Tensor, norm: str) -> Points:
    """The way back from z to the clean rows: length 1 is z, length 0 the clean row.

    In L2 and L1 the straight line, in Linf what the cube of that size leaves of z.
    """
    x, move = asks.x, z - asks.x
    if norm != "linf":
        return lambda length, of: x[of] + per_row(length, z) * move[of]
    size = row_max(move.abs())

    def clipped(length: Tensor, of: Tensor) -> Tensor:
        most = per_row(length * size[of], z)
        return x[of] + torch.minimum(torch.maximum(move[of], -most), most)

    return clipped


def to_boundary(
    asks: Decisions, z: Tensor, want: Tensor, norm: str, tolerance: float, guess: Tensor | float | None = None
) -> Tensor:
    """Points z that reach the goal, moved to the boundary on their way back; others stay.

    guess: where the boundary may be on the way, [n] or a number, below 1; None halves the whole way
    """
    way, most = towards(asks, z, norm), torch.ones_like(asks.search.away)
    if guess is None:
        length = bisect(asks, way, torch.zeros_like(most), most.clone(), want, tolerance)
    else:
        length = nearest_on(asks, way, most * guess, most, want, tolerance, known=True)[0]
    rows = torch.arange(len(z), device=z.device)
    return torch.where(per_row(want & (length < 1), z), asks.legal(way(length, rows)), z)


def compared(
    asks: Decisions, z: Tensor, way: Tensor, norm: str, want: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Points z, or those nearer to the clean rows in another direction; and which those are, bool [n].

    way: directions [n, ...], any length. One question at the distance of z, and a search where that is met.
    """
    x = asks.x
    away = asks.distance(z)
    size = row_max(way.abs()) if norm == "linf" else row_length(way)
    way = way * per_row(1 / size.clamp_min(torch.finfo(size.dtype).tiny), way)

    def points(length: Tensor, of: Tensor) -> Tensor:
        return x[of] + per_row(length, x) * way[of]

    every = torch.arange(len(x), device=x.device)
    at = asks.legal(points(away, every))
    wins = asks.try_points(at, want)
    length, nearer = nearest_on(asks, points, 0.99 * away, away, wins, tolerance)
    length = torch.where(nearer, length, away)
    return torch.where(per_row(wins, x), asks.legal(points(length, every)), z), wins
