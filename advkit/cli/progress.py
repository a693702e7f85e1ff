"""Progress bars that show robust accuracy so far, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from advkit.core.protocols import Outcome, Record
from advkit.evaluation.certificates import LABEL as CERTIFICATES
from advkit.evaluation.counts import contested, was_right
from advkit.evaluation.report.text import shorten


class Bars:
    """One bar per case; `watch` is what `evaluate` calls.

    hidden: no bar at all (machine output)
    """

    def __init__(self, *, hidden: bool = False) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[far]}", markup=False),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=hidden,
        )
        self._bars: dict[str, TaskID] = {}
        self._robust: dict[str, dict[str, bool]] = {}
        self._count: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars:
            self._progress.stop()

    def watch(self, title: str, case: Any, records: list[Record], total: int) -> None:
        """Advance a case's bar."""
        if not self._bars:  # not before there is something to show: an error says its one line alone
            self._progress.start()
        if title not in self._bars:
            self._bars[title] = self._progress.add_task(shorten(str(case.label), 40), total=total, far="")
            self._robust[title], self._count[title] = {}, 0
        robust = self._robust[title]
        for record in records:
            # A sample is robust as long as no attack has broken it.
            good = was_right(record) and (record.outcome in (Outcome.ROBUST, Outcome.INVALID) or not contested(record))
            before = robust.get(record.id)
            robust[record.id] = good and before is not False
            self._count[title] += robust[record.id] - bool(before)
        percentage = 100 * self._count[title] / max(1, len(robust))
        what = "certified" if case.label.attack == CERTIFICATES else "robust accuracy"
        text = f"{what} so far {percentage:.1f} %"
        self._progress.update(self._bars[title], advance=len(records), total=total, far=text)
