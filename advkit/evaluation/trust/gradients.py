"""A model's gradients against central differences of its outputs."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Copies, Rng

log = logging.getLogger("advkit")


def gradient_errors(view: Any, victim: Any, x: Tensor, goal: Any, rng: Rng, width: float = 1.0) -> tuple[Tensor, bool]:
    """Relative errors [B] of the view's gradient against central differences of the victim, and whether in float64.

    The direction is half the gradient and half random, so that the derivative along it is never small by accident.
    width: of the input's range; the step is 1e-3 of it in float64, 1e-2 in float32
    """
    lanes = Lanes.fitting(x)
    z = x
    pair = _in_double((view, victim), x)
    if pair is not None:
        (view, victim), z = pair, x.double()
    oracle = MeteredOracle(victim, len(z), Access.SCORES, lanes=lanes)
    _, gradient, _ = MeteredOracle(view, len(z), lanes=lanes).gradient(z, goal)
    direction = _unit(_unit(gradient) + _unit(rng.at("direction").normal(x).to(z.dtype)))
    step = (1e-3 if pair is not None else 1e-2) * width
    slope = (goal.loss(oracle(z + step * direction)) - goal.loss(oracle(z - step * direction))) / (2 * step)
    claimed = (gradient * direction).flatten(1).sum(1)
    size = torch.maximum(slope.abs(), claimed.abs())
    errors = torch.where(size > 1e-12, (slope - claimed).abs() / size.clamp(min=1e-12), torch.zeros_like(size))
    return errors.double().cpu(), pair is not None


def _unit(v: Tensor) -> Tensor:
    return nn.functional.normalize(v.flatten(1), dim=1).view_as(v)


def _in_double(models: Sequence[Any], x: Tensor) -> list[Any] | None:
    """Copies that compute in float64, or None where they can't be made; the originals are not touched."""
    copies: dict[int, Any] = {}
    for model in models:
        if id(model) in copies:
            continue
        try:
            double = model.copy() if isinstance(model, Copies) else copy.deepcopy(model)
            for module in double.modules():
                module.double()
            output = MeteredOracle(double, len(x), Access.SCORES, lanes=Lanes.fitting(x))(x.double())
        except Exception:
            log.debug("no float64 copy of %s", model, exc_info=True)
            return None
        if output.dtype != torch.float64 or not bool(torch.isfinite(output).all()):
            return None
        copies[id(model)] = double
    return [copies[id(model)] for model in models]
