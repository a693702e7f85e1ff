"""Universal perturbations (Moosavi-Dezfooli et al., arXiv 1610.08401; by gradients Shafahi et al., 1811.11304)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import TensorGoal, TensorOracle, only_in
from advkit.attacks.universal.learning import Learns, Lessons
from advkit.core.checks import at_least_one, fraction, not_negative, one_of, positive
from advkit.core.protocols import Access, MadeForThreatModel, Planned, Rng, Stepped, WantsData
from advkit.threat_models.lp import row_sum, wide
from advkit.threat_models.shared import Universal


@dataclass(frozen=True, kw_only=True)
class UniversalPerturbation(Learns, MadeForThreatModel, WantsData, Stepped, Planned):
    """Universal perturbation: one vector, learned on the attacker's own samples and added to all that are attacked.

    method:    "gradient" descends the mean loss by stochastic gradients (arXiv 1811.11304); "deepfool" goes through the
               samples one by one and adds the least change that takes each over the boundary (arXiv 1610.08401)
    samples:   of the attacker's data, at most, drawn; >= 1
    steps:     of gradient, >= 1
    batch:     samples per step, >= 1
    step_size: length of the first step of gradient in units of eps, > 0; it falls to 0
    clip:      a sample whose loss is below -clip pulls no more, > 0 (the paper's beta, 9 there); 1 is a little beyond
               the boundary under cross-entropy, so that the samples that still stand decide
    loss:      surrogate loss: "ce", "margin" or "dlr", where the goal has them
    passes:    of deepfool over the samples, at most, >= 1
    rate:      fraction of the samples that reach the goal at which deepfool ends, in (0, 1]
    overshoot: of deepfool: how much further than the boundary a change goes, >= 0

    The samples that are attacked are never asked about: what the report says is of samples that the vector was not
    learned on. Besides success on samples that are classified correctly it has `fooling_rate`, the fraction of
    all samples whose decision changes, as the papers have it. The cost of learning is shared out among the samples.
    Deviations: the deepfool form takes each step towards the goal's nearest competitor by score, where DeepFool takes
    the nearest by linearised distance; its direction is that of the threat model's norm.
    Raises UsageError for values out of range, outside the threat model universal, and without data to learn on.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    wants_data: ClassVar[bool] = True
    default_threat_model: ClassVar[str] = "universal:eps=0.1"
    method: Literal["gradient", "deepfool"] = "gradient"
    samples: int = 2000
    steps: int = 300
    batch: int = 100
    step_size: float = 1.0
    clip: float = 1.0
    loss: str = "ce"
    passes: int = 3
    rate: float = 0.8
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "passes")
        positive(self, "step_size", what="length in units of eps")
        fraction(self, "rate")
        not_negative(self, "overshoot")
        one_of(self, "method", ("gradient", "deepfool"))

    @property
    @override
    def planned(self) -> float:
        """Nothing is asked of the samples themselves; what is shared out hangs on how many there are."""
        return 1.0

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng, /) -> Tensor:
        only_in(threat, Universal, "universal", self.default_threat_model)
        if not len(x):
            return x
        if self.method == "deepfool":
            change = self._deepfool(oracle, x, threat, rng)
        else:
            change = self.learned(oracle, x, threat, rng, "universal")
        applied: Tensor = threat.applied(change, x)
        return applied

    def _deepfool(self, oracle: TensorOracle, x: Tensor, threat: Universal, rng: Rng) -> Tensor:
        lessons = Lessons.of(oracle, x, rng, self.samples, "universal")
        change = threat.blank(x, rng.at("start").generator())
        for number in range(self.passes):
            answer = oracle(threat.applied(change, lessons.x), lessons.pays)
            if float(lessons.goal.reached(answer).float().mean()) >= self.rate:
                break
            order = torch.randperm(len(lessons.x), generator=rng.at("order", number).generator())
            for row in torch.split(order.to(x.device), 1):
                change = threat.within(change + self._least(oracle, lessons.take(row), threat, change))
        return change

    def _least(self, oracle: TensorOracle, one: Lessons, threat: Universal, change: Tensor) -> Tensor:
        """What takes one sample over the boundary from where the change has brought it, [...]; 0 where it has."""
        start = z = threat.applied(change, one.x)
        goal = one.goal.under("margin")
        for _ in range(MOST):
            margin, gradient, answer = oracle.gradient(z, goal, one.pays)
            if bool(goal.reached(answer).all()):
                break
            size, steep = margin.abs().to(wide(margin)) + SLACK, gradient.to(wide(gradient))
            if threat.ball == "linf":
                way = steep.sign() * (size / row_sum(steep.abs()).clamp_min(SLACK)).view(-1, *(1,) * (z.ndim - 1))
            else:
                way = steep * (size / row_sum(steep.square()).clamp_min(SLACK)).view(-1, *(1,) * (z.ndim - 1))
            z = torch.clamp(z - (1 + self.overshoot) * way.to(z.dtype), *threat.box.bounds_like(z))
        return (z - start).squeeze(0)


MOST = 10
"""DeepFool's steps for one sample."""
SLACK = 1e-6
"""A boundary is crossed by so much, and a gradient shorter than that leads nowhere."""
