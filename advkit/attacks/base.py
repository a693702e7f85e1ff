"""What attacks are built from: the best point seen per row, and the rows still active. `Search` joins the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from advkit.core.errors import UsageError
from advkit.core.protocols import Ball, Descends, Describes, Goal, NoneReached, Oracle, Rng, WrapsBall, conforms
from advkit.core.rows import finite_rows as finite_rows
from advkit.core.rows import plainly_finite
from advkit.threat_models.lp import L1, L2, Linf, NormBall
from advkit.threat_models.sparse import L0

TensorOracle = Oracle[Tensor, Tensor]
TensorGoal = Goal[Tensor]


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """A value per row [B] shaped to broadcast against `like` [B, ...]."""
    return values.view(-1, *[1] * (like.ndim - 1))


def better(reached: Tensor, loss: Tensor, than_reached: Tensor, than_loss: Tensor) -> Tensor:
    """Bool [B]: a reached goal beats one that is not; among equals the lower loss wins. NaN never wins."""
    return torch.where(reached == than_reached, loss < than_loss, reached)


def model_name(model: Any) -> str:
    """What a model calls itself, else the name of its class: for messages."""
    describe = getattr(model, "describe", None)
    return str(describe().name) if callable(describe) else str(getattr(model, "name", type(model).__name__))


def lp_ball(ball: Any) -> Any:
    """The ball inside a threat model that wraps one (`.ball`), for attacks whose rules are published per norm."""
    while not isinstance(ball, Linf | L2 | L1 | L0) and isinstance(ball, WrapsBall):
        ball = ball.ball
    return ball


def only_in(threat: Any, kind: type[Any], attack: str, made_for: str) -> None:
    """UsageError unless the threat model is of the kind that an attack is made for.

    made_for: how that one is named
    """
    if not isinstance(threat, kind):
        name = threat.describe()["name"] if isinstance(threat, Describes) else type(threat).__name__
        raise UsageError(
            f"{attack} works within {made_for} and this threat model is {name}: leave --threat-model out, or name the "
            "first"
        )


def ball_among(attack: object, ball: Any, *kinds: type[NormBall], instead: str = "") -> Any:
    """The ball inside a threat model, for attacks that are published in some norms alone.

    attack:  an object or its name, for the message
    kinds:   the balls that it works in
    instead: an attack that serves the others, with the same access

    Raises UsageError for a ball of another kind.
    """
    inner = lp_ball(ball)
    if not isinstance(inner, kinds):
        name = attack if isinstance(attack, str) else type(attack).__name__
        named = [kind.__name__ for kind in kinds]
        words = " and ".join(part for part in (", ".join(named[:-1]), named[-1]) if part)
        hint = f" (for other norms use {instead})" if instead else ""
        raise UsageError(
            f"{name} was asked for {type(inner).__name__}; it works in {words} balls{hint}: the norm belongs to the "
            f"threat model, such as {named[0].lower()}:eps=..."
        )
    return inner


AT_ONCE = 8
"""Steps of a search of which one look tells the best points."""

_HELD = 1 << 23
"""Numbers in points that wait for it."""


@dataclass
class _Points:
    """The best points of the rows that are offered for at the moment."""

    rows: Tensor | None
    goal: TensorGoal
    x: Tensor
    loss: Tensor
    reached: Tensor
    any_reached: bool  # whether any of them has reached its goal, or seemed to
    nobody: Tensor  # False for every row
    waiting: list[tuple[Tensor, int, Tensor]] = field(default_factory=list)  # points, their version, their losses

    def wait(self, z: Tensor, loss: Tensor) -> None:
        """Leave it for later which of these points that reach nothing are better."""
        self.waiting.append((z, z._version, loss))
        if len(self.waiting) == AT_ONCE or self.x.numel() * len(self.waiting) >= _HELD:
            self.settle()

    def settle(self) -> None:
        """Take the best of the points that wait, the earliest of equal ones."""
        if not self.waiting:
            return
        points, versions, losses = zip(*self.waiting, strict=True)
        self.waiting = []
        if any(z._version != version for z, version in zip(points, versions, strict=True)):
            raise RuntimeError("an attack wrote into points it had asked about; hand a new tensor to each step")
        held = torch.stack((self.loss, *losses)).nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self.loss, which = held.min(0)
        self.x = torch.stack((self.x, *points))[which, torch.arange(len(which), device=which.device)]

    def none_reached(self, answer: Tensor) -> bool:
        """Whether no row has reached its goal, nor does by these answers: the host synchronisation of a step."""
        if self.any_reached:
            return False
        if conforms(self.goal, NoneReached):
            return cast(NoneReached, self.goal).none_reached(answer)
        return not bool(self.goal.reached(answer).any())


class Best:
    """The best point seen of every row.

    x:       the points [B, ...]; the clean row until something finite was offered
    loss:    their losses [B], +inf until then
    reached: whether the goal holds there, bool [B]

    An answer that is not finite is never better than anything, so a victim that breaks down off the data is not taken
    for one that was fooled. Raises UsageError for samples of whole numbers, such as tokens.
    """

    def __init__(self, x: Tensor, goal: TensorGoal) -> None:
        if not x.is_floating_point():
            raise UsageError(
                "this attack moves samples by fractions, and these are of whole numbers: on prompts use gcg, beast or "
                "random_suffix"
            )
        loss = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self._all = self._now = self._points(None, goal, x.clone(), loss, torch.zeros_like(loss, dtype=torch.bool))
        self._now.any_reached = False

    @staticmethod
    def _points(rows: Tensor | None, goal: TensorGoal, x: Tensor, loss: Tensor, reached: Tensor) -> _Points:
        # An expanded tensor can't be written to, so that the one may be returned step after step.
        nobody = torch.zeros((), dtype=torch.bool, device=x.device).expand(len(x))
        return _Points(rows, goal, x, loss, reached, True, nobody)

    @property
    def x(self) -> Tensor:
        return self._merged().x

    @property
    def loss(self) -> Tensor:
        return self._merged().loss

    @property
    def reached(self) -> Tensor:
        return self._merged().reached

    def _merged(self) -> _Points:
        """All rows' points, those of the active rows among them."""
        all_, now = self._all, self._now
        now.settle()
        if now is not all_:
            all_.x[now.rows], all_.loss[now.rows], all_.reached[now.rows] = now.x, now.loss, now.reached
        return all_

    def of(self, rows: Tensor | None) -> _Points:
        """What is known of these rows; they are kept together until others are asked for."""
        self._now.settle()
        if rows is not self._now.rows:
            all_ = self._merged()
            if rows is None:
                self._now, all_.any_reached = all_, True
            else:
                x, loss, reached = kept(rows, all_.x, all_.loss, all_.reached)
                self._now = self._points(rows, all_.goal.take(rows), x, loss, reached)
                self._now.any_reached = bool(reached.any())
        return self._now

    def compare(
        self, z: Tensor, answer: Tensor, loss: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """As `offer`; returns which points reach the goal, None where it is plain that none does, and which are better.

        Both bool [n]. None saves the caller a look at the first: most steps reach nothing.
        """
        now = self.of(rows)
        loss = (now.goal.loss(answer) if loss is None else loss).to(now.loss.dtype)
        finite = None if answer.is_floating_point() and plainly_finite(answer) else finite_rows(answer)
        reached: Tensor | None = None
        if now.none_reached(answer):
            wins = loss < now.loss
        else:
            reached = now.goal.reached(answer)
            reached = reached if finite is None else reached & finite
            wins = better(reached, loss, now.reached, now.loss)
        wins = wins if finite is None else wins & finite
        if reached is not None:
            now.reached, now.any_reached = now.reached | reached, True
        now.x = torch.where(per_row(wins, z), z, now.x)
        now.loss = torch.where(wins, loss, now.loss)
        return reached, wins

    def offer(self, z: Tensor, answer: Tensor, loss: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Take the points z [n, ...] that beat what their rows have; `rows` long [n] where they are not all rows.

        Returns bool [n]: which of these points reach the goal.
        """
        reached, _ = self.compare(z, answer, loss, rows)
        return self.of(rows).nobody if reached is None else reached

    def step(self, z: Tensor, answer: Tensor, loss: Tensor, rows: Tensor | None = None) -> Tensor | None:
        """As `compare`, for a caller who asks for nothing else and leaves z as it is: which points reach the goal.

        While none does, several steps' points are compared at once.
        """
        now = self._now
        waits = rows is now.rows and not now.any_reached and loss.dtype == now.loss.dtype and not z.is_inference()
        if waits and answer.is_floating_point() and plainly_finite(answer) and now.none_reached(answer):
            now.wait(z, loss)
            return None
        return self.compare(z, answer, loss, rows)[0]

    def put(self, z: Tensor, rows: Tensor | None = None) -> None:
        """Set the points of these rows, better or not."""
        self.of(rows).x = z.clone()


@dataclass(frozen=True)
class ActiveRows:
    """Rows that are still attacked, compacted together.

    index: which of the attack's rows these are, long [n]; None while all are
    """

    oracle: TensorOracle
    x: Tensor
    goal: TensorGoal
    rng: Rng
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor) -> ActiveRows:
        """Some of these rows (long index); a row may come several times."""
        return ActiveRows(
            self.oracle.take(rows),
            self.x[rows],
            self.goal.take(rows),
            self.rng.take(rows),
            rows if self.index is None else self.index[rows],
        )

    def staying(self, done: Tensor) -> Tensor | None:
        """Which rows stay when those that are `done` leave, as a long index; None when all do. Waits for the device."""
        stay = (~done).nonzero().squeeze(1)
        return None if len(stay) == len(done) else stay

    def of(self, values: Tensor) -> Tensor:
        """These rows' values, of a tensor with a value for each of the attack's rows."""
        return values if self.index is None else values[self.index]

    def affords(self, answers: int = 1) -> bool:
        """Whether every row may still ask for that many answers."""
        return affords(self.oracle, answers)


class OverActiveRows:
    """A search over rows of which some leave: `x`, `goal`, `rng` and `oracle` are those of the active ones."""

    _active: ActiveRows

    def __len__(self) -> int:
        """How many rows are active."""
        return len(self._active)

    @property
    def oracle(self) -> TensorOracle:
        return self._active.oracle

    @property
    def x(self) -> Tensor:
        return self._active.x

    @property
    def goal(self) -> TensorGoal:
        return self._active.goal

    @property
    def rng(self) -> Rng:
        return self._active.rng

    def affords(self, answers: int = 1) -> bool:
        """Whether every active row may still ask for that many answers."""
        return affords(self.oracle, answers)


Live = ActiveRows
"""The former name, for plug-ins."""


def affords(oracle: TensorOracle, answers: int = 1) -> bool:
    """Whether every row of the oracle may still ask for that many answers."""
    left = oracle.left
    return left is None or left >= answers


def descended(ball: Ball[Tensor], z: Tensor, gradient: Tensor, origin: Tensor, size: float | Tensor) -> Tensor:
    """z after a step down the gradient, `size` of the ball's eps long (a number, or one that broadcasts against z).

    Through the ball's own `descend` where it has one, which may know a shorter way to the same point. A threat model
    that wraps a ball steps by its own `project` and `steepest`, unless it wraps L0, whose step is of another kind.
    """
    inner = lp_ball(ball)
    stepping = inner if isinstance(inner, L0) else ball
    if conforms(stepping, Descends):
        return cast(Descends, stepping).descend(z, gradient, origin, size)
    return ball.project(z + size * ball.steepest(-gradient, z), origin)


def kept(rows: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """The same rows of several tensors."""
    return tuple(tensor[rows] for tensor in tensors)
