"""LARS: layer-wise learning rates for large batches (You et al., arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from typing_extensions import override

TRUST = 1e-3


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step on every weight of two axes or more has a length in proportion to the weight's own.

    The gradient plus weight decay is scaled by trust |w| / (|g| + weight_decay |w|) before it enters the momentum;
    where a norm is zero it is left as it is. Biases and normalisation parameters (one axis) get plain SGD at the same
    learning rate. That rate multiplies the momentum, as in torch's SGD.

    params: groups with their own weight_decay
    trust:  the length of a step at learning rate 1 and without momentum, in units of the weight's 2-norm
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.9, trust: float = TRUST) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "trust": trust})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step along the gradients that are there."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient, decay = weight.grad, group["weight_decay"]
                push = gradient + decay * weight
                if weight.dim() > 1:
                    length, steep = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(gradient)
                    ratio = group["trust"] * length / (steep + decay * length)
                    push = push * torch.where((length > 0) & (steep > 0), ratio, torch.ones_like(ratio))
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                state["momentum_buffer"].mul_(group["momentum"]).add_(push)
                weight.add_(state["momentum_buffer"], alpha=-group["lr"])
