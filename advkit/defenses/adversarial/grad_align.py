"""GradAlign: input gradients that agree within the ball (Andriushchenko & Flammarion, arXiv 2007.02617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from advkit.core.checks import not_negative
from advkit.core.protocols import Rng
from advkit.defenses.adversarial.base import in_mode
from advkit.defenses.adversarial.one_step import Move
from advkit.defenses.adversarial.single_step import FGSMRS, OneStepObjective
from advkit.training.loop import Objective
from advkit.training.ranks import gathered


def misalignment(first: Tensor, second: Tensor) -> Tensor:
    """1 - mean cosine of the rows [B, ...] of two gradients, in [0, 2]; rows where either is zero are left out.

    0 where none is left. In float32 or wider; the gradient flows through both.
    """
    one, two = (each.flatten(1) if each.dtype == torch.float64 else each.flatten(1).float() for each in (first, second))
    used = (one != 0).any(1) & (two != 0).any(1)
    # a norm has no derivative at zero: rows that are left out get a harmless vector before it is taken
    one, two = (torch.where(used.unsqueeze(1), each, torch.ones_like(each)) for each in (one, two))
    # where the model is sure, gradients are so small that their squares are zero; a cosine does not change with scale
    one, two = (functional.normalize(each / each.detach().abs().amax(1, keepdim=True), eps=0.0) for each in (one, two))
    lost, used = gathered((1 - (one * two).sum(1)) * used), gathered(used)
    return lost.sum() / used.sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class GradAlign(FGSMRS):
    """GradAlign: FGSM-RS plus weight * (1 - mean cosine of the input gradients at two random points of the ball).

    The first gradient is the one that the step follows, held constant; the second is differentiated once more with
    respect to the weights, about twice the cost of FGSM-RS. Works on models whose layers are differentiable twice.

    weight: of the penalty, >= 0; the paper's 0.2 is for eps 8/255 on CIFAR-10, 2.0 for 16/255
    """

    weight: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "weight")

    @override
    def objective(self) -> Objective:
        return _Objective(self, self.weight)


class _Objective(OneStepObjective):
    def __init__(self, defense: GradAlign, weight: float) -> None:
        super().__init__(defense)
        self.weight = weight
        self.eager = "grad_align differentiates the network twice, which a compiled one can't be"

    @override
    def outer(self, model: Any, x: Tensor, y: Tensor, move: Move, after: Tensor, rng: Rng) -> Tensor:
        loss = super().outer(model, x, y, move, after, rng)
        if self.weight == 0:
            return loss
        leaf = self.defense.ball(model.space).sample(x, rng.at("second")).requires_grad_()
        with in_mode(model, self.mode == "train"):
            each = functional.cross_entropy(model(leaf), y, reduction="sum")
            (second,) = torch.autograd.grad(each, leaf, create_graph=True)
        return loss + self.weight * misalignment(move.gradient, second)
