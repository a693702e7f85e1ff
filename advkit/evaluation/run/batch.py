"""One batch of rows: attacked by one attack and judged, in this process and no other.

What a batch's records are follows from the case and the batch alone, whoever runs it: the engine, or a worker process.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from advkit.core.blame import GOAL, MODEL, blamed
from advkit.core.errors import AdvkitError
from advkit.core.lanes import Lanes
from advkit.core.limits import TimedOut, limited
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import (
    Access,
    Batch,
    CountsQueries,
    Examined,
    FlipsLabels,
    Goal,
    MetByTruth,
    Model,
    Outcome,
    Record,
    ThroughView,
    Wraps,
    one_change,
)
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.evaluation.run.attempts import Attempts, Clean, attacked_model, reason_of
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.judge import Judge, Said, Verdict, finite
from advkit.evaluation.run.recorded import TIMED_OUT, records_of, state_of, states_of
from advkit.evaluation.run.speed import VICTIM
from advkit.models.ensemble import Ensemble

log = logging.getLogger("advkit")

CERTAIN = 100.0
"""Lead of a class in logits that no goal takes for doubtful."""


@dataclass(frozen=True)
class Round:
    """What one unit of a run leaves behind.

    records:     one per row, in the batch's order
    clean:       inputs that may be kept as examples, rows first; None where no input was changed
    adversarial: what the victim was shown of what the attack returned for them; what was returned where the threat
                 model does not admit it
    tokens:      sent through models that count them
    """

    records: Sequence[Record]
    clean: Tensor | None = None
    adversarial: Tensor | None = None
    tokens: int = 0


Unit = Callable[[Case, Batch, Lanes], Round]
"""What a scenario may have done with a batch; a function of a module's top level, so that processes can share it."""


@contextmanager
def own_randomness(device: str, *names: object) -> Iterator[None]:
    """Torch's global generators seeded by name inside the block and given back after it.

    Only victims with randomness of their own draw from them; advkit's draws are per row.
    """
    devices = [torch.device(device)] if torch.device(device).type == "cuda" else []
    word = hashlib.sha256("|".join(map(str, names)).encode()).digest()
    with torch.random.fork_rng(devices=devices):
        seed = int.from_bytes(word[:7], "big")
        if torch.accelerator.is_available():
            torch.manual_seed(seed)
        else:
            # Without a device torch keeps every seed for the day on which there is one, with a traceback: time, and
            # memory that is never given back.
            torch.default_generator.manual_seed(seed)
        yield


@contextmanager
def alone(case: Case, *names: object) -> Iterator[None]:
    """Every model frozen and torch's generators put aside: nothing outside can tell what ran inside."""
    modules = [m for model in models_of(case) for m in model.modules()]
    with frozen(*modules), own_randomness(case.device, case.seed, *names):
        yield


def models_of(case: Case) -> list[Model[Any, Any]]:
    """The victim and the surrogates."""
    return [case.victim, *(model for _, model in case.surrogates)]


def counting(model: Any) -> CountsQueries | None:
    """The innermost model of a chain whose answers have a price; None where there is none."""
    found = None
    while True:
        if isinstance(model, CountsQueries):
            found = model
        if not isinstance(model, Wraps):
            return found
        model = model.model


def run_alone(unit: Unit, case: Case, batch: Batch, lanes: Lanes) -> Round:
    """One batch on the case's device, leaving no trace.

    Where a model, a judge or a goal raises on some row, the batch is halved until that row is found: its record says
    why, and the others go on.
    """
    try:
        with alone(case, case.label, batch.ids[0]), limited(case.sample_timeout):
            return unit(case, on_device(batch, case.device), lanes)
    except (AdvkitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if len(batch.ids) == 1:
            log.debug("row %s raised", batch.ids[0], exc_info=True)
            return _raised(case, on_device(batch, case.device), lanes, error, blamed(error) or GOAL)
    halves = [run_alone(unit, case, half, lanes) for half in halved(batch)]
    return Round(
        [record for half in halves for record in half.records],
        _joined([half.clean for half in halves]),
        _joined([half.adversarial for half in halves]),
        sum(half.tokens for half in halves),
    )


def halved(batch: Batch) -> list[Batch]:
    """The first and the second half of a batch's rows."""
    return [rows_of(batch, rows) for rows in torch.arange(len(batch.ids)).tensor_split(2)]


def rows_of(batch: Batch, rows: Tensor) -> Batch:
    """Some rows of a batch, long."""
    return replace(
        batch,
        ids=tuple(batch.ids[row] for row in rows.tolist()),
        x=batch.x[rows],
        goal=batch.goal.take(rows),
        labels=None if batch.labels is None else batch.labels[rows],
        twins=None if batch.twins is None else batch.twins[rows],
    )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if len(found) == len(parts) else None


def _raised(case: Case, batch: Batch, lanes: Lanes, error: Exception, who: str) -> Round:
    """The record of a row on which the victim, the goal or a judge raised, and how it was when clean, where known.

    who: raised; empty where it is the attack, or not known
    """
    label = None if batch.labels is None else int(batch.labels[0])
    notes: tuple[str, ...] = (f"{who}_raised",) if who else ()
    notes += (TIMED_OUT,) if isinstance(error, TimedOut) else ()
    before: int | None = None
    try:
        with alone(case, case.label, batch.ids[0]), limited(case.sample_timeout):
            rng = RowRng.from_ids(case.seed, batch.ids, device=case.device)
            judge = _judge(case, lanes, rng)
            clean = _clean(case, batch, judge, rng.at("goal"))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        notes = ("clean_raised", *notes)
    else:
        before = judge.decisions(clean.answer)[0]
        notes = (*state_of(states_of(clean)[0], Outcome.ERROR, label, before), *notes)
    record = Record(
        id=batch.ids[0],
        attack=case.label.attack,
        outcome=Outcome.ERROR,
        label=label,
        clean=before,
        notes=notes,
        message=reason_of(error),
        stage=case.label.stage,
        source=case.label.source,
    )
    return Round([record], batch.x, batch.x)


def given_up(case: Case, batch: Batch, lanes: Lanes) -> Round:
    """The record of a row whose attack or judges did not come back from compiled code, and were ended."""
    return _raised(case, batch, lanes, _late(case), "")


def lost(case: Case, batch: Batch) -> Round:
    """The record of a row from which the victim does not come back even when it is clean."""
    record = Record(
        id=batch.ids[0],
        attack=case.label.attack,
        outcome=Outcome.ERROR,
        label=None if batch.labels is None else int(batch.labels[0]),
        notes=("clean_raised", f"{MODEL}_raised", TIMED_OUT),
        message=str(_late(case)),
        stage=case.label.stage,
        source=case.label.source,
    )
    return Round([record], batch.x, batch.x)


def _late(case: Case) -> TimedOut:
    return TimedOut(f"timed out after {case.sample_timeout:g} s")


def models_attacked(case: Case) -> list[tuple[str, Any, bool]]:
    """Name and model of all that the attacks' oracles speak for, and whether gradients are asked of it.

    None for an attack on training labels: its oracle speaks for trainings.
    """
    attack: object = case.attack
    if isinstance(attack, FlipsLabels):
        return []
    if case.surrogates:
        return [(name, model, True) for name, model in case.surrogates]
    return [(VICTIM, attacked_model(case)[0], Access(case.threat.access) >= Access.GRADIENTS)]


def fast_model(case: Case, x: Tensor) -> Any:
    """What the attack's oracle asks in place of the attacked model; None where the case has no speed switch left."""
    if case.views is None or all(text == "fp32" for text in case.views.chosen.values()):
        return None
    models = [case.views.of(name, model, x) for name, model, _ in models_attacked(case)]
    if len(models) == 1:
        return models[0]
    return Ensemble(models=models)


def on_device(batch: Batch, device: str) -> Batch:
    """The same batch there."""
    labels = None if batch.labels is None else batch.labels.to(device)
    twins = None if batch.twins is None else batch.twins.to(device)
    return replace(batch, x=batch.x.to(device), goal=batch.goal.to(device), labels=labels, twins=twins)


def attacked(case: Case, batch: Batch, lanes: Lanes) -> Round:
    """Attack and judge one batch; a row that raises becomes an error record and the others go on.

    Under a speed switch a row is attacked a second time, in full precision and with the same random streams, where the
    fast view took it for broken and the model itself does not; where it ended so near the boundary that the view can't
    tell its sides; and where the view answered NaN, gave no gradient or raised. The second run is what counts; the
    passes of both add up, the queries are those of the second alone.
    """
    rng = RowRng.from_ids(case.seed, batch.ids, device=case.device)
    judge = _judge(case, lanes, rng)
    # Every attack on a row meets the same goal: what it is to reach does not depend on who tries.
    wanted, rng = rng.at("goal"), rng.at("attack", *case.label.streams)
    clean = _clean(case, batch, judge, wanted)
    attempts = Attempts(case, batch, clean.goal, lanes, rng)
    # Where all rows are to be changed alike, none is attacked apart from the others a second time.
    model, fast = attacked_model(case)[0], None if one_change(case.threat) else fast_model(case, batch.x)
    exact = torch.tensor([fast is None or row in case.exact for row in batch.ids], device=batch.x.device)
    for chosen, asked in ((clean.attacked & exact, model), (clean.attacked & ~exact, fast)):
        if len(rows := chosen.nonzero().squeeze(1)):
            attempts.attack(rows, asked)
    verdict = judge.judge(attempts.returned, batch.x, clean.goal, case.threat)
    if fast is not None:
        doubted = _doubted(attempts, verdict, (clean.attacked & ~exact).cpu(), fast)
        if len(doubted):
            attempts.again(doubted.to(batch.x.device), model)
            verdict = judge.judge(attempts.returned, batch.x, clean.goal, case.threat)
    said = _examined(attempts, clean, judge, verdict, rng)
    admitted = verdict.admitted.to(batch.x.device).view(-1, *(1,) * (batch.x.ndim - 1))
    shown = torch.where(admitted, verdict.submitted.to(batch.x), attempts.images)
    return Round(records_of(attempts, clean, judge, verdict, said), batch.x, shown, attempts.tokens)


def judged(case: Case, batch: Batch, lanes: Lanes) -> Round:
    """Judge one batch as it is, without an attack."""
    return replace(shown(case, batch, lanes), clean=None, adversarial=None)


def shown(case: Case, batch: Batch, lanes: Lanes, returned: Tensor | None = None) -> Round:
    """Judge one batch on what was made of it elsewhere: `returned` [B, ...], the rows as they are for None."""
    rng = RowRng.from_ids(case.seed, batch.ids, device=case.device)
    judge = _judge(case, lanes, rng)
    clean = _clean(case, batch, judge, rng.at("goal"))
    attempts = Attempts(case, batch, clean.goal, lanes, rng)
    attempts.returned = attempts.start if returned is None else returned.to(attempts.start)
    verdict = judge.judge(attempts.returned, batch.x, clean.goal, case.threat)
    said = _examined(attempts, clean, judge, verdict, rng)
    return Round(records_of(attempts, clean, judge, verdict, said), batch.x, verdict.submitted.to(batch.x))


def _examined(attempts: Attempts, clean: Clean, judge: Judge, verdict: Verdict, rng: RowRng) -> list[Said]:
    """What there is to say of every row of the batch."""
    case, batch = attempts.case, attempts.batch
    return judge.examine(
        verdict,
        attempts.returned,
        batch.x,
        clean.answer,
        clean.goal,
        case.threat,
        batch.twins,
        rng.at("examine"),
        task=case.task.examiner if isinstance(case.task, Examined) else None,
        labels=batch.labels,
        shifted=isinstance(case.rule, ThroughView),
    )


def _judge(case: Case, lanes: Lanes, rng: RowRng) -> Judge:
    return Judge(case.victim, lanes, case.draws if case.randomized else 1, rng)


def _clean(case: Case, batch: Batch, judge: Judge, rng: RowRng) -> Clean:
    """The rows before any attack, and what the attacker wants of them."""
    answers = judge.answers(batch.x, "clean")
    answer = answers[0]
    sane, goal = finite(answer), case.goal_of(batch, answer, rng)
    if batch.labels is None:
        wrong = judge.majority(goal, answers)
        contested = ~wrong & sane
    else:
        wrong = judge.majority(batch.goal, answers)
        # An untargeted attacker has nothing left to win on a row that is wrong when clean; another one has, unless the
        # row meets the goal already, or would were the victim right about it.
        lost = wrong if case.rule.kind == "untargeted" else met_by_truth(goal, batch.labels, answer)
        contested = sane & ~lost & ~judge.majority(goal, answers)
    attacked = sane if case.attack_misclassified else contested  # a grid counts every image
    return Clean(goal, answer, sane.cpu(), (~wrong & sane).cpu(), contested.cpu(), attacked)


def met_by_truth(goal: Goal[Tensor], labels: Tensor, answer: Tensor) -> Tensor:
    """Bool [B]: rows whose goal a right answer reaches, such as a target that is the row's own class."""
    if isinstance(goal, MetByTruth):
        return goal.met_by_truth()
    if answer.ndim == 1:
        return goal.reached(labels)
    if answer.ndim != 2 or not bool(((labels >= 0) & (labels < answer.shape[1])).all()):
        return torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    # A lead beyond doubt, for goals that ask for a confident answer.
    return goal.reached(CERTAIN * one_hot(labels, answer.shape[1]).to(answer.dtype))


def _doubted(attempts: Attempts, verdict: Verdict, tried: Tensor, fast: Any) -> Tensor:
    """The rows on which the fast view can't be believed, long; `refuted` and `unsure` say why.

    tried: bool [B], the rows attacked through it
    """
    case, goal, lanes = attempts.case, attempts.goal, attempts.lanes
    model = attacked_model(case)[0]
    open_rows = tried & ~verdict.reached
    unsure = open_rows & (attempts.met_non_finite | attempts.no_gradient)
    if decides_in(case):
        refuted, margin = _believed(fast, attempts.images, goal, lanes, open_rows)
        refuted &= ~_believed(model, attempts.images, goal, lanes, refuted)[0]
        near = verdict.closeness <= case.speed.resolution
        if model is case.victim:
            near |= verdict.margin <= 4 * (margin - verdict.margin).abs()
        unsure |= open_rows & near & ~margin.isnan()  # answers that are no scores have no margin
        attempts.refuted = refuted
    unsure[[i for i in attempts.errors if tried[i]]] = True
    attempts.unsure = unsure
    return (attempts.refuted | unsure).nonzero().squeeze(1)


def decides_in(case: Case) -> bool:
    """Whether what the attacked model says of a row can be held against the verdict: one answer, of the victim."""
    return not case.surrogates and not case.randomized


def _believed(
    model: Model[Any, Any], returned: Tensor, goal: Goal[Tensor], lanes: Lanes, among: Tensor
) -> tuple[Tensor, Tensor]:
    """Of the rows in `among`, which the model takes to have reached the goal, and their margins (NaN elsewhere).

    Both [B] on the CPU.
    """
    rows = among.nonzero().squeeze(1).to(returned.device)
    reached = torch.zeros(len(among), dtype=torch.bool)
    margin = torch.full((len(among),), torch.nan, dtype=torch.float32)
    if len(rows):
        aim, answer = goal.take(rows), MeteredOracle(model, len(rows), Access.SCORES, lanes=lanes)(returned[rows])
        reached[rows.cpu()] = (aim.reached(answer) & finite(answer)).cpu()
        if answer.is_floating_point() and answer.ndim > 1:
            margin[rows.cpu()] = aim.margin(answer).float().cpu()
    return reached, margin
