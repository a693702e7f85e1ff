"""A multilayer perceptron for rows of any shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from advkit.core.errors import BadModel
from advkit.models.torch import Architecture, check_widths


@dataclass(frozen=True, kw_only=True)
class MLP(Architecture):
    """MLP: linear layers with ReLU between them; samples are flattened.

    hidden: units of each hidden layer; empty: a linear classifier
    """

    hidden: tuple[int, ...] = (128,)

    def __post_init__(self) -> None:
        if any(units < 1 for units in self.hidden):
            raise BadModel(f"every hidden layer needs at least one unit, got {self.hidden}")

    def network(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        width = math.prod(shape)
        check_widths("mlp", width, *self.hidden, classes)
        for units in self.hidden:
            layers += [nn.Linear(width, units), nn.ReLU()]
            width = units
        return nn.Sequential(*layers, nn.Linear(width, classes))
