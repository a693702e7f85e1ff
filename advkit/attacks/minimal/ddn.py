"""Decoupled direction and norm (Rony et al., arXiv 1811.09600)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from advkit.attacks.base import kept
from advkit.attacks.minimal.base import MinimalAttack, NearestSearch, lengthened
from advkit.core.checks import at_least_one, fraction, positive


@dataclass(frozen=True, kw_only=True)
class DDN(MinimalAttack):
    """DDN: decoupled direction and norm, a minimum-norm attack in L2.

    Every step follows the normalised gradient and then sets the length of the perturbation: a little less where the
    goal is reached, a little more where it is not.

    steps:     gradient steps, >= 1
    start:     length of the first perturbation, > 0, in units of the space; None is the distance to the boundary as the
               gradient at the clean row sees it, within the box
    gamma:     by how much of itself the length changes per step, in (0, 1)
    step_size: of the first step, > 0, in units of the first length; it falls along a cosine to a hundredth

    Costs a gradient per step and one answer. Raises UsageError for values out of range and for other threat models.

    Published are a first length and step of 1, from which a hundred steps come down to 0.006 at the least: rows nearer
    to the boundary than that are overestimated. Unlike the published code, nothing is rounded to 8 bits on the way: a
    threat model with a lattice does that.
    """

    name: ClassVar[str] = "ddn"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2",)

    steps: int = 100
    start: float | None = None
    gamma: float = 0.05
    step_size: float = 1.0

    def __post_init__(self) -> None:
        at_least_one(self, "steps")
        positive(self, "start", "step_size")
        fraction(self, "gamma", ends="()")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        first = search.look(search.x, search.goal.under("margin"))
        gradient, away = first.gradient, search.linear_distance(first)
        rows = search.leave(first.reached)
        if rows is not None:
            gradient, away = kept(rows, gradient, away)
        length = away if self.start is None else away.new_full(away.shape, self.start)
        unit, move = length, lengthened(-gradient, length)
        for step in range(1, self.steps):
            if not len(search) or not search.affords():
                return
            z = search.legal(search.x + move)
            look = search.look(z)
            rate = self.step_size * (0.01 + 0.99 * (1 + math.cos(math.pi * step / self.steps)) / 2)
            move = z - search.x - lengthened(look.gradient, rate * unit)
            length = length * (1 + self.gamma * (1 - 2 * look.reached.to(length.dtype)))
            move = lengthened(move, length)
        if len(search) and search.affords():
            search.ask(search.legal(search.x + move))
