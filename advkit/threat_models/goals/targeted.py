"""One chosen class per row; losses: cross-entropy, logit margin, and targeted DLR (arXiv 2003.01690)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import at_least, one_of
from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.protocols import NOT_REACHED, PerSample, Rng, Worded, Wording
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

    @property
    def _lead(self) -> tuple[Tensor, bool]:
        return self.targets, True

    def _spread(self, answer: Tensor) -> Tensor:
        return targeted_spread(answer)


def placed(rule: Any, ids: Sequence[str]) -> Any:
    """A copy of a rule that knows the place of every sample."""
    made = copy.copy(rule)
    object.__setattr__(made, "_place", {name: place for place, name in enumerate(ids)})
    return made


def places(known: Mapping[str, int], ids: Sequence[str]) -> list[int]:
    """The places of these samples; UsageError for a rule that was not asked `over` them."""
    if missing := [name for name in ids if name not in known]:
        raise UsageError(f"the goal has no entry for sample {missing[0]}: it was made for others")
    return [known[name] for name in ids]


@dataclass(frozen=True, kw_only=True)
class TargetedRule(Worded, PerSample):
    """Targeted misclassification: one chosen class.

    how:     "next" the class after the true one, cyclically; "random" any class but the true one, drawn per sample;
             "least_likely" the class other than the true one with the lowest clean score; "class" always the same one;
             "each" a class of its own for every sample
    target:  that class, for how=class
    targets: the classes for how=each, one per sample evaluated, in the task's order

    Success is counted over the samples whose true class and clean answer are not the target, right or wrong when clean.

    Raises UsageError where `how` does not fit `target` or `targets`, BadInput for classes that the model lacks.
    """

    kind: ClassVar[str] = "targeted"
    wording: ClassVar[Wording] = NOT_REACHED
    how: Literal["next", "random", "least_likely", "class", "each"] = "next"
    target: int | None = None
    targets: tuple[int, ...] = ()
    _place: Mapping[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        one_of(self, "how", ("next", "random", "least_likely", "class", "each"))
        if (self.how == "class") != (self.target is not None):
            raise UsageError(f"how={self.how}, target={self.target}; target=... goes with how=class and only with it")
        if (self.how == "each") != bool(self.targets):
            raise UsageError(
                f"how={self.how} with {len(self.targets)} targets; targets=... goes with how=each and only with it"
            )
        at_least(self, 0, "target")
        if self.targets and min(self.targets) < 0:
            raise UsageError(f"a target is {min(self.targets)}; expected classes from 0")

    @override
    def over(self, ids: Sequence[str]) -> Self:
        if self.how != "each":
            return self
        if len(self.targets) < len(ids):
            raise UsageError(f"{len(self.targets)} targets for {len(ids)} samples; expected one per sample")
        return cast("Self", placed(self, ids))

    @override
    def of(self, ids: Sequence[str]) -> TargetedRule:
        if self.how != "each":
            return self
        return replace(self, targets=tuple(self.targets[place] for place in places(self._place, ids)))

    def __call__(self, labels: Tensor, answer: Tensor, rng: Rng) -> Targeted:
        """The goal of a batch with true classes `labels` and untouched answer `answer` (scores, float [B, C])."""
        if self.how == "each":
            return Targeted(self._each(labels, answer))
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

    def _each(self, labels: Tensor, answer: Tensor) -> Tensor:
        if len(self.targets) != len(labels):
            raise UsageError(f"{len(self.targets)} targets for a batch of {len(labels)}; ask the rule `of` the batch")
        classes = answer.shape[1] if answer.ndim > 1 else None
        if classes is not None and max(self.targets) >= classes:
            raise BadInput(
                f"a target is {max(self.targets)}, and the model has {classes} classes; expected 0..{classes - 1}"
            )
        return torch.tensor(self.targets, dtype=torch.long, device=labels.device)


def _lowest_other(scores: Tensor, labels: Tensor) -> Tensor:
    """The class of the lowest score; the next class for rows with no finite score left."""
    lowest = scores.argmin(1)
    return torch.where(lowest == labels, (labels + 1) % scores.shape[1], lowest)
