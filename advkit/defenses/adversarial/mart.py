"""MART: adversarial training that looks at misclassified samples (Wang et al., ICLR 2020; no arXiv number)."""

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
from advkit.defenses.adversarial.base import AdversarialTraining, Misclassified
from advkit.training.loop import Objective

_ONE = 1.0001  # the released code's: the logarithm of 1 - p stays finite
_ONE_TRUE = 1.0000001
_TINY = 1e-12


def loss(nat: Tensor, adv: Tensor, y: Tensor, beta: float) -> Tensor:
    """MART's loss of logits [B, classes] of clean and adversarial samples, labels y long [B]; a mean over the batch.

    With p, q the softmax of `nat` and `adv`: -log q_y - log(1.0001 - max_{c != y} q_c + 1e-12)
    + beta KL(p || q) (1.0000001 - p_y). Gradients flow through p, q and the weight 1 - p_y, as in the released code;
    the additions, too, are its own.
    """
    log_q = adv.log_softmax(1)
    q, log_p = log_q.exp(), nat.log_softmax(1)
    p = log_p.exp()
    true = y.unsqueeze(1)
    runner_up = q.scatter(1, true, -1.0).amax(1)
    boosted = functional.nll_loss(log_q, y) - torch.log(_ONE - runner_up + _TINY).mean()
    apart = (p * (log_p - torch.log(q + _TINY))).sum(1)
    return boosted + beta * (apart * (_ONE_TRUE - p.gather(1, true).squeeze(1))).mean()


@dataclass(frozen=True, kw_only=True)
class MART(AdversarialTraining):
    """MART: boosted cross-entropy on adversarial images, plus a divergence that counts more for misclassified ones.

    The divergence is that of the adversarial output from the clean one, weighted by 1 - the clean image's probability
    of its label. The inner attack maximises the cross-entropy and starts at the image plus 0.001 N(0, 1), kept inside
    the space.

    beta: weight of the divergence, >= 0; 5 in the paper, 6 in the released code
    """

    start: ClassVar[Start] = "gaussian"

    beta: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "beta")

    @override
    def objective(self) -> Objective:
        return _Objective(self, self.beta)


class _Objective(Misclassified):
    def __init__(self, defense: AdversarialTraining, beta: float) -> None:
        super().__init__(defense)
        self.beta = beta

    @override
    def loss_on(self, made: Tensor, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        return loss(model(x), model(made), y, self.beta)
