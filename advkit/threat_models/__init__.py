"""Threat models, goals and judges by name. Adding one is one file below this package and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from advkit.core.protocols import Rule, ThreatModel
from advkit.core.registry import Registry

if TYPE_CHECKING:
    from advkit.threat_models.judges import Judge

THREAT_MODELS: Registry[ThreatModel[Any]] = Registry(
    "threat model",
    {
        "linf": "advkit.threat_models.lp:Linf",
        "l2": "advkit.threat_models.lp:L2",
        "l1": "advkit.threat_models.lp:L1",
        "l0": "advkit.threat_models.sparse:L0",
        "transfer": "advkit.threat_models.transfer:Transfer",
        "tapm": "advkit.threat_models.tapm:Tapm",
        "online": "advkit.threat_models.online:Online",
        "certified": "advkit.threat_models.certified:Certified",
        "label-flips": "advkit.threat_models.labels:LabelFlips",
        "minimum-l0": "advkit.threat_models.minimum:MinimumL0",
        "minimum-l1": "advkit.threat_models.minimum:MinimumL1",
        "minimum-l2": "advkit.threat_models.minimum:MinimumL2",
        "minimum-linf": "advkit.threat_models.minimum:MinimumLinf",
        "flips": "advkit.threat_models.events:Flips",
        "suffix": "advkit.threat_models.tokens:Suffix",
        "transform": "advkit.threat_models.warps:Transform",
        "flow": "advkit.threat_models.warps:Flow",
        "patch": "advkit.threat_models.patch:Patch",
        "universal": "advkit.threat_models.shared:Universal",
        "corruption": "advkit.threat_models.corruptions:Corruption",
        "ssim": "advkit.threat_models.perceptual:SSIM",
        "lpips": "advkit.threat_models.perceptual:LPIPS",
    },
    group="advkit.threat_models",
    contract=ThreatModel,
    objects=True,
    familiar="advkit.threat_models.familiar:BALLS",
)

GOALS: Registry[Rule] = Registry(
    "goal",
    {
        "untargeted": "advkit.threat_models.goals.untargeted:UntargetedRule",
        "targeted": "advkit.threat_models.goals.targeted:TargetedRule",
        "ordered-topk": "advkit.threat_models.goals.ordered_topk:OrderedTopKRule",
        "topk": "advkit.threat_models.goals.ordered_topk:TopKRule",
        "out-of-topk": "advkit.threat_models.goals.ordered_topk:OutOfTopKRule",
        "near": "advkit.threat_models.goals.near:NearRule",
        "says": "advkit.threat_models.goals.says:SaysRule",
        "reconstruction": "advkit.threat_models.goals.reconstruction:ReconstructionRule",
    },
    group="advkit.goals",
    contract=Rule,
    objects=True,
    familiar="advkit.threat_models.familiar:GOALS",
)

JUDGES: Registry[Judge] = Registry(
    "judge",
    {
        "refusal": "advkit.threat_models.judges:RefusalStrings",
        "exact": "advkit.threat_models.judges:ExactTarget",
        "classifier:": "advkit.threat_models.judges:Classifier",
        "python:": "advkit.threat_models.judges:PythonJudge",
    },
    group="advkit.judges",
    contract="advkit.threat_models.judges:Judge",
)
