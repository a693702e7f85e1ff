"""Move the answer away from the untouched one; the inner problem of TRADES (Zhang et al., arXiv 1901.08573)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from advkit.core.errors import BadInput
from advkit.core.protocols import NoneReached
from advkit.core.rows import finite_rows
from advkit.threat_models.goals.per_row import PerRow
from advkit.threat_models.goals.untargeted import best_other, checked_answer, pick


@dataclass(frozen=True, eq=False)
class Diverge(PerRow, NoneReached):
    """An answer whose distribution differs from the reference's as much as possible.

    reference: scores of the untouched rows, float [B, C]; taken as constants

    The loss is -KL(softmax(reference) || softmax(answer)). Reached means that the decision changed, strictly, whatever
    the true class is. It has only its own loss: `under` returns it unchanged.
    """

    kind: ClassVar[str] = "untargeted"
    reference: Tensor
    _decision: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self._decision is not None:
            return
        if self.reference.ndim != 2 or not self.reference.is_floating_point():
            raise BadInput(
                f"the reference is {self.reference.dtype} {list(self.reference.shape)}; expected scores, float [B, C]"
            )
        object.__setattr__(self, "reference", self.reference.detach())
        object.__setattr__(self, "_decision", self.reference.argmax(1))

    @property
    def _reference_class(self) -> Tensor:
        assert self._decision is not None
        return self._decision

    def _scores(self, answer: Tensor) -> bool:
        return checked_answer(answer, self.reference.shape[1] - 1, len(self.reference), "reference classes")

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]."""
        known = self._reference_class
        if not self._scores(answer):
            return (answer >= 0) & (answer != known)
        return (best_other(answer, known) > pick(answer, known)) & finite_rows(answer)

    @override
    def none_reached(self, answer: Tensor) -> bool:
        """Whether it is plain that no row reaches it; False in doubt. One look at the device."""
        return self._scores(answer) and torch.equal(answer.argmax(1), self._reference_class)

    def margin(self, answer: Tensor) -> Tensor:
        """Float [B]: score of the reference's class minus the best other; +inf where it is not finite."""
        if not self._scores(answer):
            return 1.0 - 2.0 * self.reached(answer).to(torch.get_default_dtype())
        margin = pick(answer, self._reference_class) - best_other(answer, self._reference_class)
        return torch.where(finite_rows(answer), margin, torch.inf)

    def loss(self, answer: Tensor) -> Tensor:
        """Float [B], smaller is better for the attacker."""
        if not self._scores(answer):
            return self.margin(answer)
        log_reference = F.log_softmax(self.reference, dim=1)
        return -(log_reference.exp() * (log_reference - F.log_softmax(answer, dim=1))).sum(1)

    def under(self, loss: str) -> Self:
        """Itself: divergence is the goal."""
        return self
