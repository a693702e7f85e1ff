"""Square attack: random search over square patches, scores only (Andriushchenko et al., arXiv 1912.00049)."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advkit.attacks.base import Live, TensorGoal, TensorOracle, better, finite_rows, kept, lp_ball, per_row
from advkit.attacks.gradient.pgd import at_least_one, one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Ball, Rng
from advkit.threat_models.lp import L2, Linf

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # queries after which the patch's share halves, of 10,000
BLOCK = 64  # steps whose random numbers are drawn at once: a draw costs as much for one step as for many


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
        h, w = window
        top = (place[:, 0] * (self.height - h + 1)).long().clamp_(max=self.height - h)
        left = (place[:, 1] * (self.width - w + 1)).long().clamp_(max=self.width - w)
        inside = torch.arange(h, device=place.device)[:, None] * self.width + torch.arange(w, device=place.device)
        return (top * self.width + left)[:, None, None] + inside.flatten()


@cache
def _pyramid(height: int, width: int) -> Tensor:
    """Nested rectangles around the middle, the k-th outward weighted 1 / (k + 1)^2 and holding those inside it."""
    levels = max(height // 2, width // 2) + 1
    weights = 1 / torch.arange(1, levels + 1, dtype=torch.float64) ** 2
    outward = weights.flip(0).cumsum(0).flip(0)
    rows = (torch.arange(height) - height // 2).abs()
    columns = (torch.arange(width) - width // 2).abs()
    return outward[torch.maximum(rows[:, None], columns[None, :])]


@cache
def bump(height: int, width: int) -> Tensor:
    """The published pattern of unit norm [2, height * width]: half up, half down, split by rows or by columns."""

    def split(h: int, w: int) -> Tensor:
        return torch.cat([_pyramid(h // 2, w), -_pyramid(h - h // 2, w)]) if h > 1 else _pyramid(h, w)

    by_columns = split(width, height).T
    by_rows = split(height, width) if height > 1 else by_columns
    both = torch.stack([by_rows, by_columns if width > 1 else by_rows]).flatten(1)
    return both / both.square().sum(1, keepdim=True).sqrt()


def _signs(uniform: Tensor) -> Tensor:
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform.dtype)


@dataclass
class _State:
    """Per row: the best point [B, C, H * W], its loss, whether it reached the goal; draws of the current block."""

    z: Tensor
    loss: Tensor
    reached: Tensor
    draws: Tensor

    def take(self, rows: Tensor) -> _State:
        return _State(*kept(rows, self.z, self.loss, self.reached, self.draws))


class _LinfSearch:
    """Patches set to the ball's upper or lower corner, one sign per channel."""

    odd = False

    def __init__(self, layout: Layout, ball: Ball[Tensor], eps: float, x: Tensor) -> None:
        self.layout, self.eps = layout, eps
        # Projecting the two extreme corners gives every coordinate's bounds, whatever the box.
        self.upper = ball.project(x + eps, x).reshape(len(x), layout.channels, -1)
        self.lower = ball.project(x - eps, x).reshape(len(x), layout.channels, -1)
        self.draws = 2 + layout.channels

    def take(self, rows: Tensor) -> None:
        self.upper, self.lower = kept(rows, self.upper, self.lower)

    def begin(self, rng: Rng) -> Tensor:
        """Vertical stripes, one sign per channel and column."""
        layout = self.layout
        shape = (len(self.upper), layout.channels, 1, layout.width)
        sign = rng.uniform(self.upper.new_empty(shape)).expand(-1, -1, layout.height, -1)
        return torch.where(sign.reshape(self.upper.shape) < 0.5, self.lower, self.upper)

    def change(self, z: Tensor, draw: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Pixel numbers [B, C, n] to rewrite and their new values."""
        pixels = self.layout.pixels(draw[:, :2], window).expand(-1, self.layout.channels, -1)
        down = draw[:, 2:, None] < 0.5
        return pixels, torch.where(down, self.lower.gather(2, pixels), self.upper.gather(2, pixels))


class _L2Search:
    """Patches that gather the norm of two windows and what is left of the budget into one bump."""

    odd = True

    def __init__(self, layout: Layout, ball: Ball[Tensor], eps: float, x: Tensor) -> None:
        # A hair inside the ball, so that round-off over thousands of patches never adds up to a step outside.
        self.layout, self.ball, self.eps = layout, ball, eps * (1 - 1e-6)
        self.x = x
        self.origin = x.reshape(len(x), layout.channels, -1)
        # The walls of the box, widened to an origin that round-off left outside. A point of the ball that is clamped to
        # them stays in the ball.
        low, high = lp_ball(ball).box.bounds_like(x)
        self.lower = torch.minimum(low, x).reshape(self.origin.shape)
        self.upper = torch.maximum(high, x).reshape(self.origin.shape)
        self.draws = 5 + layout.channels

    def take(self, rows: Tensor) -> None:
        self.x, self.origin, self.lower, self.upper = kept(rows, self.x, self.origin, self.lower, self.upper)

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
        pattern = bump(h, w).to(x)[turned]
        tiles = sign[:, :, :, None] * pattern[:, :, None]
        delta = x.new_zeros((len(x), layout.channels, layout.height, layout.width))
        tile = 0
        for top in tops:
            for left in lefts:
                delta[:, :, top : top + h, left : left + w] = tiles[:, tile].reshape(len(x), -1, h, w)
                tile += 1
        size = torch.linalg.vector_norm(delta.flatten(1), dim=1)
        moved = x + (delta * per_row(self.eps / size, delta)).reshape(x.shape)
        return self.ball.project(moved, x).reshape(len(x), layout.channels, -1)

    def change(self, z: Tensor, draw: Tensor, window: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Pixel numbers [B, C, 2n] to rewrite, the emptied window's before the filled one's, and their new values."""
        channels = self.layout.channels
        delta = z - self.origin
        filled = self.layout.pixels(draw[:, :2], window).expand(-1, channels, -1)
        emptied = self.layout.pixels(draw[:, 2:4], window).expand(-1, channels, -1)
        # Where windows overlap the union counts once.
        outside = delta.scatter(2, filled, 0.0).scatter_(2, emptied, 0.0)
        whole = delta.square().sum(2)
        freed = whole - outside.square().sum(2)
        # Negative by a rounding error where the ball is full: left so, it takes the excess back.
        unused = self.eps**2 - whole.sum(1, keepdim=True)
        budget = (freed + unused / channels).clamp_min(0).sqrt()

        old = delta.gather(2, filled)
        old = old / (torch.linalg.vector_norm(old, dim=2, keepdim=True) + 1e-12)
        pattern = bump(*window).to(z)[(draw[:, 4] >= 0.5).long()]
        new = pattern[:, None] * _signs(draw[:, 5:, None]) + old
        new = new * (budget[:, :, None] / (torch.linalg.vector_norm(new, dim=2, keepdim=True) + 1e-12))
        # Where the windows overlap, both carry what the filled one gets.
        filled_with = torch.clamp(
            self.origin.gather(2, filled) + new, self.lower.gather(2, filled), self.upper.gather(2, filled)
        )
        pixels = torch.cat([emptied, filled], dim=2)
        after = z.scatter(2, emptied, self.origin.gather(2, emptied)).scatter_(2, filled, filled_with)
        return pixels, after.gather(2, pixels)


@dataclass(frozen=True, kw_only=True)
class Square:
    """Rewrite a random square patch per query and keep it where the margin falls.

    A patch sits at its own place in every row and draws one sign per channel. Its share of the pixels starts at p_init
    and is halved nine times. A row leaves as soon as its goal is reached, where the oracle's answers are the verdict's.
    The search descends the goal's margin loss.

    queries:  answers asked of each row per restart, the starting stripes included, >= 1; the threat model's budget,
              where it has one, cuts them short
    p_init:   share of the pixels that the first patches cover, in (0, 1]
    schedule: "scaled" stretches the published halvings over the queries there are; "published" keeps them at absolute
              query counts (10, 50, 200... 8,000), as AutoAttack does, so that more queries repeat the fewer and go on
    restarts: independent starts, >= 1

    Rows that are no images are read as strips: [D] as one channel, [C, L] as C channels; their patches are pieces of
    the strip. Raises UsageError for values out of range and for balls other than Linf and L2, for which nothing is
    published.

    We differ from the released code where it differs from the paper: every row draws its own places, patches reach the
    last row and column, and in L2 each channel keeps the norm of its own windows.
    """

    needs: ClassVar[Access] = Access.SCORES
    queries: int = 5000
    p_init: float = 0.8
    schedule: Literal["scaled", "published"] = "scaled"
    restarts: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "queries", "restarts")
        if not 0 < self.p_init <= 1:
            raise UsageError(f"p_init is {self.p_init}; give a share of the pixels above 0 and at most 1")
        one_of(self, "schedule", ("scaled", "published"))

    def share(self, step: int, queries: int) -> float:
        """Share of the pixels that the patch of this step (1, 2...) covers in a run of so many queries."""
        count = step if self.schedule == "published" else int(step / queries * 10_000)
        return self.p_init / 2.0 ** bisect_left(HALVINGS, count)

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        inner = lp_ball(ball)
        if not isinstance(inner, Linf | L2):
            raise UsageError(
                f"square was asked for {type(inner).__name__}; it works in Linf and L2 balls (for L1 use `apgd-ce` or "
                "`pgd`, for L0 `pgd`)"
            )
        search = _LinfSearch if isinstance(inner, Linf) else _L2Search
        goal = goal.under("margin")
        out = x.clone()
        loss = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        reached = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        if not x.numel():
            return out
        layout = Layout.of(x)
        live = Live(oracle, x, goal, rng)

        def record(index: Tensor | None, state: _State) -> None:
            rows = torch.arange(len(x), device=x.device) if index is None else index
            wins = better(state.reached, state.loss, reached[rows], loss[rows])
            points = state.z.reshape(-1, *x.shape[1:])
            out[rows] = torch.where(per_row(wins, points), points, out[rows])
            loss[rows] = torch.where(wins, state.loss, loss[rows])
            reached[rows] |= state.reached

        for restart in range(self.restarts):
            if restart and oracle.decides:
                stay = live.left(reached if live.index is None else reached[live.index])
                live = live if stay is None else live.take(stay)
            left = live.oracle.left
            queries = self.queries if left is None else min(self.queries, left)
            if not len(live) or queries < 1:
                break
            searching = search(layout, ball, inner.eps, live.x)
            self._run(live, searching, layout, live.rng.at("square", restart), queries, record)
        return out

    def _run(
        self,
        live: Live,
        search: _LinfSearch | _L2Search,
        layout: Layout,
        rng: Rng,
        queries: int,
        record: Callable[[Tensor | None, _State], None],
    ) -> None:
        live = replace(live, rng=rng)
        stopping = live.oracle.decides
        z = search.begin(live.rng.at("start"))
        answer = live.oracle(z.reshape(live.x.shape))
        loss, hit = self._value(live, answer)
        state = _State(z.clone(), loss, hit, z.new_empty((len(z), 0)))
        for step in range(1, queries):
            if stopping and (stay := live.left(state.reached)) is not None:
                record(live.index, state)
                live, state = live.take(stay), state.take(stay)
                search.take(stay)
                if not len(live):
                    return
            place = (step - 1) % BLOCK
            if place == 0:
                block = live.rng.at("block", (step - 1) // BLOCK)
                state.draws = block.uniform(live.x.new_empty((len(live), BLOCK, search.draws)))
            window = layout.window(self.share(step, queries), search.odd)
            pixels, new = search.change(state.z, state.draws[:, place], window)
            old = state.z.gather(2, pixels)
            state.z.scatter_(2, pixels, new)
            loss, hit = self._value(live, live.oracle(state.z.reshape(live.x.shape)))
            wins = better(hit, loss, state.reached, state.loss)
            state.z.scatter_(2, pixels, torch.where(per_row(wins, new), new, old))
            state.loss = torch.where(wins, loss, state.loss)
            state.reached = state.reached | hit
        record(live.index, state)

    @staticmethod
    def _value(live: Live, answer: Tensor) -> tuple[Tensor, Tensor]:
        finite = finite_rows(answer)
        loss = torch.where(finite, live.goal.loss(answer), torch.inf).to(live.x.dtype)
        return loss, live.goal.reached(answer) & finite
