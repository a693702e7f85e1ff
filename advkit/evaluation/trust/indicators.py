"""Six indicators of attack failure as pure functions of what an attack left behind (Pintor et al., arXiv 2106.09947).

Each says that a robust accuracy may be too high because the attack failed, not because the model is robust. Written
from the paper's definitions and formulas.
"""

from __future__ import annotations

import torch
from torch import Tensor

RADIUS = 8 / 255  # width of the noise under which predictions should not change
DRAWS = 100
TAIL = 10
LEFT_OVER = 0.05


def unavailable_gradients(gradient: Tensor | None) -> float:
    """I1: 1 when the backward pass failed (None) or some row's loss gradient [B, ...] has no non-zero entry, else 0."""
    if gradient is None:
        return 1.0
    return float((gradient.flatten(1) == 0).all(1).any()) if len(gradient) else 0.0


def unstable_predictions(base: Tensor, perturbed: Tensor) -> Tensor:
    """I2 per row [B]: the mean relative change of the loss over draws of small noise, at most 1.

    base: losses [B]; perturbed: losses [draws, B] at x + uniform noise in (-RADIUS / 2, RADIUS / 2) per coordinate.

    The indicator is the mean over rows. The paper caps the mean; here each row is capped, so that one row on its
    decision boundary, where the loss is near 0, does not decide the mean alone.
    """
    scale = torch.where(base == 0, torch.ones_like(base), base.abs())
    return ((perturbed - base).abs() / scale).mean(0).clamp(max=1.0)


def silent_success(reached: Tensor, returned: Tensor) -> Tensor:
    """I3 per row, bool [B]: some iterate (bool [T, B]) reached the goal and the returned point (bool [B]) does not."""
    return reached.any(0) & ~returned


def incomplete_optimization(losses: Tensor) -> Tensor:
    """I4 per row, bool [B]: the best loss so far was still falling when the attack ended.

    losses: [T, B], smaller is better for the attacker; NaN where a row was not queried

    The curve is rescaled to [0, 1], its running minimum taken; the row is flagged when that minimum still moved by more
    than LEFT_OVER within the last min(T, TAIL) values. A constant curve is complete (the published code's division
    gives NaN there, and no flag).
    """
    flags = torch.zeros(losses.shape[1], dtype=torch.bool)
    for row in range(losses.shape[1]):
        curve = losses[:, row].double()
        curve = curve[torch.isfinite(curve)]
        if len(curve) < 2:
            continue
        curve = curve - curve.min()
        height = curve.max()
        if height == 0:
            continue
        tail = torch.cummin(curve / height, 0).values[-min(len(curve), TAIL) :]
        flags[row] = bool(tail[0] - tail[-1] > LEFT_OVER)
    return flags


def transfer_failure(surrogate: Tensor, victim: Tensor, fooled: Tensor) -> Tensor:
    """I5 per row, bool [B]: the surrogate's and the victim's decisions on the returned point differ.

    fooled: bool [B], the attack reached its goal on the surrogate. The paper does not ask for it; a row on which the
    attack failed on the surrogate already says nothing about the transfer.
    """
    return fooled & (surrogate != victim)


def unconstrained_attack_failure(sound: Tensor, broken: Tensor, silent: Tensor | None = None) -> float:
    """I6: the fraction of clean-correct rows that the attack does not break with an unlimited budget.

    sound:  bool [B], rows that are correct when clean; the indicator is 0 where there are none
    broken: bool [B]
    silent: rows of I3; they do not count as failures
    """
    if not bool(sound.any()):
        return 0.0
    failed = sound & ~broken if silent is None else sound & ~broken & ~silent
    return int(failed.sum()) / int(sound.sum())
