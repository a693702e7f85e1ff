"""BPDA: any gradient attack past an input transformation (Athalye, Carlini and Wagner, arXiv 1802.00420)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

from torch import Tensor
from typing_extensions import override

from advkit.attacks.around import Around
from advkit.attacks.base import TensorGoal, TensorOracle
from advkit.attacks.suites import Stage, Suite
from advkit.core.checks import one_of
from advkit.core.protocols import Ball, Rng, TakesStandIn

Through = Literal["identity", "own", "both"]
BOTH: Through = "both"


@dataclass(frozen=True, kw_only=True)
class BPDA(Around):
    """BPDA (backward pass differentiable approximation), any gradient attack inside: bpda:pgd.

    The answers are the defended model's; the derivative of its input transformation is taken to be the identity's.

    attack:  a spec, in brackets where it has commas; it needs gradients
    through: "identity"; "own", the derivative that the defense hands out, as without bpda; or "both": first its own,
             then the identity's on the samples that are still robust, worst case per sample

    On a model without an input transformation, such as the one behind the defense, it is the attack inside. Raises
    UsageError for attacks without gradients.
    """

    pointless: ClassVar[str] = "that none can be replaced: name it alone"

    attack: str = "pgd"
    through: Through = "identity"

    def __new__(cls, *, attack: str = "pgd", through: Through = "identity") -> BPDA:
        """Only both together are a suite and have stages; a copy with other settings may be of the other kind."""
        if cls is _Both and through != BOTH:
            return BPDA(attack=attack, through=through)
        return object.__new__(_Both if through == BOTH else cls)

    def __post_init__(self) -> None:
        one_of(self, "through", ("identity", "own", BOTH))
        super().__post_init__()

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        seen = oracle.seen_as(_identity, decides=oracle.decides) if self.through == "identity" else oracle
        z: Tensor = self.inner(seen, x, goal, ball, rng)
        return z


@dataclass(frozen=True, kw_only=True)
class _Both(BPDA, Suite):
    """The worst case over both derivatives, in any threat model that the attack inside takes."""

    # To the outside the same class: specs, labels and pickles know both as BPDA.
    __qualname__ = "BPDA"

    def __reduce__(self) -> tuple[Any, ...]:
        """As a call of BPDA."""
        return partial(BPDA, attack=self.attack, through=BOTH), ()

    @property
    def stand_in(self) -> Any:
        """The attack inside."""
        return self.inner

    @override
    def complaint(self, ball: Any) -> str | None:
        """Left to the attack inside."""
        return None

    @override
    def stages(self) -> tuple[Stage, ...]:
        """The defense's own derivative, then the identity's."""
        names: tuple[Through, ...] = ("own", "identity")
        return tuple(Stage(name=name, attack=BPDA(attack=self.attack, through=name)) for name in names)

    __call__ = Suite.__call__


def _identity(model: Any) -> Any:
    """The model with the derivative of the identity in place of its input transformation's."""
    return model.with_identity() if isinstance(model, TakesStandIn) else model
