"""Spiking networks: neurons, encoders, backward rules by name, adapters to other libraries (arXiv 2503.03272)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from advkit.core.registry import Registry

if TYPE_CHECKING:
    from advkit.models.spiking.surrogates import Rule

RULES: Registry[Rule] = Registry(
    "surrogate",
    {
        "pdsg": "advkit.models.spiking.surrogates:PDSG",
        "atan": "advkit.models.spiking.surrogates:ATan",
        "sigmoid": "advkit.models.spiking.surrogates:Sigmoid",
        "rect": "advkit.models.spiking.surrogates:Rect",
        "triangle": "advkit.models.spiking.surrogates:Triangle",
        "gaussian": "advkit.models.spiking.surrogates:Gaussian",
        "rga": "advkit.models.spiking.surrogates:RGA",
        "bptr": "advkit.models.spiking.surrogates:BPTR",
        "hart": "advkit.models.spiking.surrogates:HART",
        "assg": "advkit.models.spiking.surrogates:ASSG",
    },
    group="advkit.surrogates",
    contract="advkit.models.spiking.surrogates:Rule",
)
"""Backward rules of a spike. The forward pass of a network is the same under all of them."""
