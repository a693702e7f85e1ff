"""Who moves when: evasion of one victim, and the grid of public surrogates times attacks.

A scenario is all that differs between settings; the harness asks it to play and stores what it yields.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.attacks import ATTACKS
from advkit.core.errors import AccessDenied, AdvkitError, BudgetExhausted, UsageError
from advkit.core.oracle import Lanes, MeteredOracle, frozen
from advkit.core.protocols import Access, Batch, Outcome, Record
from advkit.core.rng import RowRng
from advkit.evaluation.case import Case
from advkit.evaluation.fast import VICTIM, FastViews, planned_passes
from advkit.evaluation.store import Store
from advkit.evaluation.verdict import Judge, decide, finite
from advkit.evaluation.workers import Crew

log = logging.getLogger("advkit")

Played = tuple[list[Record], Tensor, Tensor]  # records, origins, returned inputs


@contextmanager
def own_randomness(device: str, *names: object) -> Iterator[None]:
    """Torch's global generators seeded by name inside the block and given back after it.

    Only victims with randomness of their own draw from them; advkit's draws are per row.
    """
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    word = hashlib.sha256("|".join(map(str, names)).encode()).digest()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int.from_bytes(word[:7], "big"))
        yield


class _Without:
    """Rows to leave out of one attack's batches: those on record, and those that the stage does not take."""

    def __init__(self, done: Mapping[str, Record], label: str, taken: Container[str] | None = None) -> None:
        self.done, self.label, self.taken = done, label, taken

    def __contains__(self, row: object) -> bool:
        name = str(row)
        return Store.key(self.label, name) in self.done or (self.taken is not None and name not in self.taken)

    def done_or_not(self) -> _Without:
        """The same without a look at what is on record."""
        return _Without({}, self.label, self.taken)


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
        """How many records the finished case has, as far as these tell (a suite's later stages take fewer rows)."""
        if not hasattr(case.attack, "stages"):
            return case.n
        stages = case.attack.stages()
        return max(case.n, len(records)) if len(stages) > 1 else case.n

    def rounds(self, case: Case, done: Mapping[str, Record], crew: Crew | None = None) -> Iterator[Played]:
        """Records, origins and returned inputs batch by batch, in the task's order."""
        if hasattr(case.attack, "stages"):
            yield from _cascade(case, done, crew)
        else:
            yield from single_attack(case, _Without(done, case.label), crew)


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
        everybody = skip.done_or_not() if isinstance(skip, _Without) else skip
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


def played_alone(case: Case, batch: Batch, lanes: Lanes) -> Played:
    """One batch with every model frozen and torch's generators put aside: nothing outside can tell that it ran."""
    modules = [m for model in (case.victim, *(s for _, s in case.surrogates)) for m in model.modules()]
    with frozen(*modules), own_randomness(case.device, case.seed, case.label, batch.ids[0]):
        return play_batch(case, on_device(batch, case.device), lanes)


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
        for records, origin, returned in single_attack(cell, _Without(held, label, taken), crew, lanes):
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
            yield from single_attack(cell, _Without(done, cell.label), crew)


def _streams() -> Any:
    from advkit.evaluation.streams import Stream  # plays its items by what stands here

    return Stream()


SCENARIOS: dict[str, Callable[[], Any]] = {"evasion": Evasion, "grid": Grid, "stream": _streams}


def scenario_of(case: Case) -> Any:
    """The scenario that the case's threat model names; raises UsageError when it does not accept the case."""
    scenario = SCENARIOS[case.threat.scenario]()
    reason = scenario.accepts(case)
    if reason:
        raise UsageError(reason)
    return scenario


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
            found += [case.views.lanes(*each, first, backward) for *each, backward in _attacked(case)]
    return max(found, key=lambda lanes: lanes.multiple)


def _first_rows(case: Case) -> Tensor:
    first: Tensor = on_device(next(iter(case.task.batches(64, n=min(64, len(case.task))))), case.device).x
    return first


def _attacked(case: Case) -> list[tuple[str, Any, bool]]:
    """Name and model of all that the attacks' oracles speak for, and whether gradients are asked of it."""
    if case.surrogates:
        return [(name, model, True) for name, model in case.surrogates]
    return [(VICTIM, attacked_model(case)[0], Access(case.threat.access) >= Access.GRADIENTS)]


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
        views = FastViews.settle(case.speed, _attacked(case), _first_rows(case), passes * case.n)
    if file is not None:
        views.save(file)
    return replace(case, views=views)


def fast_model(case: Case, x: Tensor) -> Any:
    """What the attack's oracle asks in place of the attacked model; None where the case has no speed switch left."""
    if case.views is None or all(text == "fp32" for text in case.views.chosen.values()):
        return None
    models = [case.views.of(name, model, x) for name, model, _ in _attacked(case)]
    if len(models) == 1:
        return models[0]
    from advkit.models.ensemble import Ensemble

    return Ensemble(models=models)


def on_device(batch: Batch, device: str) -> Batch:
    """The same batch there."""
    labels = None if batch.labels is None else batch.labels.to(device)
    twins = None if batch.twins is None else batch.twins.to(device)
    return replace(batch, x=batch.x.to(device), goal=batch.goal.to(device), labels=labels, twins=twins)


def attacked_model(case: Case) -> tuple[Any, bool]:
    """What the attack's oracle speaks for, and whether its answers are the verdict's."""
    if not case.surrogates:
        # The view is for differentiating; who may only ask, asks the victim as it is deployed.
        view = case.victim.attacker_view() if Access(case.threat.access) >= Access.GRADIENTS else case.victim
        exact = view is case.victim and not case.randomized
        return view, exact and not getattr(case.threat, "lattice", 0)
    if len(case.surrogates) == 1:
        return case.surrogates[0][1], False
    from advkit.models.ensemble import Ensemble

    return Ensemble(models=tuple(model for _, model in case.surrogates)), False


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


def play_batch(case: Case, batch: Batch, lanes: Lanes) -> Played:
    """Attack and judge one batch; a row that raises becomes an error record and the others go on.

    Under a speed switch a row is attacked a second time, in full precision and with the same random streams, where the
    fast view took it for fallen and the model itself does not; where it ended so near the boundary that the view can't
    tell its sides; and where the view answered NaN, gave no gradient or raised. The second run is what counts; the
    passes of both add up, the queries are those of the second alone.
    """
    x: Tensor = batch.x
    n = len(batch.ids)
    judge = Judge(case.victim, lanes, case.draws if case.randomized else 1)
    rng = RowRng.from_ids(case.seed, batch.ids, device=case.device)
    # Every attack on a row meets the same goal: what it is to reach does not depend on who tries.
    wanted, rng = rng.at("goal"), rng.at("attack", *_stream(case))

    broken_already, clean = judge.reached(x, batch.goal)
    sane = finite(clean)
    goal = case.rule(batch.labels, clean, wanted) if batch.labels is not None else batch.goal
    sound = (~broken_already & sane).cpu()
    # A grid counts every image; elsewhere a row that is wrong untouched has nothing left to lose.
    eligible = sane if case.everyone else ~broken_already & sane & ~goal.reached(clean)

    returned = x.clone()
    cost = torch.zeros(3, n, dtype=torch.long)
    met_non_finite = torch.zeros(n, dtype=torch.bool)
    no_gradient = torch.zeros(n, dtype=torch.bool)
    outside = torch.zeros(n, dtype=torch.bool)
    errors: dict[int, str] = {}
    trace: dict[int, tuple[dict[str, Any], ...]] = {}
    together = bool(getattr(case.attack, "together", False))
    model, decides = attacked_model(case)
    fast = fast_model(case, x)

    def attempt(chosen: Tensor, asked: Any) -> None:
        """Attack these rows; when they raise, find the culprits by halving."""
        oracle = MeteredOracle(
            asked, len(chosen), case.threat.access, case.threat.queries, decides, lanes, data=case.data
        )
        where = chosen.cpu()
        try:
            out = case.attack(oracle, x[chosen], goal.take(chosen), case.threat, rng.take(chosen))
        except (AccessDenied, UsageError, torch.OutOfMemoryError):
            raise  # nobody's row is at fault
        except Exception as error:
            if len(chosen) > 1 and not together:
                for half in chosen.tensor_split(2):
                    attempt(half, asked)
                return
            reason = str(error) if isinstance(error, AdvkitError) else f"{type(error).__name__}: {error}"
            errors.update(dict.fromkeys(where.tolist(), reason))
            log.debug("row %s raised", batch.ids[int(where[0])], exc_info=True)
        else:
            if out.shape == x[chosen].shape:
                returned[chosen] = out.detach().to(x.dtype)
            else:
                outside[where] = True
        meter = oracle.meter
        # A view that averages draws asks the victim once for each.
        per_answer = getattr(model, "passes", 1)
        cost[:2, where] += per_answer * torch.stack([meter.forwards, meter.backwards])
        cost[2, where] = per_answer * meter.queries
        met_non_finite[where] = meter.non_finite
        no_gradient[where] = meter.zero_gradient
        trace.update((row, meter.noted(i)) for i, row in enumerate(where.tolist()))
        if meter.tokens:
            case.spent[case.label] = case.spent.get(case.label, 0) + meter.tokens

    exact = torch.tensor([fast is None or row in case.exact for row in batch.ids], device=x.device)
    for chosen, asked in ((eligible & exact, model), (eligible & ~exact, fast)):
        if len(rows := chosen.nonzero().squeeze(1)):
            attempt(rows, asked)

    verdict = judge.judge(returned, x, goal, case.threat)
    refuted = torch.zeros(n, dtype=torch.bool)
    unsure = torch.zeros(n, dtype=torch.bool)
    if fast is not None:
        tried = (eligible & ~exact).cpu()
        open_rows = tried & ~verdict.reached
        unsure = open_rows & (met_non_finite | no_gradient)
        if decides_in(case):
            refuted, margin = _believed(fast, returned, goal, lanes, open_rows)
            refuted &= ~_believed(model, returned, goal, lanes, refuted)[0]
            near = verdict.closeness <= case.speed.resolution
            if model is case.victim:
                near |= verdict.margin <= 4 * (margin - verdict.margin).abs()
            unsure |= open_rows & near & ~margin.isnan()  # answers that are no scores have no margin
        unsure[[i for i in errors if tried[i]]] = True
        again = (refuted | unsure).nonzero().squeeze(1).to(x.device)
        if len(again):
            for i in again.tolist():
                errors.pop(i, None)
            returned[again] = x[again]
            attempt(again, model)
            verdict = judge.judge(returned, x, goal, case.threat)
    knows_victim = not case.surrogates
    labels = None if batch.labels is None else batch.labels.cpu()
    before = decide(clean).cpu()
    attacked = eligible.cpu()
    figures = judge.examine(verdict, returned, x, clean, goal, case.threat, batch.twins, rng.at("examine"))
    records = []
    for i, row in enumerate(batch.ids):
        if i in errors:
            outcome = Outcome.ERROR
        elif not sane[i]:
            outcome = Outcome.NON_FINITE
        elif outside[i]:
            outcome = Outcome.INVALID
        elif sound[i] and not attacked[i]:
            # The attacker's goal holds untouched although the answer is right (a target that is the row's own class).
            outcome = Outcome.WRONG
        else:
            outcome = verdict.outcome(i, bool(sound[i]), knows_victim and bool(met_non_finite[i]))
        notes = [
            name
            for name, holds in (
                ("clean_non_finite", not sane[i]),
                ("met_non_finite", met_non_finite[i]),
                ("zero_gradient", no_gradient[i]),
                ("outside_threat_model", outside[i] or not verdict.admitted[i]),
                (f"refuted_{case.speed.switches[0] if case.speed.switches else ''}", refuted[i]),
                ("again_in_fp32", unsure[i] and not refuted[i]),
            )
            if bool(holds)
        ]
        records.append(
            Record(
                id=row,
                attack=case.label,
                outcome=outcome,
                label=None if labels is None else int(labels[i]),
                clean=int(before[i]),
                adversarial=int(verdict.decision[i]),
                reached=bool(verdict.reached[i]),
                distance=_number(verdict.distance[i]),
                margin=_number(verdict.margin[i]),
                closeness=_number(verdict.closeness[i]),
                eight_bit=None if verdict.eight_bit is None else bool(verdict.eight_bit[i]),
                forwards=int(cost[0, i]),
                backwards=int(cost[1, i]),
                queries=int(cost[2, i]),
                notes=tuple(notes),
                message=errors.get(i, ""),
                measures={name: float(value[i]) for name, value in verdict.measures.items()},
                figures=figures[i],
                trace=trace.get(i, ()),
            )
        )
    return records, x, returned


def decides_in(case: Case) -> bool:
    """Whether what the attacked model says of a row can be held against the verdict: one answer, of the victim."""
    return not case.surrogates and not case.randomized


def _believed(model: Any, returned: Tensor, goal: Any, lanes: Lanes, among: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows in `among`, which the model takes to have reached the goal, and their margins (NaN elsewhere).

    Both [B] on the CPU.
    """
    rows = among.nonzero().squeeze(1).to(returned.device)
    reached = torch.zeros(len(among), dtype=torch.bool)
    margin = torch.full((len(among),), torch.nan)
    if len(rows):
        aim, answer = goal.take(rows), MeteredOracle(model, len(rows), Access.SCORES, lanes=lanes)(returned[rows])
        reached[rows.cpu()] = (aim.reached(answer) & finite(answer)).cpu()
        if answer.is_floating_point() and answer.ndim > 1:
            margin[rows.cpu()] = aim.margin(answer).float().cpu()
    return reached, margin


def _number(value: Tensor) -> float | None:
    """A JSON number; NaN and infinity have none."""
    number = float(value)
    return number if math.isfinite(number) else None


def _stream(case: Case) -> tuple[str, ...]:
    """Names of the attack's random streams: its registry name and its source, not its settings.

    With the settings left out, ten more steps start where the shorter run started.
    """
    attack, _, source = case.label.partition("@")
    suite, _, stage = attack.partition("/")
    return (stage or suite.partition(":")[0], source)
