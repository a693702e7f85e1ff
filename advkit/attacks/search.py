"""The loop that iterative attacks share: score points, drop finished rows, end with the query budget."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal, Protocol, Self, TypeVar

from torch import Tensor

from advkit.attacks.base import ActiveRows, Best, OverActiveRows, TensorGoal, TensorOracle, kept
from advkit.core.protocols import Rng

Keep = Literal["best", "last"]


class Takes(Protocol):
    """Anything with an entry per row."""

    def take(self, rows: Tensor, /) -> Self: ...


T = TypeVar("T", bound=Takes)


def taken(rows: Tensor | None, item: T) -> T:
    """Some of its rows (long index); the item itself for None."""
    return item if rows is None else item.take(rows)


@dataclass(slots=True)
class Step:
    """A gradient step of a search, for the rows that are still active after it.

    number:   0, 1, ... of its run
    z:        the points that were scored [n, ...]
    x:        the clean rows [n, ...]
    gradient: of the loss at z [n, ...]
    rows:     which of the rows before this step these are, long [n]; None where none left
    """

    number: int
    z: Tensor
    x: Tensor
    gradient: Tensor
    rows: Tensor | None
    losses: Tensor

    @property
    def loss(self) -> Tensor:
        """At z [n]."""
        return self.losses if self.rows is None else self.losses[self.rows]

    def kept(self, state: T) -> T:
        """What an attack knew of the rows before this step, for those that are still active."""
        return taken(self.rows, state)


class Search(OverActiveRows):
    """The search for every row's best point: scores points, drops finished rows, ends with the query budget.

    z:    where the next step asks for the gradient, one point per active row: the clean rows until the attack sets it
    keep: "best" returns the point of lowest loss, one that reached the goal first; "last" the last one, unscored
    stop: drop a row as soon as its goal is reached, where the oracle's answers are the verdict's
    best: how points are compared; by the goal's loss where it is left out

    `x`, `goal`, `rng` and `oracle` are always those of the active rows.
    """

    def __init__(
        self,
        oracle: TensorOracle,
        x: Tensor,
        goal: TensorGoal,
        rng: Rng,
        *,
        stop: bool = True,
        keep: Keep = "best",
        best: Best | None = None,
    ) -> None:
        self.z = x
        self._active = ActiveRows(oracle, x, goal, rng)
        self._best = Best(x, goal) if best is None else best
        self._plain = best is None
        self._stop = stop and oracle.decides
        self._keep = keep

    @property
    def best(self) -> Tensor:
        """Every row's best point [B, ...], those no longer active included; the clean row where nothing was better."""
        return self._best.x

    def of(self, values: Tensor) -> Tensor:
        """The active rows' values, of a tensor with a value for every row."""
        return self._active.of(values)

    def restarts(self, count: int) -> Iterator[Rng]:
        """A random stream per restart, for the rows not broken yet; more restarts repeat the fewer and go on."""
        for restart in range(count):
            if restart:
                self.drop_broken()
            if not len(self):
                return
            yield self.rng.at("start", restart)

    def steps(self, count: int) -> Iterator[Step]:
        """Up to `count` gradient steps; ends earlier with the query budget or when no row is left.

        Each scores z and drops the rows that are finished. The point after the last step is scored by `finish`.
        """
        for number in range(count):
            if not len(self) or ((number == 0 or self._keep == "last") and not self.affords()):
                return
            z = self.z
            loss, gradient, answer = self._differentiated(z)
            rows = self._stepped(z, answer, loss) if self._keep == "best" or self._stop else None
            if rows is not None:
                z, gradient = kept(rows, z, gradient)
                if not len(self):
                    return
            if self._keep == "best" and not self.affords():
                return  # nothing could score where a step would lead
            yield Step(number, z, self.x, gradient, rows, loss)

    def finish(self) -> None:
        """The last point of a run counts too: score z, or put it unscored where the last point is returned."""
        if not len(self):
            return
        if self._keep == "last":
            self.put(self.z)
        elif self.affords():
            self.offer(self.z, self.oracle(self.z))

    def score(self, z: Tensor) -> Tensor | None:
        """Query z, take what is better and drop the rows that are broken; which rows stay, as `drop` says it."""
        reached, _ = self._best.compare(z, self.oracle(z), None, self._active.index)
        return None if reached is None else self.drop(reached)

    def trial(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Query z, take what is better and drop the rows that are broken.

        Returns of the rows that stay which took their point, bool [n], and which rows stay, as `drop` says it.
        """
        reached, wins = self._best.compare(z, self.oracle(z), None, self._active.index)
        rows = None if reached is None else self.drop(reached)
        return (wins if rows is None else wins[rows]), rows

    def toward(self, goal: TensorGoal) -> Search:
        """A search from the rows active now that descends another goal's loss; both share the best points.

        For points that are compared by something else than that loss (`best`).
        """
        search = copy(self)
        search._active = replace(self._active, goal=goal)
        return search

    def offer(self, z: Tensor, answer: Tensor) -> None:
        """Take the points that are better by answers already known."""
        self._best.offer(z, answer, rows=self._active.index)

    def put(self, z: Tensor) -> None:
        """Set the active rows' points, better or not."""
        self._best.put(z, self._active.index)

    def drop(self, done: Tensor) -> Tensor | None:
        """Drop active rows (bool [n]) where rows may stop early; a long index of those that stay, None where all do."""
        if not self._stop:
            return None
        rows = self._active.staying(done)
        if rows is not None:
            self._active = self._active.take(rows)
        return rows

    def drop_broken(self) -> Tensor | None:
        """Drop the rows that have reached their goal; which stay, as `drop` says it."""
        return self.drop(self.of(self._best.reached)) if self._stop else None

    def _differentiated(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the oracle says of z, which it may differentiate by as it is, unless it is the clean rows."""
        active = self._active
        if z is active.x or not z.is_leaf or z.requires_grad or z.is_inference():
            return active.oracle.gradient(z, active.goal)
        z.requires_grad_()
        try:
            return active.oracle.gradient(z, active.goal)
        finally:
            z.requires_grad_(False)

    def _stepped(self, z: Tensor, answer: Tensor, loss: Tensor) -> Tensor | None:
        index = self._active.index
        reached = (self._best.step if self._plain else self._compared)(z, answer, loss, index)
        return None if reached is None else self.drop(reached)

    def _compared(self, z: Tensor, answer: Tensor, loss: Tensor, rows: Tensor | None) -> Tensor | None:
        return self._best.compare(z, answer, loss, rows)[0]
