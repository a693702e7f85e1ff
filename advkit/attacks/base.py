"""What every attack's loop needs: the best point seen per row, and the rows still in play."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from advkit.core.protocols import Goal, Oracle, Rng
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

TensorOracle = Oracle[Tensor, Tensor]
TensorGoal = Goal[Tensor]


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """A value per row [B] shaped to broadcast against `like` [B, ...]."""
    return values.view(-1, *(1 for _ in like.shape[1:]))


def finite_rows(answer: Tensor) -> Tensor:
    """Bool [B]: rows whose whole answer is finite. Half the operations of torch.isfinite, once per step."""
    size = answer.abs()
    return (size.flatten(1).amax(1) if answer.ndim > 1 else size) < torch.inf


def better(reached: Tensor, loss: Tensor, than_reached: Tensor, than_loss: Tensor) -> Tensor:
    """Bool [B]: a reached goal beats one that is not; among equals the lower loss wins. NaN never wins."""
    return torch.where(reached == than_reached, loss < than_loss, reached)


def lp_ball(ball: Any) -> Any:
    """The ball inside a threat model that wraps one (`.ball`), for attacks whose rules are published per norm."""
    while not isinstance(ball, Linf | L2 | L1 | L0) and hasattr(ball, "ball"):
        ball = ball.ball
    return ball


class Best:
    """The best point seen of every row.

    x:       the points [B, ...]; the origin until something finite was offered
    loss:    their losses [B], +inf until then
    reached: whether the goal holds there, bool [B]

    An answer that is not finite is never better than anything, so a victim that breaks down off the data is not taken
    for one that was fooled.
    """

    def __init__(self, x: Tensor, goal: TensorGoal) -> None:
        self.x = x.clone()
        self.loss = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
        self.reached = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self._goal = goal
        self._rows: Tensor | None = None
        self._goal_of_rows = goal

    def offer(self, z: Tensor, answer: Tensor, loss: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """Take the points z [n, ...] that beat what their rows have; `rows` long [n] where they are not all rows.

        Returns bool [n]: which of these points reach the goal.
        """
        if rows is not self._rows:
            self._rows, self._goal_of_rows = rows, self._goal if rows is None else self._goal.take(rows)
        goal = self._goal_of_rows
        loss = goal.loss(answer) if loss is None else loss
        finite = finite_rows(answer)
        reached = goal.reached(answer) & finite
        loss = loss.to(self.loss.dtype)
        if rows is None:
            wins = better(reached, loss, self.reached, self.loss) & finite
            self.x = torch.where(per_row(wins, z), z, self.x)
            self.loss = torch.where(wins, loss, self.loss)
            self.reached = self.reached | reached
        else:
            wins = better(reached, loss, self.reached[rows], self.loss[rows]) & finite
            self.x[rows] = torch.where(per_row(wins, z), z, self.x[rows])
            self.loss[rows] = torch.where(wins, loss, self.loss[rows])
            self.reached[rows] |= reached
        return reached

    def put(self, z: Tensor, rows: Tensor | None = None) -> None:
        """Set the points of these rows, better or not."""
        if rows is None:
            self.x = z.clone()
        else:
            self.x[rows] = z


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
        """A subset of these rows (long index)."""
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
        """Which rows stay, as a long index, or None when all do. The one host synchronisation of a step."""
        stay = (~done).nonzero().squeeze(1)
        return None if len(stay) == len(done) else stay

    def affords(self, answers: int = 1) -> bool:
        """Whether every row may still ask for that many answers."""
        left = self.oracle.left
        return left is None or left >= answers


def kept(rows: Tensor, *tensors: Any) -> tuple[Any, ...]:
    """The same rows of several tensors."""
    return tuple(tensor[rows] for tensor in tensors)
