"""Adversarial patches: one for all images (Brown et al., arXiv 1712.09665), or one for each (LaVAN, Karmon et al.,
arXiv 1801.02608).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from advkit.attacks.base import TensorGoal, TensorOracle, only_in
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.universal.learning import Learns
from advkit.core.checks import at_least_one, positive
from advkit.core.protocols import Access, MadeForThreatModel, Planned, Rng, Stepped, WantsData
from advkit.threat_models.patch import Patch


@dataclass(frozen=True, kw_only=True)
class PatchAttack(Learns, MadeForThreatModel, WantsData, Stepped, Planned):
    """Adversarial patch: the pixels of one square, for each image by itself or the same content in all of them.

    Which of the two it is, and where the square is, the threat model says (`patch:size=5,place=random,universal=true`).
    For each image by itself it is projected gradient descent in the square (LaVAN); a place that the attacker chooses
    is drawn anew by every restart. One content for all images is learned on the attacker's own samples, at places that
    are drawn anew in every step where the threat model draws them, and pasted into all images that are attacked.
    `--goal targeted:how=class,target=3` makes a patch that means a class.

    steps:     gradient steps, >= 1; per restart
    step_size: length of a step in units of the box's width, > 0; that of the universal patch falls to 0
    restarts:  starts for each image, >= 1; not of a universal patch
    samples:   of the attacker's data, at most, drawn, for a universal patch; >= 1
    batch:     samples per step of a universal patch, >= 1
    clip:      a sample whose loss is below -clip pulls the universal patch no more, > 0
    loss:      surrogate loss: "ce", "margin" or "dlr", where the goal has them

    Deviations: the papers turn and scale the patch, and train it towards the mean log-probability; here it keeps its
    size and its angle, as the threat model checks both.
    Raises UsageError for values out of range, outside the threat model patch, and where a universal patch has no data
    to learn on.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    wants_data: ClassVar[bool] = True
    default_threat_model: ClassVar[str] = "patch:size=5"
    steps: int = 100
    step_size: float = 0.05
    restarts: int = 5
    samples: int = 2000
    batch: int = 100
    clip: float = 9.0
    loss: str = "ce"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "restarts")
        positive(self, "step_size", what="length in units of the box's width")

    @property
    @override
    def planned(self) -> float:
        """Passes per sample at most, of a patch for each image."""
        return float(self.restarts * (2 * self.steps + 1))

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng, /) -> Tensor:
        only_in(threat, Patch, "patch", self.default_threat_model)
        if not len(x):
            return x
        if not threat.universal:
            pgd = PGD(steps=self.steps, step_size=self.step_size, restarts=self.restarts, loss=self.loss)
            return pgd(oracle, x, goal, threat, rng)
        change = self.learned(oracle, x, threat, rng, "a universal patch")
        applied: Tensor = threat.applied(change, x)
        return applied
