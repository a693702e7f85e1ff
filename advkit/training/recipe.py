"""How to train, everything but the loss: `Recipe`, and the optimiser that it asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from advkit.core.checks import at_least_one, check, fraction, not_negative, one_of
from advkit.training.augment import AUGMENTATIONS
from advkit.training.lars import LARS

_LATER = ("warmup", "milestones", "accumulate", "compile", "channels_last")
"""Settings that came after the first runs were stored, whose fingerprints have the recipe's repr."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Recipe:
    """How to train: everything but the loss.

    epochs:       passes over the training rows
    batch_size:   rows per step; a last batch of a single row joins the one before
    optimizer:    "adam", "sgd", or "lars" for very large batches (`advkit.training.lars`)
    lr:           peak learning rate
    momentum:     of sgd and lars
    weight_decay: L2 coefficient on weights with two axes or more; biases and normalisation parameters are spared
    schedule:     "none"; "cosine" to zero; "linear" to zero; "poly": to zero with the square of what is left;
                  "onecycle": linearly up from zero, and down again from half time; "steps": a tenth of it from every
                  milestone on
    warmup:       share of the steps over which the learning rate first rises linearly to its peak; "cosine", "linear"
                  and "poly" fall over the steps that are left
    milestones:   of "steps", in shares of the steps
    ema:          decay of the averaged weights that are scored and returned, such as 0.999; 0 for none. At step t the
                  decay is at most (1 + t) / (10 + t), so that random initial weights are forgotten
    amp:          the loss under autocast: true or "bf16" for bfloat16; "fp16" for float16, with the loss scaled so that
                  its gradients do not vanish: a step whose gradients overflow is left out, and the scale is halved.
                  Gradients of attacks inside a loss are not scaled
    accumulate:   pieces of a batch whose gradients are added up before a step, to save memory. Losses that are means
                  over rows have the gradient of the whole batch; batch statistics, and methods that couple the rows of
                  a batch, see a piece at a time
    compile:      torch.compile for the network; the first steps take longer
    channels_last: images and weights with channels last in memory, faster for convolutions on many devices
    augment:      "none", or "crop-flip" for images
    validation:   fraction of the rows, the first ones of the file, kept for scoring; 0 for none
    select:       "best" weights on the validation rows, or "last"
    select_every: epochs between scorings; the last epoch is always scored
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: Literal["adam", "sgd", "lars"] = "adam"
    lr: float = 2e-3
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Literal["none", "cosine", "linear", "poly", "onecycle", "steps"] = "none"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    ema: float = 0.0
    amp: bool | Literal["bf16", "fp16"] = False
    accumulate: int = 1
    compile: bool = False
    channels_last: bool = False
    augment: Literal["none", "crop-flip"] = "none"
    validation: float = 0.1
    select: Literal["best", "last"] = "best"
    select_every: int = 1

    def __post_init__(self) -> None:
        at_least_one(self, "epochs", "batch_size", "select_every", "accumulate")
        check(self, "lr", self.lr > 0 and math.isfinite(self.lr), "a positive number")
        not_negative(self, "weight_decay")
        fraction(self, "momentum", "ema", "validation", "warmup", ends="[)")
        one_of(self, "optimizer", ("adam", "sgd", "lars"))
        one_of(self, "schedule", ("none", "cosine", "linear", "poly", "onecycle", "steps"))
        one_of(self, "amp", (False, True, "bf16", "fp16"))
        rising = list(self.milestones) == sorted(self.milestones) and all(0 < share <= 1 for share in self.milestones)
        check(self, "milestones", rising, "shares in (0, 1], the smallest first")
        check(self, "warmup", self.warmup == 0 or self.schedule != "onecycle", "0: onecycle has a warm-up of its own")
        check(self, "accumulate", self.accumulate <= self.batch_size, f"at most batch_size={self.batch_size}")
        one_of(self, "augment", tuple(AUGMENTATIONS))
        one_of(self, "select", ("best", "last"))

    def __repr__(self) -> str:
        """As a dataclass's, without later settings that are at their defaults: stored runs keep their fingerprints."""
        held = [(each, getattr(self, each.name)) for each in fields(self)]
        shown = [f"{each.name}={value!r}" for each, value in held if each.name not in _LATER or value != each.default]
        return f"{type(self).__qualname__}({', '.join(shown)})"

    @property
    def half(self) -> torch.dtype | None:
        """The type of autocast; None for none."""
        return {False: None, True: torch.bfloat16, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of optimiser step `step` of `steps`, counted from 0."""
        rising = round(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        done, falling = step - rising, steps - rising
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done / falling))
        if self.schedule == "linear":
            return self.lr * (1 - done / falling)
        if self.schedule == "poly":
            return self.lr * (1 - done / falling) ** 2
        if self.schedule == "onecycle":
            return self.lr * (1 - abs(2 * (step + 0.5) / steps - 1))
        if self.schedule == "steps":
            return self.lr * 10.0 ** -sum(step / steps >= share for share in self.milestones)
        return self.lr


def optimizer_of(module: nn.Module, further: Sequence[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """The optimiser of a recipe over the live weights of a network and further ones."""
    groups: list[dict[str, Any]] = []
    for parameters in (module.parameters(), further):
        live = [parameter for parameter in parameters if parameter.requires_grad]
        groups.append({"params": [p for p in live if p.dim() > 1], "weight_decay": recipe.weight_decay})
        groups.append({"params": [p for p in live if p.dim() <= 1], "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    if recipe.optimizer == "lars":
        return LARS(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.Adam(groups, lr=recipe.lr)
