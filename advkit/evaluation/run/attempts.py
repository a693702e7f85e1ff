"""The tries of an attack on the rows of a batch, and what it is put before."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from advkit.core.blame import BACKWARD, MODEL, blamed
from advkit.core.errors import AccessDenied, AdvkitError, UsageError
from advkit.core.lanes import Lanes
from advkit.core.limits import TimedOut, limited
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Averages, Batch, DrawsByRow, Goal, Graded, Lattice
from advkit.core.rendered import asked_in
from advkit.core.rng import RowRng
from advkit.evaluation.run.case import Case, lent
from advkit.evaluation.run.judge import rendered, unchanged
from advkit.models.ensemble import Ensemble

log = logging.getLogger("advkit")

SURROGATE = "surrogate"
"""Who raised, where the attack's model is not the victim."""


def reason_of(error: BaseException) -> str:
    """Why a row ended in an error, for its record."""
    return str(error) if isinstance(error, AdvkitError | TimedOut) else f"{type(error).__name__}: {error}"


def attacked_model(case: Case) -> tuple[Any, bool]:
    """What the attack's oracle speaks for, and whether its answers are the verdict's."""
    if not case.surrogates:
        # The view is for differentiating; who may only ask, asks the victim as it is deployed.
        view = case.victim.attacker_view() if Access(case.threat.access) >= Access.GRADIENTS else case.victim
        exact = view is case.victim and not case.randomized and not isinstance(case.rule, Graded)
        return view, exact and not (isinstance(case.threat, Lattice) and case.threat.lattice)
    if len(case.surrogates) == 1:
        return case.surrogates[0][1], False
    return Ensemble(models=tuple(model for _, model in case.surrogates)), False


@dataclass(frozen=True)
class Clean:
    """The rows before any attack; all tensors [B].

    goal:      what the attacker wants of each row
    answer:    the victim's, [B, ...]; the first draw of a random victim
    finite:    whether that answer is
    correct:   whether the victim is right, by majority of draws
    contested: whether the attacker has something to win
    attacked:  whether the row is handed to the attack; on the batch's device, the others on the CPU
    """

    goal: Goal[Tensor]
    answer: Tensor
    finite: Tensor
    correct: Tensor
    contested: Tensor
    attacked: Tensor


class Attempts:
    """What the attack makes of a batch's rows, in one try or two, and what it costs."""

    def __init__(self, case: Case, batch: Batch, goal: Goal[Tensor], lanes: Lanes, rng: RowRng) -> None:
        n = len(batch.ids)
        self.case, self.batch, self.goal, self.lanes, self.rng = case, batch, goal, lanes, rng
        self.start = unchanged(batch.x, case.threat)
        self.returned: Tensor = self.start.clone()
        self.cost = torch.zeros(3, n, dtype=torch.long)  # forwards, backwards, queries
        self.met_non_finite = torch.zeros(n, dtype=torch.bool)
        self.no_gradient = torch.zeros(n, dtype=torch.bool)
        self.asked_non_finite = torch.zeros(n, dtype=torch.bool)
        self.outside = torch.zeros(n, dtype=torch.bool)
        self.refuted = torch.zeros(n, dtype=torch.bool)
        self.unsure = torch.zeros(n, dtype=torch.bool)
        self.errors: dict[int, str] = {}
        self.raised_by: dict[int, str] = {}  # other than the attack itself
        self.late = torch.zeros(n, dtype=torch.bool)
        self.trace: dict[int, tuple[dict[str, Any], ...]] = {}
        self.tokens = 0
        model, self.decides = attacked_model(case)
        # A view that averages draws asks the victim once for each.
        self.calls = model.passes if isinstance(model, Averages) else 1

    def attack(self, rows: Tensor, model: Any) -> None:
        """Attack these rows (long) through `model`; where they raise, find the culprits by halving."""
        case, x = self.case, self.start
        assert case.attack is not None
        where = rows.cpu()
        keys = self.rng.at("draws").keys()[where] if isinstance(model, DrawsByRow) else None
        oracle = MeteredOracle(
            model,
            len(rows),
            case.threat.access,
            case.threat.queries,
            self.decides,
            self.lanes,
            data=case.data,
            keys=keys,
            propagations=case.propagations,
            differentiates=Access(case.attack.needs) >= Access.GRADIENTS,
        )
        together = case.together
        seconds = None if case.sample_timeout is None else case.sample_timeout * (len(rows) if together else 1)
        try:
            with limited(seconds):
                asked = asked_in(oracle, self.batch.x[rows], case.threat)
                out = case.attack(asked, x[rows], self.goal.take(rows), lent(case.threat), self.rng.take(rows))
            _check_kept(oracle, case)
        except (AccessDenied, UsageError, torch.OutOfMemoryError):
            raise  # nobody's row is at fault
        except (Exception, SystemExit) as error:  # an attack that leaves the program has no verdict either
            if len(rows) > 1 and not together:
                for half in rows.tensor_split(2):
                    self.attack(half, model)
                return
            self.errors.update(dict.fromkeys(where.tolist(), reason_of(error)))
            if isinstance(error, TimedOut):
                self.late[where] = True
            if who := blamed(error):
                who = SURROGATE if case.surrogates and who in (MODEL, BACKWARD) else who
                self.raised_by.update(dict.fromkeys(where.tolist(), who))
            log.debug("row %s raised", self.batch.ids[int(where[0])], exc_info=True)
        else:
            if not isinstance(out, Tensor):
                reason = f"the attack returned {type(out).__name__}; expected a tensor of the shape of x"
                self.errors.update(dict.fromkeys(where.tolist(), reason))
            elif out.shape == x[rows].shape:
                self.returned[rows] = out.detach().to(x)
            else:
                self.outside[where] = True
        meter = oracle.meter
        self.cost[:2, where] += self.calls * torch.stack([meter.forwards, meter.backwards])
        self.cost[2, where] = self.calls * meter.queries
        self.met_non_finite[where] = meter.non_finite
        self.no_gradient[where] = meter.zero_gradient
        self.asked_non_finite[where] = meter.asked_non_finite
        places = where.tolist()
        self.trace |= {places[i]: meter.noted(i) for i in meter.with_notes}
        self.tokens += meter.tokens

    def again(self, rows: Tensor, model: Any) -> None:
        """Attack these rows once more, from their clean inputs."""
        for row in rows.tolist():
            self.errors.pop(row, None)
            self.raised_by.pop(row, None)
            self.trace.pop(row, None)
        self.late[rows.cpu()] = False
        self.returned[rows] = self.start[rows]
        self.attack(rows, model)

    @property
    def images(self) -> Tensor:
        """What was returned, as inputs of the model."""
        return rendered(self.returned, self.batch.x, self.case.threat)


def _check_kept(oracle: MeteredOracle, case: Case) -> None:
    """Raise AdvkitError where the attack took more of its oracle than the case grants, whatever the oracle now says."""
    threat, meter = case.threat, oracle.meter
    if (oracle.access, oracle.queries, oracle.propagations) != (threat.access, threat.queries, case.propagations):
        raise AdvkitError("the attack changed what its oracle grants")
    if threat.queries is not None and bool((meter.queries > threat.queries).any()):
        raise AdvkitError(f"the attack asked more of a sample than the {threat.queries} queries of the threat model")
    if case.propagations is not None and bool((meter.forwards + meter.backwards > case.propagations).any()):
        raise AdvkitError(f"the attack spent more on a sample than the budget of {case.propagations} propagations")
