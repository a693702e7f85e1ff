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
        "apgd-dlr": "advkit.attacks.gradient.targeted:APGDDLR",
        "apgd-t": "advkit.attacks.gradient.targeted:APGDT",
        "fab": "advkit.attacks.minimal.fab:FAB",
        "fab-t": "advkit.attacks.minimal.fab:FABT",
        "square": "advkit.attacks.query.square:Square",
        "quadattack": "advkit.attacks.ordered.quadattack:QuadAttack",
        "cw_topk": "advkit.attacks.ordered.cw_topk:CWTopK",
        "ad_topk": "advkit.attacks.ordered.ad_topk:ADTopK",
        "thorough": "advkit.attacks.suites:Thorough",
        "auto": "advkit.attacks.suites:Thorough",
        "lean": "advkit.attacks.suites:Lean",
        "autoattack": "advkit.attacks.suites:AutoAttack",
        "online": "advkit.attacks.stream.online:Online",
        "transfer:": "advkit.attacks.transfer.engine:Composed",
        "foolbox:": "advkit.attacks.peers:Foolbox",
        "torchattacks:": "advkit.attacks.peers:TorchAttacks",
        "art:": "advkit.attacks.peers:ART",
    },
    group="advkit.attacks",
)
