"""Jacobian-based saliency map attack (Papernot et al., arXiv 1511.07528)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advkit.attacks.base import kept
from advkit.attacks.minimal.base import MinimalAttack, NearestSearch
from advkit.attacks.minimal.faces import Margin
from advkit.core.checks import at_least_one, one_of
from advkit.threat_models.minimum import MinimumL0


@dataclass(frozen=True)
class Scores(Margin):
    """The sum of the scores that a goal wants higher, or of those that it wants lower, as the loss of a face.

    Which these are is read from the sign of the derivative of its cross-entropy; of its margin where that is flat.
    """

    wanted: bool

    def loss(self, answer: Tensor) -> Tensor:
        """The sum [B]."""
        pull = self._pull(answer.detach())
        return torch.where(pull < 0 if self.wanted else pull > 0, answer, 0.0).sum(1)

    def _pull(self, answer: Tensor) -> Tensor:
        """The derivative of the goal's loss by the scores [B, C]."""
        leaf = answer.clone().requires_grad_()
        with torch.enable_grad():
            losses = self.goal.under("ce").loss(leaf).sum(), self.goal.margin(leaf).sum()
            steep, sure = (torch.autograd.grad(loss, leaf)[0] for loss in losses)
        flat = (steep == 0).all(1, keepdim=True) | ~torch.isfinite(steep).all(1, keepdim=True)
        return torch.where(flat, sure, steep)


def saliency(rise: Tensor, fall: Tensor) -> Tensor:
    """The saliency map [n, P]: rise * |fall|, where wanted scores rise and unwanted ones fall; zero elsewhere.

    rise, fall: by how much the two sums would change, in a linear model, were a position moved to the box's wall
    """
    return torch.where((rise > 0) & (fall < 0), rise * fall.abs(), 0.0)


@dataclass(frozen=True, kw_only=True)
class JSMA(MinimalAttack):
    """JSMA (Jacobian-based saliency map attack), a minimum-norm attack in L0: moves the most salient position of all.

    Each step moves one position to the wall of the box that the gradient points to, and never touches it again, until
    the goal is reached.

    steps:    most positions changed, >= 1
    saliency: "margin" what the goal's margin would fall by; "scores" the product of how much the wanted scores rise and
              the unwanted ones fall, zero where either does not (JSMA-Z); "probabilities" the same of a softmax, whose
              two factors are one: what the cross-entropy would fall by (JSMA-F). Where the map
              is zero everywhere, positions follow the difference of the two

    Costs an answer and a gradient per step ("scores": two backward passes). Rows leave where the goal is reached or no
    position is left. Raises UsageError for values out of range and for other threat models.

    Published is the search over pairs of values, all moved up or all down by one amount. Here each value goes its own
    way, and counts with the room that it has. A position is a pixel with its channels where the threat model counts
    pixels.
    """

    name: ClassVar[str] = "jsma"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l0",)
    default_threat_model: ClassVar[str] = "minimum-l0"

    steps: int = 100
    saliency: Literal["margin", "scores", "probabilities"] = "margin"

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        one_of(self, "saliency", ("margin", "scores", "probabilities"))

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        threat = search.threat
        assert isinstance(threat, MinimumL0)
        z, untouched = search.x, torch.ones_like(threat.positions(search.x), dtype=torch.bool)
        for _ in range(self.steps):
            if not len(search) or not search.affords():
                return
            score, wall, reached = self._map(search, threat, z)
            score = torch.where(untouched, score, -torch.inf)
            best, at = score.max(1)
            stuck = best <= 0
            rows = search.leave(reached | stuck)
            if rows is not None:
                z, untouched, wall, at, stuck = kept(rows, z, untouched, wall, at, stuck)
            chosen = torch.zeros_like(untouched).scatter(1, at[:, None], ~stuck[:, None])
            untouched = untouched & ~chosen
            z = torch.where(threat.everywhere(chosen, z), wall, z)
        if len(search) and search.affords():
            search.ask(z)

    def _map(self, search: NearestSearch, threat: MinimumL0, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Worth of every position [n, P], where its values would go [n, ...], and which points reach the goal."""
        goal = search.goal
        low, high = (bound.expand_as(z) for bound in threat.box.bounds_like(z))
        if self.saliency == "scores":
            _, (up, down), look = search.look_at(z, [Scores(goal, wanted=True), Scores(goal, wanted=False)])
            gradient = down - up
        else:
            look = search.look(z, goal.under("ce") if self.saliency == "probabilities" else Margin(goal))
            gradient = look.gradient
        wall = torch.where(gradient > 0, low, torch.where(gradient < 0, high, z))
        wall = search.legal(torch.where(torch.isfinite(wall), wall, z - gradient.sign()))
        move = wall - z
        plain = threat.positions(-gradient * move)
        if self.saliency != "scores":
            return plain, wall, look.reached
        worth = saliency(threat.positions(up * move), threat.positions(down * move))
        found = (worth > 0).any(1, keepdim=True)
        return torch.where(found, worth, plain), wall, look.reached
