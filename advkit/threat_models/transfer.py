"""Transfer: the attacker owns surrogates and never asks the victim (Papernot et al., arXiv 1605.07277)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, Self

from torch import Tensor
from typing_extensions import override

from advkit.core.checks import one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Ball, Describes, Lattice, Rng, Surrogates, WrapsBall
from advkit.core.spaces import Box
from advkit.threat_models.lp import L1, L2, UNIT, Linf
from advkit.threat_models.sparse import L0

Norm = Literal["linf", "l2", "l1", "l0"]
BALLS: dict[str, type] = {"linf": Linf, "l2": L2, "l1": L1, "l0": L0}


def source_name(source: Any) -> str:
    """How a surrogate is called in records and tables: its spec, or the name it describes itself by, or its class."""
    if isinstance(source, str):
        return source
    if isinstance(source, Describes) and not isinstance(source, type):
        return str(source.describe().name)
    return str(getattr(source, "__name__", type(source).__name__))


def source_names(sources: Iterable[Any]) -> tuple[str, ...]:
    """The names of several surrogates; models that share one are numbered: Sequential, Sequential-2."""
    found: list[str] = []
    for source in sources:
        name, number = source_name(source), 2
        while not isinstance(source, str) and name in found:
            name, number = f"{source_name(source)}-{number}", number + 1
        found.append(name)
    return tuple(found)


def checked_sources(sources: Any) -> None:
    """UsageError for what is no tuple of sources; a network of torch is a sequence of its layers, too."""
    if not isinstance(sources, (tuple, list)):
        shown = f"{sources!r} is one text" if isinstance(sources, str) else f"is one {type(sources).__name__}"
        raise UsageError(f"sources {shown}; expected a tuple of specs or models, such as ('zoo:NAME',)")


@dataclass(frozen=True, kw_only=True)
class SurrogateBall(Lattice, WrapsBall):
    """A ball around each row, for attackers whose oracle speaks for models of their own.

    eps:     radius, in units of the norm and of the model's space
    norm:    linf | l2 | l1 | l0
    lattice: levels of the submitted files; 255 rounds to k/255 without leaving the ball, 0 leaves values as they are
    box:     legal inputs; set by `bind`
    """

    access: ClassVar[Access] = Access.GRADIENTS
    victim_access: ClassVar[Access] = Access.NOTHING
    queries: ClassVar[int | None] = None

    eps: float = 8 / 255
    norm: Norm = "linf"
    lattice: int = 255
    box: Box = UNIT

    def __post_init__(self) -> None:
        one_of(self, "norm", tuple(BALLS))
        _ = self.ball

    @cached_property
    @override
    def ball(self) -> Ball[Tensor]:
        """The ball itself; its radius and lattice were checked there."""
        made: Ball[Tensor] = BALLS[self.norm](eps=self.eps, lattice=self.lattice, box=self.box)
        return made

    def bind(self, space: Any) -> Self:
        """The same threat model inside a model's space."""
        bound: Any = self.ball.bind(space)
        return replace(self, box=bound.box)

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """The norm of what changed, per row."""
        return self.ball.distance(x, origin)

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Which rows are finite, legal and within eps."""
        return self.ball.admits(x, origin)

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """Rows as files hold them."""
        return self.ball.finish(x, origin)

    def project(self, x: Tensor, origin: Tensor) -> Tensor:
        """The nearest admitted point."""
        return self.ball.project(x, origin)

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """A random admitted start."""
        return self.ball.sample(origin, rng)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """The eps-long direction of steepest ascent."""
        return self.ball.steepest(gradient, at)

    def describe(self) -> dict[str, Any]:
        """Plain JSON values that say what this threat model is."""
        inner: Any = self.ball
        own = {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name not in ("box", "norm")}
        if isinstance(self, Surrogates):
            own["sources"] = list(source_names(self.sources))
        return {
            **inner.describe(),
            **own,
            "name": type(self).__name__.lower(),
            "knowledge": "transfer",
            "query_budget": None,
        }


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return source_name(value) if isinstance(value, Describes) else str(value)


@dataclass(frozen=True, kw_only=True)
class Transfer(SurrogateBall, Surrogates):
    """Transfer attack: made on the attacker's own surrogate models, judged on a victim that is never queried.

    Several sources are attacked at once through the mean of their logits.

    sources:     model specs such as zoo:NAME (models themselves through the Python API)
    attacks_all: attack also the samples that the victim misclassifies clean, as the TAPM grid counts them
    """

    scenario: ClassVar[str] = "evasion"

    sources: tuple[str, ...] = ()
    attacks_all: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_sources(self.sources)
        if not self.sources:
            raise UsageError("transfer needs at least one surrogate; name it with sources=zoo:NAME (joined by +)")

    @property
    @override
    def surrogates(self) -> tuple[Any, ...]:
        """Specs or models that the attack's oracle speaks for."""
        return self.sources

    @override
    def with_sources(self, sources: Iterable[Any], seen: Iterable[str] = ()) -> Self:
        """The same threat model with these sources; which of them a defense knows makes no difference here."""
        return replace(self, sources=tuple(sources))
