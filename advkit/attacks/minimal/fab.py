"""Fast adaptive boundary attack: steps onto the linearised decision boundary (arXiv 1907.02044)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from advkit.attacks.base import ActiveRows, Best, TensorGoal, TensorOracle, finite_rows, kept, lp_ball, per_row
from advkit.attacks.minimal.faces import NearestFace, faces_of
from advkit.attacks.minimal.hyperplane import Norm, close_gaps, dual_length, length
from advkit.attacks.search import taken
from advkit.core.checks import at_least_one, check, fraction
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Ball, Rng, Stepped
from advkit.core.rows import PerRow
from advkit.threat_models.lp import L1, L2, Linf, NormBall, row_sum

NEWTON = 4  # rounds of the projection; the steps after it make up for what is missing
SEARCH = 3  # answers of the final search
NORMS: dict[type[NormBall], Norm] = {Linf: "Linf", L2: "L2", L1: "L1"}


@dataclass
class _NearestPoints(PerRow):
    """The nearest points that reached the goal, wherever they lie.

    near:   the points [B, ...]; before there is one, the nearest point where a run ended
    away:   their distances [B], +inf before there is one
    ended:  distances of the nearest points where runs ended [B]
    answer: the victim's answers at `near`, the clean rows' before it reached the goal [B, C]
    """

    near: Tensor
    away: Tensor
    ended: Tensor
    answer: Tensor

    def see(self, goal: TensorGoal, z: Tensor, distance: Tensor, answer: Tensor) -> Tensor:
        """Keep the points that reached the goal and lie nearer; bool [B]: which reached it."""
        reached = goal.reached(answer) & finite_rows(answer)
        distance = torch.where(reached, distance, torch.inf)
        closer = distance < self.away
        self.near = torch.where(per_row(closer, z), z, self.near)
        self.answer = torch.where(per_row(closer, answer), answer, self.answer)
        self.away = torch.minimum(distance, self.away)
        return reached

    def end(self, z: Tensor, distance: Tensor) -> None:
        """Where to search from in rows that are not known to have reached the goal."""
        closer = self.away.isinf() & (distance < self.ended)
        self.near = torch.where(per_row(closer, z), z, self.near)
        self.ended = torch.where(closer, distance, self.ended)

    def put(self, rows: Tensor | None, part: _NearestPoints) -> None:
        """Write back the points of some of the rows; of all for None."""
        here = slice(None) if rows is None else rows
        self.near[here], self.away[here], self.ended[here] = part.near, part.away, part.ended
        self.answer[here] = part.answer


@dataclass(frozen=True, kw_only=True)
class _Runs(Stepped, ABC):
    """How many runs there are, and which faces each follows.

    Apart from the other settings for the order of the fields: it is that of canonical specs, which records carry.

    steps:    steps per run, >= 1
    restarts: the first starts at the row, others at a random point half as far away as the ball's edge, or as the
              nearest adversarial point where that is closer; >= 1
    """

    steps: int = 100
    restarts: int = 1

    @property
    @abstractmethod
    def every(self) -> int:
        """After so many steps all faces of a run are linearised anew."""

    @abstractmethod
    def faces(self, goal: TensorGoal, answer: Tensor) -> list[tuple[TensorGoal, ...]]:
        """The faces of each run; `answer` is that of the clean rows."""


@dataclass(frozen=True, kw_only=True)
class _AllRivals(_Runs):
    """One run along all faces.

    rivals:  classes whose boundaries are followed, the likeliest on the clean row first; at most all of them, >= 1
    refresh: every so many steps all boundaries are linearised; in between only the one that seemed nearest by its
             current margin and its last gradient, for a tenth of the passes. 1 is the published algorithm
    """

    rivals: int = 9
    refresh: int = 10

    @property
    def every(self) -> int:
        return self.refresh

    def faces(self, goal: TensorGoal, answer: Tensor) -> list[tuple[TensorGoal, ...]]:
        return [faces_of(goal, answer, self.rivals)]


@dataclass(frozen=True, kw_only=True)
class _OneRival(_Runs):
    """One run per face.

    targets: wrong classes tried per row, at most all of them, >= 1; steps and restarts are those of each
    """

    targets: int = 9

    @property
    def every(self) -> int:
        return self.steps

    def faces(self, goal: TensorGoal, answer: Tensor) -> list[tuple[TensorGoal, ...]]:
        return [(face,) for face in faces_of(goal, answer, self.targets)]


@dataclass(frozen=True, kw_only=True)
class _Boundary(_Runs):
    """The attack, whichever faces it follows.

    alpha_max: largest weight of the projection seen from the row, in [0, 1]
    eta:       overshoot of the projections, >= 1
    beta:      how much of the way from the row remains after an adversarial point was seen, in (0, 1)
    stop:      leave a row as soon as its goal is reached inside the ball, where the oracle's answers are the verdict's;
               False goes on to shorten the distance
    confirm:   ask about every point, as published; else, while rows may leave, only about those inside the ball, which
               alone can decide, and take it that the others crossed the boundary (99 of 100 do)
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    seeks_nearest: ClassVar[bool] = True
    name: ClassVar[str]
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    stop: bool = True
    confirm: bool = False

    def __post_init__(self) -> None:
        counts = {"steps", "restarts", "rivals", "refresh", "targets"}
        at_least_one(self, *(each.name for each in fields(self) if each.name in counts))
        fraction(self, "alpha_max", ends="[]", what="weight")
        check(self, "eta", self.eta >= 1, "an overshoot of at least 1")
        fraction(self, "beta", ends="()")

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        inner = lp_ball(ball)
        norm = NORMS.get(type(inner))
        if norm is None:
            raise UsageError(
                f"{self.name} was asked for {type(inner).__name__}; it works in Linf, L2 and L1 (use `pgd` for L0)"
            )
        active = ActiveRows(oracle, x, goal, rng)
        if not len(x) or not active.affords():
            return x.clone()
        answer = oracle(x)
        clean = goal.margin(answer).to(x.dtype)
        never = torch.full_like(clean, torch.inf)
        nearest = _NearestPoints(x.clone(), never, never.clone(), answer.clone())
        nearest.see(goal, x, torch.zeros_like(clean), answer)
        stopping = self.stop and oracle.decides

        def remaining(active: ActiveRows) -> ActiveRows:
            stay = active.staying(active.of(nearest.away) <= inner.eps) if stopping else None
            return active if stay is None else active.take(stay)

        for number, along in enumerate(self.faces(goal, answer)):
            for restart in range(self.restarts):
                active = remaining(active)
                if not len(active):
                    break
                faces = tuple(taken(active.index, face) for face in along)
                away = active.of(nearest.away)
                start = active.x if not restart else _start(active, inner, norm, away, (number, restart))
                self._run(active, start, faces, inner, ball, norm, nearest, stopping)
        best = Best(x, goal)
        active = remaining(active)
        if len(active):
            # A point that nobody asked about is no end of a bracket: the edge and the projection have to do.
            searches = SEARCH if self.confirm or not stopping else 1
            _search(active, ball, inner.eps, self.eta, nearest, active.of(clean), best, searches)
        return torch.where(per_row(nearest.away <= inner.eps, x), nearest.near, best.x)

    def _run(
        self,
        active: ActiveRows,
        z: Tensor,
        faces: tuple[TensorGoal, ...],
        inner: NormBall,
        ball: Ball[Tensor],
        norm: Norm,
        overall: _NearestPoints,
        stopping: bool,
    ) -> None:
        """One restart; its nearest points go to `overall`."""
        aim = NearestFace(faces, z.new_ones((len(z), len(faces))))
        own = taken(active.index, overall)
        low, high = inner.box.bounds_like(z)
        trusting = stopping and not self.confirm
        offset = z - active.x
        distance: Tensor | None = None
        for step in range(self.steps):
            every = len(faces) > 1 and step % self.every == 0
            # One answer more is kept for the point that is submitted.
            if not active.affords((len(faces) if every else 1) + 2):
                break
            value, normal, aim = (_look_at_all if every else _look_at_one)(active, z, aim, norm)
            points = torch.stack([z, active.x])
            values = torch.stack([value, value - row_sum(normal * offset)])
            moves = close_gaps(points, normal, values, low, high, norm, NEWTON)
            near, far = length(moves.flatten(0, 1), norm).view(values.shape)
            alpha = (near / (near + far).clamp_min_(1e-30)).clamp_max_(self.alpha_max)
            here, there = points.add_(moves, alpha=self.eta)
            z = inner.box.clamp(torch.lerp(here, there, per_row(alpha, z)))
            offset = z - active.x
            reached: Tensor | None
            if trusting:
                # Rounded sums will do to pick the points to ask about.
                distance = length(offset, norm)
                reached, broken = _ask_inside(active, z, distance, ball, inner.eps, own)
            else:
                distance = ball.distance(z, active.x).to(z.dtype)
                reached = own.see(active.goal, z, distance, active.oracle(z))
                broken = reached & (distance <= inner.eps) if stopping else None
            if broken is not None and (stay := active.staying(broken)) is not None:
                own.end(z, distance)
                overall.put(active.index, own)
                active, aim, own = active.take(stay), aim.take(stay), own.take(stay)
                z, offset, distance = kept(stay, z, offset, distance)
                reached = None if reached is None else reached[stay]
                if not len(active):
                    return
            if step == self.steps - 1:
                break
            if reached is None:
                z = torch.add(active.x, offset.mul_(self.beta))
            else:
                offset = torch.where(per_row(reached, z), offset * self.beta, offset)
                z = torch.where(per_row(reached, z), active.x + offset, z)
        if distance is not None:
            own.end(z, distance)
        overall.put(active.index, own)


@dataclass(frozen=True, kw_only=True)
class FAB(_Boundary, _AllRivals):
    """FAB, a minimum-norm attack: projects onto the linearised decision boundary at every step.

    Every step linearises the pairwise margins between the true class and its rivals and moves to the nearest of these
    hyperplanes, while it stays as near to the row as can be. A row is finished once its goal is reached inside the
    ball. What is returned is the nearest point of the ball that reached the goal, else the one of lowest margin; the
    nearest adversarial point outside is projected onto the ball and asked about too. A goal without rivals has one
    face, its margin.

    Costs 3 answers per row and, per restart, a gradient per step, rivals - 1 more per refresh, and an answer per point
    inside the ball; with confirm or without stop 5 answers, and one at every step.
    Raises UsageError for values out of range and for the L0 ball.

    The final search follows the paper (3 steps, secant with overshoot) but tries the ball's edge first, and the
    projections are not sorted in Linf and L2.
    """

    name: ClassVar[str] = "fab"


@dataclass(frozen=True, kw_only=True)
class FABT(_Boundary, _OneRival):
    """Targeted FAB (FAB-T), a minimum-norm attack: towards the boundary with one wrong class after the other.

    The likeliest class comes first. Costs 3 answers per row, a gradient per step, restart and target, and an answer per
    point inside the ball (see `confirm`); rows that reach their goal inside the ball, by whatever class, leave at once.
    What is returned, and the errors, are as in FAB.
    """

    name: ClassVar[str] = "fab-t"


def _start(active: ActiveRows, inner: NormBall, norm: Norm, away: Tensor, names: tuple[int, int]) -> Tensor:
    """Half as far from the row as the ball's edge or the nearest adversarial point, in a random direction."""
    rng = active.rng.at("start", *names)
    noise = 2 * rng.uniform(active.x) - 1 if norm == "Linf" else rng.normal(active.x)
    factor = away.clamp_max(inner.eps) / (2 * length(noise, norm).clamp_min(1e-12))
    return inner.box.clamp(active.x + per_row(factor, active.x) * noise)


def _ask_inside(
    active: ActiveRows, z: Tensor, distance: Tensor, ball: Ball[Tensor], eps: float, own: _NearestPoints
) -> tuple[Tensor | None, Tensor | None]:
    """Which points reached the goal [B], those outside the ball taken on trust, and which did inside it.

    Both are None where no point lies inside. The overshoot takes 99 of 100 points across the boundary, and outside the
    ball it decides nothing whether it did.
    """
    inside = (distance <= eps).nonzero().squeeze(1)
    if not len(inside):
        return None, None
    reached = torch.ones_like(distance, dtype=torch.bool)
    broken = torch.zeros_like(reached)
    part, points = own.take(inside), z[inside]
    exact = ball.distance(points, active.x[inside]).to(z.dtype)
    reached[inside] = hit = part.see(active.goal.take(inside), points, exact, active.oracle(points, inside))
    broken[inside] = hit & (exact <= eps)
    own.put(inside, part)
    return reached, broken


def _look_at_one(active: ActiveRows, z: Tensor, aim: NearestFace, norm: Norm) -> tuple[Tensor, Tensor, NearestFace]:
    """Value [B] and normal of the face that seems nearest, and the faces with that one's norm renewed."""
    if len(aim.faces) == 1:
        return *active.oracle.gradient(z, aim.faces[0])[:2], aim
    value, normal, answer = active.oracle.gradient(z, aim)
    return value, normal, aim.seen(answer, normal, norm)


def _look_at_all(active: ActiveRows, z: Tensor, aim: NearestFace, norm: Norm) -> tuple[Tensor, Tensor, NearestFace]:
    """Value [B] and normal of the nearest face, and the faces with all norms renewed."""
    norms, nearest = [], torch.full_like(z.flatten(1)[:, 0], torch.inf)
    value, normal = torch.zeros_like(nearest), torch.zeros_like(z)
    for face in aim.faces:
        this, gradient, _ = active.oracle.gradient(z, face)
        norms.append(dual_length(gradient, norm))
        away = torch.where(norms[-1] > 0, this.abs() / norms[-1].clamp_min(1e-30), torch.inf)
        closer = away < nearest
        nearest = torch.where(closer, away, nearest)
        value = torch.where(closer, this, value)
        normal = torch.where(per_row(closer, z), gradient, normal)
    return value, normal, replace(aim, norms=torch.stack(norms, 1))


def _search(
    active: ActiveRows,
    ball: Ball[Tensor],
    eps: float,
    eta: float,
    overall: _NearestPoints,
    clean: Tensor,
    best: Best,
    searches: int,
) -> None:
    """Shorten the way to the nearest adversarial point along its own line, then ask about its projection too.

    The ball's edge comes first where that point lies outside: what reaches the goal there counts, what is nearer need
    not be known. The secants after that narrow the bracket between the row and the nearest point that reached the goal.
    `best` takes the points inside the ball.
    """
    own = taken(active.index, overall)
    x, end = active.x, own.near
    # The edge's float neighbours must not lie outside: aim a hair below.
    edge = (eps * (1 - 1e-6) / ball.distance(end, x).to(x.dtype).clamp_min(1e-30)).clamp_max(1.0)
    low, high = torch.zeros_like(edge), torch.ones_like(edge)
    low_margin, high_margin = clean, active.goal.margin(own.answer).to(x.dtype)
    for step in range(searches):
        if not active.affords(2):
            break
        share = eta * low_margin / (low_margin - high_margin)
        usable = torch.isfinite(share) & (share > 0)
        t = low + (high - low) * torch.where(usable, share, 1.0).clamp_max(1.0)
        if step == 0:
            t = torch.where(edge < 1, edge, t)
        z = torch.lerp(x, end, per_row(t, x))
        answer = active.oracle(z)
        reached = own.see(active.goal, z, ball.distance(z, x).to(x.dtype), answer)
        margin = active.goal.margin(answer).to(x.dtype)
        inside = (t <= edge) | (edge == 1)
        # Best never takes an answer that is not finite.
        best.offer(z, torch.where(per_row(inside, answer), answer, torch.nan), margin, active.index)
        low, low_margin = torch.where(reached, low, t), torch.where(reached, low_margin, margin)
        high, high_margin = torch.where(reached, t, high), torch.where(reached, margin, high_margin)
    if active.affords():
        z = ball.project(own.near, x)
        answer = active.oracle(z)
        best.offer(z, answer, active.goal.margin(answer).to(x.dtype), active.index)
    overall.put(active.index, own)
