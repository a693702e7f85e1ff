"""Tiny victims whose answers can be worked out by hand, and ones that break in known ways.

All randomness of the kit comes from generators of its own; the global ones are never touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from advkit.core.protocols import Access
from advkit.core.spaces import Box
from advkit.models.torch import TorchModel

DUALS = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}


def uniform(seed: int, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1) from a generator of their own."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers from a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class _Affine(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor, scale: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.clone()), nn.Parameter(bias.clone())
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x.flatten(1) @ self.weight.T + self.bias)


class Linear(TorchModel):
    """logits = scale (weight x + bias) on flattened rows: every robust accuracy has a closed form.

    weight: [C, D]; bias: [C]; scale: 1e6 makes logits whose cross-entropy has no gradient left (saturated)
    """

    def __init__(self, weight: Tensor, bias: Tensor, space: Box | None = None, scale: float = 1.0) -> None:
        super().__init__(_Affine(weight, bias, scale).eval(), space, len(weight), name="linear")
        self.weight, self.bias = weight, bias

    def distance(self, x: Tensor, labels: Tensor, norm: str) -> Tensor:
        """Distance [B] to the nearest other class in "linf", "l2" or "l1", the box left aside; 0 where it is wrong."""
        weight, x = self.weight.double(), x.flatten(1).double()
        logits = x @ weight.T + self.bias.double()
        gap = logits.gather(1, labels[:, None]) - logits
        length = torch.linalg.vector_norm(weight[labels][:, None] - weight[None], ord=DUALS[norm], dim=2)
        other = torch.arange(len(weight)) != labels[:, None]
        return torch.where(other, gap / length.clamp_min(1e-300), torch.inf).amin(1).clamp_min(0)

    def distance_l0(self, x: Tensor, labels: Tensor) -> Tensor:
        """The fewest entries [B] to change, within the box, to leave the class (of two); inf where none do."""
        weight, flat = self.weight.double(), x.flatten(1).double()
        logits = flat @ weight.T + self.bias.double()
        other = 1 - labels
        gap = (logits.gather(1, labels[:, None]) - logits.gather(1, other[:, None])).squeeze(1)
        slope = weight[labels] - weight[other]
        low, high = self.space.bounds_like(flat)
        best = torch.where(slope > 0, slope * (flat - low), slope * (flat - high))
        left = gap[:, None] - best.sort(1, descending=True)[0].cumsum(1)
        enough = torch.cat([gap[:, None], left], 1) < 0
        return torch.where(enough.any(1), enough.float().argmax(1).double(), torch.inf)


def linear(features: int = 8, classes: int = 2, seed: int = 0, scale: float = 1.0, space: Box | None = None) -> Linear:
    """A fixed random linear victim on rows [features] whose decisions split [0, 1]^features."""
    weight = normal(seed, classes, features)
    return Linear(weight, -0.5 * weight.sum(1), space, scale)


class _Disc(nn.Module):
    def __init__(self, centre: Tensor, radius: float) -> None:
        super().__init__()
        self.centre = nn.Parameter(centre.clone())
        self.radius = radius

    def forward(self, x: Tensor) -> Tensor:
        inside = self.radius**2 - (x.flatten(1) - self.centre).square().sum(1)
        return torch.stack([-inside, inside], 1)


class Quadratic(TorchModel):
    """Class 1 inside a sphere, class 0 outside: a curved boundary whose L2 distance is known.

    centre: [D]; radius: > 0
    """

    def __init__(self, centre: Tensor, radius: float, space: Box | None = None) -> None:
        super().__init__(_Disc(centre, radius).eval(), space, 2, name="quadratic")
        self.centre, self.radius = centre, radius

    def distance(self, x: Tensor, norm: str = "l2") -> Tensor:
        """Distance [B] to the sphere, the box left aside; in "linf", "l1" and "l0" from inside it alone.

        A convex set holds a ball while it holds the ball's corners: in Linf the farthest from the centre is the way of
        the row's own offset, in L1 each is one changed value. In L0 one value, changed at will, leaves the sphere.
        """
        offset = (x.flatten(1).double() - self.centre.double()).abs()
        length: Tensor = torch.linalg.vector_norm(offset, dim=1)
        if norm == "l2":
            return (length - self.radius).abs()
        if norm == "l0":
            return torch.ones_like(length)
        rest = self.radius**2 - length.square()
        if norm == "l1":
            return ((rest[:, None] + offset.square()).clamp_min(0).sqrt() - offset).amin(1)
        total, features = offset.sum(1), offset.shape[1]
        return ((total.square() + features * rest.clamp_min(0)).sqrt() - total) / features


def exhaustive(model: Any, goal: Any, ball: Any, x: Tensor, points: int = 101) -> Tensor:
    """The lowest margin [B] that the goal has anywhere in the ball, on a grid around each row [2], corners included."""
    reach = torch.linspace(-1, 1, points)
    grid = torch.stack(torch.meshgrid(reach, reach, indexing="ij"), -1).reshape(-1, 2)
    lowest = []
    for row in range(len(x)):
        origin = x[row : row + 1].expand(len(grid), 2)
        z = ball.project(origin + ball.eps * grid, origin)
        answer = model(z).detach()
        lowest.append(goal.take(torch.full((len(grid),), row)).margin(answer).amin())
    return torch.stack(lowest)


class _Through(nn.Module):
    """A module behind a function of the input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def before(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.inner(self.before(x))
        return answer


class _Rounded(_Through):
    def __init__(self, inner: nn.Module, levels: int) -> None:
        super().__init__(inner)
        self.levels = levels

    def before(self, x: Tensor) -> Tensor:
        return (x * self.levels).round() / self.levels


class _Noisy(_Through):
    def __init__(self, inner: nn.Module, deviation: float) -> None:
        super().__init__(inner)
        self.deviation = deviation

    def before(self, x: Tensor) -> Tensor:
        return x + self.deviation * torch.randn_like(x)


class _OnlyThere(_Through):
    def __init__(self, inner: nn.Module, data: Tensor) -> None:
        super().__init__(inner)
        self.data: Tensor
        self.register_buffer("data", data.flatten(1).clone())

    def forward(self, x: Tensor) -> Tensor:
        off = (x.detach().flatten(1)[:, None] - self.data).abs().amax(2).amin(1) > 1e-6
        answer: Tensor = self.inner(x)
        return answer.masked_fill(off[:, None], torch.nan)


def _behind(module: nn.Module, model: TorchModel, name: str) -> TorchModel:
    return TorchModel(module.eval(), model.space, model.classes, name=name)


def quantised(model: TorchModel, levels: int = 4) -> TorchModel:
    """The model behind an input rounded to `levels` steps: right answers, zero gradients."""
    return _behind(_Rounded(model.module, levels), model, "quantised")


def noisy(model: TorchModel, deviation: float = 0.3) -> TorchModel:
    """The model behind fresh Gaussian noise from torch's global generator: every answer differs."""
    return _behind(_Noisy(model.module, deviation), model, "noisy")


def nan_off(model: TorchModel, data: Tensor) -> TorchModel:
    """The model on these rows, NaN everywhere else: it breaks down, it is not fooled."""
    return _behind(_OnlyThere(model.module, data), model, "nan_off_the_data")


def network(shape: Sequence[int] = (2, 6, 6), classes: int = 3, seed: int = 0) -> TorchModel:
    """A small smooth convolutional net in evaluation mode, with batch statistics, dropout and a frozen parameter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, last = nn.Conv2d(shape[0], 6, 3, padding=1), nn.LazyLinear(classes)
        module = nn.Sequential(
            first,
            nn.BatchNorm2d(6),
            nn.Softplus(beta=4),
            nn.Dropout(0.3),
            nn.Conv2d(6, 6, 3, stride=2),
            nn.Tanh(),
            nn.Flatten(),
            last,
        )
        module(torch.rand(32, *shape))
    with torch.no_grad():
        last.weight.mul_(8)
    for parameter in first.parameters():
        parameter.requires_grad_(False)
    return TorchModel(module.eval(), Box(shape=tuple(shape)), classes, name="network")


@dataclass(frozen=True, kw_only=True)
class Leaver:
    """An attack that leaves the ball: `factor` eps up everywhere. What it returns must be called INVALID."""

    needs: ClassVar[Access] = Access.NOTHING
    factor: float = 2.0

    def __call__(self, oracle: Any, x: Tensor, goal: Any, ball: Any, rng: Any, /) -> Tensor:
        outside: Tensor = x + self.factor * ball.eps
        return outside
