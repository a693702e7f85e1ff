"""The judge: asks the protected victim about returned inputs and names each row's outcome.

Nothing an attack says of itself gets here. A returned input counts when it is finite, inside the threat model and the
victim's own answer on it reaches the goal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from advkit.core.blame import GOAL, JUDGE, MODEL, code_of
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import (
    Access,
    DrawsByRow,
    Evidence,
    Examines,
    Figure,
    Goal,
    Measures,
    Model,
    Outcome,
    Quantizes,
    Renders,
    Rng,
    ThreatModel,
    Votes,
    answer_shape,
)
from advkit.core.rng import RowRng


def decide(answer: Tensor) -> Tensor:
    """Long [B]: the class of each answer (logits [B, C], or decisions [B] with -1 for abstaining).

    Answers that are samples decide for no class: -1.
    """
    if answer.ndim > 2:
        return torch.full((len(answer),), -1, dtype=torch.long, device=answer.device)
    return answer.argmax(1) if answer.ndim > 1 else answer.long()


def finite(answer: Tensor) -> Tensor:
    """Bool [B]: rows whose answer holds no NaN or infinity."""
    if not answer.is_floating_point():
        return torch.ones(len(answer), dtype=torch.bool, device=answer.device)
    return torch.isfinite(answer).flatten(1).all(1)


def majority(goal: Goal[Tensor], answers: Sequence[Tensor]) -> Tensor:
    """Bool [B]: rows whose goal most of the draws' answers reach."""
    votes = torch.stack([goal.reached(answer) for answer in answers]).sum(0)
    return 2 * votes > len(answers)


def unchanged(origin: Tensor, threat: ThreatModel[Tensor]) -> Tensor:
    """What an attack starts from and what its result is measured against: the inputs, or the parameters that give them
    back (`Renders`).
    """
    return threat.identity(origin) if isinstance(threat, Renders) else origin


def rendered(returned: Tensor, origin: Tensor, threat: ThreatModel[Tensor]) -> Tensor:
    """The inputs that an attack's result stands for: itself, or what its parameters render."""
    return threat.render(returned, origin).detach() if isinstance(threat, Renders) else returned


@dataclass(frozen=True)
class Submission:
    """What became of an attack's result.

    seen:     the inputs that a victim gets to see [B, ...]
    made:     the result as the threat model measures it: the same, or the parameters that render it
    start:    what `made` is measured against
    admitted: which of the rows returned the threat model admits, bool [B]
    """

    seen: Tensor
    made: Tensor
    start: Tensor
    admitted: Tensor


def submission(returned: Tensor, origin: Tensor, threat: ThreatModel[Tensor]) -> Submission:
    """The attack's result as it is handed in, rows that the threat model does not admit left as they were."""
    start = unchanged(origin, threat)
    if returned.shape != start.shape:
        nothing = torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        return Submission(origin, start, start, nothing)
    returned = returned.detach().to(start.dtype)
    admitted = threat.admits(returned, start)
    # An inadmissible point is replaced by the origin: the attack failed on that row, whatever it found.
    shape = (-1,) + (1,) * (start.ndim - 1)
    made = threat.finish(torch.where(admitted.view(shape), returned, start), start)
    return Submission(rendered(made, origin, threat), made, start, admitted & threat.admits(made, start))


def submitted(returned: Tensor, origin: Tensor, threat: ThreatModel[Tensor]) -> tuple[Tensor, Tensor]:
    """The inputs that a victim gets to see, and which of those returned the threat model admits, bool [B]."""
    each = submission(returned, origin, threat)
    return each.seen, each.admitted


@dataclass(frozen=True)
class Said:
    """What was said of one row; see the fields of these names of `protocols.Record`."""

    figures: dict[str, float | bool] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    scores: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What the victim says of returned inputs.

    All are tensors [B], but for `submitted`, the inputs that it saw, and `answer`, what it answered to them.
    """

    admitted: Tensor
    finite: Tensor
    reached: Tensor
    decision: Tensor
    margin: Tensor
    closeness: Tensor
    distance: Tensor
    eight_bit: Tensor | None
    measures: dict[str, Tensor]
    submitted: Tensor
    answer: Tensor

    def outcomes(self, contested: Sequence[bool], met_non_finite: Sequence[bool]) -> list[Outcome]:
        """Every row's outcome.

        contested:      the attacker had something to win on it
        met_non_finite: the victim answered NaN somewhere on the attack's way; a row that the attack did not break while
                        NaN stood in its way is not robust, it is unknown
        """
        return [
            Outcome.WRONG
            if not open_
            else Outcome.INVALID
            if not admitted
            else Outcome.NON_FINITE
            if not finite
            else Outcome.BROKEN
            if reached
            else Outcome.NON_FINITE
            if met
            else Outcome.ROBUST
            for open_, met, admitted, finite, reached in zip(
                contested,
                met_non_finite,
                self.admitted.tolist(),
                self.finite.tolist(),
                self.reached.tolist(),
                strict=True,
            )
        ]


class Judge:
    """Puts questions to the victim, apart from the attack's oracle and its meter.

    draws: answers per input of a randomised victim; a row reaches its goal when the majority of draws does
    rng:   streams of the rows, for a victim that draws by row
    """

    def __init__(self, victim: Model[Any, Any], lanes: Lanes, draws: int = 1, rng: RowRng | None = None) -> None:
        self.victim = victim
        self.lanes = lanes
        self.draws = draws
        self.rng = None if rng is None or not isinstance(victim, DrawsByRow) else rng

    def answer(self, x: Tensor, what: str = "", draw: int = 0) -> Tensor:
        """One answer per row; `what` it is asked for, and which draw of it, names the streams."""
        keys = None if self.rng is None else self.rng.at("judge", what, draw).keys()
        return MeteredOracle(self.victim, len(x), Access.SCORES, lanes=self.lanes, keys=keys)(x)

    def answers(self, x: Tensor, what: str) -> list[Tensor]:
        """One answer per row and draw."""
        return [self.answer(x, what, draw) for draw in range(self.draws)]

    def decide(self, answer: Tensor) -> Tensor:
        """Long [B]: the class of each answer, -1 where the victim abstains."""
        decision = decide(answer)
        return decision.masked_fill(self.victim.abstained(answer), -1) if isinstance(self.victim, Votes) else decision

    def decisions(self, answer: Tensor) -> list[int | None]:
        """The same as numbers; None for the rows of a victim whose answers are samples."""
        if answer.ndim > 2 or answer_shape(self.victim):
            return [None] * len(answer)
        return list(self.decide(answer).tolist())

    def majority(self, goal: Goal[Tensor], answers: Sequence[Tensor]) -> Tensor:
        """Bool [B]: rows whose goal most of the draws' answers reach.

        A vote that abstains is a wrong answer: it reaches the goal of whoever wants just that, and no other.
        """
        if not isinstance(self.victim, Votes):
            return majority(goal, answers)
        out = torch.stack([self.victim.abstained(answer) for answer in answers])
        reached = torch.stack([goal.reached(answer) for answer in answers])
        votes = reached & ~out | (out if goal.kind == "untargeted" else torch.zeros_like(out))
        return 2 * votes.sum(0) > len(answers)

    def reached(self, x: Tensor, goal: Goal[Tensor], what: str) -> tuple[Tensor, Tensor]:
        """Bool [B], by majority of draws, and the first draw's answer."""
        answers = self.answers(x, what)
        return self.majority(goal, answers), answers[0]

    def judge(self, returned: Tensor, origin: Tensor, goal: Goal[Tensor], threat: ThreatModel[Tensor]) -> Verdict:
        """Admitted, finite, reached: in this order, on the point the attacker can really hand in."""
        handed = submission(returned, origin, threat)
        seen = handed.seen
        reached, answer = self.reached(seen, goal, "verdict")
        eight_bit = None
        space = self.victim.space
        if origin.ndim == 4 and origin.is_floating_point() and isinstance(space, Quantizes):
            eight_bit = self.reached(space.quantize(seen), goal, "8 bit")[0]
        scores = answer.is_floating_point() and answer.ndim > 1
        margin = goal.margin(answer) if scores else torch.zeros(len(answer), dtype=torch.float32)
        flat = answer.flatten(1) if scores else answer
        spread = flat.amax(1) - flat.amin(1) if scores else torch.ones(len(answer), dtype=torch.float32)
        measured = threat.measures(handed.made, handed.start) if isinstance(threat, Measures) else {}
        return Verdict(
            admitted=handed.admitted.cpu(),
            finite=finite(answer).cpu(),
            reached=reached.cpu(),
            decision=self.decide(answer).cpu(),
            margin=margin.float().cpu(),
            closeness=(margin / spread).float().cpu(),
            distance=threat.distance(handed.made, handed.start).cpu(),
            eight_bit=None if eight_bit is None else eight_bit.cpu(),
            measures={name: values.cpu() for name, values in measured.items()},
            submitted=seen,
            answer=answer,
        )

    def examine(
        self,
        verdict: Verdict,
        returned: Tensor,
        origin: Tensor,
        clean: Tensor,
        goal: Goal[Tensor],
        threat: ThreatModel[Tensor],
        twins: Tensor | None,
        rng: Rng,
        *,
        task: Examines | None = None,
        labels: Tensor | None = None,
        shifted: bool = False,
    ) -> list[Said]:
        """What goal, threat model, victim and task's examiner have to say of every row; see `protocols.Examines`."""
        said: dict[str, Sequence[Figure]] = {}
        parts: tuple[tuple[str, object], ...] = ((JUDGE, goal), (GOAL, threat), (MODEL, self.victim), (GOAL, task))
        experts = [(who, part.examine) for who, part in parts if isinstance(part, Examines)]
        if experts:
            admitted = verdict.admitted.to(origin.device).view(-1, *(1,) * (origin.ndim - 1))
            known = verdict.submitted if isinstance(threat, Renders) else origin
            if known is origin and returned.shape == origin.shape:
                known = torch.where(admitted, returned, origin)
            evidence = Evidence(
                self.victim,
                self.answer,
                origin,
                known,
                verdict.submitted,
                clean,
                verdict.answer,
                twins,
                rng,
                labels,
                shifted,
            )
            for who, ask in experts:
                with code_of(who):
                    said |= ask(evidence)
        if not said:
            return [Said()] * len(origin)
        rows = [Said() for _ in range(len(origin))]
        for name, values in said.items():
            for row, value in zip(rows, values, strict=True):
                if isinstance(value, str):
                    row.texts[name] = value
                elif isinstance(value, list | tuple):
                    if all(math.isfinite(each) for each in value):
                        row.scores[name] = tuple(map(float, value))
                elif value is not None and math.isfinite(number := cast(float, value)):
                    row.figures[name] = value if isinstance(value, bool) else float(number)
        return rows
