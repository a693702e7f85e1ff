"""Attacks by name. Adding one is one file below this package and one line here."""

from __future__ import annotations

from advkit.core.protocols import Attack
from advkit.core.registry import Registry

ATTACKS: Registry[Attack] = Registry(
    "attack",
    {
        "fgsm": "advkit.attacks.gradient.fgsm:FGSM",
        "pgd": "advkit.attacks.gradient.pgd:PGD",
        "mifgsm": "advkit.attacks.gradient.mifgsm:MIFGSM",
        "apgd-ce": "advkit.attacks.gradient.apgd:APGDCE",
        "apgd-margin": "advkit.attacks.gradient.apgd:APGDMargin",
        "square": "advkit.attacks.query.square:Square",
    },
    group="advkit.attacks",
)
