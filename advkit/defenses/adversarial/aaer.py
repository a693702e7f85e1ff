"""AAER: regularisation of abnormal adversarial examples in single-step training (Lin, Yu & Liu, arXiv 2404.08154)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from advkit.core.checks import at_least, not_negative, one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Rng
from advkit.defenses.adversarial.one_step import Move, Step
from advkit.defenses.adversarial.single_step import OneStepObjective, OneStepTraining, SingleStep
from advkit.defenses.adversarial.watched import abnormal, row_losses
from advkit.training.loop import Epoch, Objective, Review
from advkit.training.ranks import gathered, mean_of_batch

log = logging.getLogger("advkit")

WhenAll = Literal["skip", "apply"]
DOMINATES = 5.0
PATIENCE = 50


@dataclass(frozen=True)
class Terms:
    """The parts of AAER's loss on a batch.

    ce:          mean cross-entropy at the step's end
    abnormal:    bool [B], the abnormal adversarial examples: the step lowered their loss
    drop:        mean over them of the loss at the start minus the loss at the end, > 0; 0 where there are none (the
                 paper's CE term)
    moved:       mean over them of the squared distance between the logits at start and end (AV)
    normal:      the same over the other rows, constant (NV)
    regulariser: lambda1 * share * (lambda2 * drop + lambda3 * max(moved - normal, 0))
    """

    ce: Tensor
    abnormal: Tensor
    drop: Tensor
    moved: Tensor
    normal: Tensor
    regulariser: Tensor

    @property
    def loss(self) -> Tensor:
        """What is descended."""
        return self.ce + self.regulariser


def terms(
    before: Tensor,
    after: Tensor,
    y: Tensor,
    lambdas: Sequence[float] = (1.0, 2.5, 1.5),
    ce_grad: bool = False,
    *,
    when_all: WhenAll = "skip",
) -> Terms:
    """AAER's terms from logits [B, classes] before and after the step; `before` and NV get no gradient.

    lambdas:  lambda1, lambda2, lambda3
    ce_grad:  whether `drop` has a gradient, through the loss at the end. In the released code it has none
    when_all: where every row is abnormal, "skip" the regulariser, or "apply" it with NV = 0

    Differences are taken in float32 or wider. Squared distances are summed over classes, then averaged over the rows of
    their kind; on several processes, over those of the whole batch, while `ce` is this process's own. Logits are not
    centred: a constant added to all of a row's logits changes AV and no loss.
    """
    l1, l2, l3 = lambdas
    before = before.detach()
    start, end = gathered(row_losses(before, y)), gathered(row_losses(after if ce_grad else after.detach(), y))
    drops = start - end
    lowered = abnormal(start, end)
    count = lowered.sum()
    others = len(start) - count
    wide = after if after.dtype == torch.float64 else after.float()
    distances = gathered((wide - before.to(wide.dtype)).square().sum(1))
    nothing = torch.zeros_like(start)
    drop = torch.where(lowered, drops, nothing).sum() / count.clamp(min=1)
    moved = torch.where(lowered, distances, nothing).sum() / count.clamp(min=1)
    normal = torch.where(lowered, nothing, distances.detach()).sum() / others.clamp(min=1)
    share = count.to(wide.dtype) / max(1, len(start))
    if when_all == "skip":
        share = share * (others > 0)
    regulariser = l1 * share * (l2 * drop + l3 * functional.relu(moved - normal))
    return Terms(functional.cross_entropy(after, y), lowered, drop, moved, normal, regulariser)


@dataclass(frozen=True, kw_only=True)
class AAER(OneStepTraining):
    """AAER: a single-step method plus a penalty on abnormal adversarial examples: those whose loss the step lowered.

    Their number grows before catastrophic overfitting; the penalty is on their loss's drop and on how much further
    their outputs move than those of the others. Costs what the base method costs: both forward passes are its own.

    base:    fgsm_rs, n_fgsm or fgsm_at, with noise and step_size if wanted: [fgsm_rs:step_size=1]
    lambda1: weight of the whole, >= 0
    lambda2: weight of the loss's drop, >= 0
    lambda3: weight of the outputs' further movement, >= 0
    ce_grad: let the drop of the loss have a gradient. In the released code, by which the paper's figures were made, it
             has none, so that lambda2 changes nothing but the logged loss; the paper's formula has one
    when_all: batches in which every example is abnormal: "skip" the penalty as the released code does, or "apply" it
    warm_up: epochs over which the penalty grows from zero to its full weight, for long schedules

    The defaults are the paper's for FGSM-RS at 8/255 on CIFAR-10; N-FGSM there has lambda2=1.5, lambda3=0.15. Larger
    radii want larger weights. The released code computes gradients of all weights in the step and throws them away;
    here they are not computed.
    """

    base: str = "fgsm_rs"
    lambda1: float = 1.0
    lambda2: float = 2.5
    lambda3: float = 1.5
    ce_grad: bool = False
    when_all: WhenAll = "skip"
    warm_up: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "lambda1", "lambda2", "lambda3")
        one_of(self, "when_all", ("skip", "apply"))
        at_least(self, 0, "warm_up")
        _ = self.step

    @property
    def lambdas(self) -> tuple[float, float, float]:
        """The three weights."""
        return self.lambda1, self.lambda2, self.lambda3

    @property
    @override
    def step(self) -> Step:
        from advkit.defenses import DEFENSES

        base = DEFENSES.build(self.base)
        if type(base) not in (DEFENSES.load(name) for name in ("fgsm_rs", "n_fgsm", "fgsm_at")):
            raise UsageError(f"base is {self.base!r}; expected fgsm_rs, n_fgsm or fgsm_at")
        if not isinstance(base, SingleStep):  # never, by the line before; for the type checker
            raise UsageError(f"base is {self.base!r}; expected a single-step method")
        if replace(base, noise=0.0, step_size=1.0) != replace(type(base)(), noise=0.0, step_size=1.0):
            raise UsageError(
                f"base is {self.base!r}; only noise and step_size are settings of a base, set others in aaer"
            )
        return base.step

    @override
    def objective(self) -> Objective:
        return _Objective(self)


class _Objective(OneStepObjective):
    def __init__(self, defense: AAER) -> None:
        super().__init__(defense)
        self.aaer = defense
        self.idle = defense.lambda1 == 0 or (defense.lambda2 == 0 and defense.lambda3 == 0)
        self.epochs = 0
        self._held: list[Tensor] = []

    @override
    def outer(self, model: Any, x: Tensor, y: Tensor, move: Move, after: Tensor, rng: Rng) -> Tensor:
        if self.idle:  # the base method, to the bit
            return super().outer(model, x, y, move, after, rng)
        found = terms(move.before, after, y, self.aaer.lambdas, self.aaer.ce_grad, when_all=self.aaer.when_all)
        self.note(found.abnormal)
        grown = min(self.epochs / self.aaer.warm_up, 1.0) if self.aaer.warm_up else 1.0
        regulariser = found.regulariser if grown == 1 else grown * found.regulariser
        with torch.no_grad():  # looked at when the epoch ends: asking an accelerator every step would stop it
            ce = mean_of_batch([found.ce])[0]
            self._held.append(torch.stack((found.drop, found.moved, found.normal, regulariser, ce)))
        return found.ce + regulariser

    @override
    def noted(self) -> Mapping[str, float]:
        """The share of abnormal examples, and the means of the terms over the epoch's steps."""
        figures = dict(super().noted())
        if self._held:
            means = torch.stack(self._held).double().mean(0).tolist()
            figures |= dict(zip(("aaer_drop", "aaer_moved", "aaer_normal", "aaer_regulariser"), means, strict=False))
            self._held.clear()
        return figures

    def _dominated(self) -> int:
        """Most steps in a row of this epoch in which the penalty was more than DOMINATES times the cross-entropy."""
        if not self._held:
            return 0
        regularisers, losses = torch.stack(self._held)[:, 3:].unbind(1)
        longest = run = 0
        for more in (regularisers > DOMINATES * losses).tolist():
            run = run + 1 if more else 0
            longest = max(longest, run)
        return longest

    @override
    def review(self, entry: Epoch, log_: Sequence[Epoch]) -> Review:
        self.epochs += 1
        dominated = self._dominated()
        if dominated >= PATIENCE:
            log.warning(
                "aaer's penalty was more than %g times the cross-entropy for %d steps in a row: clean accuracy may "
                "collapse; lower lambda2 or lambda3",
                DOMINATES,
                dominated,
            )
        return super().review(entry, log_)

    @override
    def state(self) -> dict[str, Tensor]:
        """How many epochs are done, for the warm-up."""
        return {"epochs": torch.tensor(self.epochs)}

    @override
    def load(self, state: dict[str, Tensor]) -> None:
        """Go on counting."""
        self.epochs = int(state["epochs"])
