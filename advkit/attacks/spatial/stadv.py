"""Spatially transformed adversarial examples: smooth flow fields (Xiao et al., arXiv 1801.02612)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import TensorGoal, TensorOracle, only_in
from advkit.attacks.search import Search
from advkit.core.checks import at_least_one, not_negative, positive
from advkit.core.protocols import Access, Ball, MadeForThreatModel, Planned, Rng, Stepped
from advkit.threat_models.warps import Flow, roughness

DECAY = (0.9, 0.999)


@dataclass(frozen=True, kw_only=True)
class StAdv(MadeForThreatModel, Stepped, Planned):
    """Spatially transformed adversarial examples (stAdv): pixels move along a smooth flow field.

    Descends the goal's loss plus `smooth` times the roughness of the flow, and stops at the first flow that reaches the
    goal: it comes from no flow at all, so it is the smoothest on its way.

    steps:     gradient steps, >= 1
    step_size: length of a step in units of the threat model's tau, > 0
    smooth:    weight of the flow's roughness (the paper's tau, 0.05 there), >= 0
    loss:      surrogate loss: "ce", "margin" or "dlr", where the goal has them

    Deviations from the paper: Adam in place of L-BFGS, whose line search would hang on the batch; the flow is kept
    within the threat model's tau, where the paper has the penalty alone; it does not go on after the goal is reached.
    Raises UsageError for values out of range and outside the threat model flow.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    default_threat_model: ClassVar[str] = "flow:tau=1"
    steps: int = 100
    step_size: float = 0.05
    smooth: float = 0.05
    loss: str = "margin"

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        positive(self, "step_size", what="length in units of tau")
        not_negative(self, "smooth")

    @property
    @override
    def planned(self) -> float:
        """Passes per sample at most."""
        return 2.0 * self.steps + 1

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        only_in(ball, Flow, "stadv", self.default_threat_model)
        assert isinstance(ball, Flow)
        search = Search(oracle, x, goal.under(self.loss), rng)
        mean, square = torch.zeros_like(x), torch.zeros_like(x)
        for step in search.steps(self.steps):
            if step.rows is not None:
                mean, square = mean[step.rows], square[step.rows]
            gradient = step.gradient + self.smooth * _rough(ball, step.z)
            mean = DECAY[0] * mean + (1 - DECAY[0]) * gradient
            square = DECAY[1] * square + (1 - DECAY[1]) * gradient.square()
            first, second = (1 - decay ** (step.number + 1) for decay in DECAY)
            way = (mean / first) / ((square / second).sqrt() + torch.finfo(x.dtype).tiny)
            search.z = ball.project(step.z - self.step_size * way, step.x)
        search.finish()
        return search.best


def _rough(flow: Flow, z: Tensor) -> Tensor:
    """The gradient of each flow's roughness."""
    with torch.enable_grad():
        leaf = z.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(roughness(flow.tau * leaf).sum(), leaf)
    return gradient
