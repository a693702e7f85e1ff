"""A reconstructed sample far from the clean one; the attacker of the second task of arXiv 2203.14195."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import check
from advkit.core.errors import BadInput, BadModel
from advkit.core.protocols import AboutSamples, Evidence, Examines, Figure, Graded, Rng, Worded, Wording
from advkit.core.rows import PerRow, finite_rows

ERROR, CLEAN_ERROR, OVER = "rmse", "clean_rmse", "over_threshold"


@dataclass(frozen=True, eq=False)
class Reconstruction(PerRow, Examines):
    """An answer whose root mean squared error to the clean sample is above a threshold.

    clean: the samples that should be recovered, float [B, ...]
    rmse:  the threshold, >= 0, in units of the samples

    Answers have the shape of `clean`. The loss is minus the mean squared error, which has a gradient where the error is
    zero (it is zero there, too) and the same order as the root. A threshold that is met exactly is not exceeded. An
    answer that is not finite reaches nothing. It has only its own loss: `under` returns it unchanged.
    Raises BadModel for answers of another shape.
    """

    kind: ClassVar[str] = "reconstruction"
    clean: Tensor
    rmse: float

    def squared(self, answer: Tensor) -> Tensor:
        """Mean squared error [B], in the answers' dtype."""
        return self._difference(answer, answer.dtype).square().flatten(1).mean(1)

    def _difference(self, answer: Tensor, dtype: torch.dtype) -> Tensor:
        if len(answer) != len(self.clean):
            raise BadInput(
                f"an answer of {len(answer)} samples to a goal of {len(self.clean)}; take(rows) the goal of the "
                "samples left"
            )
        if answer.shape != self.clean.shape or not answer.is_floating_point():
            raise BadModel(
                f"the model answers {answer.dtype} {list(answer.shape)}; expected reconstructed samples, float "
                f"{list(self.clean.shape)}"
            )
        return answer.to(dtype) - self.clean.to(dtype)

    def error(self, answer: Tensor) -> Tensor:
        """Root mean squared error [B] to the clean sample, float64: squares of large float32 answers overflow."""
        wide = answer.dtype if answer.device.type == "mps" else torch.float64  # which has no float64
        return self._difference(answer, wide).square().flatten(1).mean(1).sqrt()

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]."""
        return (self.error(answer) > self.rmse) & finite_rows(answer)

    def margin(self, answer: Tensor) -> Tensor:
        """Float [B]: the threshold minus the error; +inf where the answer is not finite."""
        margin = (self.rmse - self.error(answer)).to(answer.dtype)
        return torch.where(finite_rows(answer), margin, torch.inf)

    def loss(self, answer: Tensor) -> Tensor:
        """Float [B], smaller is better for the attacker."""
        return -self.squared(answer)

    def under(self, loss: str) -> Self:
        """Itself."""
        return self

    @override
    def examine(self, evidence: Evidence) -> Mapping[str, Sequence[Figure]]:
        """The victim's error on what was handed to it and on the clean sample, and whether the first is too large."""
        with torch.no_grad():
            found, before = self.error(evidence.answer), self.error(evidence.clean)
            over = self.reached(evidence.answer)
        known = torch.isfinite(found).tolist()
        return {
            ERROR: found.double().tolist(),
            CLEAN_ERROR: before.double().tolist(),
            OVER: [value if sane else None for value, sane in zip(over.tolist(), known, strict=True)],
        }


@dataclass(frozen=True, kw_only=True)
class ReconstructionRule(AboutSamples, Graded, Worded):
    """A bad reconstruction: root mean squared error to the clean sample above a threshold.

    rmse: the threshold, > 0, in units of the samples. It decides which samples count as recovered, and no attack stops
          there: the mean error under attack, `rmse`, is that of the worst answer found for every sample

    For tasks whose answers are reconstructed samples. Raises UsageError for a threshold out of range.
    """

    kind: ClassVar[str] = "reconstruction"
    grades: ClassVar[tuple[str, ...]] = (ERROR, CLEAN_ERROR)
    wording: ClassVar[Wording] = Wording(
        clean="recovered when clean",
        robust="recovered under attack",
        success="attack success rate",
        figure="recovered",
    )

    rmse: float = 0.25

    def __post_init__(self) -> None:
        check(
            self, "rmse", math.isfinite(self.rmse) and self.rmse > 0, "a root mean squared error above 0, such as 0.25"
        )

    @override
    def about(self, x: Tensor) -> Reconstruction:
        """The goal of a batch of clean samples."""
        return Reconstruction(x, self.rmse)

    def __call__(self, labels: Tensor, answer: Tensor, rng: Rng) -> Reconstruction:
        """Refuses: classes are no samples to recover. See `about`."""
        raise BadInput("the goal reconstruction is about samples, and this task has classes: use a reconstruction task")
