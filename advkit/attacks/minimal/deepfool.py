"""DeepFool: steps onto the nearest linearised decision boundary (Moosavi-Dezfooli et al., arXiv 1511.04599)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import NEWTON, NORMS, PATIENCE, PUSH, MinimalAttack, NearestSearch
from advkit.attacks.minimal.faces import NearestFace, faces_of, nearest_of
from advkit.attacks.minimal.hyperplane import close_gap
from advkit.core.checks import at_least_one, not_negative
from advkit.core.protocols import SeeksMinimum
from advkit.core.rows import elementwise
from advkit.threat_models.lp import row_sum

SHORTEST = 2  # the first step over the shortest: where boundaries meet, every step breaks its promise
TURNS = 2  # looks at the points of rows that were led down the loss
State = tuple[Tensor, Tensor, Tensor]
GOOD, BAD, GROWTH = 0.9, 0.5, 1.2  # shares of what was promised that lengthen and shorten the next step, by a factor


@dataclass(frozen=True, kw_only=True)
class OntoFaces(MinimalAttack, ABC):
    """What DeepFool and its kin share: steps onto the boundary as the gradient shows it, from where a row is until it
    is across, and then from the clean row.

    steps:     gradient steps at most, >= 1
    rivals:    wrong classes whose boundaries are linearised at the clean row, the likeliest first; >= 1. After that a
               step takes the gradient of the one that seems nearest by its present margin and its last gradient. A goal
               without rivals has one boundary, where its margin is zero
    overshoot: how much further than the linearised boundary a row goes, as a share of its way from the clean row, >= 0
    """

    steps: int = 50
    rivals: int = 3
    overshoot: float = 0.01

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "rivals")
        not_negative(self, "overshoot", *(("polish",) if "polish" in {each.name for each in fields(self)} else ()))

    returns: ClassVar[bool] = True
    """Whether a row that came across further away goes back, and from there half as far."""

    @property
    def cap(self) -> float:
        """How long the first step may be, as a share of the distance to the nearest linearised boundary."""
        return math.inf

    @abstractmethod
    def finished(self, turns: Tensor, gained: Tensor, share: Tensor) -> Tensor:
        """Which rows are finished, bool [n].

        turns:  steps from the clean row so far, long [n]
        gained: by how much the last step shortened the distance, as a share of it [n]; -inf where it did not reach the
                goal, negative where it led further away
        share:  how much of a step from the clean row will be gone next [n]
        """

    def _trust(self, radius: Tensor, kept_promise: Tensor, promised: Tensor) -> Tensor:
        """The longest next step: longer where the margin fell as promised, shorter where it did not."""
        share = torch.where(promised > 0, kept_promise / promised, torch.nan)
        return torch.where(share > GOOD, radius * GROWTH, torch.where(share < BAD, radius / GROWTH, radius))

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        self._walk(search, norm)
        search.reach(self.steps, TURNS)

    def _walk(self, search: NearestSearch, norm: str) -> None:
        kind = NORMS[norm]
        answer, done = search.ask(search.x)
        faces = faces_of(search.goal, answer, self.rivals)
        rows = search.leave(done)
        if rows is not None:
            done, answer, faces = done[rows], answer[rows], tuple(face.take(rows) for face in faces)
        if not len(search) or not search.affords():
            return
        z = search.x
        values, normals, _ = search.look_at(z, faces)
        value, normal, norms = nearest_of(values, normals, kind)
        aim = NearestFace(faces, norms)
        reached, away = done, search.away
        radius = self.cap * search.linear(value, normal)
        least = radius / SHORTEST
        share = torch.ones_like(value)
        held: State = (z, value, normal)
        tries = turns = torch.zeros_like(done, dtype=torch.long)
        for _ in range(self.steps):
            low, high = search.threat.box.bounds_like(z)
            # Once a row is across, the boundary that is seen from there is projected onto from the clean row.
            point = torch.where(per_row(reached, z), search.x, z)
            gap = value - torch.where(reached, row_sum(normal * (z - search.x)), 0.0)
            move = close_gap(point, normal, gap, low, high, kind, NEWTON)
            turns = turns + reached.long()
            # The way to this face ends in a corner of the box, or there is no slope: another face is next.
            stuck = ~move.flatten(1).any(1)
            aim = aim.without(answer, stuck)
            # What crosses late is pushed: a boundary that bends away, or a box with little room left.
            tries = torch.where(reached, 0, tries)
            late = (tries + 1 - PATIENCE).clamp_min(0)
            push = (self.overshoot * elementwise(lambda steps: PUSH**steps, late)).clamp_max(1.0)
            offset = point + move - search.x
            ahead = search.legal(search.x + (1 + self.overshoot) * offset + per_row(push, z) * move)
            ahead = torch.lerp(z, ahead, per_row(torch.where(reached, share, 1.0), z))
            if math.isfinite(self.cap):
                size = search.distance(ahead - z + search.x)
                ahead = torch.lerp(z, ahead, per_row((radius / size).clamp_max(1.0), z))
                tries = tries + (size <= radius)
            else:
                tries = tries + 1
            promised = torch.where(reached, 0.0, -row_sum(normal * (ahead - z)))
            z, before = torch.where(per_row(done, z), z, search.legal(ahead)), value
            if not search.affords():
                return
            look = search.look(z, aim)
            aim = aim.seen(look.answer, look.gradient, kind)
            value, normal, reached = look.loss, look.gradient, look.reached
            radius = torch.maximum(self._trust(radius, before - value, promised), least)
            gained = torch.where(reached, 1 - look.distance / away, -torch.inf)
            away = torch.minimum(away, torch.where(reached, look.distance, torch.inf))
            worse = reached & (gained <= 0)
            share = torch.where(worse, share / 2, torch.where(reached, (2 * share).clamp_max(1.0), share))
            if self.returns:
                z, value, normal = _chosen(worse, held, (z, value, normal))
                held = _chosen(reached, (z, value, normal), held)
            answer = look.answer
            done = done | ~aim.norms.any(1) | self.finished(turns, gained, share)
            rows = search.leave(done)
            if rows is not None:
                aim = aim.take(rows)
                done, value, normal, reached, away, turns, tries, radius, least, z, answer, share = kept(
                    rows, done, value, normal, reached, away, turns, tries, radius, least, z, answer, share
                )
                held = kept(rows, *held)
            if not len(search) or (not search.oracle.decides and bool(done.all())):
                return


def _chosen(rows: Tensor, these: State, those: State) -> State:
    """Points, values and normals of these in some of the rows, bool [n], and of those in the others."""
    first, second, third = (torch.where(per_row(rows, a), a, b) for a, b in zip(these, those, strict=True))
    return first, second, third


@dataclass(frozen=True, kw_only=True)
class DeepFool(OntoFaces, SeeksMinimum):
    """DeepFool, a minimum-norm attack: steps onto the nearest linearised decision boundary until it is crossed.

    polish: steps from the clean row after that, >= 0, each onto the boundary as it is seen from the last point; 0 is
            the published algorithm

    steps, rivals and overshoot are those of every attack of its kind: gradient steps at most, classes linearised at the
    clean row, and how much further a row goes, as a share of its way. A row leaves once it is across and polished.
    Costs 2 answers, `rivals` backward passes, and a gradient per step. Raises UsageError for values out of range and
    for other threat models.

    Unlike the published code, steps are the shortest within the box; all boundaries are linearised once, not at every
    step; the overshoot is on the whole way, and grows where a row does not get across, so that nothing sticks at the
    box; a boundary that the box does not reach is given up for the next. It stops at the first boundary that it meets:
    `superdeepfool` looks for the nearest point on it. Rows that no step takes across, as where an
    ordered goal's boundaries meet, are led down the goal's own loss, for as many steps again.
    """

    name: ClassVar[str] = "deepfool"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2", "minimum-linf")

    returns: ClassVar[bool] = False
    minimal: ClassVar[bool] = False

    polish: int = 1

    def finished(self, turns: Tensor, gained: Tensor, share: Tensor) -> Tensor:
        """Across, after `polish` steps from the clean row."""
        return (turns >= self.polish) & (gained > -torch.inf)
