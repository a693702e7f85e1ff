"""TRADES: clean accuracy traded against the divergence that an attacker can cause (Zhang et al., arXiv 1901.08573)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from advkit.attacks.gradient.pgd import Start
from advkit.core.checks import not_negative
from advkit.core.protocols import Rng
from advkit.defenses.adversarial.base import AdversarialTraining, OnExamples, RobustObjective, attacked, in_mode
from advkit.threat_models.goals.diverge import Diverge
from advkit.training.loop import Objective


def divergence(clean: Tensor, adversarial: Tensor) -> Tensor:
    """KL(softmax(clean) || softmax(adversarial)), logits [B, classes], summed over classes and averaged over rows.

    The gradient flows through both. The released code divides the sum by a fixed batch size, wrong on the last batch.
    """
    return functional.kl_div(adversarial.log_softmax(1), clean.log_softmax(1), reduction="batchmean", log_target=True)


def diverging(model: Any, defense: AdversarialTraining, x: Tensor, rng: Rng, attack: Any = None) -> Tensor:
    """Rows whose answers the defense's inner attack, or another one, moved away from the clean ones."""
    with torch.no_grad(), in_mode(model, defense.mode == "train"):
        reference = model(x)
    goal, ball = Diverge(reference), defense.ball(model.space)
    return attacked(model, attack or defense.attack, x, goal, ball, rng.at("attack"), defense.mode)


@dataclass(frozen=True, kw_only=True)
class TRADES(AdversarialTraining):
    """TRADES: cross-entropy on clean images plus beta times the divergence between clean and adversarial outputs.

    The inner attack maximises the divergence from the clean answer, which it holds constant, and starts at the image
    plus 0.001 N(0, 1): at the image itself the divergence has no gradient. The start is kept inside the space, which
    the released code leaves out.

    beta: weight of the divergence, >= 0
    """

    start: ClassVar[Start] = "gaussian"

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "beta")

    @override
    def objective(self) -> Objective:
        return _Objective(self, self.beta)


class _Objective(OnExamples, RobustObjective):
    def __init__(self, defense: AdversarialTraining, beta: float) -> None:
        super().__init__(defense)
        self.beta = beta

    @override
    def examples(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        return x if self.beta == 0 else diverging(model, self.defense, x, rng)

    @override
    def loss_on(self, made: Tensor, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        clean = model(x)
        loss = functional.cross_entropy(clean, y)
        return loss if self.beta == 0 else loss + self.beta * divergence(clean, model(made))
