"""What the checks of the battery share: the case under examination, and the results of the checks before.

A check is a function of a frozen `Context`, and returns a `Result`; `Context.plus` makes the context of the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from advkit.attacks import ATTACKS
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Attack, Ball, Label, Lattice, Model, Outcome, Radius, Record, WrapsBall
from advkit.core.spaces import Box
from advkit.evaluation.counts import contested, was_right
from advkit.evaluation.run.case import Case
from advkit.evaluation.run.engine import LocalEngine
from advkit.evaluation.stats import newcombe_paired
from advkit.evaluation.trust.findings import Finding
from advkit.evaluation.trust.tracing import TracedRun

STEPS = 100
STEPS_RANDOMIZED = 20  # each of them averages over draws

Progress = Callable[[str, int, int], None]  # what runs now, steps done, steps in all

RowRecords = Mapping[str, Record]
"""The records of one run by row id."""


@dataclass(frozen=True)
class Sweep:
    """Rows robust under the reference attack by radius, in ascending order.

    whole: the radius from which the ball around any row contains the whole box; None where the box has no end
    """

    robust: Mapping[float, Set[str]]
    whole: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one check came to.

    curves:     what it measured, plain JSON values by name
    indicators: of attack failure, by name
    white_box:  runs by name, which later checks compare with
    case:       the case as later checks see it; None where nothing changed
    own:        the run of the case's own attack
    sweep:      that over the radius
    """

    findings: Sequence[Finding] = ()
    curves: Mapping[str, Any] = field(default_factory=dict)
    indicators: Mapping[str, float] = field(default_factory=dict)
    white_box: Mapping[str, RowRecords] = field(default_factory=dict)
    case: Case | None = None
    own: TracedRun | None = None
    sweep: Sweep | None = None


@dataclass(frozen=True, kw_only=True)
class Context:
    """What is examined, and the results of the checks before.

    case:      with as many rows as are used
    ball:      of its threat model, for attackers with gradients
    draws:     random points per robust row
    queries:   of the square attack
    surrogate: an undefended model to transfer from; None looks for one
    """

    case: Case
    ball: Ball[Tensor]
    draws: int
    queries: int
    surrogate: Model[Any, Any] | None = None
    findings: Sequence[Finding] = ()
    curves: Mapping[str, Any] = field(default_factory=dict)
    indicators: Mapping[str, float] = field(default_factory=dict)
    white_box: Mapping[str, RowRecords] = field(default_factory=dict)
    own: TracedRun | None = None
    sweep: Sweep | None = None

    def plus(self, result: Result) -> Context:
        """The context of the checks after the one that came to this."""
        return replace(
            self,
            case=result.case or self.case,
            findings=(*self.findings, *result.findings),
            curves={**self.curves, **result.curves},
            indicators={**self.indicators, **result.indicators},
            white_box={**self.white_box, **result.white_box},
            own=result.own or self.own,
            sweep=result.sweep or self.sweep,
        )

    def named(self, *ids: str) -> bool:
        """Whether a fault has been found already, remarks aside."""
        return any(finding.id in ids and finding.severity != "info" for finding in self.findings)

    def robust(self) -> frozenset[str]:
        """Rows that no white-box run broke."""
        return robust(self.white_box["margin"], *self.white_box.values())

    def fraction(self, rows: Set[str]) -> float:
        """These rows as a fraction of all."""
        return len(rows) / self.case.n


def robust(whole: RowRecords, *more: RowRecords) -> frozenset[str]:
    """Rows correct when clean that no run broke; the first run has all rows."""
    return correct_rows(whole).difference(*(broken(records) for records in (whole, *more)))


def correct_rows(records: RowRecords) -> frozenset[str]:
    """Rows correct when clean on which there was something to win."""
    return frozenset(row for row, record in records.items() if was_right(record) and contested(record))


def broken(records: RowRecords) -> frozenset[str]:
    """Rows that the run broke."""
    return frozenset(row for row, record in records.items() if record.outcome == Outcome.BROKEN)


def rises(weak: Set[str], strong: Set[str], n: int) -> tuple[bool, float]:
    """Whether more rows are robust under what should be the stronger attack, and by which fraction of n.

    The first beyond the paired 95 % interval.
    """
    both, more, fewer = len(strong & weak), len(strong - weak), len(weak - strong)
    interval = newcombe_paired(both, more, fewer, n - both - more - fewer)
    return interval.low > 0, (more - fewer) / n


# Runs


def run(case: Case, only: Set[str] | None = None) -> RowRecords:
    """The records of a case, or of some of its rows."""
    if only is not None and not only:
        return {}
    return {record.id: record for each in LocalEngine().attack(case, {}, only) for record in each.records}


def reference_attack(case: Case, *, steps: int = STEPS, restarts: int = 1, loss: str = "margin") -> Attack:
    """PGD whose steps add up to 2.5 eps, with gradients averaged where the victim is randomised."""
    steps = min(steps, STEPS_RANDOMIZED) if case.randomized else steps
    pgd: Any = ATTACKS.load("pgd")
    attack: Attack = pgd(
        steps=steps,
        step_size=min(1.0, 2.5 / steps),
        restarts=restarts,
        loss=loss,
        eot=case.draws if case.randomized else 1,
    )
    return attack


def against(context: Context, attack: Attack, *, ball: Ball[Tensor] | None = None, label: Label | None = None) -> Case:
    """The case with another attack, made on the victim itself within the ball."""
    label = label or Label(ATTACKS.spec(attack))
    return replace(context.case, attack=attack, label=label, threat=ball or context.ball, surrogates=())


def reference(context: Context, *, ball: Ball[Tensor] | None = None, **settings: Any) -> Case:
    """The case with the reference attack; see `reference_attack` for the settings."""
    return against(context, reference_attack(context.case, **settings), ball=ball)


def changed(threat: Any, **settings: Any) -> Any:
    """A ball with another radius or another access."""
    return replace(threat, **settings)


# The start


def examined(case: Case, *, rows: int, draws: int, queries: int, surrogate: Model[Any, Any] | None) -> Context:
    """The context of the first check.

    Raises UsageError where the threat model has no ball.
    """
    ball = case.threat.ball if isinstance(case.threat, WrapsBall) else case.threat
    if not (isinstance(ball, Ball) and isinstance(ball, Radius)):
        space = case.victim.space
        advice = "name one, --threat-model linf"
        if not isinstance(space, Box):
            advice = f"{type(space).__name__.lower()} have none; `advkit evaluate` makes the cheap checks on any model"
        raise UsageError(f"the battery attacks within balls and {type(case.threat).__name__} is none: {advice}")
    settings: dict[str, Any] = {"access": Access.GRADIENTS, "queries": None}
    if isinstance(ball, Lattice):
        settings["lattice"] = 0  # points between files: the model's outputs are what is examined
    return Context(
        case=replace(case, n=min(rows, case.n), attack_misclassified=False),
        ball=changed(ball, **settings),
        draws=draws,
        queries=queries,
        surrogate=surrogate,
    )
