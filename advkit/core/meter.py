"""What an oracle's calls cost and show, row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


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
