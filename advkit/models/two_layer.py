"""Two-layer ReLU networks whose answers are certified inside a ball, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.errors import BadModel
from advkit.core.protocols import Evidence, Examines, Figure
from advkit.models.torch import TorchModel

Norm = Literal["linf", "l2", "l1"]
P: dict[str, float] = {"linf": math.inf, "l2": 2.0, "l1": 1.0}
"""The exponent of every norm."""
DUAL: dict[str, float] = {"linf": 1.0, "l2": 2.0, "l1": math.inf}


@dataclass(frozen=True)
class Layers:
    """The weights of x -> second @ max(0, first @ x + bias) + shift, in float64.

    first:     [units, features]
    second:    [classes, units]
    round_off: of the type that the network computes in, relative to a number
    """

    first: Tensor
    bias: Tensor
    second: Tensor
    shift: Tensor
    round_off: float

    @classmethod
    def of(cls, module: nn.Module) -> Layers:
        """Those of an `mlp` with one hidden layer; BadModel for other networks."""
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        others = [layer for layer in module.modules() if not list(layer.children()) and layer not in linear]
        if len(linear) != 2 or not all(isinstance(layer, (nn.Flatten, nn.ReLU)) for layer in others):
            raise BadModel(
                f"a certificate is for a two-layer ReLU network (mlp:hidden=K); this one has {len(linear)} linear "
                f"layers and {', '.join(sorted({type(each).__name__ for each in others})) or 'nothing else'}"
            )
        one, two = linear
        weights = [
            torch.zeros(layer.out_features) if tensor is None else tensor.detach().cpu()
            for layer in (one, two)
            for tensor in (layer.weight, layer.bias)
        ]
        first, bias, second, shift = (each.double() for each in weights)
        # eps of a type is twice its unit round-off
        return cls(first, bias, second, shift, torch.finfo(one.weight.dtype).eps / 2)

    def margins(self, x: Tensor, y: Tensor, norm: str, eps: float) -> Tensor:
        """By how much the logit of class y leads all others, at least, anywhere within eps of each sample; float64 [B].

        Where no unit changes sign in the ball the network is affine there, and the bound is exact but for round-off. A
        unit that may change sign counts with what it may deviate from that affine function. Round-off of the network's
        own arithmetic, and what a threat model tolerates beyond eps, are taken off.
        """
        flat, y = x.detach().cpu().flatten(1).double(), y.cpu()
        radius = eps * (1 + 1e-5) + 1e-7
        q = DUAL[norm]
        before = flat @ self.first.T + self.bias
        active = (before >= 0).double()
        reach = radius * torch.linalg.vector_norm(self.first, q, dim=1)
        crossing = (reach - before.abs()).clamp_min(0)
        off = self._off(flat, before, reach, radius)
        margins = torch.full((len(flat),), math.inf, dtype=torch.float64)
        for rival in range(len(self.second)):
            lead = self.second[y] - self.second[rival]
            value = (before * active * lead).sum(1) + self.shift[y] - self.shift[rival]
            slope = (active * lead) @ self.first
            fall = radius * torch.linalg.vector_norm(slope, q, dim=1) + (lead.neg().clamp_min(0) * crossing).sum(1)
            bound = value - fall - off[torch.arange(len(y)), y] - off[:, rival]
            margins = torch.where(y == rival, margins, torch.minimum(margins, bound))
        return margins

    def _off(self, x: Tensor, before: Tensor, reach: Tensor, radius: float) -> Tensor:
        """Bound on the round-off of every logit, [B, classes], in any order of summation."""

        def growth(terms: int) -> float:
            return terms * self.round_off / (1 - terms * self.round_off)

        features, units = self.first.shape[1], self.first.shape[0]
        inner = growth(features + 1) * ((x.abs() + radius) @ self.first.abs().T + self.bias.abs())
        hidden = before.clamp_min(0) + reach + inner
        terms = growth(units + 1)
        return (inner + terms * hidden) @ self.second.abs().T + terms * self.shift.abs()


class TwoLayer(TorchModel, Examines):
    """A two-layer ReLU network that says of every sample whether its answer is certified.

    norm, eps: the ball of the certificate, in units of the model's space

    In a report: `certified` is the share of samples whose clean answer no point of the ball changes;
    `certificate_broken` that of certified samples whose answer an attack inside the ball changed, which is 0 where
    arithmetic is IEEE arithmetic of the network's type; `certificate_eps` is the radius that both are of, whatever that
    of the attack is. The certificate knows no box of legal values, so that it also
    holds inside one.
    """

    norm: Norm = "linf"
    eps: float = 0.0

    @classmethod
    def around(cls, model: TorchModel, norm: Norm, eps: float) -> TwoLayer:
        """The same network with certificates; BadModel where it is no two-layer ReLU network."""
        if model.mean:
            raise BadModel("a certificate is for samples as the network sees them; this model normalises them outside")
        made = cls(model.module, **model.settings())
        made.norm, made.eps = norm, eps
        _ = Layers.of(made.module)
        return made

    @override
    def with_module(self, module: nn.Module) -> TorchModel:
        return type(self).around(super().with_module(module), self.norm, self.eps)

    def margins(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Layers.margins`."""
        return Layers.of(self.module).margins(x, y, self.norm, self.eps)

    @override
    def examine(self, evidence: Evidence) -> dict[str, Sequence[Figure]]:
        decided = evidence.clean.argmax(1)
        certified = self.margins(evidence.origin, decided) > 0
        moved = (evidence.handed - evidence.origin).flatten(1).double()
        near = torch.linalg.vector_norm(moved, P[self.norm], dim=1).cpu() <= self.eps * (1 + 1e-5) + 1e-7
        changed = (evidence.answer.argmax(1) != decided).cpu()
        broken: list[Any] = [
            bool(hit) if held else None for held, hit in zip(certified.tolist(), (near & changed).tolist(), strict=True)
        ]
        radius = [self.eps] * len(broken)
        return {"certified": certified.tolist(), "certificate_broken": broken, "certificate_eps": radius}
