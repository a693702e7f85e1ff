"""One-pixel attack: differential evolution over positions and their values (arXiv 1710.08864)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import ActiveRows, Best, TensorGoal, TensorOracle, ball_among, better, finite_rows, kept
from advkit.attacks.query.pixels import Positions, first_of_each
from advkit.core.checks import at_least, at_least_one, positive
from advkit.core.protocols import Access, AsksQueries, Ball, Rng
from advkit.core.rows import PerRow
from advkit.threat_models.sparse import L0

SPREAD = 0.01
"""Of a population's losses, as a share of their spread when it was drawn, at which it is drawn anew."""

CHUNK = 1 << 22
"""Numbers that are made into candidates at a time."""


@dataclass
class _Population(PerRow):
    """Per row: candidates [n, P, K, 2 + C] (place in height and width, values; all in [0, 1]), loss and success [n, P],
    and the spread of the losses when the population was drawn [n].
    """

    genes: Tensor
    loss: Tensor
    reached: Tensor
    first: Tensor

    def spread(self) -> Tensor:
        """From the lowest to the highest loss [n]."""
        return self.loss.amax(1) - self.loss.amin(1)


@dataclass(frozen=True, kw_only=True)
class OnePixel(AsksQueries):
    """One-pixel attack: differential evolution of the positions to change and of their values, eps positions at most.

    A candidate holds a place and a value per channel for each of the ball's eps positions. A child is r1 + 0.5 (r2 -
    r3) of three others of its row's population and takes its parent's place where it is better. A generation is asked
    about at once; a row leaves after the one that reached its goal, where the oracle's answers are the verdict's. A
    population whose losses hardly differ any more is drawn anew.

    queries:    answers asked of each row, >= 1; the threat model's budget, where it has one, cuts them short
    population: candidates of each row, >= 4
    scale:      what the difference of two candidates is multiplied by, > 0
    loss:       surrogate loss: "ce", "margin" or "dlr", where the goal has them

    Works in L0 balls: `l0:eps=K`; positions are pixels or features as the ball counts them (`per`). Raises UsageError
    for values out of range and for other balls.

    The paper has 400 candidates for 100 generations (population=400,queries=40400), and a probability in place of the
    margin. Places that leave the image come in again at its other side, and values that leave the box stay at its edge,
    of which the paper says nothing; nor does it draw anew. A position that a candidate names twice takes the first of
    its values.
    """

    needs: ClassVar[Access] = Access.SCORES
    queries: int = 5000
    population: int = 10
    scale: float = 0.5
    loss: str = "margin"

    def __post_init__(self) -> None:
        at_least_one(self, "queries")
        at_least(self, 4, "population")
        positive(self, "scale")

    @property
    def least_queries(self) -> int:
        """A population and its children."""
        return 2 * self.population

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        inner = ball_among("one_pixel", ball, L0, instead="square in Linf, L2 and L1")
        goal, positions = goal.under(self.loss), Positions.of(x, inner)
        best, active = Best(x, goal), ActiveRows(oracle, x, goal, rng.at("one_pixel"))
        changed = min(int(inner.eps), len(positions))
        if not x.numel() or not changed:
            return x.clone()
        painter = _Painter(positions, *inner.box.bounds_like(x))
        genes = torch.empty(len(x), self.population, changed, 2 + positions.channels, dtype=x.dtype, device=x.device)
        population: _Population | None = None
        left, generation = self.queries, 0
        while len(active) and (number := self._affordable(active, left)):
            if population is None:
                children = _first(active.rng.at("first"), genes)
            else:
                children = self._children(active.rng.at("generation", generation), population.genes)
                # Children of candidates that hardly differ are no search: a new population takes their place.
                same = (population.spread() <= SPREAD * population.first).unsqueeze(1)
                again = _first(active.rng.at("again", generation), population.genes)
                children = torch.where(same[..., None, None], again, children)
                population.loss = torch.where(same, torch.inf, population.loss)
                population.reached = population.reached & ~same
            generation += 1
            children = children[:, :number]
            loss, reached, favourite = _asked(active, painter, children)
            left -= number
            best.offer(*favourite, rows=active.index)
            if population is None:
                population = _Population(children, loss, reached, loss.new_zeros(len(loss)))
                population.first = population.spread()
            else:
                _compete(population, children, loss, reached)
                population.first = torch.where(same.squeeze(1), population.spread(), population.first)
            if oracle.decides and (stay := active.staying(population.reached.any(1))) is not None:
                active, population = active.take(stay), population.take(stay)
            if number < self.population:
                break
        return best.x

    def _affordable(self, active: ActiveRows, left: int) -> int:
        """Candidates that may be asked about in the next generation."""
        granted = active.oracle.left
        return min(self.population, left if granted is None else min(left, granted))

    def _children(self, rng: Rng, genes: Tensor) -> Tensor:
        """One for every candidate: places wrap around, values stay in the box."""
        size = genes.shape[1]
        draw = rng.uniform(genes.new_empty(len(genes), size, 3, dtype=torch.float64))
        # Three different ones that are not the candidate itself, by their distance from it in the population.
        places = (draw * torch.arange(size - 1, size - 4, -1, device=genes.device)).long().unbind(2)
        one, two, three = places
        two = two + (two >= one)
        low, high = torch.minimum(one, two), torch.maximum(one, two)
        three = three + (three >= low)
        three = three + (three >= high)
        own = torch.arange(size, device=genes.device)
        a, b, c = (_picked(genes, (own + 1 + each) % size) for each in (one, two, three))
        child = a + self.scale * (b - c)
        return torch.cat([child[..., :2] % 1.0, child[..., 2:].clamp(0, 1)], -1)


def _picked(genes: Tensor, which: Tensor) -> Tensor:
    """Candidates [n, P, ...] by their places in the population [n, P]."""
    return genes[torch.arange(len(genes), device=genes.device)[:, None], which]


def _first(rng: Rng, like: Tensor) -> Tensor:
    """Places uniform in the image, values normal about the middle of the box, as 128 + 127 N(0, 1) is of 8 bits."""
    values = 0.5 + 0.5 * rng.at("values").normal(like[..., 2:])
    return torch.cat([rng.at("places").uniform(like[..., :2]), values.clamp(0, 1)], -1)


def _compete(population: _Population, children: Tensor, loss: Tensor, reached: Tensor) -> None:
    """Children take the places of parents that are no better; the last generation may have fewer children."""
    number = children.shape[1]
    wins = better(reached, loss, population.reached[:, :number], population.loss[:, :number])
    population.genes[:, :number] = torch.where(wins[:, :, None, None], children, population.genes[:, :number])
    population.loss[:, :number] = torch.where(wins, loss, population.loss[:, :number])
    population.reached[:, :number] |= reached


def _asked(
    active: ActiveRows, painter: _Painter, genes: Tensor
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Losses and successes [n, m] of candidates [n, m, K, 2 + C], and each row's best one with its answer and loss."""
    n, m = genes.shape[:2]
    rows = max(1, CHUNK // max(1, m * active.x[0].numel()))
    losses, successes, favourites = [], [], []
    for part in torch.split(torch.arange(n, device=genes.device), rows):
        of = part.repeat_interleave(m)
        z = painter(active.x[of], genes[part].flatten(0, 1))
        answer = active.oracle(z, of)
        goal, finite = active.goal.take(of), finite_rows(answer)
        loss = torch.where(finite, goal.loss(answer).to(genes.dtype), torch.inf).view(-1, m)
        reached = (goal.reached(answer) & finite).view(-1, m)
        first = torch.where(reached.any(1, keepdim=True) & ~reached, torch.inf, loss).argmin(1)
        first = first + m * torch.arange(len(part), device=genes.device)
        losses.append(loss)
        successes.append(reached)
        favourites.append(kept(first, z, answer, loss.flatten()))
    z, answer, lowest = (torch.cat(each) for each in zip(*favourites, strict=True))
    return torch.cat(losses), torch.cat(successes), (z, answer, lowest)


class _Painter:
    """Makes samples of candidates."""

    def __init__(self, positions: Positions, low: Tensor, high: Tensor) -> None:
        self.positions, self.bounds = positions, (low, high)

    def __call__(self, x: Tensor, genes: Tensor) -> Tensor:
        """The rows [n, ...] with the positions of candidates [n, K, 2 + C] set to their values."""
        positions = self.positions
        sides = genes.new_tensor([positions.height, positions.width])
        at = torch.minimum((genes[..., :2] * sides).long(), (sides - 1).long())
        place = at[..., 0] * positions.width + at[..., 1]
        fresh = first_of_each(place, torch.ones_like(place, dtype=torch.bool))
        # A place that comes again is sent to a column behind the image.
        place = torch.where(fresh, place, len(positions)).unsqueeze(1).expand(-1, positions.channels, -1)
        low, high = (positions.read(bound.expand_as(x)) for bound in self.bounds)
        clean = positions.read(x)
        share = torch.cat([torch.zeros_like(clean), clean.new_zeros(*clean.shape[:2], 1)], 2)
        mark = torch.zeros_like(share, dtype=torch.bool).scatter_(2, place, True)[..., :-1]
        share = share.scatter_(2, place, genes[..., 2:].transpose(1, 2))[..., :-1]
        return positions.written(torch.where(mark, torch.clamp(low + share * (high - low), low, high), clean))
