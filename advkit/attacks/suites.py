"""Suites: attacks that run one after the other on the rows still robust, worst case per row (arXiv 2003.01690).

A suite is data: stages in order, and for each which of the robust rows it takes. The evasion scenario runs stage
by stage over the whole evaluation, cheap ones first, so that a choice such as "the fifth nearest to the boundary" means
the fifth of all robust rows and not of whatever rows share a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, lp_ball
from advkit.attacks.gradient.apgd import APGDCE
from advkit.attacks.gradient.targeted import APGDDLR, APGDT
from advkit.attacks.minimal.fab import FAB, FABT
from advkit.attacks.query.square import Square
from advkit.attacks.search import Search
from advkit.core import protocols
from advkit.core.checks import one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Ball, Rng
from advkit.threat_models.lp import L1, L2, Linf

INSIDE = 0.02
"""Closeness above which a row is well inside: honest victims' last rows were broken at a tenth of it and less."""

CALL = 16
"""Rows of the smallest call of a model: the harness pads smaller ones on the CPU, so fewer cost as much."""

LUCK = 0.01
"""Fraction of the rows that a sentinel may break by luck: of honest victims at most 0.4 %, of a misleading one 2 %."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One attack of a suite and the rows it takes of those still robust.

    name:     of its records and of its random streams; unique in the suite
    attack:   what runs
    share:    fraction of the robust rows, in (0, 1]
    by:       which ones: "nearest" to the boundary (smallest margin over the spread of the scores, at the best point of
              the stages before), or a "sample" drawn by the rows' ids
    least:    at least so many rows where a fraction is taken, before it is rounded (see `takes`)
    above:    left out unless more than this fraction of the suite's rows are still robust, in [0, 1)
    sentinel: a search of another kind that watches those before it, by scores alone or along the boundary from outside
              (FAB): rows that it breaks mean that gradients are masked or mislead, and call the escalation
    when:     "always", or only after a sentinel's alarm ("escalated")
    """

    name: str
    attack: Any
    share: float = 1.0
    by: Literal["nearest", "sample"] = "nearest"
    least: int = 1
    above: float = 0.0
    sentinel: bool = False
    when: Literal["always", "escalated"] = "always"

    def takes(self, robust: int, /) -> int:
        """How many of so many robust rows it takes: all, or the fraction rounded to whole calls of `CALL` rows.

        An attack that runs several targets or restarts of a row side by side sends that many rows for each. So a call
        holds work and no padding, and few rows cost no more per row than many.
        """
        if self.share >= 1:
            return robust
        beside = self.attack.together if isinstance(self.attack, APGDT) else 1
        wanted = max(self.least, math.ceil(self.share * robust)) * beside
        calls = max(1, round(wanted / CALL))
        return min(robust, max(1, calls * CALL // beside))

    def alarmed(self, broken: Sequence[float], rows: int, /) -> bool:
        """Whether the rows that this sentinel broke say that gradients are masked.

        Any search breaks a row now and then that gradients brought to the very boundary. It does not break a row that
        they left well inside, nor many at once.

        broken: the closeness (see `by`) of the broken rows before; infinite where nothing is known
        rows:   for how many they speak: all that were robust where it took the nearest of them, else those it took
        """
        if not self.sentinel:
            return False
        return any(close > INSIDE for close in broken) or len(broken) >= max(2, LUCK * rows)


class Suite(protocols.Suite, ABC):
    """What the suites share: called as an attack, on these rows alone, every stage takes all that are robust.

    The evasion scenario does not call a suite, it runs its stages one by one, with fractions of all robust rows.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    revision: ClassVar[int] = 1
    """Counted up where the stages change: the spec stays, results do not. Reports and names of run folders tell it."""
    stand_in: ClassVar[Any] = APGDCE(steps=100)
    """One attack for its place where no verdicts tell which rows are robust (transfer)."""

    def complaint(self, ball: Any) -> str | None:
        """None, or why the suite can't run in this ball."""
        inner = lp_ball(ball)
        if isinstance(inner, Linf | L2 | L1):
            return None
        return f"the suites work in Linf, L2 and L1, not in {type(inner).__name__}: name one attack (`pgd` for L0)"

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The stages in order; those of an escalation last."""

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        if reason := self.complaint(ball):
            raise UsageError(reason)
        search = Search(oracle, x, goal, rng)
        for stage in self.stages():
            if stage.when == "escalated" or len(search) <= stage.above * len(x):
                continue
            if not search.affords():
                break
            z = stage.attack(search.oracle, search.x, search.goal, ball, search.rng.at(stage.name))
            if not search.affords():
                search.put(z)
                break
            search.score(z)
        return search.best


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Suite):
    """AutoAttack: APGD-CE, APGD-T, FAB-T and Square at the reference's budget, each on all samples still robust.

    version: "standard" (APGD-CE, targeted APGD, targeted FAB, Square 5,000), "plus" (APGD-CE and DLR with 5 restarts,
             FAB with 5, Square, both targeted ones) or "rand" for victims whose answers vary (EOT over 20 draws)

    Square keeps the reference's patch schedule in absolute query counts.
    """

    version: Literal["standard", "plus", "rand"] = "standard"

    def __post_init__(self) -> None:
        one_of(self, "version", ("standard", "plus", "rand"))

    def stages(self) -> tuple[Stage, ...]:
        """In the reference's order."""
        square = Stage(name="square", attack=Square(queries=5000, schedule="published"))
        targeted = (
            Stage(name="apgd-t", attack=APGDT(steps=100, targets=9)),
            Stage(name="fab-t", attack=FABT(steps=100, targets=9)),
        )
        if self.version == "standard":
            return (Stage(name="apgd-ce", attack=APGDCE(steps=100)), *targeted, square)
        if self.version == "rand":
            return (
                Stage(name="apgd-ce", attack=APGDCE(steps=100, eot=20)),
                Stage(name="apgd-dlr", attack=APGDDLR(steps=100, eot=20)),
            )
        return (
            Stage(name="apgd-ce", attack=APGDCE(steps=100, restarts=5)),
            Stage(name="apgd-dlr", attack=APGDDLR(steps=100, restarts=5)),
            Stage(name="fab", attack=FAB(steps=100, restarts=5)),
            square,
            *targeted,
        )


@dataclass(frozen=True, kw_only=True)
class Lean(Suite):
    """Suite, the cheapest: nearly AutoAttack's robust accuracy for a few per cent of its cost; `thorough` misses less.

    As `thorough`, with half the rows or fewer in the stages after the first two.

    targets: most classes run toward
    """

    revision: ClassVar[int] = 2
    targets: int = 9

    def stages(self) -> tuple[Stage, ...]:
        """Cheap ones first."""
        return _cascade(
            *_first(0.4),
            Stage(name="all-classes", attack=_toward(self.targets, steps=5, together=9), share=0.2),
            Stage(name="near-wide", attack=_wide(40, restarts=2), share=0.08),
            Stage(name="near-classes", attack=_toward(self.targets, steps=20, together=9, loss="dlr"), share=0.06),
            Stage(name="nearest-dlr", attack=_toward(0, steps=50, restarts=4, together=4, loss="dlr"), share=0.02),
            Stage(name="near-fab", attack=FABT(steps=20, targets=3), share=0.1, sentinel=True),
            Stage(name="near-sentinel", attack=Square(queries=150), share=0.03, above=0.1, sentinel=True),
            Stage(name="sentinel", attack=Square(queries=100), share=0.2, by="sample", sentinel=True),
        )


@dataclass(frozen=True, kw_only=True)
class Thorough(Suite):
    """Suite, the default (`auto`): AutoAttack's robust accuracy or less for a small part of its cost.

    Every row gets a short run on the cross-entropy, and one on the margin that begins outside the ball (`wide`): a row
    that gradients from inside do not break may be in a flat or misleading place. On models trained in Linf and attacked
    in L2 that breaks more than AutoAttack's black-box budget. What is left and can be broken is near the boundary, or
    close to a class that was not tried. So the nearer half of the rows takes short runs toward three classes and a few
    steps toward every one, the nearest fifth longer runs from outside, the nearest 15 % longer ones toward every class,
    and the very nearest many starts: a run breaks a row on the boundary one time in two to ten.

    FAB watches along the boundary, Square by scores alone: the nearest rows for longer than a sample of all, but for
    where fewer than a tenth of the rows are robust: gradients that broke nearly all are not masked. On an alarm (see
    `Stage.alarmed`) every robust row gets the full black-box budget and AutoAttack's own stages.

    targets: most classes run toward
    """

    revision: ClassVar[int] = 2
    targets: int = 9

    def stages(self) -> tuple[Stage, ...]:
        """Cheap ones first."""
        return _cascade(
            *_first(0.5),
            Stage(name="all-classes", attack=_toward(self.targets, steps=5, together=9), share=0.4),
            Stage(name="near-wide", attack=_wide(40, restarts=2), share=0.2),
            Stage(name="near-wider", attack=_wide(20, restarts=2, wider=4.0), share=0.2),
            Stage(name="near-classes", attack=_toward(self.targets, steps=20, together=9, loss="dlr"), share=0.15),
            Stage(name="nearest-dlr", attack=_toward(0, steps=50, restarts=4, together=4, loss="dlr"), share=0.05),
            Stage(name="nearest-targets", attack=_toward(2, steps=50, restarts=4, together=8), share=0.05),
            Stage(name="near-fab", attack=FABT(steps=20, targets=3), share=0.2, sentinel=True),
            Stage(name="near-sentinel", attack=Square(queries=150), share=0.06, above=0.1, sentinel=True),
            Stage(name="sentinel", attack=Square(queries=100), share=0.3, by="sample", least=32, sentinel=True),
        )


def _toward(
    targets: int, *, steps: int, restarts: int = 1, together: int = 1, loss: str = "margin", wider: float = 1.0
) -> APGDT:
    """Targets as the scores at the best adversarial point order them."""
    return APGDT(
        steps=steps, restarts=restarts, targets=targets, loss=loss, order="adversarial", together=together, wider=wider
    )


def _first(share: float) -> tuple[Stage, ...]:
    """What every row gets, and the runs toward three classes that a share gets."""
    return (
        Stage(name="apgd-ce", attack=APGDCE(steps=10)),
        Stage(name="wide", attack=_wide(20)),
        Stage(name="apgd-t-short", attack=_toward(3, steps=10), share=share),
    )


def _wide(steps: int, *, restarts: int = 1, wider: float = 3.0) -> APGDT:
    """Starts side by side that begin outside the ball; another distance finds other rows."""
    return _toward(0, steps=steps, restarts=restarts, together=restarts, wider=wider)


def _cascade(*stages: Stage) -> tuple[Stage, ...]:
    """The stages, and after them those that a sentinel's alarm calls for."""
    return (
        *stages,
        Stage(name="square", attack=Square(queries=5000), when="escalated"),
        Stage(name="apgd-t", attack=APGDT(steps=100, targets=9), when="escalated"),
        Stage(name="fab-t", attack=FABT(steps=100, targets=9), when="escalated"),
    )
