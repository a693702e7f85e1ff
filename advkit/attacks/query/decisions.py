"""What attacks that see decisions alone are built from: each row's own budget, a start, line search, normals."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import MinimalAttack, NearestSearch
from advkit.core.checks import at_least_one, not_negative
from advkit.core.errors import UsageError
from advkit.core.noise import normal_block
from advkit.core.protocols import Access, AsksQueries, Rng, Serves, WantsData
from advkit.threat_models.lp import row_max, row_sum

NOISES, SAMPLES, GROWTH = 10, 50, 20
"""Starts that are tried, in turn: uniform noise, samples of the attacker's data, and growing noise."""
POOL = 1000
"""Samples of the attacker's data that are drawn for each row; the nearest of them are asked about first."""
HALVINGS = 40
COARSE = 0.02
"""How near to the boundary points come that are only compared, as a share of their distance."""
BLOCK = 64
_NUMBERS = 1 << 18
"""Most numbers of a row that are drawn at a time."""

Points = Callable[[Tensor, Tensor], Tensor]
"""(lengths [m], of [m]) -> points [m, ...]: where each row is, that far along its line."""


def row_length(move: Tensor) -> Tensor:
    """L2 norms [n]."""
    return row_sum(move.square()).sqrt()


def unit(move: Tensor) -> Tensor:
    """Rows of L2 length 1; rows of zeros stay."""
    size = row_length(move)
    return move * per_row(torch.where(size > 0, 1 / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0), move)


class Decisions:
    """A search that asks for decisions, within a budget of each row's own.

    left:  queries that each active row may still ask, long [n]
    found: active rows for which a point that reaches the goal is known, bool [n]

    Rows ask as often as each needs: a question names the rows that it is about, and those without budget are left out.
    A row's points and answers do not depend on which others are asked beside it.
    """

    def __init__(self, search: NearestSearch, queries: int) -> None:
        self.search = search
        granted = search.oracle.left
        budget = queries if granted is None else min(queries, granted)
        # `settle` asks once more where files are rounded: whatever is asked about here is rounded already.
        budget -= bool(search.threat.lattice)
        self.queries = max(1, budget)
        self.left = torch.full((len(search),), self.queries, dtype=torch.long, device=search.x.device)
        self._wins = torch.zeros((len(search), 0), dtype=torch.bool, device=search.x.device)  # [n, classes]

    def __len__(self) -> int:
        return len(self.search)

    @property
    def x(self) -> Tensor:
        return self.search.x

    @property
    def found(self) -> Tensor:
        return self.search.away < torch.inf

    def legal(self, z: Tensor, of: Tensor | None = None) -> Tensor:
        """Points [m, ...] as they can be handed in: inside the box, and rounded where files are."""
        x = self.x if of is None else self.x[of]
        return self.search.threat.finish(self.search.threat.project(z, x), x)

    def distance(self, z: Tensor) -> Tensor:
        """Of a point of every active row, in the threat model's norm [n]."""
        return self.search.distance(z)

    def ask(self, z: Tensor, of: Tensor) -> Tensor:
        """Which legal points reach the goal, bool [m]; of: which active row each belongs to. The rows pay."""
        self.left -= torch.bincount(of, minlength=len(self.left))
        return self.search.ask(z, of)[1]

    def try_points(self, z: Tensor, want: Tensor) -> Tensor:
        """Ask about a point of every active row that wants it (bool [n]) and has budget; which reached the goal [n]."""
        of = (want & (self.left > 0)).nonzero().squeeze(1)
        reached = torch.zeros_like(want)
        if len(of):
            reached[of] = self.ask(z[of], of)
        return reached

    def leave(self) -> Tensor | None:
        """Let rows leave that can ask nothing more, where the oracle's answers are the verdict's; those that stay."""
        return self._kept(self.search.leave(self.left <= 0))

    def _kept(self, rows: Tensor | None) -> Tensor | None:
        if rows is not None:
            self.left = self.left[rows]
            self._wins = self._wins[rows]
        return rows

    def going(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Let rows leave, and the state [n, ...] of those that stay."""
        rows = self.leave()
        return state if rows is None else kept(rows, *state)

    def any_left(self) -> bool:
        """Whether a row has queries left."""
        return bool((self.left > 0).any())

    def bisect(self, points: Points, low: Tensor, high: Tensor, want: Tensor, tolerance: float) -> Tensor:
        """The least length known to reach the goal [n], by halving.

        low, high: lengths [n]: high reaches the goal, low does not
        want:      rows to search for, bool [n]
        tolerance: ends where high - low is at most this share of high
        """
        for _ in range(HALVINGS):
            of = (want & (self.left > 0) & (high - low > tolerance * high)).nonzero().squeeze(1)
            if not len(of):
                break
            middle = (low[of] + high[of]) / 2
            reached = self.ask(self.legal(points(middle, of), of), of)
            high[of] = torch.where(reached, middle, high[of])
            low[of] = torch.where(reached, low[of], middle)
        return high

    def nearest_on(
        self,
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
            if not bool((open_ & (self.left > 0)).any()):
                break
            of = (open_ & (self.left > 0)).nonzero().squeeze(1)
            hit = torch.zeros_like(want)
            hit[of] = self.ask(self.legal(points(length[of], of), of), of)
            high, low = torch.where(hit, length, high), torch.where(open_ & ~hit, length, low)
            reached = reached | hit
            down = hit if number == 0 else down
            # Going down ends at the first length that fails, going up at the first that holds.
            open_ = open_ & (hit == down) & (self.left > 0) & (hit | (length < most))
            if known:  # the end need not be asked about
                open_ = open_ & (hit | (length * (1 + min(0.5, reach * 3.0**number)) < most))
            share = min(0.5, reach * 3.0**number)
            length = torch.where(open_, torch.where(down, length * (1 - share), (length * (1 + share))), length)
            length = torch.minimum(length, most)
        return self.bisect(points, low, high, want & reached, tolerance), reached

    def towards(self, z: Tensor, norm: str) -> Points:
        """The way back from z to the clean rows: length 1 is z, length 0 the clean row.

        In L2 and L1 the straight line, in Linf what the cube of that size leaves of z.
        """
        x, move = self.x, z - self.x
        if norm != "linf":
            return lambda length, of: x[of] + per_row(length, z) * move[of]
        size = row_max(move.abs())

        def clipped(length: Tensor, of: Tensor) -> Tensor:
            most = per_row(length * size[of], z)
            return x[of] + torch.minimum(torch.maximum(move[of], -most), most)

        return clipped

    def to_boundary(
        self, z: Tensor, want: Tensor, norm: str, tolerance: float, guess: Tensor | float | None = None
    ) -> Tensor:
        """Points z that reach the goal, moved to the boundary on their way back; others stay.

        guess: where the boundary may be on the way, [n] or a number, below 1; None halves the whole way
        """
        way, most = self.towards(z, norm), torch.ones_like(self.search.away)
        if guess is None:
            length = self.bisect(way, torch.zeros_like(most), most.clone(), want, tolerance)
        else:
            length = self.nearest_on(way, most * guess, most, want, tolerance, known=True)[0]
        rows = torch.arange(len(z), device=z.device)
        return torch.where(per_row(want & (length < 1), z), self.legal(way(length, rows)), z)

    def start(self, norm: str, tolerance: float, directions: int) -> Tensor | None:
        """Ask about the clean rows, find each a point that reaches the goal, and move that to the boundary.

        Rows that reach the goal untouched leave, and rows for which nothing was found, with a note in their records:
        all where the oracle decides. Returns the points [n, ...]; None where no row is left.

        directions: random ones that are tried beside, each by a question at the distance so far: a boundary around a
                    row has several nearest points

        Tried are uniform noise over the box (normal noise in an unbounded one), the attacker's samples whose labels
        reach the goal, nearest first, and noise that grows from a hundredth of the box.
        """
        search = self.search
        self.left -= 1
        answer, reached = search.ask(self.legal(self.x))
        self._wins = self._decided(answer)
        self._kept(search.leave(reached))
        z = self.legal(self.x)
        for tried in (self._noise, self._samples, self._growing):
            z = tried(z, search.rng.at("start", tried.__name__))
        lost = ~self.found
        for row in lost.nonzero().squeeze(1).tolist():
            search.oracle.note(row, {"start": "none found", "queries": self.queries - int(self.left[row])})
        if (rows := self._kept(search.leave(lost))) is not None:
            z = z[rows]
        if not len(self):
            return None
        z = self.to_boundary(z, self.found, norm, COARSE if directions else tolerance)
        for number in range(directions):
            noise = search.rng.at("start", "direction", number).normal(z)
            if norm == "linf":
                noise = noise.sign()
            elif norm == "l1":  # from few values to all of them
                size = noise.flatten(1).abs()
                few = round(size.shape[1] ** (number % 5 / 4))
                noise = noise * (size >= size.topk(few, 1).values[:, -1:]).view(noise.shape)
            z, _ = self.compared(z, noise, norm, self.found, COARSE)
        return self.to_boundary(z, self.found, norm, tolerance, 1 - COARSE) if directions else z

    def compared(self, z: Tensor, way: Tensor, norm: str, want: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
        """Points z, or those nearer to the clean rows in another direction; and which those are, bool [n].

        way: directions [n, ...], any length. One question at the distance of z, and a search where that is met.
        """
        x = self.x
        away = self.distance(z)
        size = row_max(way.abs()) if norm == "linf" else row_length(way)
        way = way * per_row(1 / size.clamp_min(torch.finfo(size.dtype).tiny), way)

        def points(length: Tensor, of: Tensor) -> Tensor:
            return x[of] + per_row(length, x) * way[of]

        every = torch.arange(len(x), device=x.device)
        at = self.legal(points(away, every))
        wins = self.try_points(at, want)
        length, nearer = self.nearest_on(points, 0.99 * away, away, wins, tolerance)
        length = torch.where(nearer, length, away)
        return torch.where(per_row(wins, x), self.legal(points(length, every)), z), wins

    def _decided(self, answer: Tensor) -> Tensor:
        """Which decisions reach each row's goal, bool [n, classes]; UsageError where none reaches it."""
        goal, rows = self.search.goal, len(answer)
        data = self.search.oracle.data
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

    def _tried(self, z: Tensor, of: Tensor, points: Tensor) -> Tensor:
        """z with the points of the rows `of` that reach the goal in their place."""
        points = self.legal(points, of)
        reached = self.ask(points, of)
        z = z.clone()
        z[of[reached]] = points[reached]
        return z

    def _missing(self) -> Tensor:
        """Rows without a start that can ask, long."""
        return (~self.found & (self.left > 0)).nonzero().squeeze(1)

    def _noise(self, z: Tensor, rng: Rng) -> Tensor:
        """Starts from uniform noise over the box."""
        box = self.search.threat.box
        low, high = box.bounds_like(z)
        for number in range(NOISES if box.bounded else 0):
            if not len(of := self._missing()):
                break
            z = self._tried(z, of, low + (high - low) * rng.at(number).take(of).uniform(z[of]))
        return z

    def _samples(self, z: Tensor, rng: Rng) -> Tensor:
        """Starts from samples of the attacker's data whose labels reach the goal, nearest first."""
        data, of = self.search.oracle.data, self._missing()
        classes = self._wins.shape[1]
        if data is None or not len(data) or not len(of) or data.x.shape[1:] != z.shape[1:] or data.classes > classes:
            return z
        held, labels = data.x.to(z), data.y.to(z.device)
        drawn = rng.take(of).integers(len(held), of.new_zeros((len(of), POOL)))
        away = torch.empty(drawn.shape, dtype=z.dtype, device=z.device)
        step = max(1, (1 << 22) // max(1, z[of].numel()))
        for start in range(0, POOL, step):
            part = drawn[:, start : start + step]
            move = held[part] - self.x[of][:, None]
            away[:, start : start + step] = row_length(move.flatten(0, 1)).view(part.shape)
        away = torch.where(self._wins[of].gather(1, labels[drawn]), away, torch.inf)
        away, order = away.sort(dim=1, stable=True)
        nearest = torch.zeros((len(z), SAMPLES), dtype=torch.long, device=z.device)
        useful = torch.zeros((len(z), SAMPLES), dtype=torch.bool, device=z.device)
        nearest[of] = drawn.gather(1, order[:, :SAMPLES])
        useful[of] = away[:, :SAMPLES] < torch.inf
        for number in range(SAMPLES):
            of = self._missing()
            of = of[useful[of, number]]
            if not len(of):
                break
            z = self._tried(z, of, held[nearest[of, number]])
        return z

    def _growing(self, z: Tensor, rng: Rng) -> Tensor:
        """Starts from normal noise around the clean rows, twice as large every time."""
        box = self.search.threat.box
        low, high = box.bounds_like(z)
        size = (high - low).amax().expand(len(z)) if box.bounded else row_max(self.x.abs()).clamp_min(1)
        for number in range(GROWTH):
            if not len(of := self._missing()):
                break
            noise = rng.at(number).take(of).normal(z[of])
            z = self._tried(z, of, self.x[of] + per_row(0.01 * 2.0**number * size[of], noise) * noise)
        return z

    def normal(
        self,
        z: Tensor,
        delta: Tensor,
        number: Tensor,
        rng: Rng,
        draw: Directions | None = None,
        place: Points | None = None,
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
            points = self.legal(points if place is None else place(points, of), of)
            decision = torch.where(self.ask(points, of), 1.0, -1.0).to(z.dtype)
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


@dataclass(frozen=True, kw_only=True)
class DecisionAttack(MinimalAttack, AsksQueries, WantsData, Serves):
    """An attack that sees decisions alone and looks for the nearest point that reaches the goal.

    A row for which no point that reaches the goal was found comes back unchanged, and its record says so. A subclass
    walks from boundary points on.

    queries:    answers asked of each row, >= 1; the threat model's budget, where it has one, cuts them short
    directions: random directions that the start is compared with, >= 0
    """

    needs: ClassVar[Access] = Access.LABELS
    wants_data: ClassVar[bool] = True
    serves: ClassVar[tuple[str, ...]] = ("untargeted", "targeted")

    queries: int = 5000
    directions: int = 10

    def __post_init__(self) -> None:
        at_least_one(self, "queries")
        not_negative(self, "directions")

    @property
    @override
    def least_queries(self) -> int:
        """The clean row, a start, and a step."""
        return 3

    @override
    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        asks = Decisions(search, self.queries)
        if (z := asks.start(norm, self.tolerance(search.x), self.directions)) is not None:
            self.walk(asks, z, norm)

    def tolerance(self, x: Tensor) -> float:
        """How near to the boundary a start has to be, as a share of its distance."""
        return 1e-3

    @abstractmethod
    def walk(self, asks: Decisions, z: Tensor, norm: str) -> None:
        """From boundary points z [n, ...] on, until no row has a query left."""
