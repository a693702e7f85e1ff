"""When a run is called catastrophic overfitting (Wong et al., arXiv 2001.03994): a rule on measured figures alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FALLEN = 0.5
FALLEN_GAP = 0.25
ABNORMAL = 0.15
ABNORMAL_GAP = 0.2


@dataclass(frozen=True)
class Look:
    """What was measured at one time on held-out rows, as fractions.

    fgsm:     accuracy at the end of one step of length eps from the clean row, for all rows
    pgd:      accuracy under PGD
    abnormal: share of abnormal adversarial examples among the latest training rows: those whose loss the training
              step lowered (arXiv 2404.08154); NaN where the method has no such step
    """

    fgsm: float
    pgd: float
    abnormal: float = math.nan

    @property
    def gap(self) -> float:
        """What is right under one step and wrong under many."""
        return self.fgsm - self.pgd


def collapsed(looks: Sequence[Look]) -> str:
    """Why the last look shows catastrophic overfitting, in words; empty where it does not, or where there is none.

    Either sign is enough: PGD accuracy below half of its best so far and more than 0.25 below FGSM accuracy; or more
    than 0.15 abnormal adversarial examples and PGD accuracy more than 0.2 below FGSM accuracy. One signal alone is not:
    a model that is still weak has a low PGD accuracy, and batch statistics make some abnormal examples by themselves.
    """
    if not looks:
        return ""
    last = looks[-1]
    best = max(look.pgd for look in looks)
    accuracies = f"PGD accuracy is {100 * last.pgd:.1f} % where FGSM's is {100 * last.fgsm:.1f} %"
    if last.pgd < FALLEN * best and last.gap > FALLEN_GAP:
        return f"{accuracies}, down from {100 * best:.1f} %"
    if last.abnormal > ABNORMAL and last.gap > ABNORMAL_GAP:
        return f"{accuracies}, and the training step lowers the loss of {100 * last.abnormal:.0f} % of the samples"
    return ""
