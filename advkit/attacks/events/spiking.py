"""Any gradient attack on a spiking network, under the backward rule that the attacker chooses (arXiv 2503.03272)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from advkit.attacks.around import Around
from advkit.attacks.base import TensorGoal, TensorOracle, model_name
from advkit.attacks.suites import Stage, Suite
from advkit.attacks.wrappers import WrappedOracle
from advkit.core.checks import check
from advkit.core.errors import BadModel, UsageError
from advkit.core.protocols import Ball, Rng, TakesRule

ENSEMBLE = ("pdsg", "atan", "rect", "triangle", "rga", "bptr", "hart")
ALL = "ensemble"
OWN = "own"


@dataclass(frozen=True, kw_only=True)
class Spiking(Around):
    """Surrogate-gradient attack on a spiking network, any gradient attack inside: spiking:pgd,surrogate=pdsg.

    No surrogate gradient is strongest on every network. The ensemble runs the attack under seven of them and under the
    one that the network was trained with, each on the rows that are still robust; reports tell its stages by their
    names.

    attack:    a spec, in brackets where it has commas; it needs gradients
    surrogate: pdsg, atan, sigmoid, rect, triangle, gaussian, rga, bptr, hart or assg, settings in brackets such as
               [atan:alpha=50,detach_reset=true]; "own" for the one it was trained with; "ensemble" for the worst case
               per row
    """

    pointless: ClassVar[str] = "no surrogate matters to it: name it without spiking"

    attack: str = "pgd"
    surrogate: str = "pdsg"

    def __new__(cls, *, attack: str = "pgd", surrogate: str = "pdsg") -> Spiking:
        """Only the ensemble is a suite and has stages; a copy with other settings may be of the other kind."""
        if cls is _Ensemble and surrogate != ALL:
            return Spiking(attack=attack, surrogate=surrogate)
        return object.__new__(_Ensemble if surrogate == ALL else cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "surrogate", bool(self.surrogate), "a surrogate gradient such as pdsg, or own, or ensemble")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        z: Tensor = self.inner(self.through(oracle), x, goal, ball, rng)
        return z

    def through(self, oracle: TensorOracle) -> TensorOracle:
        """The oracle under the surrogate gradient; raises BadModel where the model has no spiking neurons."""
        return seen_under(oracle, self.surrogate)


@dataclass(frozen=True, kw_only=True)
class _Ensemble(Spiking, Suite):
    """The worst case over surrogate gradients, in any threat model that the attack inside takes."""

    # To the outside the same class: specs, labels and pickles know both as Spiking.
    __qualname__ = "Spiking"

    def __reduce__(self) -> tuple[Any, ...]:
        """As a call of Spiking."""
        return partial(Spiking, attack=self.attack, surrogate=self.surrogate), ()

    @property
    def stand_in(self) -> Spiking:
        """The default surrogate gradient."""
        return Spiking(attack=self.attack, surrogate=ENSEMBLE[0])

    def complaint(self, ball: Any) -> str | None:
        """Left to the attack inside."""
        return None

    def stages(self) -> tuple[Stage, ...]:
        """One per surrogate gradient, the network's own last."""
        names = (*ENSEMBLE, OWN)
        return tuple(Stage(name=name, attack=Spiking(attack=self.attack, surrogate=name)) for name in names)

    __call__ = Suite.__call__


def under_rule(model: Any, rule: str | None) -> Any:
    """A spiking model under a backward rule, given by its spec; None: the rule it was trained with.

    Asks the model's `with_rule`; one that has none, such as a checkpoint or a network behind a defense, is asked
    through the spiking neurons among its modules. Raises BadModel where there are none.
    """
    if isinstance(model, TakesRule):
        return model.with_rule(rule)
    inside = getattr(model, "modules", None)
    for module in inside() if callable(inside) else ():
        for layer in module.modules():
            ask = getattr(layer, "model_under", None)
            if callable(ask):
                return ask(model, rule)
    raise BadModel(
        f"{model_name(model)} has no spiking neurons, so there is no surrogate to choose: "
        "attack it directly (pgd in place of spiking:pgd), or turn a network of spikingjelly or snntorch into a model "
        "with from_spikingjelly or from_snntorch"
    )


def seen_under(oracle: TensorOracle, surrogate: str) -> TensorOracle:
    """An oracle whose gradients follow a backward rule of spikes; its answers, and the verdict, stay the same.

    surrogate: spec of a rule, or "own"
    """
    views = []

    def view(model: Any) -> Any:
        views.append(under_rule(model, None if surrogate == OWN else surrogate))
        return views[-1]

    seen = oracle.seen_as(view, decides=oracle.decides)
    rule = getattr(views[-1], "rule", None)
    return _Remembered(oracle, rule, None) if getattr(rule, "remembers", False) else seen


class _Remembered(WrappedOracle):
    """An oracle under a rule with a memory; what it knows of a row goes along with the row, whatever batch it is in."""

    def __init__(self, oracle: TensorOracle, rule: Any, memory: Any) -> None:
        super().__init__(oracle)
        self.rule = rule
        self.memory = memory
        self._seen: TensorOracle | None = None

    def _around(self, oracle: TensorOracle, rows: Tensor | None = None) -> TensorOracle:
        memory = self.memory if self.memory is None or rows is None else self.memory.take(rows)
        return _Remembered(oracle, self.rule, memory)

    def gradient(self, x: Tensor, goal: TensorGoal, of: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if of is not None:
            raise UsageError("this surrogate follows every row by itself, not several candidates of one row")
        if self.memory is None:
            self.memory = self.rule.memory_of(len(x))
        if self._seen is None:
            rule = self.memory.remembering
            self._seen = self.oracle.seen_as(lambda model: under_rule(model, rule), decides=self.decides)
        self.memory.rewind()
        return self._seen.gradient(x, goal)
