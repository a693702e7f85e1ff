"""The stable path of indicators of attack failure; the code is in `advkit.evaluation.trust.indicators`."""

from __future__ import annotations

from advkit.evaluation.trust.indicators import (
    DRAWS,
    LEFT_OVER,
    RADIUS,
    TAIL,
    incomplete_optimization,
    silent_success,
    transfer_failure,
    unavailable_gradients,
    unconstrained_attack_failure,
    unstable_predictions,
)

__all__ = [
    "DRAWS",
    "LEFT_OVER",
    "RADIUS",
    "TAIL",
    "incomplete_optimization",
    "silent_success",
    "transfer_failure",
    "unavailable_gradients",
    "unconstrained_attack_failure",
    "unstable_predictions",
]
