"""Online: a stream of items, k of which the attacker may replace, each decided as it passes (arXiv 2103.02014)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

from torch import Tensor
from typing_extensions import override

from advkit.core.checks import at_least_one
from advkit.core.errors import UsageError
from advkit.core.protocols import (
    Access,
    Lattice,
    Renders,
    Submissions,
    Surrogates,
    ThreatModel,
    WrapsBall,
    one_change,
)
from advkit.threat_models.transfer import checked_sources, source_names


@dataclass(frozen=True, kw_only=True)
class Online(Submissions, Surrogates, WrapsBall, Lattice):
    """Online attack on a stream: items come in random order, and adversarial versions of at most k of them are
    submitted.

    An item passes once: it is submitted at once or never. With sources, the attacker sees its value (the loss of the
    true label) on the surrogates only, several of them through the mean of their logits (the stochastic setting);
    without, on the victim (the deterministic setting).

    k:            submissions; None leaves it to the attack
    inner:        threat model of each item: a spec, in brackets where it holds commas
    sources:      model specs such as zoo:NAME (models themselves through the Python API); `public` stands for every
                  public surrogate of the task's zoo; empty is white box
    permutations: random orders of the stream that figures are averaged over
    """

    scenario: ClassVar[str] = "stream"

    k: int | None = None
    inner: str = "linf:eps=0.1"
    sources: tuple[str, ...] = ()
    permutations: int = 1000

    def __post_init__(self) -> None:
        checked_sources(self.sources)
        at_least_one(self, "k", "permutations")
        if self.ball.scenario != "evasion":
            raise UsageError(f"inner={self.inner} is a {self.ball.scenario}; name what bounds one item: linf:eps=0.1")
        if isinstance(self.ball, Surrogates) and self.ball.surrogates:
            raise UsageError(f"inner={self.inner} names surrogates; name them with sources=... of the stream")
        if isinstance(self.ball, Renders) or one_change(self.ball):
            raise UsageError(f"inner={self.inner} bounds no item by itself; name what does: linf:eps=0.1, patch:size=5")

    @cached_property
    @override
    def ball(self) -> Any:
        """The threat model of each item."""
        from advkit.threat_models import THREAT_MODELS

        return THREAT_MODELS.build(self.inner)

    @property
    def access(self) -> Access:
        """What the attacker may ask of the model that the values come from."""
        made: ThreatModel[Tensor] = self.ball
        return made.access

    @property
    def queries(self) -> int | None:
        """Answers per item."""
        made: ThreatModel[Tensor] = self.ball
        return made.queries

    @property
    @override
    def lattice(self) -> int:
        """Levels of the submitted files; 0 leaves values as they are."""
        return self.ball.lattice if isinstance(self.ball, Lattice) else 0

    @property
    @override
    def surrogates(self) -> tuple[Any, ...]:
        """Specs or models that the attacker's oracle speaks for; none in white box."""
        return self.sources

    @override
    def with_sources(self, sources: Iterable[Any], seen: Iterable[str] = ()) -> Self:
        """The same stream seen through these sources; which of them a defense knows makes no difference here."""
        return replace(self, sources=tuple(sources))

    @override
    def agreed(self, k: int | None) -> Self:
        """The same stream with the attack's budget; raises UsageError where both name one and they differ."""
        if k is None or k == self.k:
            return self
        if self.k is not None:
            raise UsageError(f"the attack plans {k} submissions and the threat model grants {self.k}: say k once")
        return replace(self, k=k)

    def bind(self, space: Any) -> Self:
        """The same stream inside a model's space."""
        return replace(self, inner=self.ball.bind(space))

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """The inner threat model's distance, per item."""
        distance: Tensor = self.ball.distance(x, origin)
        return distance

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Which items may be handed in as they are."""
        admitted: Tensor = self.ball.admits(x, origin)
        return admitted

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """Items as they are handed in."""
        finished: Tensor = self.ball.finish(x, origin)
        return finished

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that say what this threat model is."""
        inner = self.ball.describe()
        return {
            **inner,
            "name": "online",
            "inner": inner["name"],
            "k": self.k,
            "permutations": self.permutations,
            **({"sources": list(source_names(self.sources)), "knowledge": "transfer"} if self.sources else {}),
        }
