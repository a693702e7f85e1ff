"""Any wrong class; losses: cross-entropy, logit margin, and DLR (Croce and Hein, arXiv 2003.01690)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import ClassVar, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.protocols import NoneReached, Rng, Sloped
from advkit.core.rows import finite_rows, in_memory, plainly_finite
from advkit.threat_models.goals.per_row import PerRow

Surrogate = Literal["ce", "margin", "dlr"]
SURROGATES: tuple[str, ...] = ("ce", "margin", "dlr")


def checked_classes(labels: Tensor, what: str) -> int:
    """The largest of the class indices (-1 where there is none); BadInput unless they are non-negative long [B]."""
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype != torch.int64:
        seen = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise BadInput(f"{what} are {seen}; expected class indices, a long tensor [B]")
    if not len(labels):
        return -1
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0:
        raise BadInput(f"{what} from {low} to {high}; expected class indices from 0 up")
    return high


def checked_answer(answer: Tensor, top: int, rows: int, what: str) -> bool:
    """Whether an answer is scores [B, C]; False for decisions [B]. Shapes only, so it costs no synchronisation."""
    if len(answer) != rows:
        raise BadInput(
            f"an answer of {len(answer)} samples to a goal of {rows}; take(rows) the goal of the samples left"
        )
    if answer.ndim == 1 and not answer.is_floating_point():
        return False
    if answer.ndim != 2 or not answer.is_floating_point():
        raise BadModel(
            f"the model answers {answer.dtype} {list(answer.shape)}; expected scores, float [B, C], "
            "or decisions, long [B] with -1 for an abstention"
        )
    if answer.shape[1] < 2:
        raise BadModel(f"the model answers {answer.shape[1]} class; expected two scores per sample or more")
    if top >= answer.shape[1]:
        raise BadInput(
            f"{what} up to {top}, and the model has {answer.shape[1]} classes; expected 0..{answer.shape[1] - 1}"
        )
    return True


def scores_only(scores: bool, loss: str) -> None:
    """BadModel where a loss that needs scores meets decisions."""
    if not scores and loss != "margin":
        raise BadModel(
            f"the model answers decisions; loss {loss!r} needs scores: use loss 'margin' or a label-only attack"
        )


def top_scores(answer: Tensor, needed: int, loss: str) -> Tensor:
    """The `needed` largest scores, descending; BadModel when there are too few classes for the loss."""
    if answer.shape[1] < needed:
        raise BadModel(
            f"{loss} divides by a spread of the {needed} largest scores and the model has {answer.shape[1]} classes; "
            "use loss 'margin'"
        )
    return answer.topk(needed, dim=1).values


def targeted_spread(answer: Tensor) -> Tensor:
    """What the targeted DLR divides by: from the largest score to the mean of the third and fourth."""
    top = top_scores(answer, 4, "targeted dlr")
    return top[:, 0] - (top[:, 2] + top[:, 3]) / 2


def pick(answer: Tensor, classes: Tensor) -> Tensor:
    """The score of one class per row [B]."""
    return answer.gather(1, classes.unsqueeze(1)).squeeze(1)


def best_other(answer: Tensor, classes: Tensor) -> Tensor:
    """The largest score among the other classes [B]."""
    return answer.scatter(1, classes.unsqueeze(1), -torch.inf).amax(1)


@lru_cache(maxsize=16)
def _minus_one(classes: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A weight of -1 per class: it spares a negation of the loss and another of its gradient."""
    with torch.inference_mode(False):  # autograd has to be able to keep it
        return torch.full((classes,), -1.0, dtype=dtype, device=device)


def checked_surrogate(name: str) -> Surrogate:
    """The name as a surrogate; UsageError for a loss that these goals do not have."""
    if name not in SURROGATES:
        raise UsageError(f"loss {name!r}; expected one of {', '.join(SURROGATES)}")
    return cast(Surrogate, name)


class ClassGoal(PerRow, NoneReached, Sloped, ABC):
    """What goals about one class per row share: their checks, what decisions are worth, and the losses.

    A frozen dataclass below it declares `surrogate` and `_top` behind its classes, and says of scores what its margin
    is (`_gap`), which class the cross-entropy leads to or away from (`_lead`), and what DLR divides by (`_spread`).
    `_aim` is what the other two losses follow.
    """

    surrogate: Surrogate
    _top: int | None
    _what: ClassVar[str]  # the classes, in messages

    def __post_init__(self) -> None:
        checked_surrogate(self.surrogate)
        if self._top is None:  # take() and to() hand it on: looking it up again would synchronise
            object.__setattr__(self, "_top", checked_classes(self._classes, self._what))

    @property
    @abstractmethod
    def _classes(self) -> Tensor: ...

    @abstractmethod
    def reached(self, answer: Tensor) -> Tensor: ...

    @abstractmethod
    def _gap(self, answer: Tensor) -> Tensor: ...

    @property
    @abstractmethod
    def _lead(self) -> tuple[Tensor, bool]:
        """Classes, long [B], and whether the loss is the cross-entropy to them (or minus that)."""

    @abstractmethod
    def _spread(self, answer: Tensor) -> Tensor: ...

    def _aim(self, answer: Tensor) -> Tensor:
        return self._gap(answer)

    def _scores(self, answer: Tensor) -> bool:
        assert self._top is not None
        return checked_answer(answer, self._top, len(self._classes), self._what)

    def margin(self, answer: Tensor) -> Tensor:
        """Float [B]: negative where reached (0 in a tie); +inf where not finite."""
        if not self._scores(answer):
            return 1.0 - 2.0 * self.reached(answer).to(torch.get_default_dtype())
        gap = self._gap(answer)
        return gap if plainly_finite(answer) else torch.where(finite_rows(answer), gap, torch.inf)

    def loss(self, answer: Tensor) -> Tensor:
        """Float [B], smaller is better for the attacker."""
        scores = self._scores(answer)
        scores_only(scores, self.surrogate)
        if not scores:
            return self.margin(answer)
        if self.surrogate == "ce":
            classes, to = self._lead
            weight = None if to else _minus_one(answer.shape[1], answer.dtype, answer.device)
            return F.cross_entropy(answer, classes, weight, reduction="none")
        aim = self._aim(answer)
        return aim if self.surrogate == "margin" else aim / (self._spread(answer) + 1e-12)

    @override
    def sloped(self, answer: Tensor) -> tuple[Tensor, Tensor] | None:
        """Cross-entropy [B] and its derivative [B, C], by the functions that autograd calls; None of other losses."""
        if self.surrogate != "ce" or type(self).loss is not ClassGoal.loss:
            return None
        if not self._scores(answer) or answer.dtype != torch.float32:
            return None
        classes, to = self._lead
        weight = None if to else _minus_one(answer.shape[1], answer.dtype, answer.device)
        logs = torch.log_softmax(answer, 1)
        slope = torch._log_softmax_backward_data(self._pull(answer), logs, 1, answer.dtype)
        return F.nll_loss(logs, classes, weight, reduction="none"), slope

    def _pull(self, answer: Tensor) -> Tensor:
        """The derivative of the cross-entropy by the logarithms of the probabilities [B, C]; kept: it is constant."""
        kept: tuple[Tensor, ...] = self.__dict__.get("_pulls", ())
        if not kept or kept[0].shape != answer.shape or kept[0].device != answer.device:
            classes, to = self._lead
            pull = torch.zeros_like(answer).scatter_(1, classes.unsqueeze(1), -1.0 if to else 1.0)
            kept = (pull,)  # in a tuple, so that `take` does not take it for a field
            self.__dict__["_pulls"] = kept
        return kept[0]

    def under(self, loss: str) -> Self:
        """The same goal with another surrogate loss."""
        surrogate = checked_surrogate(loss)
        return self if surrogate == self.surrogate else replace(self, surrogate=surrogate)  # type: ignore[type-var]


@dataclass(frozen=True, eq=False)
class Untargeted(ClassGoal):
    """Any class but the true one.

    Classes are decided as a deployed classifier does: the largest score, the lowest index among equals.

    labels:    true classes, long [B]
    surrogate: "ce" minus the cross-entropy; "margin" true score minus the best other; "dlr" the margin over the spread
               between the largest and the third largest score (needs three classes)

    Answers are scores, float [B, C], or decisions, long [B]. An abstention (-1) reaches nothing, and neither does an
    answer that is not finite. The margin of a decision is -1 where the goal is reached, else 1.
    Raises BadInput for labels out of range, BadModel for answers of the wrong shape.
    """

    kind: ClassVar[str] = "untargeted"
    _what: ClassVar[str] = "labels"
    labels: Tensor
    surrogate: Surrogate = "ce"
    _top: int | None = field(default=None, repr=False)

    @property
    def _classes(self) -> Tensor:
        return self.labels

    @cached_property
    def _listed(self) -> list[int]:
        listed: list[int] = self.labels.tolist()
        return listed

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]."""
        if not self._scores(answer):
            return (answer >= 0) & (answer != self.labels)
        return (answer.argmax(1) != self.labels) & finite_rows(answer)

    @override
    def none_reached(self, answer: Tensor) -> bool:
        """Whether it is plain that no row reaches it; False in doubt. One look at the device."""
        if not self._scores(answer):
            return False
        scores = in_memory(answer)
        if scores is None:
            return torch.equal(answer.argmax(1), self.labels)
        return bool(scores.argmax(1).tolist() == self._listed)

    def _gap(self, answer: Tensor) -> Tensor:
        return pick(answer, self.labels) - best_other(answer, self.labels)

    @property
    def _lead(self) -> tuple[Tensor, bool]:
        return self.labels, False

    def _spread(self, answer: Tensor) -> Tensor:
        top = top_scores(answer, 3, "dlr")
        return top[:, 0] - top[:, 2]

    def rivals(self, answer: Tensor, k: int, without: Sequence[Rival] = ()) -> tuple[Rival, ...]:
        """The same goal aimed at one wrong class at a time: the k likeliest at `answer`, likeliest first.

        `without` are earlier rivals that do not come again; there are never more than there are classes left.
        """
        if not self._scores(answer):
            raise BadModel("the model answers decisions; rivals are ordered by scores: use an attack without targets")
        lowest = torch.finfo(answer.dtype).min
        scores = torch.nan_to_num(answer.detach(), nan=lowest, neginf=lowest)
        taken = torch.stack([self.labels, *(earlier.rival for earlier in without)], dim=1)
        order = scores.scatter(1, taken, -torch.inf).topk(max(0, min(k, answer.shape[1] - taken.shape[1])), dim=1)
        return tuple(Rival(self.labels, _top=self._top, rival=rival) for rival in order.indices.unbind(1))


@dataclass(frozen=True, eq=False)
class Rival(Untargeted):
    """Any class but the true one, on the way to one of them.

    rival:     the class that the loss leads to, long [B]; any other wrong class reaches the goal too
    surrogate: "margin" the true score minus the rival's; "dlr" that over the distance from the largest score to the
               mean of the third and fourth (needs four classes), as published; "ce" the cross-entropy to the rival

    The margin's zero is the boundary between the two classes.
    """

    surrogate: Surrogate = "margin"
    rival: Tensor = field(kw_only=True)

    def _aim(self, answer: Tensor) -> Tensor:
        return pick(answer, self.labels) - pick(answer, self.rival)

    @property
    def _lead(self) -> tuple[Tensor, bool]:
        return self.rival, True

    def _spread(self, answer: Tensor) -> Tensor:
        return targeted_spread(answer)


@dataclass(frozen=True, kw_only=True)
class UntargetedRule:
    """Any class other than the true one."""

    kind: ClassVar[str] = "untargeted"

    def __call__(self, labels: Tensor, answer: Tensor, rng: Rng) -> Untargeted:
        """The goal of a batch with true classes `labels`; the untouched `answer` and `rng` do not matter here."""
        goal = Untargeted(labels)
        goal._scores(answer)
        return goal
