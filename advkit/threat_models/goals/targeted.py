"""One chosen class per row; losses: cross-entropy, logit margin, and targeted DLR (arXiv 2003.01690)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.protocols import NOT_REACHED, NoneReached, Rng, Worded, Wording
from advkit.core.rows import finite_rows
from advkit.threat_models.goals.per_row import PerRow
from advkit.threat_models.goals.untargeted import (
    Surrogate,
    best_other,
    checked_answer,
    checked_classes,
    checked_surrogate,
    pick,
    scores_only,
    top_scores,
)


@dataclass(frozen=True, eq=False)
class Targeted(PerRow, NoneReached):
    """One chosen class; among equal scores the lowest index decides, as in `Untargeted`.

    targets:   wanted classes, long [B]
    surrogate: "ce" the cross-entropy to the target; "margin" the best other score minus the target's; "dlr" that
               margin over the distance from the largest score to the mean of the third and fourth (needs four classes)

    Answers, abstentions and errors are as in `Untargeted`. The paper's targeted DLR puts the true class where this one
    puts the best class other than the target: a goal does not know the true class, the two agree until another class
    comes out on top, and from there on only this one still measures the way to the target.
    """

    kind: ClassVar[str] = "targeted"
    targets: Tensor
    surrogate: Surrogate = "ce"
    _top: int | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        checked_surrogate(self.surrogate)
        if self._top is None:
            object.__setattr__(self, "_top", checked_classes(self.targets, "targets"))

    def _scores(self, answer: Tensor) -> bool:
        assert self._top is not None
        return checked_answer(answer, self._top, len(self.targets), "targets")

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]."""
        if not self._scores(answer):
            return answer == self.targets
        return (answer.argmax(1) == self.targets) & finite_rows(answer)

    @override
    def none_reached(self, answer: Tensor) -> bool:
        """Whether it is plain that no row reaches it; False in doubt. One look at the device."""
        return self._scores(answer) and not bool((answer.argmax(1) == self.targets).any())

    def margin(self, answer: Tensor) -> Tensor:
        """Float [B]: best other score minus the target's: negative where reached (0 in a tie), +inf if not finite."""
        if not self._scores(answer):
            return 1.0 - 2.0 * self.reached(answer).to(torch.get_default_dtype())
        margin = best_other(answer, self.targets) - pick(answer, self.targets)
        return torch.where(finite_rows(answer), margin, torch.inf)

    def loss(self, answer: Tensor) -> Tensor:
        """Float [B], smaller is better for the attacker."""
        scores = self._scores(answer)
        scores_only(scores, self.surrogate)
        if not scores:
            return self.margin(answer)
        if self.surrogate == "ce":
            return F.cross_entropy(answer, self.targets, reduction="none")
        margin = best_other(answer, self.targets) - pick(answer, self.targets)
        if self.surrogate == "margin":
            return margin
        top = top_scores(answer, 4, "targeted dlr")
        return margin / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

    def under(self, loss: str) -> Self:
        """The same goal with another surrogate loss."""
        surrogate = checked_surrogate(loss)
        return self if surrogate == self.surrogate else replace(self, surrogate=surrogate)


@dataclass(frozen=True, kw_only=True)
class TargetedRule(Worded):
    """Targeted misclassification: one chosen class.

    how:    "next" the class after the true one, cyclically; "random" any class but the true one, drawn per sample;
            "least_likely" the class other than the true one with the lowest clean score; "class" always the same one
    target: that class, for how=class; samples whose true class it is are left out of the success rate

    Raises UsageError where `how` and `target` do not fit, BadInput for classes that the model lacks.
    """

    kind: ClassVar[str] = "targeted"
    wording: ClassVar[Wording] = NOT_REACHED
    how: Literal["next", "random", "least_likely", "class"] = "next"
    target: int | None = None

    def __post_init__(self) -> None:
        if self.how not in ("next", "random", "least_likely", "class"):
            raise UsageError(f"how={self.how!r}; expected next, random, least_likely or class")
        if (self.how == "class") != (self.target is not None):
            raise UsageError(f"how={self.how}, target={self.target}; target=... goes with how=class and only with it")
        if self.target is not None and self.target < 0:
            raise UsageError(f"target={self.target}; expected a class index from 0 up")

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
