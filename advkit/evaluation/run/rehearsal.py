"""What is checked before anything is spent: whether the case can give a number at all."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.core.errors import AdvkitError, BadInput, BadModel, BudgetExhausted, RunInterrupted, UsageError
from advkit.core.lanes import Lanes
from advkit.core.limits import TimedOut, limited
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import AboutSamples, Access, Averages, Batch, Model, Refuses, answer_shape
from advkit.core.rendered import asked_in
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.evaluation.run.batch import halved, models_of, on_device, own_randomness, rows_of
from advkit.evaluation.run.case import Case, lent
from advkit.evaluation.run.judge import Judge, unchanged
from advkit.evaluation.run.scenario import RowsApart, Scenario
from advkit.models.torch import check_mode, checked_logits

log = logging.getLogger("advkit")


def preflight(case: Case, scenario: Scenario) -> None:
    """Refuse what can't give a number: raises BadInput, BadModel or UsageError before anything is spent."""
    if reason := scenario.accepts(case):
        raise UsageError(reason)
    if case.places is not None and not (isinstance(scenario, RowsApart) and scenario.rows_apart(case)):
        raise UsageError(
            f"what becomes of a row depends on the others here ({case.label}): leave rows out and run them together"
        )
    _check_rule(case)
    if isinstance(case.rule, Refuses) and (reason := case.rule.misfit(case.victim)):
        raise UsageError(reason)
    _check_models(case)
    first = first_rows(case)
    if complaint := case.victim.space.complaint(first.x):
        raise BadInput(complaint)
    first, answer = _first_answer(case, first)
    with own_randomness(case.device, "rehearsal"):
        for cell in scenario.cells(case):
            rehearse(cell, first, answer)


def _check_rule(case: Case) -> None:
    """UsageError for a goal on classes where answers are samples, and the other way round."""
    kind, name = case.rule.kind, case.task.name
    if answer_shape(case.task) and not isinstance(case.rule, AboutSamples):
        raise UsageError(
            f"the goal {kind} is about classes, and answers of the task {name} are reconstructed samples: use "
            "--goal reconstruction:rmse=..."
        )
    if isinstance(case.rule, AboutSamples) and not answer_shape(case.task):
        raise UsageError(
            f"the goal {kind} is about reconstructed samples, and answers of the task {name} are not: use "
            "--goal untargeted, or a task such as digits-reconstruction"
        )


def _check_models(case: Case) -> None:
    info = case.victim.describe()
    if info.classes is not None and info.classes != case.task.classes:
        raise BadModel(
            f"the model answers {info.classes} classes, the task {case.task.name} has {case.task.classes}: "
            "choose a model trained for this task"
        )
    for name, model in (("the model", case.victim), *((f"surrogate {n}", s) for n, s in case.surrogates)):
        check_mode(model, name)


def _first_answer(case: Case, first: Batch) -> tuple[Batch, Tensor]:
    """The first rows that the victim answers and its answer, once that has the right shape.

    A row on which it raises is for that row's record; where it raises on all of them, the model does not fit.
    """
    batch, answer = answered(case, first)
    if not answer_shape(case.task) and answer.ndim == 2 and answer.shape[1] != case.task.classes:
        raise BadModel(
            f"the model answers {answer.shape[1]} classes, the task {case.task.name} has {case.task.classes}: "
            "choose a model trained for this task"
        )
    return batch, answer


def first_rows(case: Case, rows: int = 64) -> Batch:
    """The task's first rows on the case's device, no more than a batch of the case, and fewer where answers are dear.

    Under a limit of time without those on which a model does not come back: each is asked alone, so that which they are
    does not depend on how fast the others go. BadModel where none is left.
    """
    if isinstance(case.victim, Averages):  # every answer is one of many passes
        rows = max(2, rows // case.victim.passes)
    rows = min(rows, case.batch_size, case.n)
    batch = on_device(next(iter(case.task.batches(rows, n=rows))), case.device)
    if case.sample_timeout is None:
        return batch
    for model in models_of(case):
        kept = _in_time(model, batch, case.sample_timeout, case.device)
        if not kept:
            raise BadModel(
                f"the model does not answer any of the first {rows} samples within {case.sample_timeout:g} s: give it "
                "more time, or see what it waits for"
            )
        batch = rows_of(batch, torch.tensor(kept))
    return batch


_known: dict[tuple[int, tuple[str, ...], float], tuple[Any, list[int]]] = {}


def _in_time(model: Model[Any, Any], batch: Batch, seconds: float, device: str) -> list[int]:
    """Places of the rows that the model answers in time, or raises on; asked once per process."""
    key = (id(model), batch.ids, seconds)
    if key not in _known:
        judge, kept = Judge(model, Lanes(1, 1)), []
        with frozen(*model.modules()), own_randomness(device, "in time"):
            for row in range(len(batch.ids)):
                try:
                    with limited(seconds):
                        judge.answer(batch.x[row : row + 1])
                except TimedOut:
                    continue
                except Exception:
                    log.debug("row %s raised", batch.ids[row], exc_info=True)
                kept.append(row)
        if len(_known) >= 32:
            _known.clear()
        _known[key] = model, kept  # the model is kept so that its id stays its own
    return _known[key][1]


def answered(case: Case, batch: Batch) -> tuple[Batch, Tensor]:
    """Rows of a batch on which the victim does not raise, and its answer to them.

    Raises BadModel where it raises on every row, RunInterrupted where one row is too much memory.
    """
    try:
        with frozen(*case.victim.modules()), own_randomness(case.device, "preflight"):
            answer = Judge(case.victim, Lanes.fitting(batch.x)).answer(batch.x)
    except AdvkitError:
        raise
    except torch.OutOfMemoryError as error:
        if len(batch.ids) == 1:
            raise RunInterrupted(
                f"out of memory on one sample of shape {tuple(batch.x.shape[1:])}: take a smaller model, or another "
                "--device"
            ) from error
        return answered(case, halved(batch)[0])
    except Exception as error:  # code of the user's raises whatever it likes
        for half in halved(batch) if len(batch.ids) > 1 else []:
            with suppress(BadModel):
                return answered(case, half)
        raise BadModel(
            f"the model can't take inputs of shape {tuple(batch.x.shape[1:])} of task {case.task.name}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return batch, checked_logits(answer, len(batch.x), answer_shape(case.task))


class _SecondQuestion(Exception):
    """An attack came as far as its second query, or wanted to look inside the model."""


class _StubModel:
    """Answers the first query as the clean row was answered, with gradient zero, and ends the rehearsal at the next."""

    lanes: ClassVar[Lanes] = Lanes(1, 1)
    tokens: ClassVar[int] = 0

    def __init__(self, answer: Tensor) -> None:
        self.answer = answer
        self.left = int(answer.is_floating_point() and bool(torch.isfinite(answer).all()))

    def __call__(self, x: Tensor) -> Tensor:
        if not self.left:
            raise _SecondQuestion
        self.left -= 1
        nothing = 0.0 * x.flatten(1).sum(1).view(-1, *(1,) * (self.answer.ndim - 1))
        return self.answer.expand(len(x), *self.answer.shape[1:]) + nothing

    def __getattr__(self, name: str) -> Any:
        raise _SecondQuestion


def rehearse(case: Case, batch: Batch, clean: Tensor) -> None:
    """Start the case's attack on one row and end it at its second query: no pass through any model.

    By then it has taken a step. An attack that refuses its settings, goal or threat model would refuse them on every
    row; that is a mistake of the request, raised here before anything is written. Whatever else it raises is for the
    row's record.
    """
    if case.attack is None:
        return
    row = torch.zeros(1, dtype=torch.long, device=batch.x.device)
    rng = RowRng.from_ids(case.seed, batch.ids, device=case.device).at("rehearsal")
    goal = case.goal_of(batch, clean, rng.at("goal"))
    model = _StubModel(clean[:1])
    oracle = MeteredOracle(
        model, 1, case.threat.access, case.threat.queries, decides=True, lanes=Lanes(1, 1), data=case.data,
        propagations=case.propagations, differentiates=Access(case.attack.needs) >= Access.GRADIENTS,
    )  # fmt: skip
    start = unchanged(batch.x[row], case.threat)
    with suppress(_SecondQuestion):
        try:
            with limited(case.sample_timeout):
                asked = asked_in(oracle, batch.x[row], case.threat)
                case.attack(asked, start, goal.take(row), lent(case.threat), rng.take(row))
        except BudgetExhausted:
            if model.left:
                raise
        except (AdvkitError, _SecondQuestion):
            raise
        except (Exception, SystemExit):
            log.debug("the rehearsal of %s raised", case.label, exc_info=True)
            return
        if model.left and Access(case.attack.needs) > Access.NOTHING and oracle.left == 0:
            raise UsageError(_too_little(case))


def _too_little(case: Case) -> str:
    """What to say where an attack gives up before its first question, for want of budget."""
    if case.propagations is not None:
        return (
            f"{case.label} can't take one step with a budget of {case.propagations} propagations of a sample: a step "
            "with a gradient costs 2; raise it"
        )
    return f"{case.label} can't take one step with {case.threat.queries} queries of a sample: raise queries"
