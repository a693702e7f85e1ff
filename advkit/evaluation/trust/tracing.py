"""A case's attack on its way through the engine, traced: margin and success of every point that it queries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Attack, Outcome, Record
from advkit.evaluation.run.attempts import attacked_model
from advkit.evaluation.run.batch import Round
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import LocalEngine
from advkit.evaluation.run.judge import decide, finite
from advkit.evaluation.trust import indicators


@dataclass(frozen=True)
class TracedRun:
    """Records of a run, by row id, and what the traces say of the rows that were attacked.

    unfinished:        whether the row's loss was still falling when the attack ended (I4)
    silent:            whether the attack queried a point that reached the goal and returned another (I3); empty where
                       the attack's oracle does not decide
    not_transferred:   whether the victim decides otherwise on a point that reached the goal on the model that the
                       attack queried (I5); empty where that is the victim
    reached_at_source: on how many rows the goal was reached on that model
    margins:           [T, rows] of every batch: best margin of each query, infinite where a row was not queried
    """

    records: Mapping[str, Record]
    unfinished: Mapping[str, bool]
    silent: Mapping[str, bool]
    not_transferred: Mapping[str, bool]
    reached_at_source: int
    margins: Sequence[Tensor]

    def mean_margin(self) -> list[float]:
        """The best margin so far after each query, averaged over the rows that were queried."""
        length = max((len(margins) for margins in self.margins), default=0)
        if not length:
            return []
        padded = [nn.functional.pad(each, (0, 0, 0, length - len(each)), value=torch.inf) for each in self.margins]
        best = torch.cummin(torch.cat(padded, 1), 0).values
        best = best[:, torch.isfinite(best).all(0)]
        return [float(value) for value in best.mean(1)] if best.shape[1] else []


def traced(case: Case) -> TracedRun:
    """Run the case's attack on all rows and trace it."""
    assert case.attack is not None
    attack = _TracedAttack(case.attack)
    records: dict[str, Record] = {}
    batches = []
    for each in LocalEngine().attack(replace(case, attack=attack), {}):
        records |= {record.id: record for record in each.records}
        rows = [
            i for i, r in enumerate(each.records) if r.outcome != Outcome.WRONG and "clean_non_finite" not in r.notes
        ]
        traces = attack.take_traces()
        # A batch that was halved around a row that raised has several traces, and none of all its rows.
        if len(traces) == 1 and traces[0].rows == len(rows):
            batches.append(_traced_batch(case, each, rows, traces[0]))
    return TracedRun(
        records,
        {row: flag for batch in batches for row, flag in batch.unfinished.items()},
        {row: flag for batch in batches for row, flag in batch.silent.items()},
        {row: flag for batch in batches for row, flag in batch.not_transferred.items()},
        sum(batch.reached_at_source for batch in batches),
        [margins for batch in batches for margins in batch.margins],
    )


def _traced_batch(case: Case, attacked: Round, rows: Sequence[int], trace: _Trace) -> TracedRun:
    """What one trace says of the rows of a batch that were attacked."""
    records = {attacked.records[i].id: attacked.records[i] for i in rows}
    margins = trace.margins()
    silent: dict[str, bool] = {}
    not_transferred: dict[str, bool] = {}
    reached_at_source = 0
    model, decides = attacked_model(case)
    if decides:
        returned = torch.tensor([record.reached for record in records.values()])
        silent = _by_row(records, indicators.silent_success(trace.reached(), returned))
    if model is not case.victim:
        assert attacked.adversarial is not None
        points = attacked.adversarial[torch.tensor(rows, device=attacked.adversarial.device)]
        output = MeteredOracle(model, len(rows), Access.SCORES, lanes=Lanes.fitting(points))(points)
        reached = trace.goal.reached(output).cpu()
        victim = torch.tensor([-1 if r.adversarial is None else r.adversarial for r in records.values()])
        not_transferred = _by_row(records, indicators.transfer_failure(decide(output).cpu(), victim, reached))
        reached_at_source = int(reached.sum())
    unfinished = _by_row(records, indicators.incomplete_optimization(margins))
    return TracedRun(records, unfinished, silent, not_transferred, reached_at_source, [margins])


def _by_row(ids: Iterable[str], flags: Tensor) -> dict[str, bool]:
    return dict(zip(ids, flags.tolist(), strict=True))


class _Trace:
    """Margin and success of every point that one call of an attack queried, per row.

    The margin stands for the attack's loss, so that attacks with different losses, or none, are measured alike.
    """

    def __init__(self, goal: Any, rows: int) -> None:
        self.goal = goal
        self.rows = rows
        self._margins: list[Tensor] = []
        self._reached: list[Tensor] = []

    def add(self, output: Tensor, index: Tensor, goal: Any) -> None:
        margin = goal.under("margin").loss(output).detach().double()
        reached = goal.reached(output) & finite(output)
        # Several candidates of one row count by their best; rows that were not queried stay at infinity.
        best = torch.full((self.rows,), torch.inf, dtype=torch.float64, device=margin.device)
        best.scatter_reduce_(0, index, margin.nan_to_num(nan=torch.inf), "amin")
        any_reached = torch.zeros(self.rows, dtype=torch.long, device=margin.device)
        any_reached.scatter_reduce_(0, index, reached.long(), "amax")
        self._margins.append(best)
        self._reached.append(any_reached.bool())

    def margins(self) -> Tensor:
        """[T, rows]; infinite where a row was not queried."""
        return torch.stack(self._margins).cpu() if self._margins else torch.empty(0, self.rows, dtype=torch.float64)

    def reached(self) -> Tensor:
        """Bool [T, rows]."""
        return torch.stack(self._reached).cpu() if self._reached else torch.zeros(0, self.rows, dtype=torch.bool)


class _TracingOracle:
    """An oracle that notes every output in a trace; the attack sees no difference."""

    def __init__(self, inner: Any, trace: _Trace, index: Tensor, goal: Any) -> None:
        self._inner = inner
        self._trace = trace
        self._index = index
        self._goal = goal

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, x: Tensor, of: Tensor | None = None) -> Tensor:
        output: Tensor = self._inner(x, of)
        self._note(output, of)
        return output

    def gradient(self, x: Tensor, goal: Any, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        loss, gradient, output = self._inner.gradient(x, goal, of)
        self._note(output, of)
        return loss, gradient, output

    def gradients(self, x: Tensor, goals: Any) -> tuple[Tensor, Tensor, Tensor]:
        losses, gradients, output = self._inner.gradients(x, goals)
        self._note(output, None)
        return losses, gradients, output

    def take(self, rows: Tensor) -> _TracingOracle:
        return _TracingOracle(self._inner.take(rows), self._trace, self._index[rows], self._goal.take(rows))

    def _note(self, output: Tensor, of: Tensor | None) -> None:
        if of is None:
            self._trace.add(output, self._index, self._goal)
        else:
            self._trace.add(output, self._index[of], self._goal.take(of))


class _TracedAttack:
    """An attack, and a trace of each of its calls until they are taken."""

    def __init__(self, attack: Attack) -> None:
        self._attack = attack
        self._traces: list[_Trace] = []

    @property
    def needs(self) -> Access:
        return Access(self._attack.needs)

    def __call__(self, oracle: Any, x: Tensor, goal: Any, threat: Any, rng: Any, /) -> Any:
        trace = _Trace(goal, len(x))
        index = torch.arange(len(x), device=x.device)
        returned = self._attack(_TracingOracle(oracle, trace, index, goal), x, goal, threat, rng)
        self._traces.append(trace)
        return returned

    def take_traces(self) -> list[_Trace]:
        """The traces since the last call of this."""
        traces, self._traces = self._traces, []
        return traces
