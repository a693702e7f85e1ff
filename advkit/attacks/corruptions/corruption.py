"""Common corruptions (Hendrycks and Dietterich, arXiv 1903.12261)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, only_in
from advkit.core.checks import check, one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, MadeForThreatModel, Rng
from advkit.threat_models.corruptions import KINDS, SEEDS, Corruption


@dataclass(frozen=True, kw_only=True)
class CommonCorruption(MadeForThreatModel):
    """Common corruption: noise, blur, brightness, contrast or JPEG, drawn once for each image; no adversary.

    kind:     gaussian_noise, impulse_noise, gaussian_blur, brightness, contrast or jpeg_compression
    severity: 1 to 5, as in ImageNet-C and CIFAR-10-C (the threat model says which)

    Asks the victim nothing and aims at no goal. Accuracy under it is that on corrupted images, but for samples that are
    wrong when clean, which no report calls robust. kornia computes the image and the harness renders it from kind,
    severity and seed (extra `corruptions`).
    Raises UsageError for values out of range, outside the threat model corruption, and above its severity.
    """

    needs: ClassVar[Access] = Access.NOTHING
    default_threat_model: ClassVar[str] = "corruption"
    kind: str = "gaussian_noise"
    severity: int = 3

    def __post_init__(self) -> None:
        one_of(self, "kind", KINDS)
        check(self, "severity", self.severity in range(1, 6), "a severity from 1 to 5")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng, /) -> Tensor:
        only_in(threat, Corruption, "corruption", self.default_threat_model)
        if self.severity > threat.severity:
            raise UsageError(f"severity={self.severity} and the threat model admits up to {threat.severity}")
        seeds = rng.at("seed").integers(SEEDS, torch.zeros(len(x), dtype=torch.long, device=x.device))
        fixed = x.new_tensor([KINDS.index(self.kind) + 1, self.severity]).expand(len(x), 2)
        return torch.cat([fixed, seeds.to(x.dtype).unsqueeze(1)], 1)
