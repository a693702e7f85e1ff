"""One step away from every row of a batch, on a model that is being trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from advkit.core.protocols import Ball, Rng
from advkit.core.state import frozen
from advkit.defenses.adversarial.base import Mode, in_mode


@dataclass(frozen=True)
class Step:
    """One step away from a clean row; lengths in units of eps.

    noise: radius of the ball from which the start is drawn; 0 starts at the row
    size:  length of the step
    clip:  whether the end is projected onto the ball; else it may be noise + size away
    """

    noise: float
    size: float
    clip: bool

    def begin(self, x: Tensor, ball: Any, rng: Rng) -> Tensor:
        """The start, inside the space."""
        if self.noise == 0:
            return x
        wide = ball if self.noise == 1 else replace(ball, eps=self.noise * ball.eps)  # the same ball keeps its walls
        start: Tensor = wide.sample(x, rng)
        return start

    def end(self, start: Tensor, gradient: Tensor, x: Tensor, ball: Any) -> Tensor:
        """The start plus a step up the gradient of the loss, inside the space."""
        room = ball if self.clip else replace(ball, eps=(self.noise + self.size) * ball.eps)
        moved: Tensor = room.project(start + self.size * ball.steepest(gradient, start), x)
        return moved


@dataclass(frozen=True)
class Move:
    """A step that was taken.

    start, end: rows [B, ...]
    before:     logits at the start [B, classes], constant
    gradient:   of the cross-entropy at the start, per row
    """

    start: Tensor
    end: Tensor
    before: Tensor
    gradient: Tensor


def input_gradient(model: Any, z: Tensor, y: Tensor, mode: Mode) -> tuple[Tensor, Tensor]:
    """Gradient of every row's cross-entropy with respect to the row, and the logits; both constant.

    Parameters are frozen meanwhile: their gradients would cost a third of the pass and be thrown away.
    """
    with in_mode(model, mode == "train"), frozen(*model.modules()), torch.enable_grad():
        leaf = z.detach().requires_grad_()
        answer = model(leaf)
        (gradient,) = torch.autograd.grad(functional.cross_entropy(answer, y, reduction="sum"), leaf)
    return gradient, answer.detach()


def take(model: Any, x: Tensor, y: Tensor, ball: Ball[Tensor], step: Step, rng: Rng, mode: Mode = "train") -> Move:
    """One step on a model that is being trained: a forward pass and an input gradient."""
    start = step.begin(x, ball, rng.at("start"))
    gradient, before = input_gradient(model, start, y, mode)
    return Move(start, step.end(start, gradient, x, ball), before, gradient)


def correct_after(model: Any, x: Tensor, y: Tensor, ball: Ball[Tensor], rng: Rng) -> Tensor:
    """Bool [B]: rows that are right at the end of one step of length eps, as FGSM accuracy is counted in the papers.

    Every row is moved, also one that is wrong already. A model that has overfitted to the step gets many of those
    right by it, which an attack that leaves them alone (`fgsm`) does not show.
    """
    move = take(model, x, y, ball, Step(0.0, 1.0, clip=True), rng, "eval")
    with in_mode(model, False), torch.no_grad():
        right: Tensor = model(move.end).argmax(1) == y
    return right
