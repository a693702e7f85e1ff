"""Spiking networks as models: same weights under any backward rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from advkit.core.errors import BadModel
from advkit.core.protocols import ModelInfo, TakesRule
from advkit.models.spiking import RULES
from advkit.models.spiking.encoders import Direct
from advkit.models.spiking.neurons import Neuron, Stepped
from advkit.models.spiking.surrogates import Rule, use_surrogate
from advkit.models.torch import TorchModel
from advkit.models.views import Averaged

DRAWS = 10
"""Calls that the attacker's view of a model with random coding averages."""


class SpikingModel(TorchModel, TakesRule):
    """A torch module with spiking neurons, seen under a backward rule; every call starts from rest.

    module:   holds spiking neurons of advkit; BadModel where it does not
    rule:     backward rule of every neuron, an object or a spec; None leaves each its own
    settings: those of TorchModel, by name
    """

    def __init__(self, module: nn.Module, *, rule: Rule | str | None = None, **settings: Any) -> None:
        super().__init__(module, **settings)
        if not neurons(module):
            raise BadModel(
                f"{self.name} holds no spiking neuron of advkit; build one from advkit.models.spiking, or turn a "
                "network of another library into one with from_spikingjelly or from_snntorch"
            )
        self.rule = None if rule is None else RULES.build(rule)

    @classmethod
    @override
    def of(cls, model: TorchModel, rule: Rule | str | None = None) -> SpikingModel:
        """The same description and module, under a rule."""
        return cls(model.module, rule=rule, **model.settings())

    def __repr__(self) -> str:
        rule = "" if self.rule is None else f", rule={RULES.label(self.rule)}"
        return f"SpikingModel({self.name}, classes={self.classes}, space={self.space}{rule})"

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of rows in `space`."""
        if self.rule is None:
            return super().__call__(x)
        with use_surrogate(self.rule.entered(len(x))):
            return super().__call__(x)

    @override
    def with_rule(self, rule: Rule | str | None) -> SpikingModel:
        """The same weights, shared, under another backward rule; answers stay the same to the last bit."""
        return SpikingModel.of(self, rule)

    def with_module(self, module: nn.Module) -> SpikingModel:
        """The same description and rule around another module."""
        return SpikingModel.of(super().with_module(module), self.rule)

    @property
    def randomized(self) -> bool:
        """Whether answers vary from call to call (random coding)."""
        return any(isinstance(each, Direct) and each.randomized for each in self.module.modules())

    def attacker_view(self) -> Any:
        """Itself; the mean of draws where its coding is random."""
        return Averaged(self, DRAWS) if self.randomized else self

    def describe(self) -> ModelInfo:
        return replace(super().describe(), randomized=self.randomized)


def neurons(module: nn.Module) -> list[Neuron]:
    """The spiking neurons inside, in the order of the modules."""
    return [each for each in module.modules() if isinstance(each, Neuron)]


def stepped(module: nn.Module) -> list[Stepped]:
    """The neurons that are called once per time step."""
    return [each for each in module.modules() if isinstance(each, Stepped)]
