"""One chosen class per row; losses: cross-entropy, logit margin, and targeted DLR (arXiv 2003.01690)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import at_least, one_of
from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.protocols import NOT_REACHED, Rng, Worded, Wording
from advkit.core.rows import finite_rows
from advkit.threat_models.goals.untargeted import (
    ClassGoal,
    Surrogate,
    best_other,
    checked_answer,
    checked_classes,
    pick,
    targeted_spread,
)


@dataclass(frozen=True, eq=False)
class Targeted(ClassGoal):
    """One chosen class; among equal scores the lowest index decides, as in `Untargeted`.

    targets:   wanted classes, long [B]
    surrogate: "ce" the cross-entropy to the target; "margin" the best other score minus the target's; "dlr" that
               margin over the distance from the largest score to the mean of the third and fourth (needs four classes)

    Answers, abstentions and errors are as in `Untargeted`. The paper's targeted DLR puts the true class where this one
    puts the best class other than the target: a goal does not know the true class, the two agree until another class
    comes out on top, and from there on only this one still measures the way to the target.
    """

    kind: ClassVar[str] = "targeted"
    _what: ClassVar[str] = "targets"
    targets: Tensor
    surrogate: Surrogate = "ce"
    _top: int | None = field(default=None, repr=False)

    @property
    def _classes(self) -> Tensor:
        return self.targets

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]."""
        if not self._scores(answer):
            return answer == self.targets
        return (answer.argmax(1) == self.targets) & finite_rows(answer)

    @override
    def none_reached(self, answer: Tensor) -> bool:
        """Whether it is plain that no row reaches it; False in doubt. One look at the device."""
        return self._scores(answer) and not bool((answer.argmax(1) == self.targets).any())

    def _gap(self, answer: Tensor) -> Tensor:
        return best_other(answer, self.targets) - pick(answer, self.targets)

    def _cross_entropy(self, answer: Tensor) -> Tensor:
        return F.cross_entropy(answer, self.targets, reduction="none")

    def _spread(self, answer: Tensor) -> Tensor:
        return targeted_spread(answer)


@dataclass(frozen=True, kw_only=True)
class TargetedRule(Worded):
    """Targeted misclassification: one chosen class.

    how:    "next" the class after the true one, cyclically; "random" any class but the true one, drawn per sample;
            "least_likely" the class other than the true one with the lowest clean score; "class" always the same one
    target: that class, for how=class

    Success is counted over the samples whose true class and clean answer are not the target, right or wrong when clean.

    Raises UsageError where `how` and `target` do not fit, BadInput for classes that the model lacks.
    """

    kind: ClassVar[str] = "targeted"
    wording: ClassVar[Wording] = NOT_REACHED
    how: Literal["next", "random", "least_likely", "class"] = "next"
    target: int | None = None

    def __post_init__(self) -> None:
        one_of(self, "how", ("next", "random", "least_likely", "class"))
        if (self.how == "class") != (self.target is not None):
            raise UsageError(f"how={self.how}, target={self.target}; target=... goes with how=class and only with it")
        at_least(self, 0, "target")

    def __call__(self, labels: Tensor, answer: Tensor, rng: Rng) -> Targeted:
        """The goal of a batch with true classes `labels` and untouched answer `answer` (scores, float [B, C])."""
        if not checked_answer(answer, checked_classes(labels, "labels"), len(labels), "labels"):
            if self.target is None:
                raise BadModel(f"targeted:how={self.how} needs scores and the model answers decisions; use how=class")
            return Targeted(torch.full_like(labels, self.target))
        classes = answer.shape[1]
        if self.target is not None:
            if self.target >= classes:
                raise BadInput(f"target={self.target}, and the model has {classes} classes; expected 0..{classes - 1}")
            return Targeted(torch.full_like(labels, self.target))
        if self.how == "next":
            return Targeted((labels + 1) % classes)
        if self.how == "random":
            return Targeted((labels + 1 + rng.integers(classes - 1, labels)) % classes)
        others = torch.nan_to_num(answer.detach(), nan=torch.inf).scatter(1, labels.unsqueeze(1), torch.inf)
        return Targeted(_lowest_other(others, labels))


def _lowest_other(scores: Tensor, labels: Tensor) -> Tensor:
    """The class of the lowest score; the next class for rows with no finite score left."""
    lowest = scores.argmin(1)
    return torch.where(lowest == labels, (labels + 1) % scores.shape[1], lowest)
