"""What attacks that see decisions alone ask through: each row has a budget of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import NearestSearch
from advkit.attacks.query.courses import Courses
from advkit.threat_models.lp import row_sum


def row_length(move: Tensor) -> Tensor:
    """L2 norms [n]."""
    return row_sum(move.square()).sqrt()


def unit(move: Tensor) -> Tensor:
    """Rows of L2 length 1; rows of zeros stay."""
    size = row_length(move)
    return move * per_row(torch.where(size > 0, 1 / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0), move)


class Decisions:
    """A search that asks for decisions, within a budget of each row's own.

    left:  queries that each active row may still ask, long [n]
    found: active rows for which a point that reaches the goal is known, bool [n]

    Rows ask as often as each needs: a question names the rows that it is about, and those without budget are left out.
    A row's points and answers do not depend on which others are asked beside it. A row that leaves tells its record how
    near it had come after how many queries.
    """

    def __init__(self, search: NearestSearch, queries: int) -> None:
        self.search = search
        granted = search.oracle.left
        budget = queries if granted is None else min(queries, granted)
        # `settle` asks once more where files are rounded: whatever is asked about here is rounded already.
        budget -= bool(search.threat.lattice)
        self.queries = max(1, budget)
        self.left = torch.full((len(search),), self.queries, dtype=torch.long, device=search.x.device)
        self._courses = Courses.of(search.x, self.queries)

    def __len__(self) -> int:
        return len(self.search)

    @property
    def x(self) -> Tensor:
        return self.search.x

    @property
    def found(self) -> Tensor:
        return self.search.away < torch.inf

    def legal(self, z: Tensor, of: Tensor | None = None) -> Tensor:
        """Points [m, ...] as they can be handed in: inside the box, and rounded where files are."""
        x = self.x if of is None else self.x[of]
        return self.search.threat.finish(self.search.threat.project(z, x), x)

    def distance(self, z: Tensor) -> Tensor:
        """Of a point of every active row, in the threat model's norm [n]."""
        return self.search.distance(z)

    def ask(self, z: Tensor, of: Tensor) -> Tensor:
        """Which legal points reach the goal, bool [m]; of: which active row each belongs to. The rows pay."""
        self.left -= torch.bincount(of, minlength=len(self.left))
        before = self.search.away
        reached = self.search.ask(z, of)[1]
        self._courses.extend(self.queries - self.left, before, self.search.away)
        return reached

    def try_points(self, z: Tensor, want: Tensor) -> Tensor:
        """Ask about a point of every active row that wants it (bool [n]) and has budget; which reached the goal [n]."""
        of = (want & (self.left > 0)).nonzero().squeeze(1)
        reached = torch.zeros_like(want)
        if len(of):
            reached[of] = self.ask(z[of], of)
        return reached

    def dismiss(self, done: Tensor) -> Tensor | None:
        """Let rows (bool [n]) leave where the oracle's answers are the verdict's; who stays, None where all do."""
        oracle, rows = self.search.oracle, self.search.leave(done)
        if rows is not None:
            for row in done.nonzero().squeeze(1).tolist():
                for step in self._courses.told(row):
                    oracle.note(row, step)
            self.left, self._courses = self.left[rows], self._courses.take(rows)
        return rows

    def leave(self) -> Tensor | None:
        """Let rows leave that can ask nothing more; those that stay, None where all do."""
        return self.dismiss(self.left <= 0)

    def going(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Let rows leave, and the state [n, ...] of those that stay."""
        rows = self.leave()
        return state if rows is None else kept(rows, *state)

    def any_left(self) -> bool:
        """Whether a row has queries left."""
        return bool((self.left > 0).any())
