"""Views of models that have spiking neurons somewhere inside, under a backward rule."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from advkit.core.protocols import TakesRule
from advkit.core.wrapper import Wrapper
from advkit.models.spiking import RULES
from advkit.models.spiking.surrogates import Rule, use_surrogate


class Ruled(Wrapper, TakesRule):
    """Any model with spiking neurons somewhere inside, such as one behind a defense, under a backward rule."""

    def __init__(self, model: Any, rule: Rule) -> None:
        self.model = model
        self.rule = rule

    def __repr__(self) -> str:
        return f"Ruled({self.model!r}, {RULES.label(self.rule)})"

    def __call__(self, x: Tensor) -> Tensor:
        with use_surrogate(self.rule.entered(len(x))):
            answer: Tensor = self.model(x)
        return answer

    @override
    def with_rule(self, rule: Rule | str | None) -> Any:
        """The model under another rule."""
        return self.model if rule is None else Ruled(self.model, RULES.build(rule))

    def attacker_view(self) -> Any:
        """The view of the model inside, under the same rule."""
        inner = self.model.attacker_view()
        return self if inner is self.model else Ruled(inner, self.rule)

    def to(self, device: Any) -> Any:
        """The model there, under the same rule."""
        moved = self.model.to(device)
        return self if moved is self.model else Ruled(moved, self.rule)
