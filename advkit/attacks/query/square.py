"""Square attack: random search over square patches, scores only (arXiv 1912.00049; in L1 arXiv 2103.01208)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advkit.attacks.base import (
    ActiveRows,
    TensorGoal,
    TensorOracle,
    ball_among,
    better,
    finite_rows,
    kept,
    lp_ball,
    per_row,
)
from advkit.core.checks import at_least_one, fraction, one_of
from advkit.core.protocols import Access, Ball, Rng
from advkit.core.rows import PerRow
from advkit.threat_models.lp import L1, L2, Linf

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the patch's share halves, of 10,000
BLOCK = 128  # steps whose random numbers are drawn at once: a draw costs as much for one step as for many
SPREAD = (0.7548776662466927, 0.5698402909980532)  # 1 / p and 1 / p^2 with p^3 = p + 1: the plane's golden ratio


@dataclass(frozen=True)
class Layout:
    """A row read as channels of pixels: [D] is one strip, [C, L] are C strips, [..., H, W] are images."""

    channels: int
    height: int
    width: int

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        shape = x.shape[1:]
        if len(shape) <= 1:
            return cls(1, 1, max(1, x[0].numel()))
        if len(shape) == 2:
            return cls(shape[0], 1, shape[1])
        return cls(math.prod(shape[:-2]), shape[-2], shape[-1])

    def window(self, share: float, odd: bool) -> tuple[int, int]:
        """Height and width of a patch that covers that share of the pixels; a strip's patch is a piece of it."""
        pixels = share * self.height * self.width
        strip = self.height == 1 or self.width == 1
        side = round(pixels if strip else math.sqrt(pixels))
        if odd:
            side = max(side, 3)
            side += side % 2 == 0
        return min(max(side, 1), self.height), min(max(side, 1), self.width)

    def pixels(self, place: Tensor, window: tuple[int, int]) -> Tensor:
        """Flat pixel numbers [B, 1, h * w] of windows at places uniform in [0, 1), [B, 2]."""
        return self.corner(place, torch.tensor(window)).unsqueeze(-1) + self.inside(window, place.device)

    def corner(self, place: Tensor, window: Tensor) -> Tensor:
        """Flat number [..., 1] of the first pixel of windows [..., 2] at places uniform in [0, 1), [..., 2]."""
        free = torch.tensor((self.height, self.width)) - window
        free = free.to(place.device)
        at = torch.minimum((place * (free + 1)).long(), free)
        return at[..., :1] * self.width + at[..., 1:]

    def inside(self, window: tuple[int, int], device: torch.device) -> Tensor:
        """Pixel numbers [h * w] of a window whose first pixel is 0."""
        h, w = window
        return (torch.arange(h, device=device)[:, None] * self.width + torch.arange(w, device=device)).flatten()


@cache
def _pyramid(height: int, width: int, power: int) -> Tensor:
    """Nested rectangles around the middle, the k-th outward weighted (k + 1)^-power and holding those inside it."""
    levels = max(height // 2, width // 2) + 1
    weights = 1 / torch.arange(1, levels + 1, dtype=torch.float64) ** power
    outward = weights.flip(0).cumsum(0).flip(0)
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    return outward[torch.maximum(rows[:, None], columns[None, :])]


@cache
def bump(height: int, width: int, norm: int = 2) -> Tensor:
    """The published pattern of unit norm [2, height * width]: half up, half down, split by rows or by columns.

    norm: 2, or 1 for the steeper pattern of the L1 ball
    """
    power = 2 if norm == 2 else 4

    def pyramid(h: int, w: int) -> Tensor:
        flat = _pyramid(h, w, power)
        return flat / flat.sum() if norm == 1 else flat  # in L1 both halves weigh the same, as released

    def split(h: int, w: int) -> Tensor:
        return torch.cat([pyramid(h // 2, w), -pyramid(h - h // 2, w)]) if h > 1 else pyramid(h, w)

    by_columns = split(width, height).T
    by_rows = split(height, width) if height > 1 else by_columns
    both = torch.stack([by_rows, by_columns if width > 1 else by_rows]).flatten(1)
    length: Tensor = torch.linalg.vector_norm(both, norm, dim=1, keepdim=True)
    return both / length


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform.dtype)


@dataclass
class _State(PerRow):
    """Per row: the best point [B, C, H * W], its loss [B], whether it reached the goal [B]."""

    z: Tensor
    loss: Tensor
    reached: Tensor


@dataclass
class _Block:
    """What a block of steps needs to know, drawn at once: windows [steps] and tensors with the steps first."""

    windows: list[tuple[int, int]]
    tensors: tuple[Tensor, ...]

    def take(self, rows: Tensor) -> _Block:
        """The same steps of some of the rows."""
        return _Block(self.windows, tuple(tensor[:, rows] for tensor in self.tensors))


class _LinfSearch:
    """Patches set to the ball's upper or lower corner, one sign per channel.

    Spread, a row's patches follow a sequence that leaves no part of the image out for long, and in one channel, drawn
    per patch, the sign is the one that the patch's first pixel does not have: no query repeats the best point.
    """

    odd = False

    def __init__(self, layout: Layout, ball: Ball[Tensor], eps: float, x: Tensor, spread: bool) -> None:
        self.layout, self.spread = layout, spread
        # Projecting the two extreme corners gives every coordinate's bounds, whatever the box.
        upper = ball.project(x + eps, x).reshape(len(x), layout.channels, -1)
        lower = ball.project(x - eps, x).reshape(len(x), layout.channels, -1)
        self.corners = torch.cat([upper, lower], 2)
        self.pixels = upper.shape[2]

    def take(self, rows: Tensor) -> None:
        (self.corners,) = kept(rows, self.corners)

    def begin(self, rng: Rng) -> Tensor:
        """Vertical stripes, one sign per channel and column."""
        layout = self.layout
        upper, lower = self.corners[..., : self.pixels], self.corners[..., self.pixels :]
        sign = rng.uniform(upper.new_empty((len(upper), layout.channels, 1, layout.width)))
        sign = sign.expand(-1, -1, layout.height, -1)
        return torch.where(sign.reshape(upper.shape) < 0.5, lower, upper)

    def block(self, rng: Rng, number: int, windows: list[tuple[int, int]]) -> _Block:
        """First pixels, how far to shift them to find the corner that was drawn, and whether it is the one opposite to
        the first pixel's instead, all [steps, B, C, 1]."""
        channels, rows = self.layout.channels, len(self.corners)
        draw = rng.at("block", number).uniform(self.corners.new_empty((rows, len(windows), 3 + channels)))
        place = draw[..., :2]
        if self.spread:
            start = rng.at("spread").uniform(self.corners.new_empty((rows, 1, 2)))
            steps = range(number * BLOCK, number * BLOCK + len(windows))
            ahead = [[step * each % 1.0 for each in SPREAD] for step in steps]
            place = (start + torch.tensor(ahead, dtype=start.dtype, device=start.device)) % 1.0
        first = self.layout.corner(place, torch.tensor(windows)).expand(-1, -1, channels)
        shift = (draw[..., 3:] < 0.5).long() * self.pixels
        if self.spread:
            turned = (draw[..., 2:3] * channels).long().clamp_(max=channels - 1)
            shift.scatter_(2, turned, -1)
        opposite = shift < 0
        return _Block(
            windows, tuple(each.transpose(0, 1).unsqueeze(3).contiguous() for each in (first, shift, opposite))
        )

    def change(
        self, z: Tensor, window: tuple[int, int], inside: Tensor, first: Tensor, shift: Tensor, opposite: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pixel numbers [B, C, n] to rewrite, what they hold, and their new values."""
        pixels = first + inside
        old = z.gather(2, pixels)
        if self.spread:
            # At the upper corner: go to the lower one.
            raised = old[..., :1] == self.corners.gather(2, first)
            shift = torch.where(opposite, raised * self.pixels, shift)
        return pixels, old, self.corners.gather(2, pixels + shift)


class _SumSearch:
    """Patches that gather the norm of two windows and what is left of the budget into one bump: L2 and L1."""

    odd = True

    def __init__(self, layout: Layout, ball: Ball[Tensor], eps: float, x: Tensor, norm: int) -> None:
        # A hair inside the ball, so that round-off over thousands of patches never adds up to a step outside.
        self.layout, self.ball, self.eps, self.norm = layout, ball, eps * (1 - 1e-6), norm
        self.x = x
        self.origin = x.reshape(len(x), layout.channels, -1)
        # The walls of the box, widened to an origin that round-off left outside. A point of the ball that is clamped to
        # them stays in the ball.
        low, high = lp_ball(ball).box.bounds_like(x)
        self.lower = torch.minimum(low, x).reshape(self.origin.shape)
        self.upper = torch.maximum(high, x).reshape(self.origin.shape)

    def take(self, rows: Tensor) -> None:
        self.x, self.origin, self.lower, self.upper = kept(rows, self.x, self.origin, self.lower, self.upper)

    def _length(self, move: Tensor, keepdim: bool = False) -> Tensor:
        """Norms over the last axis."""
        if self.norm == 1:
            return move.abs().sum(-1, keepdim=keepdim)
        length: Tensor = torch.linalg.vector_norm(move, dim=-1, keepdim=keepdim)
        return length

    def begin(self, rng: Rng) -> Tensor:
        """A grid of about 5 by 5 bumps, one sign per channel and bump."""
        layout, x = self.layout, self.x
        h, w = max(1, layout.height // 5), max(1, layout.width // 5)
        if layout.height > 1 and layout.width > 1:
            h = w = min(h, w)
        tops = range((layout.height % h) // 2, layout.height - h + 1, h)
        lefts = range((layout.width % w) // 2, layout.width - w + 1, w)
        draws = rng.uniform(x.new_empty((len(x), len(tops) * len(lefts), 1 + layout.channels)))
        turned, sign = (draws[:, :, 0] >= 0.5).long(), _signs(draws[:, :, 1:])
        pattern = bump(h, w, self.norm).to(x)[turned]
        tiles = sign[:, :, :, None] * pattern[:, :, None]
        delta = x.new_zeros((len(x), layout.channels, layout.height, layout.width))
        tile = 0
        for top in tops:
            for left in lefts:
                delta[:, :, top : top + h, left : left + w] = tiles[:, tile].reshape(len(x), -1, h, w)
                tile += 1
        size = self._length(delta.flatten(1))
        moved = x + (delta * per_row(self.eps / size, delta)).reshape(x.shape)
        return self.ball.project(moved, x).reshape(len(x), layout.channels, -1)

    def block(self, rng: Rng, number: int, windows: list[tuple[int, int]]) -> _Block:
        """First pixels of the filled and the emptied window [steps, B, C, 1], which way the bump is split [steps, B],
        signs [steps, B, C, 1]."""
        channels = self.layout.channels
        draw = rng.at("block", number).uniform(self.x.new_empty((len(self.x), len(windows), 5 + channels)))
        sizes = torch.tensor(windows)
        filled, emptied = (
            self.layout.corner(place, sizes).expand(-1, -1, channels).unsqueeze(3)
            for place in (draw[..., :2], draw[..., 2:4])
        )
        tensors = (filled, emptied, (draw[..., 4] >= 0.5).long(), _signs(draw[..., 5:, None]))
        return _Block(windows, tuple(each.transpose(0, 1).contiguous() for each in tensors))

    def change(
        self,
        z: Tensor,
        window: tuple[int, int],
        inside: Tensor,
        filled: Tensor,
        emptied: Tensor,
        turned: Tensor,
        sign: Tensor,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Pixel numbers [B, C, 2n] to rewrite, the emptied window's before the filled one's, what they hold, and their
        new values; no numbers where every pixel may change."""
        channels, power = self.layout.channels, self.norm
        filled, emptied = filled + inside, emptied + inside
        delta = z - self.origin
        # Where windows overlap the union counts once.
        outside = delta.scatter(2, filled, 0.0).scatter_(2, emptied, 0.0)
        whole, rest = ((each.square() if power == 2 else each.abs()).sum(2) for each in (delta, outside))
        # Negative by a rounding error where the ball is full: left so, it takes the excess back.
        unused = self.eps**power - whole.sum(1, keepdim=True)
        budget = (whole - rest + unused / channels).clamp_min(0)

        old = delta.gather(2, filled)
        old = old / (self._length(old, keepdim=True) + 1e-12)
        new = bump(*window, power).to(z)[turned][:, None] * sign + old
        new = new / (self._length(new, keepdim=True) + 1e-12)
        if power == 1:
            # More than there is, in several channels: the projection takes it from where there is least.
            moved = outside.scatter_(2, filled, new * (budget * channels)[:, :, None]).add_(self.origin)
            x = self.x
            return None, z, self.ball.project(moved.reshape(x.shape), x).reshape(z.shape)
        new = new * budget.sqrt()[:, :, None]
        # Where the windows overlap, both carry what the filled one gets.
        filled_with = torch.clamp(
            self.origin.gather(2, filled) + new, self.lower.gather(2, filled), self.upper.gather(2, filled)
        )
        pixels = torch.cat([emptied, filled], dim=2)
        after = z.scatter(2, emptied, self.origin.gather(2, emptied)).scatter_(2, filled, filled_with)
        return pixels, z.gather(2, pixels), after.gather(2, pixels)


@dataclass(frozen=True, kw_only=True)
class Square:
    """Square attack: random search over square patches that keeps a patch when it lowers the margin.

    A patch sits at its own place in every row and draws one sign per channel. Its share of the pixels starts at p_init
    and is halved nine times. A row leaves as soon as its goal is reached, where the oracle's answers are the verdict's.
    The search descends the goal's margin loss.

    queries:  answers asked of each row per restart, the starting stripes included, >= 1; the threat model's budget,
              where it has one, cuts them short
    p_init:   share of the pixels that the first patches cover, in (0, 1]
    schedule: "scaled" stretches the published halvings over the queries there are and, in Linf, spreads the patches
              evenly and never asks about the best point again; "published" draws each patch by itself and keeps the
              halvings at absolute query counts (10, 50, 200... 8,000), as AutoAttack does, so that more queries repeat
              the fewer and go on
    restarts: independent starts, >= 1

    Rows that are no images are read as strips: [D] as one channel, [C, L] as C channels; their patches are pieces of
    the strip. Raises UsageError for values out of range and for balls other than Linf, L2 and L1, for which nothing is
    published.

    We differ from the released code where it differs from the paper: every row draws its own places, patches reach the
    last row and column, and in L2 and L1 each channel keeps the norm of its own windows. In L1 the sharper pyramids
    and the excess over the budget in several channels are the released code's, the projection onto ball and box ours.
    """

    needs: ClassVar[Access] = Access.SCORES
    queries: int = 5000
    p_init: float = 0.8
    schedule: Literal["scaled", "published"] = "scaled"
    restarts: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "queries", "restarts")
        fraction(self, "p_init", what="fraction of the pixels")
        one_of(self, "schedule", ("scaled", "published"))

    def share(self, step: int, queries: int) -> float:
        """Share of the pixels that the patch of this step (1, 2...) covers in a run of so many queries."""
        count = step if self.schedule == "published" else int(step / queries * 10_000)
        return self.p_init / 2.0 ** bisect_left(HALVINGS, count)

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        inner = ball_among("square", ball, Linf, L2, L1, instead="one_pixel or pixle in L0")
        out = x.clone()
        loss = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        reached = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if not x.numel():
            return out
        layout = Layout.of(x)
        active = ActiveRows(oracle, x, goal, rng)

        def record(index: Tensor | None, state: _State) -> None:
            rows = torch.arange(len(x), device=x.device) if index is None else index
            wins = better(state.reached, state.loss, reached[rows], loss[rows])
            points = state.z.reshape(-1, *x.shape[1:])
            out[rows] = torch.where(per_row(wins, points), points, out[rows])
            loss[rows] = torch.where(wins, state.loss, loss[rows])
            reached[rows] |= state.reached

        for restart in range(self.restarts):
            if restart and oracle.decides:
                stay = active.staying(reached if active.index is None else reached[active.index])
                active = active if stay is None else active.take(stay)
            left = active.oracle.left
            queries = self.queries if left is None else min(self.queries, left)
            if not len(active) or queries < 1:
                break
            searching: _LinfSearch | _SumSearch
            if isinstance(inner, Linf):
                searching = _LinfSearch(layout, ball, inner.eps, active.x, self.schedule == "scaled")
            else:
                searching = _SumSearch(layout, ball, inner.eps, active.x, 2 if isinstance(inner, L2) else 1)
            self._run(active, searching, layout, active.rng.at("square", restart), queries, record)
        return out

    def _run(
        self,
        active: ActiveRows,
        search: _LinfSearch | _SumSearch,
        layout: Layout,
        rng: Rng,
        queries: int,
        record: Callable[[Tensor | None, _State], None],
    ) -> None:
        active = replace(active, rng=rng)
        stopping = active.oracle.decides
        z = search.begin(active.rng.at("start")).clone()
        asked = z.view(active.x.shape)
        loss, hit = self._value(active, active.oracle(asked))
        state = _State(z, loss, z.new_zeros(len(z), dtype=torch.bool) if hit is None else hit)
        block: _Block | None = None
        insides: dict[tuple[int, int], Tensor] = {}
        steps: list[tuple[Tensor, ...]] = []
        for step in range(1, queries):
            if stopping and hit is not None and (stay := active.staying(state.reached)) is not None:
                record(active.index, state)
                active, state = active.take(stay), state.take(stay)
                search.take(stay)
                if not len(active):
                    return
                if block is not None:
                    block = block.take(stay)
                    steps = list(zip(*(each.unbind(0) for each in block.tensors), strict=True))
            number, place = divmod(step - 1, BLOCK)
            if place == 0:
                ahead = range(step, min(step + BLOCK, queries))
                windows = [layout.window(self.share(each, queries), search.odd) for each in ahead]
                block = search.block(active.rng, number, windows)
                steps = list(zip(*(each.unbind(0) for each in block.tensors), strict=True))
            assert block is not None
            window = block.windows[place]
            if window not in insides:
                insides[window] = layout.inside(window, state.z.device)
            pixels, old, new = search.change(state.z, window, insides[window], *steps[place])
            if pixels is None:
                asked = new.view(active.x.shape)
            else:
                state.z.scatter_(2, pixels, new)
                if len(asked) != len(active):
                    asked = state.z.view(active.x.shape)
            loss, hit = self._value(active, active.oracle(asked))
            if hit is None and stopping:
                wins = loss < state.loss
            else:
                hit = torch.zeros_like(state.reached) if hit is None else hit
                wins = better(hit, loss, state.reached, state.loss)
                state.reached = state.reached | hit
            after = torch.where(wins.view(-1, 1, 1), new, old)
            if pixels is None:
                state.z = after
            else:
                state.z.scatter_(2, pixels, after)
            state.loss = torch.where(wins, loss, state.loss)
        record(active.index, state)

    @staticmethod
    def _value(active: ActiveRows, answer: Tensor) -> tuple[Tensor, Tensor | None]:
        """The margins, +inf for answers that are not finite, and which reach the goal; None where none can.

        A goal is reached nowhere but at margins of 0 and below, so that most steps need one look at the lowest of them.
        """
        loss = active.goal.margin(answer).to(active.x.dtype)
        if float(loss.amin()) > 0:
            return loss, None
        finite = finite_rows(answer)
        return torch.where(finite, loss, torch.inf), active.goal.reached(answer) & finite
