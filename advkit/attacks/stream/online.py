"""Online attacks: any attack makes the candidates, a selector spends k submissions on a stream (arXiv 2103.02014)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from advkit.attacks import ATTACKS
from advkit.attacks.base import TensorGoal, TensorOracle
from advkit.attacks.stream.selectors import Rule, Running, selector
from advkit.attacks.wrappers import WrappedOracle
from advkit.core.checks import at_least_one
from advkit.core.errors import UsageError
from advkit.core.protocols import (
    Access,
    MadeForGoal,
    MadeForThreatModel,
    OnlineAttack,
    PlansSubmissions,
    Rng,
    WrapsBall,
    on_streams,
)


@dataclass(frozen=True, kw_only=True)
class Online(OnlineAttack, PlansSubmissions, MadeForGoal, MadeForThreatModel):
    """Online attack on a stream: attacks every item and submits k of them, each decided at once and for good.

    Candidates do not depend on the order of the stream. They are pushed on after they fool the model they are made on:
    what counts is the loss there. Selection costs nothing beside the attack, so a better selector is the cheaper gain.

    inner:     the attack that makes the candidates: a spec, in brackets where it holds commas, or an attack
    selector:  virtual | virtual+ | optimistic | single-ref | optimal-dp | random
    k:         submissions; None takes the threat model's
    observe:   items watched before any is taken, for selectors that watch; None takes their own number
    reference: rank among the watched that later items must exceed (single-ref); None takes the best for k
    exhaust:   take whatever comes once no more items are left than submissions, as the paper's experiments do
    """

    inner: str = "pgd"
    selector: str = "virtual+"
    k: int | None = None
    observe: int | None = None
    reference: int | None = None
    exhaust: bool = True

    default_goal: ClassVar[str] = "untargeted"

    def __post_init__(self) -> None:
        at_least_one(self, "k", "observe", "reference")
        if not self.rule.online:
            raise UsageError(
                f"the selector {self.selector} needs the whole stream at once, which no online attacker has; its "
                "figures stand in every report beside those of the selector asked for"
            )
        if on_streams(self.attack):
            raise UsageError(
                f"inner={self.inner}: an online attack inside an online attack; name one that makes inputs"
            )

    @cached_property
    def rule(self) -> Rule:
        """The selection rule."""
        return selector(self.selector, observe=self.observe, reference=self.reference, exhaust=self.exhaust)

    @cached_property
    def attack(self) -> Any:
        """The attack that makes the candidates."""
        return ATTACKS.build(self.inner)

    @property
    def needs(self) -> Access:
        """What the inner attack needs."""
        return Access(self.attack.needs)

    @property
    def default_threat_model(self) -> str:
        """Streams with the budget named here."""
        return "online" if self.k is None else f"online:k={self.k}"

    def start(self, length: int, budget: int, rng: Rng | None = None) -> Running:
        """The selector for one stream; raises UsageError where its settings do not fit."""
        return self.rule.start(length, budget, rng)

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Any, rng: Rng, /) -> Tensor:
        inner = ball.ball if isinstance(ball, WrapsBall) else ball
        candidates: Tensor = self.attack(_Undecided(oracle), x, goal, inner, rng)
        return candidates


class _Undecided(WrappedOracle):
    """An oracle whose answers are no verdict: no row stops when it is fooled."""

    def __init__(self, oracle: TensorOracle) -> None:
        super().__init__(oracle)
        self.decides = False

    def _around(self, oracle: TensorOracle, rows: Tensor | None = None) -> TensorOracle:
        return _Undecided(oracle)
