"""Gradients from values alone: finite differences along random directions (RGE, NES, SPSA) and coordinates (CGE).

The estimators of arXiv 2203.14195, and those of attacks that see scores alone (arXiv 1804.08598, 1802.05666), of
whatever function a caller may only evaluate. All rows are estimated at once, and points are handed over in calls of
bounded size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from advkit.core.errors import UsageError
from advkit.core.noise import blocks, normal_block
from advkit.core.protocols import Rng
from advkit.core.rng import RowRng

Function = Callable[[Tensor, Tensor], Tensor]
"""(points [n, ...], of [n]) -> values [n], a floating type: point i is asked about for row of[i]."""
Mode = Literal["central", "forward"]
Directions = Literal["normal", "signs"]
BLOCK = 64
"""Directions that are drawn at a time for a row."""
CHUNK = 4096
_DRAWN, _ASKED = 1 << 20, 1 << 22
"""Numbers of a row that are drawn at a time, and that are asked about in one call."""


class Estimate(NamedTuple):
    """What an estimator found.

    gradient: like z
    value:    the function at z, [B]; None where it was not asked for
    queries:  how often the function was asked about each row
    """

    gradient: Tensor
    value: Tensor | None
    queries: int


def rge_queries(q: int, *, antithetic: bool = False, value: bool = False) -> int:
    """Queries of `rge` for each row."""
    return 2 * q + value if antithetic else q + 1


def cge_queries(coordinates: int, *, mode: Mode = "central", value: bool = False) -> int:
    """Queries of `cge` for each row; coordinates: how many are asked about."""
    return 2 * coordinates + value if mode == "central" else coordinates + 1


def pair_queries(pairs: int) -> int:
    """Queries of `pair_gradient` for each row."""
    return 2 * pairs


def pair_gradient(
    function: Function,
    z: Tensor,
    rng: Rng,
    *,
    pairs: int,
    mu: float,
    directions: Directions = "normal",
    low: Tensor | None = None,
    high: Tensor | None = None,
    chunk: int = CHUNK,
) -> Estimate:
    """Antithetic estimate: (1 / q) sum_k u_k (f(z + mu u_k) - f(z - mu u_k)) / (2 mu), as NES and SPSA have it.

    z:          rows [B, ...] with d numbers each, a floating type
    rng:        one stream per row: a row's directions depend on nothing else, nor does a bit of its estimate
    pairs:      q, directions, >= 1
    mu:         length of a step in every coordinate, > 0
    directions: "normal", standard normal numbers (NES); "signs", -1 and 1 (SPSA)
    low, high:  bounds that broadcast against rows; points are clamped between them, so that a function of legal inputs
                is asked about nothing else. In a coordinate that lies at a bound the estimate is half as long: what
                clamping leaves of the difference is mu |u|, where it is 2 mu |u| inside
    chunk:      most points in one call of the function, >= 1

    Costs 2 q queries per row. Unbiased for the gradient of a linear function; for another function for that of its mean
    over the directions. A value that is not finite counts as no difference. The variance on a linear function, in sum
    over the coordinates, is (d + 1) |g|^2 / q for normal numbers and (d - 1) |g|^2 / q for signs. Raises UsageError for
    settings out of range.
    """
    _check(z, mu, chunk)
    if pairs < 1:
        raise UsageError(f"pairs is {pairs!r}; expected a whole number of directions of at least 1")
    if directions not in ("normal", "signs"):
        raise UsageError(f"directions is {directions!r}; expected one of normal, signs")
    flat = z.detach().flatten(1)
    at_once = max(1, min(BLOCK, _DRAWN // max(1, flat.shape[1])))
    asked = _Asked(function, z, min(chunk, max(64, _ASKED // max(1, flat.shape[1]))))
    total = torch.zeros_like(flat)
    keys = rng.keys().tolist()
    for block, number in blocks(0, pairs, at_once):
        u = torch.stack([normal_block(key, block, number, row) for key, row in zip(keys, flat, strict=True)])
        u = (torch.where(u < 0, -1.0, 1.0) if directions == "signs" else u).to(flat.dtype)
        slopes = []
        for part in torch.split(u, asked.step, dim=1):
            ahead, behind = (
                asked(_clamped((flat[:, None] + way * part).view(-1, *z.shape[1:]), low, high).view(part.shape))
                for way in (mu, -mu)
            )
            slopes.append((ahead - behind) / (2 * mu))
        slope = torch.nan_to_num(torch.cat(slopes, 1), nan=0.0, posinf=0.0, neginf=0.0)
        # A product of matrices may sum in another order in another batch.
        total += (slope.unsqueeze(2) * u).sum(1)
    return Estimate((total / pairs).reshape(z.shape), None, pair_queries(pairs))


def rge(
    function: Function,
    z: Tensor,
    rng: RowRng,
    *,
    q: int = 20,
    mu: float = 0.005,
    antithetic: bool = False,
    value: bool = False,
    chunk: int = CHUNK,
) -> Estimate:
    """Random gradient estimate: (d / q) sum_k u_k (f(z + mu u_k) - f(z)) / mu, with u_k uniform on the unit sphere.

    z:          rows [B, ...] with d numbers each, a floating type
    rng:        one stream per row: a row's directions do not depend on the others
    q:          directions, >= 1
    mu:         length of a step, > 0
    antithetic: (f(z + mu u_k) - f(z - mu u_k)) / (2 mu) in place of the forward difference: on a quadratic function
                exactly the projection (d / q) sum_k u_k u_k' g
    value:      ask about z, too, where the estimate does without it
    chunk:      most points in one call of the function, >= 1

    Costs q + 1 queries per row, antithetic 2 q (one more with `value`). Its variance on a linear function is
    (d - 1) |g|^2 / q in sum over the coordinates. Raises UsageError for settings out of range.
    """
    _check(z, mu, chunk)
    if q < 1:
        raise UsageError(f"q is {q!r}; expected a whole number of directions of at least 1")
    if len(rng) != len(z):
        raise UsageError(f"{len(z)} rows and streams of {len(rng)}; expected one stream per row")
    flat = z.detach().flatten(1)
    asked = _Asked(function, z, chunk)
    at = asked(flat[:, None])[:, 0] if value or not antithetic else None
    total = torch.zeros_like(flat)
    keys = rng.keys().tolist()
    for block, number in blocks(0, q, BLOCK):
        drawn = torch.stack([normal_block(key, block, number, row) for key, row in zip(keys, flat, strict=True)])
        drawn = drawn.to(flat.dtype)
        drawn = drawn / torch.linalg.vector_norm(drawn, dim=2, keepdim=True)
        for u in torch.split(drawn, asked.step, dim=1):
            ahead = asked(flat[:, None] + mu * u)
            if antithetic:
                slope = (ahead - asked(flat[:, None] - mu * u)) / (2 * mu)
            else:
                assert at is not None
                slope = (ahead - at[:, None]) / mu
            total += torch.einsum("bk,bkd->bd", slope, u)
    gradient = total * (flat.shape[1] / q)
    return Estimate(gradient.reshape(z.shape), at, rge_queries(q, antithetic=antithetic, value=value))


def cge(
    function: Function,
    z: Tensor,
    *,
    mu: float = 0.005,
    mode: Mode = "central",
    coordinates: Tensor | None = None,
    value: bool = False,
    chunk: int = CHUNK,
) -> Estimate:
    """Coordinate-wise gradient estimate: a finite difference along every coordinate of z.

    z:           rows [B, ...] with d numbers each, a floating type
    mu:          length of a step, > 0
    mode:        "central": (f(z + mu e_j) - f(z - mu e_j)) / (2 mu), exact on a quadratic function; "forward":
                 (f(z + mu e_j) - f(z)) / mu, off by mu A_jj / 2 on one of curvature A
    coordinates: places in a flattened row, long [s], without repetition; the gradient is 0 in the others. None: all d
    value:       ask about z, too, where the estimate does without it
    chunk:       most points in one call of the function, >= 1

    Costs 2 s queries per row (one more with `value`), forward s + 1. Raises UsageError for settings out of range.
    """
    _check(z, mu, chunk)
    if mode not in ("central", "forward"):
        raise UsageError(f"mode is {mode!r}; expected one of central, forward")
    flat = z.detach().flatten(1)
    d = flat.shape[1]
    places = torch.arange(d, device=flat.device) if coordinates is None else coordinates.to(flat.device)
    fine = places.ndim == 1 and not places.is_floating_point() and places.dtype != torch.bool and len(places) > 0
    if not fine or int(places.min()) < 0 or int(places.max()) >= d or len(set(places.tolist())) != len(places):
        raise UsageError(f"coordinates is {list(places.shape)}; expected different whole numbers from 0 to {d - 1}")
    asked = _Asked(function, z, chunk)
    at = asked(flat[:, None])[:, 0] if value or mode == "forward" else None
    gradient = torch.zeros_like(flat)
    for start in range(0, len(places), asked.step):
        part = places[start : start + asked.step]
        steps = torch.zeros(len(part), d, dtype=flat.dtype, device=flat.device)
        steps[torch.arange(len(part), device=flat.device), part] = mu
        ahead = asked(flat[:, None] + steps)
        if mode == "central":
            slope = (ahead - asked(flat[:, None] - steps)) / (2 * mu)
        else:
            assert at is not None
            slope = (ahead - at[:, None]) / mu
        gradient[:, part] = slope
    return Estimate(gradient.reshape(z.shape), at, cge_queries(len(places), mode=mode, value=value))


def _clamped(points: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
    return points if low is None and high is None else torch.clamp(points, low, high)


class _Asked:
    """The function at several points of every row, in calls of at most `chunk` points.

    step: points per row that make up one call
    """

    def __init__(self, function: Function, z: Tensor, chunk: int) -> None:
        self.function, self.z, self.chunk = function, z, chunk
        self.step = max(1, chunk // max(1, len(z)))

    def __call__(self, points: Tensor) -> Tensor:
        """Values [B, k] at points [B, k, d]."""
        rows, number = points.shape[:2]
        of = torch.arange(rows, device=points.device).repeat_interleave(number)
        flat = points.reshape(rows * number, *self.z.shape[1:])
        with torch.no_grad():
            parts = [
                self.function(*each)
                for each in zip(torch.split(flat, self.chunk), torch.split(of, self.chunk), strict=True)
            ]
        values = torch.cat(parts)
        if values.shape != (rows * number,):
            raise UsageError(f"the function answers {list(values.shape)} for {rows * number} points; expected one each")
        return values.to(self.z.dtype).reshape(rows, number)


def _check(z: Tensor, mu: float, chunk: int) -> None:
    if z.ndim < 2 or not z.is_floating_point():
        raise UsageError(f"z is {z.dtype} {list(z.shape)}; expected rows of floating numbers, [B, ...]")
    if not mu > 0:
        raise UsageError(f"mu is {mu!r}; expected a length of a step above 0, such as 0.005")
    if chunk < 1:
        raise UsageError(f"chunk is {chunk!r}; expected a whole number of points of at least 1")
