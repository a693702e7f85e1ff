"""The best point per row, against a loop over rows that follows the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from advkit.attacks.base import ActiveRows, Best
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted

NAN, INF = float("nan"), float("inf")


def goals(rows: int) -> list[Any]:
    classes = torch.arange(rows) % 3
    return [Untargeted(classes), Targeted(classes), Diverge(torch.eye(3)[classes]), Plain(classes)]


class Plain:
    """A goal of somebody else's, without the short cut and without a look at what is finite."""

    def __init__(self, classes: Tensor) -> None:
        self.classes = classes

    def reached(self, answer: Tensor) -> Tensor:
        return answer.argmax(1) == self.classes

    def take(self, rows: Tensor) -> Plain:
        return Plain(self.classes[rows])


def awkward(rows: int, seed: int) -> Tensor:
    """Scores with ties, NaN and infinities of either sign."""
    generator = torch.Generator().manual_seed(seed)
    answer = torch.randint(0, 3, (rows, 3), generator=generator).float()
    for value in (NAN, INF, -INF):
        where = torch.rand(rows, 3, generator=generator) < 0.05
        answer[where] = value
    return answer


@pytest.mark.parametrize("which", range(4))
def test_none_reached_is_never_wrong(which: int) -> None:
    sure = 0
    for seed in range(400):
        answer = awkward(2, seed)
        goal = goals(2)[which]
        if not hasattr(goal, "none_reached"):
            continue
        if goal.none_reached(answer):
            assert not goal.reached(answer).any()
            sure += 1
        elif torch.isfinite(answer).all() and not isinstance(goal, Diverge):
            assert goal.reached(answer).any()
    assert sure or which == 3


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("which", range(4))
def test_best_is_what_its_definition_says(which: int, leave: bool) -> None:
    n = 40
    goal = goals(n)[which]
    generator = torch.Generator().manual_seed(which)
    origin = torch.rand(n, 2, generator=generator)
    best = Best(origin, goal)
    found: list[tuple[bool, float, Tensor]] = [(False, INF, row) for row in origin]
    rows: Tensor | None = None
    quiet = 0
    for step in range(30):
        here = torch.arange(n) if rows is None else rows
        z, loss = torch.rand(len(here), 2, generator=generator), torch.rand(len(here), generator=generator)
        aim = goal.take(here)
        answer = awkward(len(here), 100 * which + step)
        if step % 2:  # most rows do not reach it in most steps
            answer = torch.where(aim.reached(answer)[:, None], torch.tensor(NAN), answer)
        loss[torch.rand(len(here), generator=generator) < 0.1] = INF
        reached, wins = best.compare(z, answer, loss, rows)
        expected = aim.reached(answer) & torch.isfinite(answer).all(1)
        assert torch.equal(torch.zeros_like(expected) if reached is None else reached, expected)
        quiet += reached is None
        taken = torch.zeros_like(wins)
        for i, row in enumerate(here.tolist()):
            if not torch.isfinite(answer[i]).all():
                continue
            had_reached, had_loss, _ = found[row]
            better = bool(expected[i]) if bool(expected[i]) != had_reached else float(loss[i]) < had_loss
            if better:
                found[row] = (bool(expected[i]), float(loss[i]), z[i])
                taken[i] = True
        assert torch.equal(wins, taken)
        if step % 7 == 3:  # looking in between changes nothing
            assert len(best.x) == len(best.loss) == n
        if leave and expected.any():
            rows = here[~expected]
        if rows is not None and not len(rows):
            break
    assert best.reached.tolist() == [reached for reached, _, _ in found]
    assert best.loss.tolist() == [loss for _, loss, _ in found]
    assert torch.equal(best.x, torch.stack([x for _, _, x in found]))
    assert quiet or not leave


def test_a_class_of_minus_infinity_wins_nothing() -> None:
    """The cross-entropy of such an answer is finite and as low as can be; the answer is not finite all the same."""
    goal = Untargeted(torch.tensor([0, 0]))
    best = Best(torch.zeros(2, 1), goal)
    answer = torch.tensor([[1.0, 0.9, -INF], [1.0, 0.9, 0.0]])
    assert torch.isfinite(goal.loss(answer)).all()
    best.offer(torch.ones(2, 1), answer)
    assert best.x.flatten().tolist() == [0, 1]
    assert best.loss[0] == INF


def test_the_rows_that_nobody_reached_cannot_be_written_to() -> None:
    best = Best(torch.zeros(3, 1), Untargeted(torch.tensor([0, 0, 0])))
    reached = best.offer(torch.ones(3, 1), torch.eye(3)[[0, 0, 0]])
    assert best.compare(torch.ones(3, 1), torch.eye(3)[[0, 0, 0]])[0] is None
    assert reached.tolist() == [False] * 3
    with pytest.raises(RuntimeError):
        reached |= torch.tensor([True, False, False])


def test_active_rows_take_a_row_several_times() -> None:
    x = torch.rand(3, 2)
    oracle = MeteredOracle(lambda z: torch.cat([z, z[:, :1]], 1), 3)
    active = ActiveRows(oracle, x, Untargeted(torch.tensor([0, 1, 2])), RowRng.from_ids(0, ("a", "b", "c")))
    twice = active.take(torch.tensor([1, 1, 2])).take(torch.tensor([0, 1]))
    assert twice.index is not None
    assert twice.index.tolist() == [1, 1]
    twice.oracle.gradient(twice.x, twice.goal)
    assert oracle.meter.forwards.tolist() == [0, 2, 0]
    drawn = twice.rng.uniform(twice.x)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], active.rng.uniform(x)[1])
