"""How near an attack had come after so many queries, row by row: the trace that records keep of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PER_DECADE = 10
"""Numbers of queries between 10 and 100, between 100 and 1,000, and so on, after which the distance is kept."""


def marks_until(queries: int) -> list[int]:
    """The numbers of queries after which distances are kept: evenly spread in their logarithm, the budget the last."""
    steps = range(3, 20 * PER_DECADE)
    return [*dict.fromkeys(mark for step in steps if (mark := round(10 ** (step / PER_DECADE))) < queries), queries]


class Courses:
    """The least distances of the active rows after fixed numbers of queries.

    marks: numbers of queries, ascending, long [K]; spent: queries that each row has asked, long [n]
    away:  the least distance known by each mark [n, K]; infinite where there was none, or the row is not so far

    A mark that falls inside a call to the victim gets what was known before that call.
    """

    def __init__(self, marks: Tensor, passed: Tensor, away: Tensor) -> None:
        self.marks, self._passed, self.away = marks, passed, away

    @classmethod
    def of(cls, rows: Tensor, queries: int) -> Courses:
        """Empty ones of rows [n, ...] that may ask so many queries."""
        marks = torch.tensor(marks_until(queries), device=rows.device)
        passed = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        return cls(marks, passed, rows.new_full((len(rows), len(marks)), torch.inf))

    def take(self, rows: Tensor) -> Courses:
        """Those of some rows, long."""
        return Courses(self.marks, self._passed[rows], self.away[rows])

    def extend(self, spent: Tensor, before: Tensor, after: Tensor) -> None:
        """Take in a call: queries asked by now [n], and the least distances before and after it [n]."""
        passed = torch.bucketize(spent, self.marks, right=True)
        if bool((passed > self._passed).any()):
            place = torch.arange(len(self.marks), device=spent.device)
            now = (place >= self._passed[:, None]) & (place < passed[:, None])
            known = torch.where(self.marks == spent[:, None], after[:, None], before[:, None])
            self.away = torch.where(now, known, self.away)
            self._passed = passed

    def told(self, row: int) -> list[dict[str, Any]]:
        """The steps of a row for its record: a mark where its distance fell, and the last that it passed."""
        passed = int(self._passed[row])
        steps: list[dict[str, Any]] = []
        pairs = zip(self.marks[:passed].tolist(), self.away[row, :passed].tolist(), strict=True)
        for place, (queries, away) in enumerate(pairs, 1):
            distance = float(f"{away:.6g}")
            if distance < torch.inf and (not steps or distance < steps[-1]["distance"] or place == passed):
                steps.append({"queries": queries, "distance": distance})
        return steps
