"""Progress bars that show robust accuracy so far, on standard error."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from advkit.core.protocols import Outcome, Record
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
        self._standing: dict[str, dict[tuple[str, str], bool]] = {}

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
            name = case.label if case.attack is not None else f"{case.threat.scenario} {case.specs['threat_model']}"
            shown = shorten(str(name), 40)
            self._bars[title] = self._progress.add_task(shown, total=total, far="")
            self._standing[title] = {}
        held = self._standing[title]
        grid = case.attack is None
        for record in records:
            # A row under a suite stands as long as no stage has felled it; a grid's images are counted one by one.
            key = (record.attack if grid else "", record.id)
            good = record.adversarial == record.label if grid else record.outcome in (Outcome.ROBUST, Outcome.INVALID)
            held[key] = good and held.get(key, True)
        word = "accuracy on transferred images" if grid else "robust accuracy"
        share = 100 * sum(held.values()) / max(1, len(held))
        self._progress.update(self._bars[title], advance=len(records), total=total, far=f"{word} so far {share:.1f} %")
