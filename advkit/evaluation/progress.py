"""What a terminal or a notebook shows while a run goes on: how far it is, what is still robust, how long it takes.

One line for each case; below it, of a suite the stage that runs and what the stages before it left, of a search for
suffixes its step, its loss and the successes so far. Other work, such as a training, has one line. `screen` is where
they are shown.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from advkit.core.protocols import Label, Outcome, Record, Suite
from advkit.core.watching import SearchStep
from advkit.evaluation.certificates import LABEL as CERTIFICATES
from advkit.evaluation.counts import contested, was_right
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.speed import planned_passes
from advkit.evaluation.scenarios.evasion import labelled, schedule, stages_ahead
from advkit.evaluation.screen import Works, clock, line

_LEAST = 0.005  # done before a rest of time is told: the first call of a model is no measure


@runtime_checkable
class GoesOn(Protocol):
    """A search that may end at its first success, and else spends all of its steps."""

    @property
    def stop_on_success(self) -> bool: ...
    @property
    def most_steps(self) -> int: ...


@dataclass
class _Batch:
    """The batch that is under way in this process."""

    label: Label
    rows: int
    passes: float
    passed: int = 0
    searches: dict[tuple[int, ...], SearchStep] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """How much of it is done, about: by the steps of its searches, else by its passes."""
        if self.searches and all(step.steps or step.over for step in self.searches.values()):
            done = sum(
                len(rows) * (1.0 if step.over else min(1.0, step.step / step.steps))
                for rows, step in self.searches.items()
            )
            return min(1.0, done / self.rows)
        return min(1.0, self.passed / max(1.0, self.rows * self.passes))

    @property
    def succeeded(self) -> int:
        """Samples whose search believes that it has reached the goal."""
        return sum(len(rows) for rows, step in self.searches.items() if step.reached)

    @property
    def step(self) -> str:
        """How far the searches under way are: the step of the furthest, and the lowest loss."""
        going = [step for step in self.searches.values() if not step.over] or list(self.searches.values())
        last = max(going, key=lambda step: step.step)
        losses = [step.loss for step in going if step.loss is not None]
        step = f"step {min(last.step, last.steps)} of {last.steps}" if last.steps else f"step {last.step}"
        return step + (f", loss {min(losses):.3f}" if losses else "")


class CaseProgress:
    """How far one case is, from its records and from what its batch under way tells."""

    def __init__(self, case: Case) -> None:
        self.case, self.begun = case, time.monotonic()
        self.suite = isinstance(case.attack, Suite)
        self.done, self.total = 0, 0
        self.batch: _Batch | None = None
        self.stage = ""
        self.left: dict[str, tuple[int, int, float]] = {}  # of a stage that is over: robust, seen, seconds
        self._robust: dict[str, bool] = {}
        self._standing = 0
        self._ended: Counter[tuple[str, Outcome]] = Counter()
        self._stage_begun = self.begun
        self._succeeded, self._searched = 0, 0  # of the batches that are over
        self._found: float | None = None  # the share that lay on record when the run began

    def add(self, records: Sequence[Record], total: int) -> None:
        """New records; `total` of all as far as is known."""
        for record in records:
            self._enter(record.stage)
            # A sample is robust as long as no attack has broken it.
            good = was_right(record) and (record.outcome in (Outcome.ROBUST, Outcome.INVALID) or not contested(record))
            before = self._robust.get(record.id)
            self._robust[record.id] = good and before is not False
            self._standing += self._robust[record.id] - bool(before)
            self._ended[record.stage, record.outcome] += 1
        self.done, self.total = self.done + len(records), total
        if self._found is None and self.batch is None:  # a resumed run
            self._found = self.share
        if self.batch is not None and self.batch.searches:
            self._succeeded += self.batch.succeeded
            self._searched += self.batch.rows
        self.batch = None

    def begins(self, batch: _Batch) -> None:
        """A batch is under way."""
        self._enter(batch.label.stage)
        self._found = 0.0 if self._found is None else self._found
        self.batch = batch

    def _enter(self, stage: str) -> None:
        if stage != self.stage:
            if self.stage:
                spent = time.monotonic() - self._stage_begun
                self.left[self.stage] = (self._standing, len(self._robust), spent)
            self.stage, self._stage_begun = stage, time.monotonic()

    @property
    def share(self) -> float:
        """How much of the case is done, about, in [0, 1]; stages of a suite count by the passes they plan."""
        under_way = 0.0 if self.batch is None else self.batch.share * self.batch.rows
        if not self.suite:
            return min(1.0, (self.done + under_way) / max(1, self.total or getattr(self.case, "size", 1)))
        done, total = 0.0, 0.0
        for stage, rows in stages_ahead(self.case, self._ended):
            name, cost = labelled(self.case, stage).stage, planned_passes(stage.attack)
            ended = sum(number for (each, _), number in self._ended.items() if each == name)
            done += cost * (ended + (under_way if name == self.stage else 0.0))
            total += cost * rows
        return min(1.0, done / total) if total else 0.0

    @property
    def seconds_left(self) -> float | None:
        """About how long it still takes; None before that can be told, 0 at the end."""
        if self.total and self.done >= self.total:
            return 0.0
        share, found = self.share, self._found or 0.0
        if share - found < _LEAST:
            return None
        return (time.monotonic() - self.begun) * (1 - share) / (share - found)

    @property
    def standing(self) -> str:
        """How many of the samples seen so far still stand."""
        word = "certified" if self.case.label.attack == CERTIFICATES else "robust"
        return f"{self._standing} of {len(self._robust)} {word}" if self._robust else ""

    def lines(self) -> Iterator[str]:
        """What is shown of it, top down."""
        for name, (standing, seen, seconds) in self.left.items():
            yield f"    {name}: left {standing} of {seen} robust, {clock(seconds)}"
        yield line(str(self.case.label), self.share, self.seconds_left, self.begun, self.standing)
        if self.total and self.done >= self.total:
            return
        if self.suite and self.stage:
            names = [labelled(self.case, stage).stage for stage in schedule(self.case.attack)]
            place = f"stage {names.index(self.stage) + 1} of {len(names)}, " if self.stage in names else ""
            yield f"    {place}{self.stage} on {self._of_stage()} samples"
        if self.batch is not None and self.batch.searches:
            succeeded, searched = self._succeeded + self.batch.succeeded, self._searched + self.batch.rows
            yield f"    {self.batch.step}, success so far on {succeeded} of {searched} prompts"

    def _of_stage(self) -> int:
        return next(
            (
                rows
                for stage, rows in stages_ahead(self.case, self._ended)
                if labelled(self.case, stage).stage == self.stage
            ),
            0,
        )


def announcement(case: Case) -> str:
    """What is said before a run that is dearer than need be; "" for any other."""
    attack: Any = case.attack
    if isinstance(attack, Suite):
        return _of_suite(case)
    if isinstance(attack, GoesOn) and attack.most_steps and not attack.stop_on_success:
        name = str(case.label).partition(":")[0]
        return (
            f"{case.label}: {attack.most_steps} steps for every prompt, also after a success. "
            f"`{name}:stop_on_success=true` ends each search at its first success."
        )
    return ""


def _of_suite(case: Case) -> str:
    from advkit.attacks.suites import AutoAttack, Thorough  # here, for most runs have no use for it

    attack: Any = case.attack
    if not isinstance(attack, AutoAttack):
        return ""
    passes, instead = planned_passes(attack), planned_passes(Thorough())
    return (
        f"{case.label}: about {passes:,.0f} passes for every sample that stays robust, in {len(attack.stages())} "
        f"stages. The suite `auto` plans about {instead:,.0f}, for AutoAttack's robust accuracy or less."
    )


class Bars(Works):
    """Shows how far the cases of a run are, on standard error or in a notebook's cell; a context manager.

    progress: None shows it where standard error is a terminal, and in notebooks; True always, False never

    Inside the block it hears of every case that is run, and of other work (`core.watching`).
    """

    def __init__(self, progress: bool | None = None) -> None:
        super().__init__(progress)
        self.cases: dict[str, CaseProgress] = {}
        self._said: list[str] = []

    def starts(self, title: str, case: Case) -> None:
        """A case is about to run."""
        said = announcement(case)
        self._said += [said] if said and said not in self._said else []
        self.cases.pop(title, None)
        self.cases[title] = CaseProgress(case)

    def recorded(self, records: Sequence[Record], total: int) -> None:
        """Advance the case that was started last."""
        self._last().add(records, total)
        self._draw()

    def begins(self, label: Label, rows: int, passes: float) -> None:
        """A batch of the case that was started last is under way."""
        if self.cases:
            self._last().begins(_Batch(label, rows, passes))
            self._draw()

    def passed(self, rows: int) -> None:
        """Samples went through a model."""
        if (batch := self._batch()) is not None:
            batch.passed += rows
            self._draw()

    def searched(self, rows: Sequence[int], step: SearchStep) -> None:
        """A step of a search."""
        if (batch := self._batch()) is not None:
            batch.searches[tuple(rows)] = step
            self._draw()

    def _last(self) -> CaseProgress:
        return next(reversed(self.cases.values()))

    def _batch(self) -> _Batch | None:
        return self._last().batch if self.cases else None

    def lines(self) -> list[str]:
        """What is shown now."""
        return [*self._said, *super().lines(), *(text for each in self.cases.values() for text in each.lines())]


__all__ = ["Bars", "CaseProgress", "announcement"]
