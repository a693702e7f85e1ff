"""One batch of rows: attacked by one attack and judged, in this process and no other.

What a batch's records are follows from the case and the batch alone, whoever plays it: a scenario, or a worker of its.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import AccessDenied, AdvkitError, UsageError
from advkit.core.oracle import Lanes, MeteredOracle, frozen
from advkit.core.protocols import Access, Batch, Outcome, Record
from advkit.core.rng import RowRng
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.judge import Judge, decide, finite
from advkit.evaluation.run.speed import VICTIM
from advkit.models.ensemble import Ensemble

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


def played_alone(case: Case, batch: Batch, lanes: Lanes) -> Played:
    """One batch with every model frozen and torch's generators put aside: nothing outside can tell that it ran."""
    modules = [m for model in (case.victim, *(s for _, s in case.surrogates)) for m in model.modules()]
    with frozen(*modules), own_randomness(case.device, case.seed, case.label, batch.ids[0]):
        return play_batch(case, on_device(batch, case.device), lanes)


def models_attacked(case: Case) -> list[tuple[str, Any, bool]]:
    """Name and model of all that the attacks' oracles speak for, and whether gradients are asked of it."""
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


def attacked_model(case: Case) -> tuple[Any, bool]:
    """What the attack's oracle speaks for, and whether its answers are the verdict's."""
    if not case.surrogates:
        # The view is for differentiating; who may only ask, asks the victim as it is deployed.
        view = case.victim.attacker_view() if Access(case.threat.access) >= Access.GRADIENTS else case.victim
        exact = view is case.victim and not case.randomized
        return view, exact and not getattr(case.threat, "lattice", 0)
    if len(case.surrogates) == 1:
        return case.surrogates[0][1], False
    return Ensemble(models=tuple(model for _, model in case.surrogates)), False


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
    said = judge.examine(verdict, returned, x, clean, goal, case.threat, batch.twins, rng.at("examine"))
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
                figures=said[i][0],
                trace=trace.get(i, ()),
                texts=said[i][1],
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
