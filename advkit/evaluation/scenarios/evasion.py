"""Who moves when: evasion of one victim, and the grid of public surrogates times attacks.

A scenario is all that differs between settings; the harness asks it to play and stores what it yields.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.attacks import ATTACKS
from advkit.core.errors import AdvkitError, BudgetExhausted
from advkit.core.oracle import Lanes, MeteredOracle
from advkit.core.protocols import Access, Batch, Outcome, Record
from advkit.core.rng import RowRng
from advkit.evaluation.run.batch import Played, models_attacked, on_device, own_randomness, played_alone
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.speed import FastViews, planned_passes
from advkit.evaluation.run.store import Store
from advkit.evaluation.run.workers import Crew

log = logging.getLogger("advkit")


class Without:
    """Rows to leave out of one attack's batches: those on record, and those that the stage does not take."""

    def __init__(self, done: Mapping[str, Record], label: str, taken: Container[str] | None = None) -> None:
        self.done, self.label, self.taken = done, label, taken

    def __contains__(self, row: object) -> bool:
        name = str(row)
        return Store.key(self.label, name) in self.done or (self.taken is not None and name not in self.taken)

    def done_or_not(self) -> Without:
        """The same without a look at what is on record."""
        return Without({}, self.label, self.taken)


class Evasion:
    """The attacker changes inputs of a finished model; one attack or a suite of them, judged row by row."""

    name: ClassVar[str] = "evasion"

    def accepts(self, case: Case) -> str | None:
        """None, or why this case can't be played."""
        if case.attack is None:
            return "this threat model needs an attack: name one with --attack"
        if callable(getattr(case.attack, "start", None)):
            return f"{case.label} is an attack on streams; give it one with --threat-model online"
        needs, granted = Access(case.attack.needs), Access(case.threat.access)
        if needs > granted:
            return (
                f"the attack {case.label} needs {needs.name.lower()}; the threat model grants {granted.name.lower()}: "
                "choose an attack that asks for less, or grant more with access=..."
            )
        if hasattr(case.attack, "stages") and case.surrogates:
            return (
                f"the suite {case.label} follows rows by the victim's verdicts; under transfer name one of its attacks"
            )
        return None

    def expected(self, case: Case, records: Mapping[str, Record]) -> int:
        """How many records the finished case has, as far as these tell: a suite's stages take what the last ones left.

        An escalation counts from its first record on.
        """
        if not hasattr(case.attack, "stages"):
            return case.n
        held: dict[str, list[Record]] = {}
        for record in records.values():
            held.setdefault(record.attack, []).append(record)
        stages = case.attack.stages()
        escalated = any(f"{case.label}/{stage.name}" in held for stage in stages if stage.when == "escalated")
        total, standing = 0, case.n
        for stage in stages:
            own = held.get(f"{case.label}/{stage.name}", [])
            if own or ((stage.when == "always" or escalated) and standing > stage.above * case.n):
                share = standing if stage.share >= 1 else max(stage.least, math.ceil(stage.share * standing))
                total += max(len(own), min(standing, share))
            standing -= sum(record.outcome in (Outcome.WRONG, Outcome.BROKEN) for record in own)
        return total

    def rounds(self, case: Case, done: Mapping[str, Record], crew: Crew | None = None) -> Iterator[Played]:
        """Records, origins and returned inputs batch by batch, in the task's order."""
        if hasattr(case.attack, "stages"):
            yield from _cascade(case, done, crew)
        else:
            yield from single_attack(case, Without(done, case.label), crew)


def single_attack(
    case: Case, skip: Container[str] = (), crew: Crew | None = None, lanes: Callable[[], Lanes] | None = None
) -> Iterator[Played]:
    """One attack on the rows whose ids are not skipped; batch by batch, in the task's order.

    lanes: tells the shapes of the calls where several attacks on the same models share them; None probes

    An attack that makes something of all rows together gets all of them, those on record too where a run that was cut
    short left some out: what is on record is not yielded again.
    """
    batches = case.task.batches(case.batch_size, skip=skip, n=case.n)
    first = next(batches, None)
    if first is None:
        return
    together = bool(getattr(case.attack, "together", False))
    if together:
        everybody = skip.done_or_not() if isinstance(skip, Without) else skip
        batches = case.task.batches(case.n, skip=everybody, n=case.n)
        first = next(batches)
    case = with_views(case)
    shapes = lanes_of(case) if lanes is None else lanes()
    waiting = chain([first], batches)
    plays = crew.play(case, waiting, shapes) if crew is not None else (played_alone(case, b, shapes) for b in waiting)
    if not together:
        yield from plays
        return
    for records, origin, returned in plays:
        new = [i for i, record in enumerate(records) if record.id not in skip]
        yield [records[i] for i in new], origin[new], returned[new]


def _cascade(case: Case, done: Mapping[str, Record], crew: Crew | None) -> Iterator[Played]:
    """A suite, stage by stage over all rows; a stage takes rows that stood after every stage before it.

    Which rows a stage takes follows from the records alone, so a resumed run takes the same.
    """
    case = with_views(case)
    lanes = functools.cache(functools.partial(lanes_of, case))
    held = dict(done)
    order = [row for batch in case.task.batches(1024, n=case.n) for row in batch.ids]
    standing = dict.fromkeys(order, math.inf)
    escalated = False
    for stage in case.attack.stages():
        if (stage.when == "escalated" and not escalated) or len(standing) <= stage.above * len(order):
            continue
        label = f"{case.label}/{stage.name}"
        taken = taken_by(stage, standing, case.seed)
        # The search of a fast view is blind where its precision ends: those rows it is spared.
        blind = case.speed.resolution
        exact = frozenset(row for row in taken if standing[row] <= blind) if blind else frozenset()
        cell = replace(case, attack=stage.attack, label=label, exact=exact)
        for records, origin, returned in single_attack(cell, Without(held, label, taken), crew, lanes):
            held.update((Store.key(label, record.id), record) for record in records)
            yield records, origin, returned
        felled, stood_for = [], len(standing) if stage.by == "nearest" else len(taken)
        for row in taken:
            record = held[Store.key(label, row)]
            if record.outcome in (Outcome.WRONG, Outcome.BROKEN):
                stood = standing.pop(row)
                if record.outcome == Outcome.BROKEN:
                    felled.append(stood)
            elif record.closeness is not None:
                standing[row] = min(standing[row], record.closeness)
        escalated |= stage.alarmed(felled, stood_for)


def taken_by(stage: Any, standing: Mapping[str, float], seed: int) -> frozenset[str]:
    """The rows that a stage takes of those standing: all, the share nearest to the boundary, or a drawn share."""
    if stage.share >= 1:
        return frozenset(standing)
    most = min(len(standing), max(stage.least, math.ceil(stage.share * len(standing))))

    def rank(row: str) -> tuple[float, str]:
        word = hashlib.sha256(f"{seed}|{stage.name}|{row}".encode()).hexdigest()
        return (standing[row] if stage.by == "nearest" else 0.0, word)

    return frozenset(sorted(standing, key=rank)[:most])


class Grid:
    """TAPM: every attack on every public surrogate, each returned image shown to the victim (arXiv 2310.17645).

    The victim is asked only for verdicts. All rows are attacked, also those it gets wrong untouched, because the grid's
    accuracies count every image.
    """

    name: ClassVar[str] = "grid"

    def accepts(self, case: Case) -> str | None:
        """None, or why this case can't be played."""
        if not case.surrogates:
            return f"no public surrogates for task {case.task.name}: name them with sources=..., e.g. zoo:NAME"
        return None

    def cells(self, case: Case) -> list[Case]:
        """One evasion case per (surrogate, attack)."""
        return [
            replace(
                case,
                attack=attack,
                threat=case.threat.cell(name),
                surrogates=((name, source),),
                label=f"{label}@{name}",
                everyone=True,
            )
            for name, source in case.surrogates
            for label, attack in case.threat.algorithms(ATTACKS.build)
        ]

    def expected(self, case: Case, records: Mapping[str, Record]) -> int:
        """How many records a finished case has."""
        return case.n * len(self.cells(case))

    def rounds(self, case: Case, done: Mapping[str, Record], crew: Crew | None = None) -> Iterator[Played]:
        """Records, origins and returned inputs cell by cell."""
        for cell in self.cells(case):
            yield from single_attack(cell, Without(done, cell.label), crew)


def lanes_of(case: Case) -> Lanes:
    """Shapes in which every model of the case answers the same bits for a row in any batch.

    Always probed on the task's first rows, so that a resumed run chooses the same. A victim that the attacker may not
    differentiate is not differentiated here either.
    """
    first = _first_rows(case)
    probes = [(case.victim, not case.surrogates), *((model, True) for _, model in case.surrogates)]
    with own_randomness(case.device, "lanes"):
        found = [Lanes.probed(model, first, backward) for model, backward in probes]
        if case.views is not None:
            found += [case.views.lanes(*each, first, backward) for *each, backward in models_attacked(case)]
    return max(found, key=lambda lanes: lanes.multiple)


def _first_rows(case: Case) -> Tensor:
    first: Tensor = on_device(next(iter(case.task.batches(64, n=min(64, len(case.task))))), case.device).x
    return first


def with_views(case: Case, file: Path | None = None) -> Case:
    """The case with the views that its speed asks for; itself in full precision, or where it has them.

    file: where what is settled is read from, or written to
    """
    if not case.speed.switches or case.views is not None:
        return case
    if file is not None and file.exists():
        return replace(case, views=FastViews.load(file))
    cells = Grid().cells(case) if case.attack is None else [case]
    passes = sum(planned_passes(cell.attack) for cell in cells) / (len(case.surrogates) if case.attack is None else 1)
    with own_randomness(case.device, "speed"):
        views = FastViews.settle(case.speed, models_attacked(case), _first_rows(case), passes * case.n)
    if file is not None:
        views.save(file)
    return replace(case, views=views)


class _Asked(Exception):
    """An attack came as far as its second question, or wanted to look inside the model."""


class _Curtain:
    """Stands where a model would: answers the first question as the untouched row was answered, with gradient zero."""

    lanes: ClassVar[Lanes] = Lanes(1, 1)
    tokens: ClassVar[int] = 0

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer
        self.left = int(answer.is_floating_point() and bool(torch.isfinite(answer).all()))

    def __call__(self, x: Tensor) -> Tensor:
        if not self.left:
            raise _Asked
        self.left -= 1
        return self.answer.expand(len(x), -1) + 0.0 * x.flatten(1).sum(1, keepdim=True)

    def __getattr__(self, name: str) -> Any:
        raise _Asked


def rehearse(case: Case, batch: Batch, clean: Tensor) -> None:
    """Start every attack of the case on one row and end it at its second question: no pass through any model.

    By then it has taken a step. An attack that refuses its settings, goal or threat model would refuse them on every
    row; that is a mistake of the request, raised here before anything is written. Whatever else it raises is for the
    row's record.
    """
    row = torch.zeros(1, dtype=torch.long, device=batch.x.device)
    rng = RowRng.from_ids(case.seed, batch.ids, device=case.device).at("rehearsal")
    goal = case.rule(batch.labels, clean, rng.at("goal")) if batch.labels is not None else batch.goal
    for each in Grid().cells(case) if case.attack is None else [case]:
        curtain = _Curtain(clean[:1])
        oracle = MeteredOracle(
            curtain, 1, each.threat.access, each.threat.queries, decides=True, lanes=Lanes(1, 1), data=each.data
        )
        with suppress(_Asked):
            try:
                each.attack(oracle, batch.x[row], goal.take(row), each.threat, rng.take(row))
            except BudgetExhausted:
                if curtain.left:
                    raise
            except (AdvkitError, _Asked):
                raise
            except Exception:
                log.debug("the rehearsal of %s raised", each.label, exc_info=True)
