"""Parts that transform the input before the model sees it; every row and copy draws for itself.

Their randomness enters through tensors of draws, one row each, never through python loops over rows, so that a row's
copies are the same in every batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from advkit.attacks.base import per_row
from advkit.attacks.transfer.engine import Draw, Run, Transform
from advkit.attacks.transfer.gradients import images
from advkit.core.checks import at_least_one, fraction, not_negative, one_of
from advkit.core.errors import UsageError
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.untargeted import Untargeted


def below(uniform: Tensor, high: Tensor | int) -> Tensor:
    """Whole numbers 0 .. high - 1 from uniform ones; `high` may differ by row."""
    top = high - 1
    number = (uniform * high).floor().long()
    return torch.minimum(number, top) if isinstance(top, Tensor) else number.clamp(max=top)


@dataclass(frozen=True, kw_only=True)
class DI(Transform):
    """Shrink the image to a random size and pad it with zeros at a random place (arXiv 1803.06978).

    p:      probability of the transform, in [0, 1]
    low:    smallest size, as a share of the image's, in (0, 1]
    copies: transformed copies per gradient, >= 1
    mode:   "shrink" to [low, 1] of the size; "enlarge": take the image at a random size in [1, 1.1), pad it to 1.1 and
            resize all to the old size, as released code for large images does (one interpolation here, two there)

    Bilinear; the side is at least 1 pixel, and an image that can't shrink stays as it is.
    """

    p: float = 0.7
    low: float = 7 / 8
    copies: int = 1
    mode: Literal["shrink", "enlarge"] = "shrink"

    def __post_init__(self) -> None:
        at_least_one(self, "copies")
        one_of(self, "mode", ("shrink", "enlarge"))
        fraction(self, "p", ends="[]", what="probability")
        fraction(self, "low")

    def __call__(self, x: Tensor, copy: Tensor, draw: Draw, run: Run) -> Tensor:
        images(x, "di")
        drawn = draw.uniform("di", 4)
        axes = [self._axis(x.shape[axis], drawn[:, 1], drawn[:, axis]) for axis in (2, 3)]
        moves = (drawn[:, 0] < self.p) & (axes[0][1] | axes[1][1])
        height, width = (axis[0] for axis in axes)
        grid = torch.stack(
            [width[:, None, :].expand(-1, x.shape[2], -1), height[:, :, None].expand(-1, -1, x.shape[3])], -1
        )
        warped = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return torch.where(per_row(moves, x), warped, x)

    def _axis(self, side: int, size: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Where along an axis each output pixel looks, in grid_sample's [-1, 1], and whether that is anywhere else."""
        if self.mode == "shrink":
            low = max(1, math.ceil(self.low * side))
            resized = low + below(size, side - low + 1)
            frame = side
        else:
            frame = int(1.1 * side)
            resized = side + below(size, max(1, frame - side))
        pad = below(place, frame - resized + 1)
        output = torch.arange(side, device=size.device, dtype=size.dtype)
        inside = (output[None] + 0.5) * (frame / side) - 0.5 - pad[:, None]
        ratio = side / resized[:, None].to(size.dtype)
        source = (inside + 0.5) * ratio - 0.5
        seen = (inside > -1) & (inside < resized[:, None])
        # Far outside rather than at the brink, where round-off could let a grey level through.
        where = torch.where(seen, (2 * source + 1) / side - 1, -3.0)
        return where, (resized != frame)


@dataclass(frozen=True, kw_only=True)
class SI(Transform):
    """Average over the image divided by 1, 2, 4, ... (scale invariance, arXiv 1908.06281).

    copies: scales, >= 1
    """

    copies: int = 5

    def __post_init__(self) -> None:
        at_least_one(self, "copies")

    def __call__(self, x: Tensor, copy: Tensor, draw: Draw, run: Run) -> Tensor:
        return x * per_row(torch.pow(0.5, copy).to(x), x)


@dataclass(frozen=True, kw_only=True)
class Admix(Transform):
    """Mix in a little of images of other classes, then scale as `si` does (arXiv 2102.00436).

    scales: scales of each mixture, >= 1
    mixes:  images mixed in, one after the other, >= 1
    eta:    their weight, >= 0

    The images come from the attacker's own labelled data (`oracle.data`), never from the batch, on which a row's result
    must not depend; those of the row's own class are left out. An attack knows no labels: the goal `untargeted` says
    whether a class is another one; for other goals that is any class but the surrogate's decision on the row, for one
    answer. Raises UsageError where there are no data, or none of another class.
    """

    wants_data: ClassVar[bool] = True
    scales: int = 5
    mixes: int = 3
    eta: float = 0.2

    def __post_init__(self) -> None:
        at_least_one(self, "scales", "mixes")
        not_negative(self, "eta")

    @property
    def copies(self) -> int:  # type: ignore[override]
        return self.scales * self.mixes

    def __call__(self, x: Tensor, copy: Tensor, draw: Draw, run: Run) -> Tensor:
        scaled = x
        if self.eta:
            rows = len(run.x)
            partners = [_partners_of(run, mix) for mix in range(self.mixes)]
            mixed = torch.stack(partners)[copy // self.scales, torch.arange(len(x), device=x.device) % rows]
            scaled = x + self.eta * mixed
        return scaled * per_row(torch.pow(0.5, copy % self.scales).to(x), x)


def _partners_of(run: Run, mix: int) -> Tensor:
    """An image of another class for every row; the same for all scales, another at every gradient."""
    pool = _pool(run)
    drawn = run.rng.at("admix", run.step, run.calls, mix).uniform(run.x.new_empty(len(run.x)).double())
    counts = pool.others.cumsum(1)
    number = below(drawn, counts[:, -1])
    place = torch.searchsorted(counts, number[:, None], right=True)
    before = torch.where(place > 0, counts.gather(1, (place - 1).clamp_min(0)), 0)
    images: Tensor = pool.images[(pool.first[place] + number[:, None] - before).squeeze(1)]
    return images


@dataclass(frozen=True)
class _Pool:
    """Images [P, ...] in the order of their classes; per class the first one's place [K]; per row and class how many
    are of another class than the row's [B, K]."""

    images: Tensor
    first: Tensor
    others: Tensor


def _pool(run: Run) -> _Pool:
    found: Any = run.notes.get("admix")
    if found is None:
        found = run.notes["admix"] = _made_pool(run)
    assert isinstance(found, _Pool)
    return found


def _made_pool(run: Run) -> _Pool:
    data = run.notes.get("data")
    if data is None or not len(data):
        raise UsageError(
            "admix mixes in images of other classes, and the attacker was given none: set the oracle's `data` to a "
            "labelled set (an evaluation hands over the task's training data), or use `si`"
        )
    if data.x.shape[1:] != run.x.shape[1:]:
        raise UsageError(f"admix: its images are {list(data.x.shape[1:])}, the rows {list(run.x.shape[1:])}")
    labels = data.y.to(run.x.device)
    order = labels.argsort(stable=True)
    classes, counts = labels.unique(return_counts=True)
    rows = len(run.x)
    if isinstance(run.goal, (Untargeted, Diverge)):  # what else is untargeted may need scores to be judged
        other = torch.stack([run.goal.reached(each.expand(rows)) for each in classes], 1)
    else:
        other = run.oracle(run.x).argmax(1)[:, None] != classes
    if not bool(other.any(1).all()):
        raise UsageError("admix: the attacker's images are all of a row's own class; give it some of other classes")
    return _Pool(data.x[order.to(data.x.device)].to(run.x), counts.cumsum(0) - counts, other * counts)


@lru_cache(maxsize=8)
def dct_matrix(side: int) -> Tensor:
    """The orthonormal DCT-II [side, side] in float64: rows are frequencies."""
    place = torch.arange(side, dtype=torch.float64)
    waves = torch.cos(math.pi / side * (place[None] + 0.5) * place[:, None]) * math.sqrt(2 / side)
    waves[0] = math.sqrt(1 / side)
    return waves


@dataclass(frozen=True, kw_only=True)
class SSA(Transform):
    """Add noise and rescale every frequency of the image at random (spectrum simulation, arXiv 2207.05382).

    copies: spectra per gradient, >= 1
    rho:    frequencies are multiplied by U(1 - rho, 1 + rho), >= 0
    noise:  deviation of the Gaussian noise, in units of eps, >= 0
    """

    copies: int = 20
    rho: float = 0.5
    noise: float = 1.0

    def __post_init__(self) -> None:
        at_least_one(self, "copies")
        not_negative(self, "rho", "noise")

    def __call__(self, x: Tensor, copy: Tensor, draw: Draw, run: Run) -> Tensor:
        height, width = images(x, "ssa")
        if self.noise:
            x = x + self.noise * run.reach * draw.normal("ssa noise", *x.shape[1:])
        factor = 1 - self.rho + 2 * self.rho * draw.uniform("ssa", *x.shape[1:])
        down, across = (dct_matrix(side).to(x) for side in (height, width))
        spectrum = _both(x, down, across.T)
        return _both(spectrum * factor, down.T, across)


def _both(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left @ x @ right for every image, in fixed-shape products: a product's last bits depend on its shape."""
    parts = []
    for part in torch.split(x, 16):
        short = 16 - len(part)
        whole = torch.cat([part, part[-1:].expand(short, *part.shape[1:])]) if short else part
        parts.append((left @ (whole @ right))[: len(part)])
    return torch.cat(parts)


@dataclass(frozen=True, kw_only=True)
class SIA(Transform):
    """Cut the image into random rectangles and give each a random transformation (structure invariance,
    arXiv 2309.14700).

    One of: roll vertically, roll horizontally, flip vertically, flip horizontally, rotate by 180 degrees, scale by
    U(0, 1), add U(-16/255, 16/255) and clip to the box.

    copies: cuts per gradient, >= 1
    blocks: rectangles along each side, >= 1; fewer where the side has fewer pixels
    """

    copies: int = 20
    blocks: int = 3

    def __post_init__(self) -> None:
        at_least_one(self, "copies", "blocks")

    def __call__(self, x: Tensor, copy: Tensor, draw: Draw, run: Run) -> Tensor:
        height, width = images(x, "sia")
        down = cuts(draw, "sia rows", height, self.blocks)
        across = cuts(draw, "sia columns", width, self.blocks)
        block = down.slot[:, :, None] * self.blocks + across.slot[:, None, :]
        flat = block.flatten(1)

        def per_block(name: str) -> Tensor:
            return draw.uniform(name, self.blocks**2).gather(1, flat).view_as(block)

        what = below(per_block("sia what"), 7)
        amount = per_block("sia amount")
        i, size_i = down.offset[:, :, None].expand_as(block), down.size[:, :, None].expand_as(block)
        j, size_j = across.offset[:, None, :].expand_as(block), across.size[:, None, :].expand_as(block)
        turned_i = torch.where(what == 0, (i + below(amount, size_i)) % size_i, i)
        turned_j = torch.where(what == 1, (j + below(amount, size_j)) % size_j, j)
        turned_i = torch.where((what == 2) | (what == 4), size_i - 1 - i, turned_i)
        turned_j = torch.where((what == 3) | (what == 4), size_j - 1 - j, turned_j)
        source = (down.start[:, :, None] + turned_i) * width + across.start[:, None, :] + turned_j
        moved = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, x.shape[1], -1)).view_as(x)
        moved = torch.where((what == 5)[:, None], moved * amount[:, None], moved)
        noise = (2 * draw.uniform("sia noise", *x.shape[1:]) - 1) * (16 / 255)
        low, high = run.box.bounds_like(x)
        noisy = torch.minimum(torch.maximum(moved + noise, low), high)
        return torch.where((what == 6)[:, None], noisy, moved)


@dataclass(frozen=True)
class Cuts:
    """A side cut into pieces at random; for each place on it [n, side]: which piece it is in, where that starts, how
    long it is, how far into it the place is."""

    slot: Tensor
    start: Tensor
    size: Tensor
    offset: Tensor


def cuts(draw: Draw, name: str, side: int, pieces: int) -> Cuts:
    """Pieces of at least one pixel, every choice of cuts as likely."""
    pieces = min(pieces, side)
    starts = _starts(draw.uniform(name, max(1, side - 1)), side, pieces)
    place = torch.arange(side, device=starts.device)
    slot = (place[None, :, None] >= starts[:, None, 1:]).sum(2)
    start = starts.gather(1, slot)
    ends = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], side)], 1)
    size = ends.gather(1, slot) - start
    return Cuts(slot, start, size, place[None] - start)


def _starts(uniform: Tensor, side: int, pieces: int) -> Tensor:
    """Where pieces start, ascending [..., pieces], from one uniform number per possible cut [..., side - 1]."""
    zero = torch.zeros_like(uniform[..., :1], dtype=torch.long)
    if pieces == 1 or side == 1:
        return zero
    chosen = uniform.argsort(-1)[..., : pieces - 1] + 1
    return torch.cat([zero, chosen.sort(-1).values], -1)


@dataclass(frozen=True, kw_only=True)
class BSR(Transform):
    """Cut the image into strips, shuffle and rotate them, cut and shuffle each across (block shuffle and rotation,
    arXiv 2308.10299).

    copies: shuffles per gradient, >= 1
    blocks: strips, and pieces of a strip, >= 1
    angle:  strips turn by U(-angle, angle) degrees around their middle, zeros coming in, >= 0
    """

    copies: int = 20
    blocks: int = 2
    angle: float = 24.0

    def __post_init__(self) -> None:
        at_least_one(self, "copies", "blocks")
        not_negative(self, "angle")

    def __call__(self, x: Tensor, copy: Tensor, draw: Draw, run: Run) -> Tensor:
        images(x, "bsr")
        upright = self._shuffled(x, draw, "rows")
        sideways = self._shuffled(x.transpose(2, 3), draw, "columns").transpose(2, 3)
        return torch.where(per_row(draw.uniform("bsr axis") < 0.5, x), upright, sideways)

    def _shuffled(self, x: Tensor, draw: Draw, axis: str) -> Tensor:
        """Strips along the third dimension."""
        n, channels, height, width = x.shape
        strips, pieces = min(self.blocks, height), min(self.blocks, width)
        starts = _starts(draw.uniform(f"bsr strips {axis}", max(1, height - 1)), height, strips)
        order = draw.uniform(f"bsr order {axis}", strips).argsort(1)
        across = _starts(draw.uniform(f"bsr pieces {axis}", strips, max(1, width - 1)), width, pieces)
        orders = draw.uniform(f"bsr orders {axis}", strips, pieces).argsort(2)
        turn = (2 * draw.uniform(f"bsr turn {axis}", strips) - 1) * math.radians(self.angle)

        strip, first, offset, size = _rearranged(starts, order, height)  # [n, height]
        _, begin, along, _ = _rearranged(across.flatten(0, 1), orders.flatten(0, 1), width)  # [n * strips, width]
        column = (begin + along).view(n, strips, width)
        column = column.gather(1, strip[:, :, None].expand(-1, -1, width)).to(x)  # [n, height, width]

        angle = turn.gather(1, strip)[:, :, None]
        middle = (size - 1)[:, :, None].to(x) / 2
        up, right = offset[:, :, None].to(x) - middle, column - (width - 1) / 2
        row = angle.cos() * up - angle.sin() * right + middle
        column = angle.sin() * up + angle.cos() * right + (width - 1) / 2
        if not self.angle:
            row, column = row.round(), column.round()

        low_i, low_j = row.floor(), column.floor()
        moved = torch.zeros_like(x)
        for di in (0, 1):
            for dj in (0, 1):
                i, j = (low_i + di).long(), (low_j + dj).long()
                weight = (1 - (row - i).abs()) * (1 - (column - j).abs())
                inside = (i >= 0) & (i < size[:, :, None]) & (j >= 0) & (j < width)
                source = (first[:, :, None] + i.clamp_min(0)).clamp(max=height - 1) * width + j.clamp(0, width - 1)
                taken = x.flatten(2).gather(2, source.flatten(1)[:, None].expand(-1, channels, -1)).view_as(x)
                moved = moved + (weight * inside)[:, None] * taken
        return moved


def _rearranged(starts: Tensor, order: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pieces in another order; for each new place [n, side]: its piece, the piece's old start, the place in it, its
    length."""
    ends = torch.cat([starts[:, 1:], torch.full_like(starts[:, :1], side)], 1)
    sizes = (ends - starts).gather(1, order)
    new = sizes.cumsum(1) - sizes
    place = torch.arange(side, device=starts.device)
    slot = (place[None, :, None] >= new[:, None, 1:]).sum(2)
    piece = order.gather(1, slot)
    return piece, starts.gather(1, piece), place[None] - new.gather(1, slot), sizes.gather(1, slot)
