"""Points that reach the goal, for attacks by decisions alone to start from: noise and the attacker's own samples."""

from __future__ import annotations

import torch
from torch import Tensor

from advkit.attacks.base import per_row
from advkit.attacks.query.decisions import Decisions, row_length
from advkit.attacks.query.lines import compared, to_boundary
from advkit.core.errors import UsageError
from advkit.core.protocols import Rng
from advkit.threat_models.lp import row_max

NOISES, SAMPLES, GROWTH, MOSAICS = 10, 50, 20, 20
"""Starts that are tried, in turn: uniform noise, samples of the attacker's data, growing noise, and mosaics."""
TILES = 2, 3, 4
"""Tiles of a mosaic along an axis, in turn."""
POOL = 1000
"""Samples of the attacker's data that are drawn for each row; the nearest of them are asked about first."""
COARSE = 0.02
"""How near to the boundary points come that are only compared, as a share of their distance."""


def start(asks: Decisions, norm: str, tolerance: float, directions: int) -> Tensor | None:
    """Ask about the clean rows, find each a point that reaches the goal, and move that to the boundary.

    Rows that reach the goal untouched leave, and rows for which nothing was found, with a note in their records:
    all where the oracle decides. Returns the points [n, ...]; None where no row is left.

    directions: random ones that are tried beside, each by a question at the distance so far: a boundary around a
                row has several nearest points

    Tried are uniform noise over the box (normal noise in an unbounded one), the attacker's samples whose labels
    reach the goal, nearest first, noise that grows from a hundredth of the box, and mosaics of the box's corners.
    """
    search = asks.search
    asks.left -= 1
    answer, reached = search.ask(asks.legal(asks.x))
    wins = wins_of(asks, answer)
    if (rows := asks.dismiss(reached)) is not None:
        wins = wins[rows]
    z = asks.legal(asks.x)
    z = from_noise(asks, z, search.rng.at("start", "_noise"))
    z = from_samples(asks, z, wins, search.rng.at("start", "_samples"))
    z = from_growing_noise(asks, z, search.rng.at("start", "_growing"))
    z = from_mosaics(asks, z, search.rng.at("start", "mosaics"))
    lost = ~asks.found
    for row in lost.nonzero().squeeze(1).tolist():
        search.oracle.note(row, {"start": "none found", "queries": asks.queries - int(asks.left[row])})
    if (rows := asks.dismiss(lost)) is not None:
        z = z[rows]
    if not len(asks):
        return None
    return _compared_with(asks, z, norm, tolerance, directions)


def _compared_with(asks: Decisions, z: Tensor, norm: str, tolerance: float, directions: int) -> Tensor:
    """The starts on the boundary, or points in random directions that are nearer."""
    z = to_boundary(asks, z, asks.found, norm, COARSE if directions else tolerance)
    for number in range(directions):
        noise = asks.search.rng.at("start", "direction", number).normal(z)
        if norm == "linf":
            noise = noise.sign()
        elif norm == "l1":  # from few values to all of them
            size = noise.flatten(1).abs()
            few = round(size.shape[1] ** (number % 5 / 4))
            noise = noise * (size >= size.topk(few, 1).values[:, -1:]).view(noise.shape)
        z, _ = compared(asks, z, noise, norm, asks.found, COARSE)
    return to_boundary(asks, z, asks.found, norm, tolerance, 1 - COARSE) if directions else z


def wins_of(asks: Decisions, answer: Tensor) -> Tensor:
    """Which decisions reach each row's goal, bool [n, classes]; UsageError where none reaches it."""
    goal, rows = asks.search.goal, len(answer)
    data = asks.search.oracle.data
    classes = answer.shape[1] if answer.ndim > 1 else (0 if data is None else data.classes)
    which = torch.arange(classes, device=answer.device)
    wins = torch.zeros((rows, classes), dtype=torch.bool, device=answer.device)
    for each in range(classes):
        decision = (which == each).to(answer.dtype) if answer.ndim > 1 else which[each]
        wins[:, each] = goal.reached(decision.expand(answer.shape))
    if classes and not bool(wins.any(1).all()):
        raise UsageError(
            f"the goal {type(goal).__name__} asks for more than the class on top, and this attack sees decisions "
            "alone: it serves untargeted and targeted; for others use an attack that sees scores or gradients "
            "(advkit list attacks --access scores)"
        )
    return wins


def from_noise(asks: Decisions, z: Tensor, rng: Rng) -> Tensor:
    """Starts from uniform noise over the box."""
    box = asks.search.threat.box
    low, high = box.bounds_like(z)
    for number in range(NOISES if box.bounded else 0):
        if not len(of := _missing(asks)):
            break
        z = _tried(asks, z, of, low + (high - low) * rng.at(number).take(of).uniform(z[of]))
    return z


def from_samples(asks: Decisions, z: Tensor, wins: Tensor, rng: Rng) -> Tensor:
    """Starts from samples of the attacker's data whose labels reach the goal, nearest first.

    wins: which classes reach each row's goal, bool [n, classes]
    """
    data, of = asks.search.oracle.data, _missing(asks)
    classes = wins.shape[1]
    if data is None or not len(data) or not len(of) or data.x.shape[1:] != z.shape[1:] or data.classes > classes:
        return z
    held, labels = data.x.to(z), data.y.to(z.device)
    drawn = rng.take(of).integers(len(held), of.new_zeros((len(of), POOL)))
    away = torch.empty(drawn.shape, dtype=z.dtype, device=z.device)
    step = max(1, (1 << 22) // max(1, z[of].numel()))
    for start in range(0, POOL, step):
        part = drawn[:, start : start + step]
        move = held[part] - asks.x[of][:, None]
        away[:, start : start + step] = row_length(move.flatten(0, 1)).view(part.shape)
    away = torch.where(wins[of].gather(1, labels[drawn]), away, torch.inf)
    away, order = away.sort(dim=1, stable=True)
    nearest = torch.zeros((len(z), SAMPLES), dtype=torch.long, device=z.device)
    useful = torch.zeros((len(z), SAMPLES), dtype=torch.bool, device=z.device)
    nearest[of] = drawn.gather(1, order[:, :SAMPLES])
    useful[of] = away[:, :SAMPLES] < torch.inf
    for number in range(SAMPLES):
        of = _missing(asks)
        of = of[useful[of, number]]
        if not len(of):
            break
        z = _tried(asks, z, of, held[nearest[of, number]])
    return z


def from_growing_noise(asks: Decisions, z: Tensor, rng: Rng) -> Tensor:
    """Starts from normal noise around the clean rows, twice as large every time."""
    box = asks.search.threat.box
    low, high = box.bounds_like(z)
    size = (high - low).amax().expand(len(z)) if box.bounded else row_max(asks.x.abs()).clamp_min(1)
    for number in range(GROWTH):
        if not len(of := _missing(asks)):
            break
        noise = rng.at(number).take(of).normal(z[of])
        z = _tried(asks, z, of, asks.x[of] + per_row(0.01 * 2.0**number * size[of], noise) * noise)
    return z


def from_mosaics(asks: Decisions, z: Tensor, rng: Rng) -> Tensor:
    """Starts from large tiles of the box's low and high, where fine noise is one class to the victim.

    Tiles of an image [..., H, W] or a series [C, L]; of rows [D] single values.
    """
    box = asks.search.threat.box
    low, high = box.bounds_like(z)
    axes = () if z.ndim < 3 else ((2,) if z.ndim == 3 else (z.ndim - 2, z.ndim - 1))
    for number in range(MOSAICS if box.bounded else 0):
        if not len(of := _missing(asks)):
            break
        tiles = TILES[number % len(TILES)]
        fine = rng.at(number).take(of).uniform(z[of])
        for axis in axes:
            size = z.shape[axis]
            first = torch.arange(size, device=z.device) * tiles // size * size // tiles
            fine = fine.index_select(axis, first)
        z = _tried(asks, z, of, torch.where(fine < 0.5, low, high))
    return z


def _tried(asks: Decisions, z: Tensor, of: Tensor, points: Tensor) -> Tensor:
    """z with the points of the rows `of` that reach the goal in their place."""
    points = asks.legal(points, of)
    reached = asks.ask(points, of)
    z = z.clone()
    z[of[reached]] = points[reached]
    return z


def _missing(asks: Decisions) -> Tensor:
    """Rows without a start that can ask, long."""
    return (~asks.found & (asks.left > 0)).nonzero().squeeze(1)
