"""FLORAL as a defense of the harness (Bal et al., ICLR 2025, arXiv 2502.17121)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from typing_extensions import override

from advkit.core.checks import at_least_one, check, not_negative, positive
from advkit.defenses.labels.floral import FLORAL
from advkit.defenses.labels.svm import SVM


@dataclass(frozen=True, kw_only=True)
class FLORALSVM(SVM):
    """FLORAL: a kernel SVM that is trained while an attacker inside flips labels of its most influential samples.

    C, kernel, gamma, degree, coef0: of the SVM
    budget:    labels that the attacker inside flips in a round: a share of the samples in (0, 1), rounded up, or a
               whole number; 0 for no attacker, the ablation. It is not what the attacker outside may flip
    rounds:    >= 1
    step_size: in absolute units; none is 0.5 over the largest eigenvalue of the kernel matrix
    init:      "svm": start from the SVM of the labels as they came; "zero"
    output:    "average" of the second half of the rounds; "last" round
    landmarks: of a Nystroem kernel, for more than 10,000 samples; none for the kernel itself

    `advkit.FLORAL` is the classifier itself, with more settings and with what differs from the paper.
    """

    defends: ClassVar[bool] = True

    budget: float = 0.05
    rounds: int = 500
    step_size: float | None = None
    init: Literal["svm", "zero"] = "svm"
    output: Literal["average", "last"] = "average"
    landmarks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self, "rounds", "landmarks")
        positive(self, "step_size")
        not_negative(self, "budget")
        whole = self.budget < 1 or float(self.budget).is_integer()
        check(self, "budget", whole, "a share of the samples in (0, 1), or a whole number of labels")

    @override
    def ablation(self) -> FLORALSVM | None:
        """The same rounds without an attacker: from the SVM they stay there, from zero it is the SVM stopped early."""
        return replace(self, budget=0.0) if self.budget else None

    @override
    def learner(self, seed: int) -> FLORAL:
        """`advkit.FLORAL`; it draws the flips of the attacker inside and the landmarks."""
        return FLORAL(
            C=self.C,
            kernel=self.kernel,
            gamma="scale" if self.gamma is None else self.gamma,
            degree=self.degree,
            coef0=self.coef0,
            budget=self.budget,
            rounds=self.rounds,
            step_size="auto" if self.step_size is None else self.step_size,
            init=self.init,
            output=self.output,
            landmarks=self.landmarks,
            random_state=seed,
        )
