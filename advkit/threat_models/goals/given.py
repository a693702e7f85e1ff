"""Goals made by the caller for the samples of one task: a class per sample, or a goal object of one's own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.errors import UsageError
from advkit.core.protocols import NOT_REACHED, PerSample, Rng, Worded, Wording
from advkit.threat_models.goals.targeted import Targeted, TargetedRule, placed, places

_GOAL = ("kind", "reached", "loss", "margin", "under", "take", "to")


@dataclass(frozen=True, eq=False)
class GivenGoal(PerSample, Worded):
    """A goal of the caller's own, made for the samples of a task in its order.

    goal: has the members of `core.protocols.Goal`; its first row is the task's first sample

    Raises UsageError where the goal has fewer rows than samples are evaluated.
    """

    goal: Any
    _place: dict[str, int] = field(default_factory=dict, init=False, repr=False)

    @property
    def kind(self) -> str:
        """That of the goal."""
        return str(self.goal.kind)

    @property
    @override
    def wording(self) -> Wording:
        return Wording() if self.kind == "untargeted" else NOT_REACHED

    @override
    def over(self, ids: Sequence[str]) -> Self:
        rows = min((len(each) for each in vars(self.goal).values() if _has_rows(each)), default=len(ids))
        if rows < len(ids):
            raise UsageError(
                f"the goal {type(self.goal).__name__} has {rows} rows for {len(ids)} samples; expected one per sample"
            )
        made: Self = placed(self, ids)
        return made

    @override
    def of(self, ids: Sequence[str]) -> GivenGoal:
        made = copy.copy(self)
        object.__setattr__(made, "goal", self.goal.take(torch.tensor(places(self._place, ids))))
        return made

    def __call__(self, labels: Tensor, answer: Tensor, rng: Rng, /) -> Any:
        """The goal of a batch: that of its samples, see `of`."""
        return self.goal.to(labels.device)


def _has_rows(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def given(part: Any) -> Any:
    """The rule of a tensor or list with one class per sample, or of a goal object; None for anything else.

    Raises UsageError for a tensor of something else.
    """
    if isinstance(part, Targeted) and part.surrogate == "ce":
        part = part.targets
    if isinstance(part, (Tensor, np.ndarray, list, tuple)):
        return TargetedRule(how="each", targets=_classes(part))
    if all(hasattr(part, name) for name in _GOAL):
        return GivenGoal(part)
    if callable(part) and not hasattr(part, "kind"):
        name = getattr(part, "__name__", type(part).__name__)
        raise UsageError(
            f"the goal is a callable ({name}) that does not say its kind: it needs a member `kind`, such as "
            f"{name if name.isidentifier() else 'rule'}.kind = 'targeted', and takes (labels, answer, rng) of a batch "
            "to return a goal, such as Targeted(classes). One class per sample is a goal as it is: goal=classes"
        )
    return None


def _classes(part: Any) -> tuple[int, ...]:
    try:
        classes = torch.as_tensor(part if isinstance(part, Tensor) else np.asarray(part))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"the goal is a {type(part).__name__}; expected one class per sample ({error})") from error
    if classes.ndim != 1 or classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise UsageError(
            f"the goal has shape {list(classes.shape)} and type {classes.dtype}; expected one class per sample, whole "
            "numbers [N]"
        )
    return tuple(classes.tolist())
