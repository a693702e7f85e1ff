"""Fast adaptive boundary attack: steps onto the linearised decision boundary (arXiv 1907.02044)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from advkit.attacks.base import Best, Live, TensorGoal, TensorOracle, finite_rows, kept, lp_ball, per_row
from advkit.attacks.gradient.pgd import at_least_one
from advkit.attacks.gradient.targeted import rivals_of
from advkit.attacks.minimal.hyperplane import Norm, close_gap, dual_length, length
from advkit.core.errors import UsageError
from advkit.core.protocols import Access, Ball, Rng
from advkit.threat_models.lp import L1, L2, Linf, NormBall

NEWTON = 8  # rounds of the projection; the steps after it make up for what is missing
SEARCH = 3  # answers of the final search
NORMS: dict[type[NormBall], Norm] = {Linf: "Linf", L2: "L2", L1: "L1"}


@dataclass(frozen=True)
class _Way:
    """A goal whose loss is its margin: the only face of goals without rivals."""

    kind: ClassVar[str] = "face"
    goal: TensorGoal

    def reached(self, answer: Tensor) -> Tensor:
        return self.goal.reached(answer)

    def loss(self, answer: Tensor) -> Tensor:
        return self.goal.margin(answer)

    def margin(self, answer: Tensor) -> Tensor:
        return self.goal.margin(answer)

    def under(self, loss: str) -> Self:
        return self

    def take(self, rows: Tensor) -> Self:
        return replace(self, goal=self.goal.take(rows))

    def to(self, device: torch.device | str) -> Self:
        return replace(self, goal=self.goal.to(device))


@dataclass(frozen=True)
class _Nearest:
    """Several faces whose loss is that of the one that seems nearest: its value over its gradient's dual norm.

    faces: goals that are zero on their boundary
    norms: dual norms of their gradients, as last seen [B, K]
    """

    kind: ClassVar[str] = "face"
    faces: tuple[TensorGoal, ...]
    norms: Tensor

    def values(self, answer: Tensor) -> Tensor:
        """Every face's value [B, K]."""
        return torch.stack([face.loss(answer) for face in self.faces], 1)

    def nearest(self, values: Tensor) -> Tensor:
        """Which face seems nearest, long [B]; one without gradient never does."""
        away = torch.where(self.norms > 0, values.abs() / self.norms.clamp_min(1e-30), torch.inf)
        return away.nan_to_num(nan=torch.inf).argmin(1)

    def reached(self, answer: Tensor) -> Tensor:
        return self.faces[0].reached(answer)

    def loss(self, answer: Tensor) -> Tensor:
        values = self.values(answer)
        return values.gather(1, self.nearest(values.detach())[:, None]).squeeze(1)

    def margin(self, answer: Tensor) -> Tensor:
        return self.faces[0].margin(answer)

    def under(self, loss: str) -> Self:
        return self

    def take(self, rows: Tensor) -> Self:
        return replace(self, faces=tuple(face.take(rows) for face in self.faces), norms=self.norms[rows])

    def to(self, device: torch.device | str) -> Self:
        return replace(self, faces=tuple(face.to(device) for face in self.faces), norms=self.norms.to(device))


@dataclass
class _Shortest:
    """What the attack has found per row.

    near:   the nearest point that reached the goal, wherever it lies [B, ...]; before there is one, the last point seen
    away:   its distance [B], +inf before there is one
    margin: the goal's margin there [B]
    best:   the points of the ball
    """

    near: Tensor
    away: Tensor
    margin: Tensor
    best: Best
    goal: TensorGoal

    def see(self, live: Live, ball: Ball[Tensor], z: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Remember points and what the victim says of them; bool [n]: which reached the goal, and which did inside."""
        distance = ball.distance(z, live.x).to(z.dtype)
        finite = finite_rows(answer)
        margin = live.goal.margin(answer).to(z.dtype)
        reached = live.goal.reached(answer) & finite
        inside = ball.admits(z, live.x)
        # Best never takes an answer that is not finite, and a point outside the ball is not to be taken.
        self.best.offer(
            z,
            torch.where(inside[:, None], answer, torch.nan),
            torch.where(reached, distance, margin),
            live.index,
        )
        rows = slice(None) if live.index is None else live.index
        closer = (reached & (distance < self.away[rows])) | (finite & ~reached & self.away[rows].isinf())
        self.near[rows] = torch.where(per_row(closer, z), z, self.near[rows])
        self.margin[rows] = torch.where(closer, margin, self.margin[rows])
        self.away[rows] = torch.where(reached, torch.minimum(distance, self.away[rows]), self.away[rows])
        return reached, reached & inside


@dataclass(frozen=True, kw_only=True)
class FAB:
    """Step onto the nearest linearised boundary, again and again, while staying as near to the row as can be.

    Every step linearises the pairwise margins between the true class and its rivals and moves to the nearest of these
    hyperplanes. A row is finished once its goal is reached inside the ball. What is returned is the nearest point of
    the ball that reached the goal, else the one of lowest margin; the nearest adversarial point outside is projected
    onto the ball and asked about too. A goal without rivals has one face, its margin.

    steps:     steps per restart, >= 1
    restarts:  the first starts at the row, others at a random point half as far away as the ball's edge, or as the
               nearest adversarial point where that is closer; >= 1
    rivals:    classes whose boundaries are followed, the likeliest on the clean row first; at most all of them, >= 1
    refresh:   every so many steps all boundaries are linearised; in between only the one that seemed nearest by its
               current margin and its last gradient, for a tenth of the passes. 1 is the published algorithm
    alpha_max: largest weight of the projection seen from the row, in [0, 1]
    eta:       overshoot of the projections, >= 1
    beta:      how much of the way from the row remains after an adversarial point was found, in (0, 1)
    stop:      leave a row as soon as its goal is reached inside the ball, where the oracle's answers are the verdict's;
               False goes on to shorten the distance

    Costs 5 answers per row and, per restart, a gradient and an answer per step and rivals - 1 gradients per refresh.
    Raises UsageError for values out of range and for the L0 ball.

    The final search follows the paper (3 steps, secant with overshoot) but tries the ball's edge first, and the
    projections are not sorted in Linf and L2.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    steps: int = 100
    restarts: int = 1
    rivals: int = 9
    refresh: int = 10
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    stop: bool = True

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "restarts", "rivals", "refresh")
        _in_range(self)

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        pace = _Pace(self.steps, self.restarts, self.refresh, self.alpha_max, self.eta, self.beta, self.stop)
        return _attack("fab", oracle, x, goal, ball, rng, pace, self.rivals, together=True)


@dataclass(frozen=True, kw_only=True)
class FABT:
    """FAB towards the boundary with one wrong class after the other, the likeliest first.

    Costs 5 answers per row and a gradient and an answer per step, restart and target; rows that reach their goal inside
    the ball, by whatever class, leave at once.

    targets: wrong classes tried per row, at most all of them, >= 1

    The other fields, what is returned, and the errors are as in FAB.
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    stop: bool = True

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "restarts", "targets")
        _in_range(self)

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        pace = _Pace(self.steps, self.restarts, self.steps, self.alpha_max, self.eta, self.beta, self.stop)
        return _attack("fab-t", oracle, x, goal, ball, rng, pace, self.targets, together=False)


@dataclass(frozen=True)
class _Pace:
    """The settings that both attacks share."""

    steps: int
    restarts: int
    refresh: int
    alpha_max: float
    eta: float
    beta: float
    stop: bool


def _in_range(settings: FAB | FABT) -> None:
    for name, fine, words in (
        ("alpha_max", 0 <= settings.alpha_max <= 1, "a weight from 0 to 1"),
        ("eta", settings.eta >= 1, "an overshoot of at least 1"),
        ("beta", 0 < settings.beta < 1, "a share between 0 and 1"),
    ):
        if not fine:
            raise UsageError(f"{name} is {getattr(settings, name)}; give {words}")


def _attack(
    name: str,
    oracle: TensorOracle,
    x: Tensor,
    goal: TensorGoal,
    ball: Ball[Tensor],
    rng: Rng,
    pace: _Pace,
    rivals: int,
    together: bool,
) -> Tensor:
    """The runs of both attacks: all faces `together`, or one run per face."""
    inner = lp_ball(ball)
    norm = NORMS.get(type(inner))
    if norm is None:
        raise UsageError(f"{name} was asked for {type(inner).__name__}; it works in Linf, L2 and L1 (use `pgd` for L0)")
    live = Live(oracle, x, goal, rng)
    if not len(x) or not live.affords():
        return x.clone()
    answer = oracle(x)
    nothing = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    shortest = _Shortest(x.clone(), nothing, nothing.clone(), Best(x, goal), goal)
    clean = goal.margin(answer).to(x.dtype)
    stopping = pace.stop and oracle.decides
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    done |= shortest.see(live, ball, x, answer)[1]
    faces = rivals_of(goal, answer, rivals) or (_Way(goal),)
    runs = [faces] if together else [(face,) for face in faces]
    for run, each in enumerate(runs):
        for restart in range(pace.restarts):
            if stopping and (stay := live.left(done if live.index is None else done[live.index])) is not None:
                live = live.take(stay)
            if not len(live):
                return shortest.best.x
            here = each if live.index is None else tuple(face.take(live.index) for face in each)
            start = live.x.clone() if not restart else _start(live, inner, norm, shortest, (run, restart))
            _run(live, start, here, inner, ball, norm, pace, shortest, done, stopping)
    if stopping and (stay := live.left(done if live.index is None else done[live.index])) is not None:
        live = live.take(stay)
    if len(live):
        _search(live, ball, inner.eps, pace.eta, shortest, clean)
    return shortest.best.x


def _start(live: Live, inner: NormBall, norm: Norm, shortest: _Shortest, names: tuple[int, int]) -> Tensor:
    """Half as far from the row as the ball's edge or the nearest adversarial point, in a random direction."""
    rng = live.rng.at("start", *names)
    noise = 2 * rng.uniform(live.x) - 1 if norm == "Linf" else rng.normal(live.x)
    away = shortest.away if live.index is None else shortest.away[live.index]
    factor = away.clamp_max(inner.eps) / (2 * length(noise, norm).clamp_min(1e-12))
    return inner.box.clamp(live.x + per_row(factor, live.x) * noise)


def _walls(inner: NormBall, x: Tensor) -> tuple[Tensor, Tensor]:
    """The box, widened to rows that round-off left outside."""
    low, high = inner.box.bounds_like(x)
    return torch.minimum(low, x), torch.maximum(high, x)


def _run(
    live: Live,
    z: Tensor,
    faces: tuple[TensorGoal, ...],
    inner: NormBall,
    ball: Ball[Tensor],
    norm: Norm,
    pace: _Pace,
    shortest: _Shortest,
    done: Tensor,
    stopping: bool,
) -> None:
    """One restart; marks in `done` the rows that reached the goal inside the ball."""
    aim = _Nearest(faces, z.new_ones((len(z), len(faces))))
    low, high = _walls(inner, live.x)
    for step in range(pace.steps):
        every = len(faces) > 1 and step % pace.refresh == 0
        if not live.affords(len(faces) + 1 if every else 2):
            return
        value, normal, aim = (_look_at_all if every else _look_at_one)(live, z, aim, norm)
        points, origins = torch.cat([z, live.x]), torch.cat([value, value + _along(normal, live.x - z)])
        moves = close_gap(
            points, torch.cat([normal, normal]), origins, torch.cat([low, low]), torch.cat([high, high]), norm, NEWTON
        )
        here, there = moves[: len(z)], moves[len(z) :]
        near, far = length(here, norm), length(there, norm)
        alpha = per_row((near / (near + far).clamp_min(1e-30)).clamp_max(pace.alpha_max), z)
        z = (1 - alpha) * (z + pace.eta * here) + alpha * (live.x + pace.eta * there)
        z = torch.minimum(torch.maximum(z, low), high)
        reached, inside = shortest.see(live, ball, z, live.oracle(z))
        done[slice(None) if live.index is None else live.index] |= inside
        z = torch.where(per_row(reached, z), live.x + pace.beta * (z - live.x), z)
        if stopping and (stay := live.left(inside)) is not None:
            live, aim = live.take(stay), aim.take(stay)
            z, low, high = kept(stay, z, low, high)
            if not len(live):
                return


def _along(normal: Tensor, move: Tensor) -> Tensor:
    """The inner product of every row [B]."""
    return (normal * move).flatten(1).sum(1)


def _look_at_one(live: Live, z: Tensor, aim: _Nearest, norm: Norm) -> tuple[Tensor, Tensor, _Nearest]:
    """Value [B] and normal of the face that seems nearest, and the faces with that one's norm renewed."""
    value, normal, answer = live.oracle.gradient(z, aim)
    if len(aim.faces) == 1:
        return value, normal, aim
    which = aim.nearest(aim.values(answer))[:, None]
    return value, normal, replace(aim, norms=aim.norms.scatter(1, which, dual_length(normal, norm)[:, None]))


def _look_at_all(live: Live, z: Tensor, aim: _Nearest, norm: Norm) -> tuple[Tensor, Tensor, _Nearest]:
    """Value [B] and normal of the nearest face, and the faces with all norms renewed."""
    norms, nearest = [], torch.full_like(z.flatten(1)[:, 0], torch.inf)
    value, normal = torch.zeros_like(nearest), torch.zeros_like(z)
    for face in aim.faces:
        this, gradient, _ = live.oracle.gradient(z, face)
        norms.append(dual_length(gradient, norm))
        away = torch.where(norms[-1] > 0, this.abs() / norms[-1].clamp_min(1e-30), torch.inf)
        closer = away < nearest
        nearest = torch.where(closer, away, nearest)
        value = torch.where(closer, this, value)
        normal = torch.where(per_row(closer, z), gradient, normal)
    return value, normal, replace(aim, norms=torch.stack(norms, 1))


def _search(live: Live, ball: Ball[Tensor], eps: float, eta: float, shortest: _Shortest, clean: Tensor) -> None:
    """Shorten the way to the nearest adversarial point along its own line, then ask about its projection too.

    The ball's edge comes first where that point lies outside: what reaches the goal there counts, what is nearer need
    not be known. The secants after that narrow the bracket between the row and the nearest point that reached the goal.
    """
    rows = slice(None) if live.index is None else live.index
    x, end = live.x, shortest.near[rows].clone()
    # The edge's float neighbours must not lie outside: aim a hair below.
    edge = (eps * (1 - 1e-6) / ball.distance(end, x).to(x.dtype).clamp_min(1e-30)).clamp_max(1.0)
    low, high = torch.zeros_like(edge), torch.ones_like(edge)
    low_margin, high_margin = clean[rows].clone(), shortest.margin[rows].clone()
    for step in range(SEARCH):
        if not live.affords(2):
            break
        share = eta * low_margin / (low_margin - high_margin)
        usable = torch.isfinite(share) & (share > 0)
        secant = low + (high - low) * torch.where(usable, share, 1.0).clamp_max(1.0)
        t = torch.where(edge < 1, edge, secant) if step == 0 else secant
        z = torch.where(per_row(t < 1, x), x + per_row(t, x) * (end - x), end)
        answer = live.oracle(z)
        reached, _ = shortest.see(live, ball, z, answer)
        margin = live.goal.margin(answer).to(x.dtype)
        low, low_margin = torch.where(reached, low, t), torch.where(reached, low_margin, margin)
        high, high_margin = torch.where(reached, t, high), torch.where(reached, margin, high_margin)
    if live.affords():
        z = ball.project(shortest.near[rows], x)
        shortest.see(live, ball, z, live.oracle(z))
