"""The metered oracle: the only caller of victim models.

It answers what the threat model grants and nothing more, counts every forward, backward and query per row, enforces the
query budget, keeps NaN out of the attack while remembering who answered it, and evaluates in fixed-shape chunks so that
a row's bits do not depend on the batch it happens to travel in.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from advkit.core.blame import BACKWARD, GOAL, MODEL, blame
from advkit.core.errors import AccessDenied, BudgetExhausted
from advkit.core.noise import mixed
from advkit.core.protocols import (
    Access,
    CountsTokens,
    Data,
    DrawsByRow,
    Headed,
    Modular,
    NeedsAccess,
    Shaped,
    Sloped,
    conforms,
)
from advkit.core.round_off import operations
from advkit.core.rows import all_finite, all_moving, finite_rows, plainly_finite, row_size, sizes_of

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
            first = _probe(model, held[: lanes.chunk], backward)
            found, known = _agreeing(model, held, tried, first, backward)
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
    model: Callable[[Tensor], Tensor], rows: Tensor, tried: tuple[int, ...], first: tuple[Tensor, ...], backward: bool
) -> tuple[list[int], tuple[Tensor, ...]]:
    """The sizes of a call that give rows the same bits as the first one, or as one below it where that is alone.

    Returned with what a call of that size was answered.

    rows:  [max(tried), ...], those of the first call over and over
    first: what they were answered in it
    """
    chunk = len(first[0])
    wholes = [size for size in tried if size <= chunk][-1:-3:-1]
    found: list[int] = []
    answered = first
    for whole in wholes:
        known = first if whole == chunk else _probe(model, rows[:whole], backward)
        agree = [whole]
        for place, size in enumerate(tried):
            # At the front and at the back by turns: the last rows of a call are the ones that other code may take.
            start = whole - size if place % 2 and size < whole else 0
            if size == whole or (size > whole and whole != wholes[0]):
                continue
            answers = _probe(model, rows[start : start + size], backward)
            at = (start + torch.arange(size)) % whole
            if all(torch.equal(a, b[at.to(b.device)]) for a, b in zip(answers, known, strict=True)):
                agree.append(size)
        if len(agree) > len(found):
            found, answered = agree, known
        if len(found) > 1:
            break
    return found, answered


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


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Parameters without gradient inside the block; the flags are given back as they were.

    An attack differentiates with respect to the input alone; live parameters would cost 2-38 % of every backward.
    """
    live = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in live:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_(True)


class _Extremes:
    """The largest and smallest of what was noted, per row; NaN, once noted, stays.

    Notes are kept and folded many at a time, so that noting costs no tensor operation.
    """

    __slots__ = ("_notes",)
    FOLDED = 32

    def __init__(self) -> None:
        self._notes: list[tuple[Tensor, Tensor]] = []

    def note(self, high: Tensor, low: Tensor) -> None:
        self._notes.append((high, low))
        if len(self._notes) == self.FOLDED:
            self._notes = [self._folded()]

    def _folded(self) -> tuple[Tensor, Tensor]:
        highs, lows = zip(*self._notes, strict=True)
        return torch.stack(highs).amax(0), torch.stack(lows).amin(0)

    @property
    def non_finite(self) -> Tensor | None:
        """Bool [rows]: NaN or infinity among the notes; None where there are none."""
        if not self._notes:
            return None
        high, low = self._folded()
        return ~(torch.isfinite(high) & torch.isfinite(low))

    @property
    def zero(self) -> Tensor | None:
        """Bool [rows]: nothing but zeros; None where there are no notes."""
        if not self._notes:
            return None
        high, low = self._folded()
        return (high == 0) & (low == 0)


class _Segment:
    """Counts of one view of the oracle: plain integers, so that metering costs no tensor operation per step."""

    __slots__ = ("answers", "asked", "backwards", "forwards", "gradients", "moved", "rows")

    def __init__(self, rows: Tensor | None) -> None:
        self.rows = rows
        self.forwards = 0
        self.backwards = 0
        self.asked = _Extremes()
        self.answers = _Extremes()
        self.gradients = _Extremes()
        self.moved = False  # whether there was a gradient in which no row was zero


class Meter:
    """What the rows of one oracle have cost so far; long [rows] and bool [rows] tensors on the CPU.

    A view that holds a row several times pays for it several times. `tokens` is what models that count them sent
    through their networks, all rows together: what is shared or remembered between rows is nobody's alone.

    looks: whether answers and gradients are looked at, for values that are not finite and for gradients of zeros;
           without it passes alone are counted, and the rows' flags stay False
    """

    def __init__(self, rows: int, *, looks: bool = True) -> None:
        self.rows = rows
        self.looks = looks
        self.detached = False
        self.calls = 0
        self.tokens = 0
        self._noted: dict[int, list[dict[str, Any]]] = {}
        self._segments: list[_Segment] = []
        self._scattered = torch.zeros(rows, dtype=torch.long)
        self._scattered_backwards = torch.zeros(rows, dtype=torch.long)
        self._scattered_bad = torch.zeros(rows, dtype=torch.bool)
        self._scattered_asked = torch.zeros(rows, dtype=torch.bool)

    def segment(self, rows: Tensor | None) -> _Segment:
        self._segments.append(_Segment(rows))
        return self._segments[-1]

    def scatter(
        self, of: Tensor, non_finite: Tensor, backward: bool, forward: bool = True, asked: Tensor | None = None
    ) -> None:
        """Candidates that belong to rows in another order or number; `asked` [n]: which of them are not finite."""
        self.calls += 1
        of = of.cpu()
        if asked is not None:
            self._scattered_asked[of[asked.cpu()]] = True
        if forward:
            self._scattered += torch.bincount(of, minlength=self.rows)
        if backward:
            self._scattered_backwards += torch.bincount(of, minlength=self.rows)
        self._scattered_bad[of[non_finite.cpu()]] = True

    def note(self, row: int, figures: Mapping[str, Any]) -> None:
        """Keep what an attack tells of one of the meter's rows."""
        self._noted.setdefault(row, []).append({str(name): _plain(value) for name, value in figures.items()})

    @property
    def with_notes(self) -> tuple[int, ...]:
        """The meter's rows of which something was told."""
        return tuple(self._noted)

    def noted(self, row: int) -> tuple[dict[str, Any], ...]:
        """What was told of a row, in the order in which it was."""
        return tuple(self._noted.get(row, ()))

    def _count(self, name: str) -> Tensor:
        total = torch.zeros(self.rows, dtype=torch.long)
        for segment in self._segments:
            count = getattr(segment, name)
            if segment.rows is None:
                total += count
            elif count:
                total += count * torch.bincount(segment.rows.cpu(), minlength=self.rows)
        return total

    @property
    def forwards(self) -> Tensor:
        """Rows sent forward through the model, those of gradient steps included."""
        return self._count("forwards") + self._scattered

    @property
    def backwards(self) -> Tensor:
        """Backward passes."""
        return self._count("backwards") + self._scattered_backwards

    @property
    def queries(self) -> Tensor:
        """Answers asked for: every forward is one."""
        return self.forwards

    @property
    def non_finite(self) -> Tensor:
        """Rows to which the victim ever answered NaN or infinity, or whose gradient was, on an input that is finite."""
        bad = self._scattered_bad.clone()
        for segment in self._segments:
            for extremes in (segment.answers, segment.gradients):
                if (found := extremes.non_finite) is not None:
                    bad[self._of(segment, found)] = True
        return bad

    @property
    def asked_non_finite(self) -> Tensor:
        """Rows for which the attack asked about an input with NaN or infinity: no answer to that is the victim's."""
        asked = self._scattered_asked.clone()
        for segment in self._segments:
            if (found := segment.asked.non_finite) is not None:
                asked[self._of(segment, found)] = True
        return asked

    @property
    def zero_gradient(self) -> Tensor:
        """Rows whose every gradient so far was exactly zero (False for rows that never asked for one)."""
        asked = torch.zeros(self.rows, dtype=torch.bool)
        moved = torch.zeros(self.rows, dtype=torch.bool)
        for segment in self._segments:
            zero = segment.gradients.zero
            if segment.moved:
                here = slice(None) if segment.rows is None else segment.rows.cpu()
                asked[here] = moved[here] = True
            elif zero is not None:
                asked[self._of(segment, torch.ones_like(zero))] = True
                moved[self._of(segment, ~zero)] = True
        return asked & ~moved

    @staticmethod
    def _of(segment: _Segment, chosen: Tensor) -> Tensor:
        """The oracle's rows, long, of some of a segment's, bool."""
        chosen = chosen.cpu()
        return chosen.nonzero().squeeze(1) if segment.rows is None else segment.rows.cpu()[chosen]


def _plain(value: Any) -> Any:
    """A JSON value that reads back as it was written; numbers that are not finite become None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


_engine: Callable[..., tuple[Tensor | None, ...]] | None = getattr(torch.autograd.graph, "_engine_run_backward", None)
"""What `torch.autograd.grad` calls at last; asked itself, since that one imports sympy, a second, for its checks."""


def _backward(end: Tensor, slope: Tensor, leaf: Tensor, again: bool) -> Tensor | None:
    """The gradient at the leaf, given the one at the end; None where no path leads there."""
    if _engine is None:
        return torch.autograd.grad(end, leaf, slope, retain_graph=again, allow_unused=True)[0]
    return _engine((end,), (slope,), again, False, (leaf,), allow_unreachable=True, accumulate_grad=False)[0]


class MeteredOracle:
    """All an attack sees of a model.

    model:   called on whole chunks; `modules()` is not touched here (see `frozen`)
    rows:    how many rows this oracle serves
    access:  NOTHING refuses all, LABELS answers one-hot decisions, SCORES the answers, GRADIENTS everything
    queries: answers each row may ask for; None is unlimited
    propagations: passes through the model that each row may cost, forward and backward ones together; None is unlimited
    differentiates: whether the attack takes gradients: of so many propagations are left half as many questions
    decides: its answers are the verdict's, so that a row which reached its goal may stop
    lanes:   shapes of the calls, where the model does not say its own; None pads nothing, so that a row's last bits may
             depend on its batch, and sends a model in training mode, which has batch statistics, all rows at once
    data:    what labelled data the attacker holds, for attacks that need some; None where none was handed over
    keys:    of the meter's rows, int64 on the CPU, for models that draw by row (`RowRng.keys`): every query of a row
             draws anew, whatever is asked beside it; None leaves such a model to torch's generators

    Raises AccessDenied and BudgetExhausted.
    """

    def __init__(
        self,
        model: Callable[[Any], Any],
        rows: int,
        access: Access = Access.GRADIENTS,
        queries: int | None = None,
        decides: bool = True,
        lanes: Lanes | None = None,
        meter: Meter | None = None,
        index: Tensor | None = None,
        data: Data | None = None,
        keys: Tensor | None = None,
        propagations: int | None = None,
        differentiates: bool = True,
    ) -> None:
        self.model = cast(Any, model)
        self.propagations = propagations
        self.differentiates = differentiates
        self.data = data
        self.keys = keys
        self._drawing = None if keys is None or not isinstance(self.model, DrawsByRow) else self.model
        self.rows = rows
        self.access = access
        self.queries = queries
        self.decides = decides
        self.lanes = Lanes.own(model) or lanes
        self.meter = meter or Meter(rows)
        self._index = index
        self._counting = self.model if isinstance(self.model, CountsTokens) else None
        self._segment = self.meter.segment(index)
        self._aims: tuple[Any, list[int], list[Any]] = (None, [], [])
        self._ones: Tensor | None = None
        self._times: Tensor | None = None  # how often this view holds each row of the meter
        if queries is not None or propagations is not None:
            rows_here = torch.arange(self.meter.rows) if index is None else index.cpu()
            self._times = torch.bincount(rows_here, minlength=self.meter.rows)
        # The meter's queries are looked up again only where somebody else has asked since `_known` calls.
        self._most, self._known = 0, -1

    def take(self, rows: Tensor) -> MeteredOracle:
        """The oracle of some of the rows (long or bool index); a row may come several times. The meter is shared."""
        rows = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        index = rows if self._index is None else self._index.to(rows.device)[rows]
        return MeteredOracle(
            self.model,
            len(index),
            self.access,
            self.queries,
            self.decides,
            self.lanes,
            self.meter,
            index,
            self.data,
            self.keys,
            self.propagations,
            self.differentiates,
        )

    def note(self, row: int, figures: Mapping[str, Any]) -> None:
        """Keep what a step of the attack tells of one of this oracle's rows, for its record."""
        if not 0 <= row < self.rows:
            raise ValueError(f"a note on sample {row} of an oracle that serves {self.rows}")
        self.meter.note(int(self._global(torch.tensor([row]))), figures)

    @property
    def left(self) -> int | None:
        """Times that this view may still be asked about all its rows; None when unlimited."""
        if self._times is None:
            return None
        limits = []
        here = self._times > 0
        times, queries = self._times[here], self.meter.queries[here]
        if self.queries is not None:
            limits.append((self.queries, (self.queries - queries) // times))
        if self.propagations is not None:
            passes = self.propagations - queries - self.meter.backwards[here]
            limits.append((self.propagations, passes // (times * (2 if self.differentiates else 1))))
        return min(int(left.min()) if len(left) else most for most, left in limits)

    def __call__(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        """Answers [n, ...] without gradient; `of` [n] says which row each candidate belongs to."""
        if self.access < Access.LABELS:
            raise AccessDenied("the attack asked for an answer; this threat model grants no access to the victim")
        self._spend(x, of)
        chunks, lanes = self._chunks(x)
        keys = self._keys(x, of, chunks)
        # Not inference mode, 2-5 % faster: a defense that optimises while it predicts must be able to.
        with torch.no_grad():
            parts = [self._forward(part, lanes, key)[: len(part)] for part, key in zip(chunks, keys, strict=True)]
        answer = parts[0].detach() if len(parts) == 1 else torch.cat(parts).detach()
        self._note(x, answer, of)
        if self.access == Access.LABELS and answer.ndim > 1:
            return nn.functional.one_hot(answer.argmax(1), answer.shape[1]).to(answer.dtype)
        return answer

    def gradient(self, x: Tensor, goal: Any, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [n], each row's own gradient (no mean over the batch), answer [n, ...]: one forward and one backward.

        A non-finite loss comes back as +inf and a non-finite gradient entry as 0; the meter remembers the row.
        """
        self._may_differentiate()
        self._spend(x, of, 2)
        chunks, lanes = self._chunks(x)
        aims = [goal] if len(chunks) == 1 else self._aimed(goal, [len(part) for part in chunks], x.device)
        keys = self._keys(x, of, chunks)
        parts = [self._passed(*each, lanes) for each in zip(chunks, aims, keys, strict=True)]
        with torch.no_grad():
            loss, gradient, answer = parts[0] if len(parts) == 1 else (torch.cat(v) for v in zip(*parts, strict=True))
            if not (self._note(x, answer, of, gradient) and self._owned(gradient)):
                gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
            if loss.device.type != "cpu" or not all_finite(loss):
                loss = loss.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
            return loss, gradient, answer

    def gradients(self, x: Tensor, goals: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [K, n] of several goals, their gradients [K, n, ...], answer [n, ...]: one forward and K backwards.

        What is not finite comes back as from `gradient`.
        """
        self._may_differentiate()
        self._spend(x, None, 1 + len(goals))
        chunks, lanes = self._chunks(x)
        rows = torch.split(torch.arange(len(x), device=x.device), [len(part) for part in chunks])
        keys = self._keys(x, None, chunks)
        losses: list[list[Tensor]] = [[] for _ in goals]
        gradients: list[list[Tensor]] = [[] for _ in goals]
        answers = []
        for part, own, key in zip(chunks, rows, keys, strict=True):
            leaf, answer = self._called(part, key, lanes)
            for which, goal in enumerate(goals):
                aim = goal if len(chunks) == 1 else goal.take(own)
                loss, gradient = self._differentiated(aim, answer, leaf, again=which < len(goals) - 1)
                losses[which].append(loss)
                gradients[which].append(gradient[: len(part)])
            answers.append(answer.detach())
        with torch.no_grad():
            each = [torch.cat(parts) for parts in gradients]
            answer = torch.cat(answers)
            self._note(x, answer, None, each[0])
            asked = ~torch.isfinite(row_size(x.detach())) if self.meter.looks else None
            others = [self._passed_back(more, None, asked) for more in each[1:]]
            stacked = torch.stack([each[0].nan_to_num(0.0, 0.0, 0.0), *others])
            loss = torch.stack([torch.cat(parts) for parts in losses])
            return loss.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf), stacked, answer

    def _may_differentiate(self) -> None:
        if self.access < Access.GRADIENTS:
            raise AccessDenied(
                f"the attack asked for a gradient; this threat model grants {self.access.name.lower()} only "
                "(use a query attack such as `square`, or grant access=gradients)"
            )

    def _owned(self, gradient: Tensor) -> bool:
        """Whether its rows share memory neither with one another nor with what is kept here."""
        if not gradient.is_contiguous():
            return False
        kept = self._ones
        return kept is None or gradient.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr()

    def _passed(self, x: Tensor, goal: Any, keys: Tensor | None, lanes: Lanes) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, gradient and answer of one call of the model, as they come."""
        leaf, answer = self._called(x, keys, lanes)
        loss, gradient = self._differentiated(goal, answer, leaf)
        short = leaf.shape[0] != x.shape[0]
        return loss, gradient[: x.shape[0]] if short else gradient, answer.detach()

    def _called(self, x: Tensor, keys: Tensor | None, lanes: Lanes) -> tuple[Tensor, Tensor]:
        """The leaf of one call of the model, padded, and the answer to the rows of x, with its graph."""
        with torch.enable_grad():
            leaf = self._leaf(x, lanes)
            answer = self._forward(leaf, None, keys)
            return leaf, answer if leaf.shape[0] == x.shape[0] else answer[: x.shape[0]]

    @staticmethod
    def _leaf(x: Tensor, lanes: Lanes) -> Tensor:
        """What is differentiated by: x itself where it is lent for that, which it shows by requiring a gradient."""
        if x.requires_grad and x.is_leaf and lanes.padded(x.shape[0]) == x.shape[0]:
            return x
        return MeteredOracle._padded(x.detach() if x.requires_grad else x, lanes).requires_grad_()

    def _differentiated(self, goal: Any, answer: Tensor, leaf: Tensor, again: bool = False) -> tuple[Tensor, Tensor]:
        """The goal's loss and its gradient at the leaf, each row's own; `again` where more will follow."""
        loss, end, slope = self._loss(goal, answer)
        gradient = None
        if end.requires_grad:
            try:
                gradient = _backward(end, slope, leaf, again)
            except BaseException as error:
                blame(error, BACKWARD)
                raise
        if gradient is None:
            self.meter.detached = True
            gradient = torch.zeros_like(leaf, requires_grad=False)
        return loss, gradient

    def _loss(self, goal: Any, answer: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The goal's loss, where autograd begins, and the derivative that it begins with."""
        try:
            if conforms(goal, Sloped):
                with torch.no_grad():
                    sloped = goal.sloped(answer)
                if sloped is not None:
                    return sloped[0], answer, sloped[1]
            with torch.enable_grad():
                loss: Tensor = goal.loss(answer)
        except BaseException as error:
            blame(error, GOAL)
            raise
        if self._ones is None or self._ones.shape != loss.shape or self._ones.dtype != loss.dtype:
            self._ones = torch.ones_like(loss, requires_grad=False)
        return loss.detach(), loss, self._ones

    def _aimed(self, goal: Any, sizes: list[int], device: torch.device) -> list[Any]:
        """The goal of every chunk; those of the goal asked for last are kept, since a walk keeps its goal."""
        if self._aims[0] is not goal or self._aims[1] != sizes:
            rows = torch.split(torch.arange(sum(sizes), device=device), sizes)
            self._aims = (goal, sizes, [goal.take(part) for part in rows])
        return self._aims[2]

    def seen_as(self, view: Callable[[Any], Any], decides: bool = False) -> MeteredOracle:
        """The same rows and the same meter, but the questions go to `view(model)`.

        What white box means beyond a gradient: a tap that answers the features of a layer, a copy with another
        backward rule, one member of an ensemble. `decides` where its answers are the verdict's still. A view that asks
        for no more than the scores of outputs, such as the next token's, says so in `needs`.
        """
        least = max(Access.SCORES, view.needs) if isinstance(view, NeedsAccess) else Access.GRADIENTS
        if self.access < least:
            self._white_box("the inside of the model" if least == Access.GRADIENTS else "scores of the model's outputs")
        return MeteredOracle(
            view(self.model),
            self.rows,
            self.access,
            self.queries,
            decides and self.decides,
            self.lanes,
            self.meter,
            self._index,
            self.data,
            self.keys,
            self.propagations,
            self.differentiates,
        )

    def head(self) -> Tensor | None:
        """Weight [classes, features] of the model's last linear layer; None where it has none, or does not say."""
        self._white_box("the weights of the last layer")
        return self.model.head() if isinstance(self.model, Headed) else None

    def _white_box(self, what: str) -> None:
        if self.access < Access.GRADIENTS:
            raise AccessDenied(
                f"the attack asked for {what}; this threat model grants {self.access.name.lower()} only (choose an "
                "attack that asks for less, or grant access=gradients)"
            )

    def differentiable(self, origin: Tensor) -> nn.Module:
        """The model as a torch module, for attacks that bring their own loop and autograd.

        Metered and refused like every other question. The module holds none of the model's parameters, so that nobody
        can switch modes or move weights through it, and they are frozen while it computes; its one empty parameter
        says where it lives to those who ask. Lanes do not apply: whole batches go through as they come, and a row's
        last bits may depend on its batch.

        origin: the rows [rows, ...] that the candidates come from. As many candidates as rows are taken to be the rows
                in order; any other number is told apart by the nearest origin, for nothing but the meter
        """
        return _Differentiable(self, origin)

    def _chunks(self, x: Tensor) -> tuple[list[Tensor], Lanes]:
        lanes = self.lanes
        if lanes is None:
            training = isinstance(self.model, Modular) and any(m.training for m in self.model.modules())
            lanes = Lanes(max(1, len(x)), 1) if training else Lanes.unpadded(x)
            self.lanes = lanes
        sizes = lanes.split(x.shape[0])
        if len(sizes) == 1:
            return [x], lanes
        return list(torch.split(x.detach() if x.requires_grad else x, list(sizes))), lanes

    @staticmethod
    def _padded(x: Tensor, lanes: Lanes) -> Tensor:
        short = lanes.padded(x.shape[0]) - x.shape[0]
        if not short:
            return x.clone()
        return torch.cat([x, x[-1:].expand(short, *x.shape[1:])])

    def _keys(self, x: Tensor, of: Tensor | None, chunks: Sequence[Tensor]) -> Sequence[Tensor | None]:
        """The keys of a query's candidates, chunk by chunk: each row's own, and how often it was asked about before."""
        if self._drawing is None or self.keys is None:
            return [None] * len(chunks)
        rows = torch.arange(len(x)) if of is None else of.cpu()
        rows = rows if self._index is None else self._index.cpu()[rows]
        keys = mixed(self.keys[rows], self.meter.forwards[rows])
        return torch.split(keys, [len(part) for part in chunks])

    def _forward(self, x: Tensor, lanes: Lanes | None, keys: Tensor | None) -> Tensor:
        before = 0 if self._counting is None else self._counting.tokens
        x = x if lanes is None or lanes.padded(x.shape[0]) == x.shape[0] else self._padded(x, lanes)
        try:
            answer: Tensor
            if self._drawing is None or keys is None:
                answer = self.model(x)
            else:  # padded rows are copies of the last one
                answer = self._drawing.drawing(x, torch.cat([keys, keys[-1:].expand(len(x) - len(keys))]))
        except BaseException as error:
            if not x.is_floating_point() or bool(finite_rows(x.detach()).all()):
                blame(error, MODEL)  # about NaN nobody should have asked
            raise
        if self._counting is not None:
            self.meter.tokens += self._counting.tokens - before
        return answer

    def _passed_back(self, gradient: Tensor, of: Tensor | None, asked: Tensor | None) -> Tensor:
        """Count a backward pass of somebody else's autograd; what is not finite goes on as 0."""
        high, low = (_excused(extreme, asked) for extreme in _extremes(gradient))
        if of is not None:
            bad = ~(torch.isfinite(high) & torch.isfinite(low))
            self.meter.scatter(self._global(of), bad, forward=False, backward=True)
        else:
            self._segment.backwards += 1
            self._segment.gradients.note(high, low)
        return gradient.nan_to_num(0.0, 0.0, 0.0)

    def _spend(self, x: Tensor, of: Tensor | None, passes: int = 1) -> None:
        """Refuse what no budget allows: an answer for every candidate, of so many passes each."""
        if of is None and x.shape[0] != self.rows:
            raise ValueError(f"{len(x)} candidates for {self.rows} samples: say which sample each belongs to (`of`)")
        if self._times is None or not x.shape[0]:
            return
        if self.propagations is not None:
            self._check_propagations(of, passes)
        if self.queries is None:
            return
        if of is None and self._known == self.meter.calls:
            most = self._most + 1
        else:
            times = self._asked_for(of)
            most = int((self.meter.queries + times)[times > 0].max())
        if most > self.queries:
            raise BudgetExhausted(
                f"the attack made query number {most} of a sample; the threat model allows {self.queries} "
                "(lower the attack's steps, or raise queries)"
            )
        if of is None and int(self._times.max()) == 1:
            self._most, self._known = most, self.meter.calls + 1

    def _check_propagations(self, of: Tensor | None, passes: int) -> None:
        times = self._asked_for(of)
        most = int((self.meter.forwards + self.meter.backwards + passes * times)[times > 0].max())
        if most > cast(int, self.propagations):
            raise BudgetExhausted(
                f"the attack came to {most} propagations of a sample; the budget is {self.propagations} "
                "(lower the attack's steps, or raise the budget)"
            )

    def _asked_for(self, of: Tensor | None) -> Tensor:
        """How often a query asks about each of the meter's rows."""
        assert self._times is not None
        return self._times if of is None else torch.bincount(self._global(of), minlength=self.meter.rows)

    def _global(self, of: Tensor) -> Tensor:
        return of.cpu() if self._index is None else self._index.cpu()[of.cpu()]

    def _note(self, x: Tensor, answer: Tensor, of: Tensor | None, gradient: Tensor | None = None) -> bool:
        """Count a pass and keep what it met; whether it is plain that the gradient is finite throughout."""
        looks = self.meter.looks
        plain = gradient is not None and all_moving(gradient)
        told = not looks or ((gradient is None or plain) and (not answer.is_floating_point() or plainly_finite(answer)))
        if of is None and told:
            self.meter.calls += 1
            self._segment.forwards += 1
            self._segment.backwards += gradient is not None
            self._segment.moved |= plain and looks
            return plain
        sizes = sizes_of(answer) if looks and answer.is_floating_point() else None
        extremes = _extremes(gradient) if looks and gradient is not None else None
        plain = plain or (extremes is not None and extremes[0].device.type == "cpu" and all_finite(*extremes))
        length = None if sizes is None else _suspects(x, answer)
        asked = None if length is None else ~torch.isfinite(length)
        if asked is not None:
            sizes = None if sizes is None else _excused(sizes, asked)
            extremes = None if extremes is None else (_excused(extremes[0], asked), _excused(extremes[1], asked))
        if of is not None:
            bad = torch.zeros(len(answer), dtype=torch.bool, device=answer.device)
            for size in (sizes, *(extremes or ())):
                bad = bad if size is None else bad | ~torch.isfinite(size)
            self.meter.scatter(self._global(of), bad, backward=gradient is not None, asked=asked)
            return plain
        self.meter.calls += 1
        segment = self._segment
        segment.forwards += 1
        if length is not None:
            segment.asked.note(length, length)
        if sizes is not None:
            segment.answers.note(sizes, sizes)
        segment.backwards += gradient is not None
        if extremes is not None:
            segment.gradients.note(*extremes)
        return plain


def _suspects(x: Tensor, answer: Tensor) -> Tensor | None:
    """The sizes of the inputs [n] where the answer may be non-finite because its input is; else None.

    On a CPU, where all is well, a look at the sizes' memory that costs no tensor operation; elsewhere it would wait for
    the device, the sizes of the inputs do not.
    """
    if not x.is_floating_point() or plainly_finite(answer):
        return None
    return row_size(x.detach())


def _excused(values: Tensor, asked: Tensor | None) -> Tensor:
    """Values per candidate [n], with 1 for those whose input was not finite: they say nothing of the victim."""
    return values if asked is None else torch.where(asked, torch.ones_like(values), values)


def _extremes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest and the smallest value of every row. On a CPU a norm would take ten times as long."""
    features = tuple(range(1, values.ndim))
    return values.amax(features), values.amin(features)


class _Differentiable(nn.Module):
    """See `MeteredOracle.differentiable`."""

    def __init__(self, oracle: MeteredOracle, origin: Tensor) -> None:
        super().__init__()
        self._oracle = oracle
        self._origin = origin.detach().flatten(1)
        self._before: Tensor | None = None
        self.place = nn.Parameter(origin.new_empty(0), requires_grad=False)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Answers [n, ...]; with gradient where x requires one and the threat model grants it."""
        oracle = self._oracle
        if x.is_floating_point():
            x = x.to(self._origin.dtype)  # some packages compute in float64 and hand that over
        follows = x.requires_grad and torch.is_grad_enabled()
        if oracle.access < (Access.GRADIENTS if follows else Access.LABELS):
            raise AccessDenied(
                f"the attack asked for {'a gradient' if follows else 'an answer'}; this threat model grants "
                f"{oracle.access.name.lower()} only"
            )
        length = row_size(x.detach())
        asked = None if bool(torch.isfinite(length).all()) else ~torch.isfinite(length)
        of = None if len(x) == oracle.rows else self._rows_of(x.detach().flatten(1), asked)
        oracle._spend(x, of, 2 if follows else 1)
        with frozen(*oracle.model.modules() if isinstance(oracle.model, Modular) else ()):
            if follows:
                x = x.view_as(x)
                x.register_hook(lambda gradient: oracle._passed_back(gradient, of, asked))  # type: ignore[no-untyped-call]
            answer = oracle._forward(x, None, oracle._keys(x, of, [x])[0])
        oracle._note(x, answer.detach(), of)
        if oracle.access == Access.LABELS and answer.ndim > 1:
            return nn.functional.one_hot(answer.argmax(1), answer.shape[1]).to(answer.dtype)
        if follows and not answer.requires_grad:
            oracle.meter.detached = True
        return answer

    def _rows_of(self, x: Tensor, asked: Tensor | None) -> Tensor:
        """The rows [n] that flat candidates belong to: the nearest, and where NaN has no nearest, those of before."""
        of = torch.cdist(x, self._origin).argmin(1)
        if asked is not None and self._before is not None and len(self._before) == len(of):
            of = torch.where(asked, self._before, of)
        self._before = of
        return of
