"""A network that recovers a sample from few linear measurements of it, as in the second task of arXiv 2203.14195."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.checks import at_least
from advkit.core.errors import BadModel
from advkit.core.protocols import Rng
from advkit.models.torch import Architecture, TorchModel, check_widths


class Measured(nn.Module):
    """A fixed random linear map of flattened samples: x [B, ...] -> [B, m].

    Its entries are normal with variance 1/m, so that a measurement is about as long as its sample. They are drawn from
    a generator of their own and are a buffer: no training changes them.
    """

    matrix: Tensor

    def __init__(self, features: int, measurements: int, seed: int) -> None:
        super().__init__()
        drawn = torch.randn(
            measurements,
            features,
            generator=torch.Generator("cpu").manual_seed(seed),
            device="cpu",
            dtype=torch.float32,
        )
        place = torch.get_default_device()  # "meta" where only names and shapes are wanted
        self.register_buffer("matrix", (drawn / math.sqrt(measurements)).to(place))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.flatten(1), self.matrix)


@dataclass(frozen=True, kw_only=True)
class Reconstructor(Architecture):
    """Reconstruction network: measures a sample by a fixed random linear map and recovers the sample from that.

    measurements: numbers that are measured, >= 1; 0 for a quarter of the sample's
    hidden:       units of each hidden layer of the network that recovers it; empty: a linear map
    seed:         of the map's entries, normal with variance 1/measurements. One map for all seeds of training
    sigmoid:      end in a sigmoid, for samples in [0, 1]

    The map is inside the model: an attacker changes the sample that is measured, and a front stands before the map.
    The paper does not say its measurements; these settings are ours. Raises BadModel for a task of classes.
    """

    measurements: int = 0
    hidden: tuple[int, ...] = (512, 512)
    seed: int = 0
    sigmoid: bool = True

    def __post_init__(self) -> None:
        at_least(self, 0, "measurements", "seed")
        if any(units < 1 for units in self.hidden):
            raise BadModel(f"every hidden layer needs at least one unit, got {self.hidden}")

    def network(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        features = math.prod(shape)
        width = self.measurements or math.ceil(features / 4)
        check_widths("reconstructor", features, width, *self.hidden, features)
        layers: list[nn.Module] = [Measured(features, width, self.seed)]
        for units in self.hidden:
            layers += [nn.Linear(width, units), nn.ReLU()]
            width = units
        layers += [nn.Linear(width, features), *([nn.Sigmoid()] if self.sigmoid else [])]
        return nn.Sequential(*layers, nn.Unflatten(1, shape))

    @override
    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: object = None) -> TorchModel:
        """An untrained model; `classes` is 0 for a task whose answers are samples."""
        if classes:
            raise BadModel(
                f"reconstructor answers samples, and this task has {classes} classes: use mlp or cnn, or a task such "
                "as digits-reconstruction"
            )
        model = super().__call__(shape, 1, rng, space=space)
        model.classes, model.answer_shape = None, tuple(int(length) for length in shape)
        return model
