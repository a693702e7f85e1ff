"""Training that is watched for catastrophic overfitting: what is measured, and what is done about it."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from advkit.attacks.gradient.pgd import PGD
from advkit.core.checks import one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Data, Rng
from advkit.defenses.adversarial.base import TrainingDefense, correct_under
from advkit.defenses.adversarial.one_step import correct_after
from advkit.training.loop import Epoch, Objective, Review
from advkit.training.overfitting import Look, collapsed

log = logging.getLogger("advkit")

Action = Literal["warn", "stop", "raise"]
FGSM_ACCURACY = "fgsm_accuracy"
ABNORMAL_SHARE = "abnormal_share"
OVERFITTING = "overfitting"
WINDOW = 50
"""Latest steps of an epoch over which the share of abnormal examples is taken."""


@dataclass(frozen=True, kw_only=True)
class WatchedTraining(TrainingDefense):
    """A training defense with a detector of catastrophic overfitting (`advkit.training.overfitting`).

    overfitting: what the detector does when it finds catastrophic overfitting: "warn", "stop" the training, or "raise"
                 an error. It looks at the validation samples whenever they are scored
    roll_back:   with overfitting=stop: hand back the best weights before it, also where the recipe selects the last
    """

    overfitting: Action = "warn"
    roll_back: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "overfitting", ("warn", "stop", "raise"))
        if self.overfitting != "warn" and self.recipe.validation == 0:
            raise UsageError(
                f"overfitting={self.overfitting} with validation=0: the detector looks at validation samples; "
                "set the recipe's validation, such as 0.1"
            )

    @property
    def claims(self) -> str:
        """The threat model it trains against."""
        return f"{self.norm}:eps={self.eps!r}"


class WatchedObjective(Objective):
    """A training loss under the detector; its checkpoints are judged by correctness under PGD-10.

    The log gets `fgsm_accuracy` of the validation rows, `abnormal_share` over the epoch's last 50 steps where the
    method notes it, and `overfitting`, 1 where the detector fires; the PGD accuracy is the score.
    """

    judge: ClassVar[PGD] = PGD(steps=10, step_size=0.25)

    def __init__(self, defense: WatchedTraining) -> None:
        super().__init__()
        self.defense = defense
        self.rolls_back = defense.overfitting == "stop" and defense.roll_back
        self._lowered: deque[Tensor] = deque(maxlen=WINDOW)

    @override
    def prepare(self, model: Any, data: Data, rng: Rng) -> None:
        """The ball must fit the model's space: said before the first epoch."""
        _ = self.defense.ball(model.space)

    def note(self, lowered: Tensor) -> None:
        """Keep which of the whole batch's rows' loss the step lowered, bool."""
        self._lowered.append(lowered)

    @override
    def score(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        """1.0 where a row is still right after PGD-10 from a random start, else 0.0."""
        ball = self.defense.ball(model.space)
        return correct_under(model, self.judge, x, y, ball, rng.at("judge")).to(torch.float32)

    @override
    def measures(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Mapping[str, Tensor]:
        """Correctness after one step of length eps from the clean row."""
        return {FGSM_ACCURACY: correct_after(model, x, y, self.defense.ball(model.space), rng)}

    @override
    def review(self, entry: Epoch, log: Sequence[Epoch]) -> Review:
        """Figures of the epoch, and the detector's word; raises UsageError where overfitting=raise."""
        figures = dict(self.noted())
        if math.isnan(entry.score):
            return Review(figures)
        looks = [_look(each) for each in log if not math.isnan(each.score)]
        looks.append(_look(entry, figures))
        why = collapsed(looks)
        figures[OVERFITTING] = float(bool(why))
        return Review(figures, self._act(f"catastrophic overfitting in epoch {entry.epoch}: {why}") if why else "")

    def noted(self) -> Mapping[str, float]:
        """What was noted step by step, by name; asked at the end of every epoch, and forgotten."""
        if not self._lowered:
            return {}
        share = float(torch.cat(tuple(self._lowered)).double().mean())
        self._lowered.clear()
        return {ABNORMAL_SHARE: share}

    def _act(self, words: str) -> str:
        """Warn, or raise, or give the reason to end the run."""
        action = self.defense.overfitting
        if action == "raise":
            raise UsageError(f"{words}; train with overfitting=stop to get the weights before it, or with a lower eps")
        log.warning("%s%s", words, ": training stops" if action == "stop" else "")
        return words if action == "stop" else ""


def _look(entry: Epoch, noted: Mapping[str, float] | None = None) -> Look:
    figures = {**entry.figures, **(noted or {})}
    return Look(figures[FGSM_ACCURACY], entry.score, figures.get(ABNORMAL_SHARE, math.nan))


def row_losses(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy [B] in float32 or wider, since differences of it are taken."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(wide, y, reduction="none")


def abnormal(before: Tensor, after: Tensor) -> Tensor:
    """Bool [B]: rows whose loss the step lowered; equal losses are normal."""
    return before > after
