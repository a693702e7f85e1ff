"""Chosen classes at the top, in order or in any order, and the true class out of the top K (arXiv 2312.11510).

Each goal is a polyhedron of logits: differences of pairs of them have a sign. So each has, next to the cross-entropy,
margin and DLR that every goal has, the losses of the published ordered attacks: the hinge of CW^K, the divergence from
an ordered distribution of Adversarial Distillation (both in arXiv 1905.10695), and the squared distance to the
polyhedron of QuadAttacK.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from advkit.core.checks import at_least_one, not_negative
from advkit.core.errors import BadInput, BadModel, UsageError
from advkit.core.protocols import NOT_REACHED, Rng, Worded, Wording
from advkit.threat_models.goals.polyhedron import (
    Pairs,
    ordered_pairs,
    out_of_topk_pairs,
    projection_loss,
    unordered_pairs,
)
from advkit.threat_models.goals.untargeted import checked_answer, checked_classes, pick, top_scores

SURROGATES = ("ce", "margin", "dlr", "cw", "ad", "quad")


@dataclass(frozen=True, eq=False)
class _Top(ABC):
    """What the goals share.

    surrogate:  "ce", "margin", "dlr", "cw", "ad" or "quad"; each goal says what they are
    gram:       Gram matrix W W^T [C, C] of the last linear layer, for "quad": distances are then measured in the
                features before it; None measures them in the logits
    similarity: between classes [C, C], in [-1, 1], for "ad"; None is the identity
    spacing:    what "quad" wants between the logits of a pair, > 0
    kappa:      what "cw" wants between the logits of a pair, >= 0
    alpha:      logit of the first target, for "ad"
    beta:       what "ad" wants between the logits of targets that follow one another, >= 0
    """

    _: KW_ONLY
    surrogate: str = "ce"
    gram: Tensor | None = None
    similarity: Tensor | None = None
    spacing: float = 0.2
    kappa: float = 0.0
    alpha: float = 10.0
    beta: float = 0.3
    _top: int | None = field(default=None, repr=False)
    _pairs: Pairs | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.surrogate not in SURROGATES:
            raise UsageError(f"loss {self.surrogate!r}; expected one of {', '.join(SURROGATES)}")
        not_negative(self, "spacing", "kappa", "beta")
        for name in ("gram", "similarity"):
            given: Tensor | None = getattr(self, name)
            if given is not None and (given.ndim != 2 or given.shape[0] != given.shape[1]):
                raise BadInput(f"the {name} matrix is {list(given.shape)}; expected [C, C], one row per class")
        if self._top is None:  # take() and to() hand it on: looking it up again would synchronise
            object.__setattr__(self, "_top", self._checked())

    @abstractmethod
    def _checked(self) -> int:
        """The largest class index, after a look at the fields."""

    @property
    @abstractmethod
    def _classes(self) -> Tensor:
        """The class indices per row, long [B] or [B, K]."""

    @abstractmethod
    def _gap(self, answer: Tensor) -> Tensor:
        """The largest of lower minus upper over the goal's pairs [B]."""

    @abstractmethod
    def _listwise(self, answer: Tensor) -> Tensor: ...

    @abstractmethod
    def _hinge(self, answer: Tensor) -> Tensor: ...

    @abstractmethod
    def _spread(self, answer: Tensor) -> Tensor: ...

    @abstractmethod
    def pairs(self, answer: Tensor) -> Pairs:
        """The classes (upper, lower), long [B, R] each, whose scores must differ for the goal to be reached."""

    def distribution(self, answer: Tensor) -> Tensor:
        """What "ad" wants the softmax of the answer to be [B, C]."""
        raise UsageError(f"{type(self).__name__} names no classes to distil towards: it has no loss 'ad'")

    def _scores(self, answer: Tensor) -> bool:
        assert self._top is not None
        scores = checked_answer(answer, self._top, len(self._classes), "classes of the goal")
        if not scores:
            raise BadModel("the model answers decisions; the order of classes shows in scores alone")
        for name in ("gram", "similarity"):
            given: Tensor | None = getattr(self, name)
            if given is not None and len(given) != answer.shape[1]:
                raise BadInput(f"the {name} matrix is of {len(given)} classes and the model has {answer.shape[1]}")
        return scores

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]: every pair in order, strictly."""
        return self.margin(answer) < 0

    def margin(self, answer: Tensor) -> Tensor:
        """Float [B]: the largest of lower minus upper score over the pairs: negative where reached; +inf if not finite.

        In a tie it is 0.
        """
        self._scores(answer)
        finite = torch.isfinite(answer).all(1)
        return torch.where(finite, self._gap(answer), torch.inf)

    def loss(self, answer: Tensor) -> Tensor:
        """Float [B], smaller is better for the attacker."""
        self._scores(answer)
        if self.surrogate == "ce":
            return self._listwise(answer)
        if self.surrogate == "margin":
            return self._gap(answer)
        if self.surrogate == "dlr":
            return self._gap(answer) / (self._spread(answer) + 1e-12)
        if self.surrogate == "cw":
            return self._hinge(answer)
        if self.surrogate == "ad":
            wanted = self.distribution(answer)
            return (torch.xlogy(wanted, wanted) - wanted * F.log_softmax(answer, dim=1)).sum(1)
        return projection_loss(answer, self.gram, self.pairs(answer), self.spacing)

    def under(self, loss: str) -> Self:
        """The same goal with another surrogate loss."""
        return self if loss == self.surrogate else replace(self, surrogate=loss)

    def with_gram(self, gram: Tensor | None) -> Self:
        """The same goal with distances measured through W W^T [C, C]; None in the logits."""
        return replace(self, gram=gram)

    def for_classes(self, classes: int) -> Self:
        """The same goal with its pairs worked out beforehand, for a model of that many classes."""
        return self

    def _taken(self, rows: Tensor) -> Pairs | None:
        known = self._pairs
        return None if known is None else known._replace(upper=known.upper[rows], lower=known.lower[rows])

    def _moved(self, device: torch.device | str) -> dict[str, Any]:
        given = {name: getattr(self, name) for name in ("gram", "similarity")}
        moved: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in given.items()}
        known = self._pairs
        if known is not None:
            moved["_pairs"] = known._replace(upper=known.upper.to(device), lower=known.lower.to(device))
        return moved


def _checked_targets(targets: Tensor) -> int:
    """The largest target; BadInput unless they are long [B, K], K >= 1, and differ within a row."""
    if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.dtype != torch.int64 or not targets.shape[1]:
        seen = f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise BadInput(f"targets are {seen}; expected class indices, a long tensor [B, K] with K >= 1")
    highest = checked_classes(targets.flatten(), "targets")
    ordered = targets.sort(1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(1)
    if bool(twice.any()):
        row = int(twice.nonzero()[0])
        raise BadInput(f"sample {row} wants {targets[row].tolist()}: a class can't take two places, name each once")
    return highest


@dataclass(frozen=True, eq=False)
class TopK(_Top):
    """The K chosen classes score highest, in whatever order.

    targets: wanted classes, long [B, K], distinct within a row, 1 <= K < C

    Losses: "ce" the sum over targets of their cross-entropy among themselves and the classes that are no targets;
    "margin" the best other score minus the lowest target's; "dlr" that over the distance from the largest score to the
    mean of those in places K + 2 and K + 3; "cw" the mean over targets of the hinge max(0, best other - target +
    kappa); "ad" the divergence from a distribution in which all targets have the logit alpha and another class its mean
    similarity to them; "quad" the squared distance to the nearest logits that hold every target `spacing` above every
    other class.

    Answers must be scores, float [B, C]. One that is not finite reaches nothing, and neither does a tie. Raises
    BadInput for targets out of range, BadModel for answers of the wrong shape.
    """

    kind: ClassVar[str] = "targeted"
    targets: Tensor

    def _checked(self) -> int:
        highest = _checked_targets(self.targets)
        self._check_distillation()
        return highest

    def _check_distillation(self) -> None:
        lowest = self.alpha - self._step * (self.targets.shape[1] - 1)
        # Similarities end at 1: below that, and only there, the classes at hand have to be looked at.
        if lowest > (0.0 if self.similarity is None else 1.0) or self.surrogate != "ad":
            return
        highest = 0.0 if self.similarity is None else float(self._background(self.similarity).amax())
        if lowest <= highest:
            raise UsageError(
                f"alpha={self.alpha:g}, beta={self._step:g} give the last of {self.targets.shape[1]} targets the logit "
                f"{lowest:g}, no more than the {highest:.3g} of some other class; raise alpha or lower beta"
            )

    def _background(self, similarity: Tensor) -> Tensor:
        """Mean similarity of every class to the targets [B, C]; -inf for the targets."""
        return similarity[self.targets].mean(1).scatter(1, self.targets, -torch.inf)

    @property
    def _step(self) -> float:
        return 0.0

    @property
    def _classes(self) -> Tensor:
        return self.targets

    def _scores(self, answer: Tensor) -> bool:
        scores = super()._scores(answer)
        if self.targets.shape[1] >= answer.shape[1]:
            raise BadInput(
                f"{self.targets.shape[1]} targets in any order, and the model has {answer.shape[1]} classes: that "
                "always holds; name fewer"
            )
        return scores

    def _others(self, answer: Tensor) -> Tensor:
        """The scores with the targets' at -inf [B, C]."""
        return answer.scatter(1, self.targets, -torch.inf)

    def _gap(self, answer: Tensor) -> Tensor:
        return self._others(answer).amax(1) - answer.gather(1, self.targets).amin(1)

    def _listwise(self, answer: Tensor) -> Tensor:
        wanted, rest = answer.gather(1, self.targets), self._others(answer).logsumexp(1, keepdim=True)
        # -log(exp t / (exp t + exp rest)), target by target
        return F.softplus(rest - wanted).sum(1)

    def _hinge(self, answer: Tensor) -> Tensor:
        best = self._others(answer).amax(1, keepdim=True)
        return (best - answer.gather(1, self.targets) + self.kappa).clamp_min(0).mean(1)

    def _spread(self, answer: Tensor) -> Tensor:
        k = self.targets.shape[1]
        top = top_scores(answer, k + 3, f"dlr of {k} targets")
        return top[:, 0] - (top[:, k + 1] + top[:, k + 2]) / 2

    def distribution(self, answer: Tensor) -> Tensor:
        """What "ad" wants the softmax of the answer to be [B, C]."""
        k = self.targets.shape[1]
        if self.similarity is None:
            logits = torch.zeros_like(answer)
        else:
            logits = self.similarity.to(answer)[self.targets].mean(1)
        ladder = self.alpha - self._step * torch.arange(k, dtype=answer.dtype, device=answer.device)
        return logits.detach().scatter(1, self.targets, ladder.expand(len(answer), k)).softmax(1)

    def pairs(self, answer: Tensor) -> Pairs:
        """Every target above every other class."""
        return unordered_pairs(self.targets, answer.shape[1]) if self._pairs is None else self._pairs

    def for_classes(self, classes: int) -> Self:
        """The same goal with its pairs worked out beforehand, for a model of that many classes."""
        if self._pairs is not None:
            return self
        return replace(self, _pairs=self.pairs(self.targets.new_empty(len(self.targets), classes)))

    def take(self, rows: Tensor) -> Self:
        """The goal of a subset of the rows (long or bool index)."""
        return replace(self, targets=self.targets[rows], _pairs=self._taken(rows))

    def to(self, device: torch.device | str) -> Self:
        """The same goal on a device."""
        return replace(self, targets=self.targets.to(device), **self._moved(device))


@dataclass(frozen=True, eq=False)
class OrderedTopK(TopK):
    """The K chosen classes score highest, the first above the second and so on.

    targets: wanted classes in their order, long [B, K], distinct within a row, 1 <= K <= C

    Losses: "ce" the listwise cross-entropy, the sum over places of the cross-entropy of its target among the classes
    not placed before; "margin" the largest of lower minus upper over consecutive places; "dlr" that over the distance
    from the largest score to the mean of those in places K + 2 and K + 3 (with K = 1 the targeted DLR); "cw" the mean
    over places of the hinge between the lowest of the targets so far and the best of all other classes; "ad" the
    divergence from a distribution in which target i has the logit alpha - (i - 1) beta and another class its mean
    similarity to the targets; "quad" the squared distance to the nearest logits that hold all consecutive gaps at
    `spacing` or more.

    With K = 1 it is the targeted goal without its ties. Answers and errors are as in `TopK`. The published code takes
    equality of sorted indices for success, in which a tie may count.
    """

    kind: ClassVar[str] = "topk_ordered"

    @property
    def _step(self) -> float:
        return self.beta

    def _scores(self, answer: Tensor) -> bool:
        scores = _Top._scores(self, answer)
        if self.targets.shape[1] > answer.shape[1]:
            raise BadInput(f"{self.targets.shape[1]} places for {answer.shape[1]} classes; name fewer targets")
        return scores

    def _is_whole(self, answer: Tensor) -> bool:
        return self.targets.shape[1] == answer.shape[1]

    def _gap(self, answer: Tensor) -> Tensor:
        wanted = answer.gather(1, self.targets)
        gaps = wanted[:, 1:] - wanted[:, :-1]
        if not self._is_whole(answer):
            last = self._others(answer).amax(1, keepdim=True) - wanted[:, -1:]
            gaps = torch.cat([gaps, last], 1)
        return gaps.amax(1)

    def _listwise(self, answer: Tensor) -> Tensor:
        wanted = answer.gather(1, self.targets)
        if self._is_whole(answer):  # the last place falls to the last class by itself
            remaining = wanted.flip(1)
        else:
            rest = self._others(answer).logsumexp(1, keepdim=True)
            remaining = torch.cat([rest, wanted.flip(1)], 1)
        return (remaining.logcumsumexp(1)[:, 1:].flip(1) - wanted[:, : remaining.shape[1] - 1]).sum(1)

    def _hinge(self, answer: Tensor) -> Tensor:
        wanted = answer.gather(1, self.targets)
        lowest = wanted.cummin(1).values
        behind = wanted[:, 1:]
        if not self._is_whole(answer):
            behind = torch.cat([behind, self._others(answer).amax(1, keepdim=True)], 1)
        best = behind.flip(1).cummax(1).values.flip(1)
        terms = (best - lowest[:, : best.shape[1]] + self.kappa).clamp_min(0)
        return terms.sum(1) / self.targets.shape[1]

    def pairs(self, answer: Tensor) -> Pairs:
        """Every target above the next, the last above every other class."""
        return ordered_pairs(self.targets, answer.shape[1]) if self._pairs is None else self._pairs


@dataclass(frozen=True, eq=False)
class OutOfTopK(_Top):
    """The true class is not among the K highest: K others or more score above it.

    labels: true classes, long [B]
    k:      places that the true class must leave, 1 <= k < C

    Losses: "ce" the sum over the K places of the log-probability of the true class among the classes not placed before
    (with k = 1 minus the cross-entropy); "margin" the true score minus the k-th best other; "dlr" that over the
    distance from the largest to the (k + 2)-th largest score; "cw" the mean over the k best others of the hinge max(0,
    true - other + kappa); "quad" the squared distance to the nearest logits that hold the k others that lead now
    `spacing` above the true class. It has no "ad".

    Answers and errors are as in `TopK`.
    """

    kind: ClassVar[str] = "untargeted"
    labels: Tensor
    k: int = 5

    def _checked(self) -> int:
        at_least_one(self, "k")
        if self.surrogate == "ad":
            raise UsageError("out-of-topk names no classes to distil towards: it has no loss 'ad'; use cw or quad")
        return checked_classes(self.labels, "labels")

    @property
    def _classes(self) -> Tensor:
        return self.labels

    def under(self, loss: str) -> Self:
        """The same goal with another surrogate loss."""
        if loss == "ad":
            raise UsageError("out-of-topk names no classes to distil towards: it has no loss 'ad'; use cw or quad")
        return super().under(loss)

    def _scores(self, answer: Tensor) -> bool:
        scores = super()._scores(answer)
        if self.k >= answer.shape[1]:
            raise BadInput(f"k={self.k}, and only {answer.shape[1] - 1} classes can score above the true one")
        return scores

    def _leaders(self, answer: Tensor) -> tuple[Tensor, Tensor]:
        """The k best other scores, descending, and their classes [B, k]."""
        leaders = answer.scatter(1, self.labels[:, None], -torch.inf).topk(self.k, dim=1)
        return leaders.values, leaders.indices

    def _gap(self, answer: Tensor) -> Tensor:
        return pick(answer, self.labels) - self._leaders(answer)[0][:, -1]

    def _listwise(self, answer: Tensor) -> Tensor:
        true = pick(answer, self.labels)
        leaders, where = self._leaders(answer)
        rest = answer.scatter(1, where, -torch.inf).logsumexp(1, keepdim=True)
        remaining = torch.cat([rest, leaders.flip(1)], 1).logcumsumexp(1)[:, 1:]
        return (true[:, None] - remaining).sum(1)

    def _hinge(self, answer: Tensor) -> Tensor:
        return (pick(answer, self.labels)[:, None] - self._leaders(answer)[0] + self.kappa).clamp_min(0).mean(1)

    def _spread(self, answer: Tensor) -> Tensor:
        top = top_scores(answer, self.k + 2, f"dlr of the top {self.k}")
        return top[:, 0] - top[:, self.k + 1]

    def pairs(self, answer: Tensor) -> Pairs:
        """The k others that lead now above the true class."""
        return out_of_topk_pairs(self.labels, self._leaders(answer.detach())[1])

    def take(self, rows: Tensor) -> Self:
        """The goal of a subset of the rows (long or bool index)."""
        return replace(self, labels=self.labels[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same goal on a device."""
        return replace(self, labels=self.labels.to(device), **self._moved(device))


def drawn_targets(labels: Tensor, classes: int, k: int, rng: Rng) -> Tensor:
    """k wrong classes per row, uniform without replacement and in random order, long [B, k]."""
    if k >= classes:
        raise BadInput(f"k={k}, and a model of {classes} classes has {classes - 1} wrong ones; choose a smaller k")
    noise = rng.uniform(torch.empty(len(labels), classes, dtype=torch.float64, device=labels.device))
    return noise.scatter(1, labels[:, None], -1.0).topk(k, dim=1).indices


def _classes_of(labels: Tensor, answer: Tensor, what: str) -> int:
    if not checked_answer(answer, checked_classes(labels, "labels"), len(labels), "labels"):
        raise BadModel(f"{what} needs scores and the model answers decisions; choose another goal")
    return answer.shape[1]


@dataclass(frozen=True, kw_only=True)
class OrderedTopKRule(Worded):
    """Ordered top-K: k wrong classes take the first k places in one given order, drawn per sample.

    k: how many, 1 <= k < C; drawn uniformly without replacement from the wrong classes, in random order
    """

    kind: ClassVar[str] = "topk_ordered"
    wording: ClassVar[Wording] = NOT_REACHED
    k: int = 5

    def __post_init__(self) -> None:
        at_least_one(self, "k")

    def __call__(self, labels: Tensor, answer: Tensor, rng: Rng) -> OrderedTopK:
        """The goal of a batch with true classes `labels` and untouched answer `answer` (scores, float [B, C])."""
        return OrderedTopK(drawn_targets(labels, _classes_of(labels, answer, "ordered-topk"), self.k, rng))


@dataclass(frozen=True, kw_only=True)
class TopKRule(Worded):
    """Top-K targets: k wrong classes take the first k places in any order, drawn per sample.

    k: how many, 1 <= k < C; drawn uniformly without replacement from the wrong classes
    """

    kind: ClassVar[str] = "targeted"
    wording: ClassVar[Wording] = NOT_REACHED
    k: int = 5

    def __post_init__(self) -> None:
        at_least_one(self, "k")

    def __call__(self, labels: Tensor, answer: Tensor, rng: Rng) -> TopK:
        """The goal of a batch with true classes `labels` and untouched answer `answer` (scores, float [B, C])."""
        return TopK(drawn_targets(labels, _classes_of(labels, answer, "topk"), self.k, rng))


@dataclass(frozen=True, kw_only=True)
class OutOfTopKRule(Worded):
    """Untargeted top-K: the true class is not among the k highest scores.

    k: places that it must leave, 1 <= k < C
    """

    kind: ClassVar[str] = "untargeted"
    wording: ClassVar[Wording] = NOT_REACHED
    k: int = 5

    def __post_init__(self) -> None:
        at_least_one(self, "k")

    def __call__(self, labels: Tensor, answer: Tensor, rng: Rng) -> OutOfTopK:
        """The goal of a batch with true classes `labels`; the untouched `answer` and `rng` do not matter here."""
        _classes_of(labels, answer, "out-of-topk")
        goal = OutOfTopK(labels, self.k)
        goal.margin(answer)
        return goal
