"""Lanes: the shapes of calls in which a row gets the same bits in any batch; probed for each model on this machine."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from advkit.core.protocols import Shaped
from advkit.core.round_off import operations

log = logging.getLogger("advkit")

LARGE = 3 * 128 * 128
"""Numbers in a row from which on a CPU evaluates four rows at a time."""


_TRIED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_LARGER = (128, 256)
_TRIED_LARGE = (1, 2, 4, 8)
"""Sizes of a call that a probe tries; for large rows the last ones. Which are safe to try, `round_off` says."""

_WORTH = 20_000
"""Rows sent from which a trial of the larger sizes, 384 rows, is under 2 % of a run."""

_LOOKED_AT = 3
"""Rows of the pass whose operations are looked at."""

_CALL = 4
"""What a call costs beside its rows, in rows: as much as cutting a batch may pad to save one."""


@dataclass
class Lanes:
    """The shapes in which a victim is evaluated.

    Matrix kernels choose their code by the batch's shape, and another choice may change a row's last bits; one sign of
    a gradient later the row ends elsewhere. Calls are made in shapes that a probe found to give the same bits, the last
    one padded to the next of them, so that every row's bits are its own.

    chunk:    most rows in one call of the model
    multiple: a call's rows are padded to a multiple of this; 1 pads nothing
    sizes:    the numbers of rows that a call may have, ascending, chunk the last; they count in place of `multiple`.
              Empty: all multiples up to chunk
    bits:     a hash of what the probe was answered; other bits come from another machine, or another torch
    """

    chunk: int = 64
    multiple: int = 16
    sizes: tuple[int, ...] = ()
    bits: str = field(default="", compare=False, repr=False)

    @staticmethod
    def own(model: Any) -> Lanes | None:
        """The shapes that a model wants to be called in; None where it does not say."""
        said = model.lanes if isinstance(model, Shaped) else None
        return said if isinstance(said, Lanes) else None

    @classmethod
    def fitting(cls, x: Tensor) -> Lanes:
        """The default for rows like these: padded lanes on the CPU, plain large batches elsewhere.

        A large image is worth a kernel's while by itself: fixed calls of four cost no more per row and pad less.
        """
        size = x[0].numel() if len(x) else 0
        if x.device.type != "cpu":
            return cls(chunk=min(1024, max(16, 2**24 // max(1, size))), multiple=1)
        return cls(chunk=4, multiple=4) if size >= LARGE else cls()

    @classmethod
    def unpadded(cls, x: Tensor) -> Lanes:
        """Batches as they come, those that would take too much memory in parts."""
        if x.device.type != "cpu":
            return cls.fitting(x)
        return cls(chunk=8 if len(x) and x[0].numel() >= LARGE else 256, multiple=1)

    @classmethod
    def of_sizes(cls, sizes: Iterable[int]) -> Lanes:
        """Calls of these numbers of rows."""
        kept = tuple(sorted(set(sizes)))
        return cls(kept[-1], kept[0], kept)

    @classmethod
    def probed(
        cls,
        model: Callable[[Tensor], Tensor],
        x: Tensor,
        backward: bool = True,
        rows: float = 0,
        batch: int = 0,
        also: Iterable[int] = (),
    ) -> Lanes:
        """Calls of those sizes in which this model gives a row the same bits as in most others.

        Tried on the rows at hand, over and over; forward and, with `backward`, input gradient must agree. Only sizes
        are tried in which no function is computed by other code at the end of a call (see `round_off`).

        rows:  about how many rows the run will send; calls of more than 64 are tried where there are so many that the
               trial is nothing beside them
        batch: most rows in a batch of the run, a size that is tried too; smaller runs try no more than they need
        also:  sizes to try in any case
        """
        own = cls.own(model)
        if own is not None:
            return own
        lanes = cls.fitting(x)
        if lanes.multiple == 1 or not x.is_floating_point():
            return lanes
        tried = tuple(sorted({*_to_try(lanes.chunk, rows, batch), *also}))
        held = x.detach()[torch.arange(max(tried), device=x.device) % lanes.chunk % len(x)]
        try:
            with torch.random.fork_rng(devices=[]):
                safe = operations(model, held[:_LOOKED_AT], backward)
            tried = tuple(size for size in tried if size == lanes.chunk or safe.allow(size))
            usual = [size for size in _to_try(lanes.chunk, 0, 0) if size < lanes.chunk and safe.allow(size)]
            first = _probe(model, held[: lanes.chunk], backward)
            found, known = _agreeing(model, held, tried, usual, first, backward)
            if len(found) > 1:
                _check_places(model, held, known, backward)
        except torch.OutOfMemoryError:  # no call of 64 rows will ever be made
            return replace(lanes, chunk=lanes.multiple)
        except Exception:  # a model without gradients, or one that raises on one of these rows
            return replace(lanes, multiple=lanes.chunk)
        return replace(cls.of_sizes(found), bits=_hash(first))

    @classmethod
    def answered(cls, model: Callable[[Tensor], Tensor], x: Tensor, backward: bool = True) -> str:
        """The `bits` of what `probed` gives, from a single call; "" where a probe would come to none."""
        lanes = cls.fitting(x)
        if cls.own(model) is not None or lanes.multiple == 1 or not x.is_floating_point():
            return ""
        try:
            return _hash(_probe(model, x.detach()[torch.arange(lanes.chunk, device=x.device) % len(x)], backward))
        except Exception:  # as in `probed`
            return ""

    @classmethod
    def shared(cls, found: Sequence[Lanes]) -> Lanes:
        """Shapes that suit all of these."""
        probed = [set(lanes.sizes) for lanes in found if lanes.sizes]
        return replace(cls._shared(found, probed), bits=cls.joined([lanes.bits for lanes in found]))

    @staticmethod
    def joined(bits: Sequence[str]) -> str:
        """The `bits` of shapes that suit several models."""
        return hashlib.sha256(" ".join(bits).encode()).hexdigest()

    @classmethod
    def _shared(cls, found: Sequence[Lanes], probed: Sequence[set[int]]) -> Lanes:
        others = [lanes for lanes in found if not lanes.sizes]
        common = set.intersection(*probed) if probed else set()
        if probed and all(lanes.multiple == 1 for lanes in others):
            return cls.of_sizes(common or {max(min(each) for each in probed)})
        if probed:
            even = {16, 32, 48, 64} <= common
            others.append(cls() if even else cls(multiple=64))
        return max(others, key=lambda lanes: lanes.multiple)

    def padded(self, rows: int) -> int:
        """The rows of the call that so many are sent in, at most `chunk`."""
        if not self.sizes:
            return rows + -rows % self.multiple
        return next(size for size in self.sizes if size >= rows) if rows else 0

    def split(self, rows: int) -> tuple[int, ...]:
        """How many rows of a batch go into each call, in their order."""
        if rows <= (self.sizes[0] if self.sizes else self.chunk):
            return (rows,)
        if not self.sizes:
            return (*([self.chunk] * (rows // self.chunk)), *([rows % self.chunk] if rows % self.chunk else []))
        return _cut(rows, self.sizes)


@functools.lru_cache(maxsize=4096)
def _cut(rows: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The cheapest calls for so many rows, largest first; the last one may have to be padded."""
    whole = max(0, rows // sizes[-1] - 1)
    rest = rows - whole * sizes[-1]
    cost, last = [0.0], [0]
    for covered in range(1, rest + 1):
        each = min(sizes, key=lambda size: cost[max(0, covered - size)] + size)
        cost.append(cost[max(0, covered - each)] + each + _CALL)
        last.append(each)
    calls = []
    while rest > 0:
        calls.append(last[rest])
        rest -= last[rest]
    calls = [sizes[-1]] * whole + sorted(calls, reverse=True)
    calls[-1] += rest
    return tuple(calls)


def _to_try(chunk: int, rows: float, batch: int) -> tuple[int, ...]:
    """Sizes of a call worth a trial, ascending: no larger ones than batches fill, or than pay in so short a run."""
    many = rows >= _WORTH
    tried = set(_TRIED_LARGE if chunk in _TRIED_LARGE else _TRIED + (_LARGER if many else ()))
    if batch <= 0:
        return tuple(sorted(tried))
    if batch <= max(tried):
        tried.add(batch)
    enough = min([size for size in tried if size >= batch], default=max(tried))
    return tuple(sorted({size for size in tried if size <= (max(enough, chunk) if many else enough)} | {chunk}))


def _check_places(model: Callable[[Tensor], Tensor], held: Tensor, known: tuple[Tensor, ...], backward: bool) -> None:
    """Warn where a row's bits depend on its place in a call.

    known: what the first rows of those held were answered in one call
    """
    rows = len(known[0])
    turned = torch.arange(rows).roll(1)
    moved = _probe(model, held[turned.to(held.device)], backward)
    if not all(torch.equal(a[turned.to(a.device)], b) for a, b in zip(known, moved, strict=True)):
        log.warning(
            "a sample's last bits depend on its place in the batch, so records may depend on the batch size; on x86, "
            "set MKL_CBWR=AUTO,STRICT in the environment, or import advkit before torch computes anything"
        )


def _agreeing(
    model: Callable[[Tensor], Tensor],
    rows: Tensor,
    tried: Sequence[int],
    usual: Sequence[int],
    first: tuple[Tensor, ...],
    backward: bool,
) -> tuple[list[int], tuple[Tensor, ...]]:
    """The sizes of a call that give rows the same bits as the first one, or as one below it where that is alone.

    Returned with what a call of that size was answered.

    rows:  [max(tried), ...], those of the first call over and over
    usual: smaller sizes, ascending, that decide whether the first call is alone, and which is the one below it: neither
           must depend on the batch. They are tried, too, where none of them agrees that is among the others
    first: what they were answered in it
    """
    found = _alike(model, rows, tried, first, backward)
    if not usual or not {*found}.isdisjoint(usual):
        return found, first
    tried = sorted({*tried, *usual})
    found = _alike(model, rows, tried, first, backward)
    if not {*found}.isdisjoint(usual):
        return found, first
    below = usual[-1]
    known = _probe(model, rows[:below], backward)
    others = _alike(model, rows, [size for size in tried if size <= below], known, backward)
    return (found, first) if {*others[1:]}.isdisjoint(usual) else (others, known)


def _alike(
    model: Callable[[Tensor], Tensor], rows: Tensor, tried: Sequence[int], known: tuple[Tensor, ...], backward: bool
) -> list[int]:
    """The size of a call that was answered so, and those that give its rows the same bits."""
    whole = len(known[0])
    agree = [whole]
    for place, size in enumerate(tried):
        if size == whole:
            continue
        # At the front and at the back by turns: the last rows of a call are the ones that other code may take.
        start = whole - size if place % 2 and size < whole else 0
        answers = _probe(model, rows[start : start + size], backward)
        at = (start + torch.arange(size)) % whole
        if all(torch.equal(a, b[at.to(b.device)]) for a, b in zip(answers, known, strict=True)):
            agree.append(size)
    return agree


def _hash(answers: tuple[Tensor, ...]) -> str:
    """Of their bits."""
    digest = hashlib.sha256()
    for each in answers:
        digest.update(each.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _probe(model: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> tuple[Tensor, ...]:
    """The answer and, where asked for, the input gradient of its squares."""
    if not backward:
        with torch.no_grad():
            return (model(x),)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        answer = model(leaf)
        total = answer.square().sum()
        gradient = torch.autograd.grad(total, leaf)[0] if total.requires_grad else torch.zeros_like(leaf)
    return answer.detach(), gradient
