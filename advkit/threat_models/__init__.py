"""Threat models and goals by name. Adding one is one file below this package and one line here."""

from __future__ import annotations

from typing import Any

from advkit.core.registry import Registry

THREAT_MODELS: Registry[Any] = Registry(
    "threat model",
    {
        "linf": "advkit.threat_models.lp:Linf",
        "l2": "advkit.threat_models.lp:L2",
        "l1": "advkit.threat_models.lp:L1",
        "l0": "advkit.threat_models.sparse:L0",
        "transfer": "advkit.threat_models.transfer:Transfer",
        "tapm": "advkit.threat_models.tapm:Tapm",
        "online": "advkit.threat_models.online:Online",
        "minimum-l2": "advkit.threat_models.minimum:MinimumL2",
        "flips": "advkit.threat_models.events:Flips",
    },
    group="advkit.threat_models",
)

GOALS: Registry[Any] = Registry(
    "goal",
    {
        "untargeted": "advkit.threat_models.goals.untargeted:UntargetedRule",
        "targeted": "advkit.threat_models.goals.targeted:TargetedRule",
        "ordered-topk": "advkit.threat_models.goals.ordered_topk:OrderedTopKRule",
        "topk": "advkit.threat_models.goals.ordered_topk:TopKRule",
        "out-of-topk": "advkit.threat_models.goals.ordered_topk:OutOfTopKRule",
    },
    group="advkit.goals",
)
