"""What every attack's loop needs: the best point seen per row, and the rows still in play."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from advkit.core.protocols import Ball, Goal, Oracle, Rng
from advkit.core.rows import finite_rows as finite_rows
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

TensorOracle = Oracle[Tensor, Tensor]
TensorGoal = Goal[Tensor]


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """A value per row [B] shaped to broadcast against `like` [B, ...]."""
    return values.view(-1, *(1 for _ in like.shape[1:]))


def better(reached: Tensor, loss: Tensor, than_reached: Tensor, than_loss: Tensor) -> Tensor:
    """Bool [B]: a reached goal beats one that is not; among equals the lower loss wins. NaN never wins."""
    return torch.where(reached == than_reached, loss < than_loss, reached)


def lp_ball(ball: Any) -> Any:
    """The ball inside a threat model that wraps one (`.ball`), for attacks whose rules are published per norm."""
    while not isinstance(ball, Linf | L2 | L1 | L0) and hasattr(ball, "ball"):
        ball = ball.ball
    return ball


@dataclass
class _Found:
    """The best points of the rows that are offered for at the moment."""

    rows: Tensor | None
    goal: TensorGoal
    x: Tensor
    loss: Tensor
    reached: Tensor
    fell: bool  # whether any of them has reached, or seemed to
    nobody: Tensor  # False for every row

    def untouched(self, answer: Tensor) -> bool:
        """Whether no row has reached its goal, nor does by these answers: the host synchronisation of a step."""
        if self.fell:
            return False
        none_reached = getattr(self.goal, "none_reached", None)
        if none_reached is not None:
            return bool(none_reached(answer))
        return not bool(self.goal.reached(answer).any())


class Best:
    """The best point seen of every row.

    x:       the points [B, ...]; the origin until something finite was offered
    loss:    their losses [B], +inf until then
    reached: whether the goal holds there, bool [B]
    quiet:   whether it is known already that no point offered last reaches its goal, so that nobody need look
    won:     which of the points offered last were taken, bool [n]

    An answer that is not finite is never better than anything, so a victim that breaks down off the data is not taken
    for one that was fooled. A goal may have `none_reached(answer) -> bool`, a cheaper `not reached(answer).any()` that
    may say no in doubt: most steps end with it.
    """

    def __init__(self, x: Tensor, goal: TensorGoal) -> None:
        loss = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self._all = self._now = self._found(None, goal, x.clone(), loss, torch.zeros_like(loss, dtype=torch.bool))
        self._now.fell = False
        self.quiet = False
        self.won = self._now.nobody

    @staticmethod
    def _found(rows: Tensor | None, goal: TensorGoal, x: Tensor, loss: Tensor, reached: Tensor) -> _Found:
        # An expanded tensor can't be written to, so that the one may be handed out step after step.
        nobody = torch.zeros((), dtype=torch.bool, device=x.device).expand(len(x))
        return _Found(rows, goal, x, loss, reached, True, nobody)

    @property
    def x(self) -> Tensor:
        return self._settled().x

    @property
    def loss(self) -> Tensor:
        return self._settled().loss

    @property
    def reached(self) -> Tensor:
        return self._settled().reached

    def _settled(self) -> _Found:
        """Everybody's points, those of the rows in play among them."""
        all_, now = self._all, self._now
        if now is not all_:
            all_.x[now.rows], all_.loss[now.rows], all_.reached[now.rows] = now.x, now.loss, now.reached
        return all_

    def of(self, rows: Tensor | None) -> _Found:
        """What is known of these rows; they are kept together until others are asked for."""
        if rows is not self._now.rows:
            all_ = self._settled()
            if rows is None:
                self._now, all_.fell = all_, True
            else:
                x, loss, reached = kept(rows, all_.x, all_.loss, all_.reached)
                self._now = self._found(rows, all_.goal.take(rows), x, loss, reached)
                self._now.fell = bool(reached.any())
        return self._now

    def offer(self, z: Tensor, answer: Tensor, loss: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Take the points z [n, ...] that beat what their rows have; `rows` long [n] where they are not all rows.

        Returns bool [n]: which of these points reach the goal.
        """
        now = self.of(rows)
        loss = (now.goal.loss(answer) if loss is None else loss).to(now.loss.dtype)
        finite = finite_rows(answer)
        self.quiet = now.untouched(answer)
        if self.quiet:
            reached = now.nobody
            wins = (loss < now.loss) & finite
        else:
            reached = now.goal.reached(answer) & finite
            wins = better(reached, loss, now.reached, now.loss) & finite
            now.reached, now.fell = now.reached | reached, True
        now.x = torch.where(per_row(wins, z), z, now.x)
        now.loss = torch.where(wins, loss, now.loss)
        self.won = wins
        return reached

    def put(self, z: Tensor, rows: Tensor | None = None) -> None:
        """Set the points of these rows, better or not."""
        self.of(rows).x = z.clone()


@dataclass(frozen=True)
class Live:
    """The rows still in play, compacted together: what an attack's loop works on.

    index: which of the attack's rows these are, long [n]; None while all are
    """

    oracle: TensorOracle
    x: Tensor
    goal: TensorGoal
    rng: Rng
    index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: Tensor) -> Live:
        """Some of these rows (long index); a row may come several times."""
        return Live(
            self.oracle.take(rows),
            self.x[rows],
            self.goal.take(rows),
            self.rng.take(rows),
            rows if self.index is None else self.index[rows],
        )

    def through(self, oracle: TensorOracle) -> Live:
        """The same rows seen through another oracle."""
        return replace(self, oracle=oracle)

    def left(self, done: Tensor) -> Tensor | None:
        """Which rows stay, as a long index, or None when all do. Waits for the device."""
        stay = (~done).nonzero().squeeze(1)
        return None if len(stay) == len(done) else stay

    def affords(self, answers: int = 1) -> bool:
        """Whether every row may still ask for that many answers."""
        left = self.oracle.left
        return left is None or left >= answers


def descended(ball: Ball[Tensor], z: Tensor, gradient: Tensor, origin: Tensor, size: float | Tensor) -> Tensor:
    """z after a step down the gradient, `size` of the ball's eps long (a number, or one that broadcasts against z).

    Through the ball's own `descend` where it has one, which may know a shorter way to the same point.
    """
    descend = getattr(ball, "descend", None)
    if descend is not None:
        moved: Tensor = descend(z, gradient, origin, size)
        return moved
    return ball.project(z + size * ball.steepest(-gradient, z), origin)


def kept(rows: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """The same rows of several tensors."""
    return tuple(tensor[rows] for tensor in tensors)
