"""What minimum-norm attacks are built from: the nearest verified point of every row, and the rows still searched."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import ActiveRows, OverActiveRows, TensorGoal, TensorOracle, finite_rows, per_row
from advkit.attacks.minimal.hyperplane import Norm, close_gap, length
from advkit.core.errors import BudgetExhausted, UsageError
from advkit.core.protocols import Access, MadeForThreatModel, Rng, SeeksNearest
from advkit.core.rows import PerRow
from advkit.threat_models.lp import row_sum
from advkit.threat_models.minimum import Minimum, MinimumL0

OVERSHOOT = (0.0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
"""How much further than the nearest point a row goes, in turn, where files of few levels round it back."""


NEWTON = 8
"""Rounds of a projection within the box; the steps after it make up for what is missing."""

BEYOND = 1e-4
"""How far beyond a linearised boundary a point is put first, to lie across it; ten times as far every time after."""

PATIENCE, PUSH = 3, 1.5
"""Steps without crossing after which an overshoot grows, and the factor by which it does per step."""

STRIDES = 4
"""Steps down a goal's own loss that are as long as the way to the linearised boundary."""

SHARE = 0.9
"""Where on the way to the nearest point found the boundary is looked for at the end of a search, at the nearest."""

NORMS: dict[str, Norm] = {"l1": "L1", "l2": "L2", "linf": "Linf"}


def largest(score: Tensor, count: Tensor) -> Tensor:
    """Bool [n, positions]: the `count` [n] positions of the largest score, the first among equals, none of zero."""
    best, where = score.sort(dim=1, descending=True, stable=True)
    kept = (torch.arange(score.shape[1], device=score.device) < count[:, None]) & (best > 0)
    return torch.zeros_like(kept).scatter(1, where, kept)


def lengthened(move: Tensor, length: Tensor) -> Tensor:
    """The rows of `move` with these L2 lengths [n]; rows of zeros stay."""
    size = row_sum(move.square()).sqrt()
    return move * per_row(torch.where(size > 0, length / size, 0.0), move)


@dataclass(frozen=True)
class Look(PerRow):
    """What the victim says of a point of every active row.

    loss, gradient, answer: as the oracle gives them
    reached:  which of the points reach the goal, bool [n]
    distance: of the points in the threat model's norm [n]
    """

    loss: Tensor
    gradient: Tensor
    answer: Tensor
    reached: Tensor
    distance: Tensor


class NearestSearch(OverActiveRows):
    """The search for every row's nearest point: verifies points, keeps the nearest, lets finished rows leave.

    nearest: the nearest point known to reach the goal, of the active rows [n, ...]; the clean row before there is one
    away:    its distance [n], +inf before there is one; 0 for rows that reach the goal untouched
    threat:  the minimum-norm threat model, which has the distance and the box

    `x`, `goal`, `rng` and `oracle` are those of the active rows. Whatever is asked through `look` and `ask` counts; no
    attack keeps books of its own.
    """

    def __init__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Minimum, rng: Rng) -> None:
        self.threat = threat
        self._start = self._active = ActiveRows(oracle, x, goal, rng)
        self.nearest = x.clone()
        self.away = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self._all, self._all_away = self.nearest, self.away

    @property
    def best(self) -> Tensor:
        """Every row's nearest point [B, ...], those no longer active included; the clean row where there is none."""
        if self._active.index is not None:
            self._all[self._active.index] = self.nearest
            return self._all
        return self.nearest

    @property
    def _distances(self) -> Tensor:
        """Those of `best` [B], +inf where there is none."""
        if self._active.index is not None:
            self._all_away[self._active.index] = self.away
            return self._all_away
        return self.away

    def legal(self, z: Tensor) -> Tensor:
        """The nearest points in the box [n, ...]."""
        return self.threat.project(z, self.x)

    def distance(self, z: Tensor) -> Tensor:
        """Of points of the active rows, in the threat model's norm [n]."""
        return self.threat.distance(z, self.x).to(z.dtype)

    def look(self, z: Tensor, aim: TensorGoal | None = None) -> Look:
        """Loss and gradient at legal points z [n, ...], of the goal or of another one for the same rows (`aim`)."""
        loss, gradient, answer = self.oracle.gradient(z, self.goal if aim is None else aim)
        reached, distance = self.offer(z, answer)
        return Look(loss, gradient, answer, reached, distance)

    def linear_distance(self, look: Look) -> Tensor:
        """How far from the clean rows the boundary would be, were the margins of a look there linear (not in L0) [n].

        Within the box: what black ground leaves open counts alone. 1 without slope.
        """
        return self.linear(look.loss, look.gradient)

    def linear(self, value: Tensor, normal: Tensor) -> Tensor:
        """As `linear_distance`, of a boundary with that value [n] and gradient [n, ...] at the clean rows."""
        kind = NORMS[self.threat.least]
        low, high = self.threat.box.bounds_like(self.x)
        away = length(close_gap(self.x, normal, value, low, high, kind, NEWTON), kind)
        return torch.where((away > 0) & torch.isfinite(away), away, 1.0)

    def look_at(self, z: Tensor, faces: Sequence[TensorGoal]) -> tuple[Tensor, Tensor, Look]:
        """Losses [K, n] and gradients [K, n, ...] of several goals at z, by one forward; and the look of the first."""
        losses, gradients, answer = self.oracle.gradients(z, faces)
        reached, distance = self.offer(z, answer)
        return losses, gradients, Look(losses[0], gradients[0], answer, reached, distance)

    def ask(self, z: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Answers to legal points, and which reach the goal; `of` long [m]: which active row each belongs to."""
        answer = self.oracle(z, of)
        return answer, self.offer(z, answer, of)[0]

    def offer(self, z: Tensor, answer: Tensor, of: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keep the points that are nearer by answers already known; which reach the goal, and all distances."""
        goal, x = (self.goal, self.x) if of is None else (self.goal.take(of), self.x[of])
        reached = goal.reached(answer) & finite_rows(answer)
        distance = self.threat.distance(z, x).to(z.dtype)
        candidate = torch.where(reached, distance, torch.inf)
        if of is not None:
            candidate, z = self._nearest_of(candidate, z, of)
        closer = candidate < self.away
        self.nearest = torch.where(per_row(closer, z), z, self.nearest)
        self.away = torch.minimum(candidate, self.away)
        return reached, distance

    def _nearest_of(self, candidate: Tensor, z: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest candidate of every active row, the first where several are: distances [n] and points."""
        rows, many = len(self), len(of)
        least = torch.full((rows,), torch.inf, dtype=candidate.dtype, device=z.device)
        least = least.scatter_reduce(0, of, candidate, "amin")
        place = torch.where(candidate == least[of], torch.arange(many, device=z.device), many)
        first = torch.full((rows,), many, device=z.device).scatter_reduce(0, of, place, "amin")
        asked = first < many
        first = torch.where(asked, first, 0)
        return torch.where(asked, least, torch.inf), z[first]

    def narrow(self, inner: Tensor, above: Tensor, outer: Tensor, below: Tensor, answers: int) -> None:
        """Look for the boundary between inner points, where the goal's margin is `above` [n] zero, and outer ones,
        where it is `below`: secants that go a little further than the margins say, where either end stays for long
        halves of them.
        """
        low, high = torch.zeros_like(above), torch.ones_like(above)
        for _ in range(answers):
            if not self.affords():
                return
            share = above / (above - below)
            share = torch.where(torch.isfinite(share) & (share > 0), share, 0.5)
            share = low + (high - low) * (share + 0.02).clamp_max(1.0)
            z = self.legal(torch.lerp(inner, outer, per_row(share, inner)))
            answer, reached = self.ask(z)
            margin = self.goal.margin(answer).to(above.dtype)
            low, high = torch.where(reached, low, share), torch.where(reached, share, high)
            above, below = torch.where(reached, above / 2, margin), torch.where(reached, margin, below / 2)

    def reach(self, steps: int, turns: int) -> None:
        """Lead rows that have not reached the goal down its own loss, for so many steps, and `tighten` what they find.

        For attacks that step onto one boundary at a time: where several meet, as in an ordered goal, their steps lead
        to and fro. Costs nothing where every row has reached the goal.
        """
        lost = self._restored() == torch.inf
        self._leave(~lost)
        if not len(self) or not self.affords(2):
            return
        z = self.x
        low, high = self.threat.box.bounds_like(z)
        look = self.look(z, self.goal.under("margin"))
        onto = close_gap(z, look.gradient, look.loss, low, high, "L2", NEWTON)
        size = length(onto, "L2") / STRIDES
        rows = self._leave(look.reached | (size == 0))
        if rows is not None:
            z, size = z[rows], size[rows]
        for _ in range(steps):
            if not len(self) or not self.affords():
                break
            low, high = self.threat.box.bounds_like(z)
            look = self.look(z)
            free = torch.where(look.gradient > 0, z > low, z < high)
            step = lengthened(look.gradient * free, size)
            z = self.legal(z - step)
            rows = self._leave(look.reached | ~step.flatten(1).any(1))
            if rows is not None:
                z, size = z[rows], size[rows]
        self.tighten(turns, 0, lost)

    def _restored(self) -> Tensor:
        """Make all rows active again; their distances, a new tensor."""
        found, away = self.best, self._distances.clone()
        self._active, self.nearest, self._all, self.away = self._start, found, found, away
        return away.clone()

    def tighten(self, turns: int, secants: int, among: Tensor | None = None) -> None:
        """Come nearer at the end of a search; rows that left come back.

        turns:   looks at the nearest point: the boundary as it is seen from there is projected onto from the clean row
                 (in L0 as in L1: the steepest features one after the other), and one point between the two is asked
                 about
        secants: answers along the line from the clean row through the nearest point, after two for its margins; in L0
                 answers of a bisection of the changed positions, after a look, as often as `turns` says
        among:   which of all rows, bool [B]; None is all
        """
        away = self._restored()
        idle = (away == 0) | torch.isinf(away)
        self._leave(idle if among is None else idle | ~among)
        kind = NORMS.get(self.threat.least, "L1")
        for turn in range(turns):
            if not len(self) or not self.affords(3):
                return
            outer = self.nearest
            look = self.look(outer, self.goal.under("margin"))
            low, high = self.threat.box.bounds_like(outer)
            value = look.loss + row_sum(look.gradient * (self.x - outer))
            move = close_gap(self.x, look.gradient, value, low, high, kind, NEWTON)
            inner = self.legal(self.x + (1 + BEYOND * 10**turn) * move)
            self.narrow(inner, self._margin(inner), outer, look.loss, 1)
        if not secants or not len(self) or not self.affords(3):
            return
        outer = self.nearest
        if isinstance(self.threat, MinimumL0):
            for _ in range(max(1, turns)):
                self._fewer(self.nearest, self.threat, secants)
            return
        inner = self.legal(self.x + SHARE * (outer - self.x))
        self.narrow(inner, self._margin(inner), outer, self._margin(outer), secants)

    def _fewer(self, outer: Tensor, threat: MinimumL0, answers: int) -> None:
        """Bisect how many of the changed positions the goal takes when they go to the box's edge.

        Those come first by which the margin fell most.
        """
        if not self.affords(2):
            return
        move, gradient = outer - self.x, self.look(outer, self.goal.under("margin")).gradient
        low, high = self.threat.box.bounds_like(outer)
        score = threat.positions(-gradient * move)
        score = torch.where(threat.positions(move.abs()) > 0, score - score.amin(1, keepdim=True) + 1, 0.0)
        wall = torch.where(gradient > 0, low, high)
        few, many = torch.zeros_like(self.away), self.away
        for _ in range(answers):
            if not self.affords():
                return
            count = ((few + many) / 2).floor().clamp_min(1)
            chosen = threat.everywhere(largest(score, count), move)
            reached = self.ask(torch.where(chosen, wall, self.x))[1]
            few, many = torch.where(reached, few, count), torch.where(reached, count, many)

    def _margin(self, z: Tensor) -> Tensor:
        return self.goal.margin(self.ask(z)[0]).to(z.dtype)

    def leave(self, done: Tensor) -> Tensor | None:
        """Let active rows (bool [n]) leave; a long index of those that stay, None where all do. Waits for the device.

        Nobody leaves where the oracle's answers are not the verdict's.
        """
        return self._leave(done) if self.oracle.decides else None

    def _leave(self, done: Tensor) -> Tensor | None:
        rows = self._active.staying(done)
        if rows is not None:
            self._all, self._all_away = self.best, self._distances
            self._active = self._active.take(rows)
            self.nearest, self.away = self.nearest[rows], self.away[rows]
        return rows

    def settle(self, steps: Sequence[float] = OVERSHOOT) -> None:
        """Where files hold few levels, look for each row's nearest point that reaches the goal once it is rounded.

        Points are asked about as they would be submitted, on the line from the clean row through the nearest point, a
        little further each time; rows leave at the first that holds.
        """
        if not self.threat.lattice:
            return
        found = self.best
        towards = found - self._start.x
        self._active = self._start
        self.nearest = self._all = self.x.clone()
        self.away = self._all_away = self.x.new_full((len(self),), torch.inf)
        rows = self._leave((towards == 0).flatten(1).all(1))
        for step in steps:
            towards = towards if rows is None else towards[rows]
            if not len(self) or not self.affords():
                break
            z = self.threat.finish(self.legal(self.x + (1 + step) * towards), self.x)
            rows = self._leave(self.ask(z)[1])
        if len(self):  # what did not hold anywhere, or was not asked about, is for the verdict
            self.nearest = found if self._active.index is None else found[self._active.index]


@dataclass(frozen=True, kw_only=True)
class MinimalAttack(MadeForThreatModel, SeeksNearest, ABC):
    """An attack that looks for the nearest point that reaches the goal; the threat model names the norm.

    What is returned is always the nearest point of those that the victim was asked about and that reached the goal, and
    the clean row where none did. Rows that are finished leave the batch. A threat model with a radius is refused: a
    run without one gives robust accuracy at every radius.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    seeks_nearest: ClassVar[bool] = True
    name: ClassVar[str]
    norms: ClassVar[tuple[str, ...]]
    """The threat models it works in, such as minimum-l2."""
    default_threat_model: ClassVar[str] = "minimum-l2"

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, threat: Any, rng: Rng, /) -> Tensor:
        if not isinstance(threat, Minimum) or f"minimum-{threat.least}" not in self.norms:
            asked = f"minimum-{threat.least}" if isinstance(threat, Minimum) else type(threat).__name__
            raise UsageError(
                f"{self.name} was asked for {asked}; it looks for the nearest point and works in "
                f"{', '.join(self.norms)}: its run has robust accuracy at every radius (`pgd` and `apgd-ce` attack "
                "within one)"
            )
        if not len(x):
            return x.clone()
        search = NearestSearch(oracle, x, goal, threat, rng)
        with suppress(BudgetExhausted):  # several gradients at once may be more than a budget of passes allows
            if search.affords():
                self.search(search, threat.least)
                search.settle()
        return search.best

    @abstractmethod
    def search(self, search: NearestSearch, norm: str) -> None:
        """Ask the victim through `search`, which remembers the nearest points; `norm` is l0, l1, l2 or linf."""
