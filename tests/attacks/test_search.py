"""`Search` against loops over single rows, written down from the definitions: equal points and passes, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from advkit.attacks.base import Best, descended
from advkit.attacks.gradient.apgd import ALPHA, APGDCE, RHO, checkpoints, start_of
from advkit.attacks.gradient.fgsm import FGSM
from advkit.attacks.gradient.mifgsm import MIFGSM
from advkit.attacks.gradient.pgd import PGD, starting_point
from advkit.attacks.search import Search
from advkit.attacks.suites import Stage, Suite
from advkit.attacks.wrappers import averaged, momentum, normalised
from advkit.benchmark import Ops
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.core.state import frozen
from advkit.testing.play import names, play
from advkit.testing.victims import linear, uniform
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

ROWS = 24
LANES = Lanes(chunk=16, multiple=16)  # a row alone and a row among others go through the same kernel
BALLS = {"linf": Linf(eps=0.08), "l2": L2(eps=0.25), "l1": L1(eps=0.8), "l0": L0(eps=2)}


def victim() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 6))
    for parameter in net.parameters():
        parameter.requires_grad_(False).mul_(2)
    return net


def goals(net: Any, x: Tensor) -> dict[str, Any]:
    with torch.no_grad():
        answer = net(x)
    labels = answer.argmax(1)
    return {"untargeted": Untargeted(labels), "targeted": Targeted((labels + 1) % 6), "diverge": Diverge(answer)}


class Row:
    """One row: its oracle, its stream, and the best point so far, in Python's own truth values and numbers."""

    def __init__(self, oracle: MeteredOracle, eot: int, x: Tensor, goal: Any, rng: Any, stop: bool, keep: str) -> None:
        self.oracle, self.x, self.goal, self.rng = averaged(oracle, eot), x, goal, rng
        self.stopping, self.keep = stop and oracle.decides, keep
        self.best, self.loss, self.reached = x, float("inf"), False

    def affords(self) -> bool:
        return self.oracle.left is None or self.oracle.left >= 1

    def offer(self, z: Tensor, answer: Tensor, loss: Tensor) -> bool:
        reached = bool(self.goal.reached(answer))
        if (reached and not self.reached) or (reached == self.reached and float(loss) < self.loss):
            self.best, self.loss, self.reached = z, float(loss), reached
        return reached

    def gradient(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """Loss and gradient at z; None where the row is done."""
        if not self.affords():
            return None
        loss, gradient, answer = self.oracle.gradient(z, self.goal)
        if (self.keep == "best" or self.stopping) and self.offer(z, answer, loss) and self.stopping:
            return None
        return loss, gradient

    def finish(self, z: Tensor) -> None:
        if self.stopping and self.reached:
            return
        if self.keep == "last":
            self.best = z
        elif self.affords():
            answer = self.oracle(z)
            self.offer(z, answer, self.goal.loss(answer))


def pgd(row: Row, attack: Any, ball: Any) -> None:
    """PGD, FGSM and MI-FGSM."""
    steps = getattr(attack, "steps", 1)
    size = getattr(attack, "step_size", 1.0) or 1 / steps
    decay = getattr(attack, "decay", 0)
    for restart in range(getattr(attack, "restarts", 1)):
        if row.stopping and row.reached:
            return
        z = starting_point(getattr(attack, "start", "origin"), row.x, ball, row.rng.at("start", restart))
        velocity: Tensor | None = None
        for _ in range(steps):
            if (seen := row.gradient(z)) is None:
                break
            gradient = seen[1]
            if decay:
                gradient = normalised(gradient) if velocity is None else decay * velocity + normalised(gradient)
                velocity = gradient
            z = ball.descend(z, gradient, row.x, size)
        row.finish(z)


def apgd(row: Row, attack: Any, ball: Any) -> None:
    """Auto-PGD in Linf and L2, with branches in place of masks."""
    reviews = checkpoints(attack.steps)
    for restart in range(attack.restarts):
        if row.stopping and row.reached:
            return
        z = before = start_of(row.x, ball, row.rng.at("start", restart))
        size, improved, since, halved = 2.0, 0, 0, False
        last = lowest = lowest_at_review = float("inf")
        best: tuple[Tensor, Tensor] | None = None
        for k in range(attack.steps):
            if (seen := row.gradient(z)) is None:
                break
            loss, gradient = float(seen[0]), seen[1]
            here = z
            if k == 0:
                lowest_at_review = loss
            improved += k > 0 and loss < last
            last = loss
            if best is None or loss < lowest:
                best, lowest = (here, gradient), loss
            if k > 0 and k in reviews:
                few = improved < RHO * (k - since)
                halved = few or (not halved and lowest >= lowest_at_review)
                if halved:
                    size /= 2
                    (here, gradient), last = best, lowest
                improved, since, lowest_at_review = 0, k, lowest
            target = descended(ball, here, gradient, row.x, torch.full_like(here[:1, :1], size))
            if k > 0:
                target = ball.project(torch.lerp(torch.lerp(before, here, 2), target, ALPHA), row.x)
            before, z = here, target  # after a return, the next move is measured from the best point
        row.finish(z)


def check(
    attack: Any, loop: Any, ball: Any, goal_name: str, *, decides: bool = True, queries: int | None = None
) -> Any:
    """The attack on all rows against the loop on each; what was played, and how many rows were broken."""
    net, x = victim(), uniform(5, ROWS, 12)
    goal = goals(net, x)[goal_name]
    played = play(attack, net, x, goal, ball, decides=decides, queries=queries, lanes=LANES)
    for i in range(ROWS):
        one = torch.tensor([i])
        oracle = MeteredOracle(net, 1, queries=queries, decides=decides, lanes=LANES)
        rng = RowRng.from_ids(0, names(ROWS)).take(one)
        keep = "last" if isinstance(attack, FGSM) else getattr(attack, "keep", "best")
        stop = getattr(attack, "stop", True)
        row = Row(oracle, attack.eot, x[one], goal.take(one).under(attack.loss), rng, stop, keep)
        loop(row, attack, ball)
        assert torch.equal(played.z[one], row.best)
        assert int(played.meter.forwards[i]) == int(oracle.meter.forwards[0])
        assert int(played.meter.backwards[i]) == int(oracle.meter.backwards[0])
    return played


PGDS = {
    "as it is": PGD(steps=7, step_size=0.3),
    "restarts": PGD(steps=4, step_size=0.4, restarts=3),
    "restarts, all to the end": PGD(steps=4, step_size=0.4, restarts=3, stop=False),
    "origin, margin": PGD(steps=7, step_size=0.3, start="origin", loss="margin"),
    "gaussian, dlr": PGD(steps=7, step_size=0.3, start="gaussian", loss="dlr"),
    "last": PGD(steps=7, step_size=0.3, keep="last"),
    "last, to the end": PGD(steps=7, step_size=0.3, keep="last", stop=False),
    "eot": PGD(steps=5, step_size=0.3, eot=2),
    "one step": PGD(steps=1, step_size=1.0),
    "fgsm": FGSM(),
    "fgsm, margin": FGSM(loss="margin"),
    "mifgsm": MIFGSM(steps=6),
    "mifgsm, slow": MIFGSM(steps=6, decay=0.5, step_size=0.3, stop=False),
    "mifgsm, last": MIFGSM(steps=6, keep="last"),
    "mifgsm, no momentum": MIFGSM(steps=6, decay=0.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("name", PGDS)
def test_pgd_and_its_kin_are_the_loop_over_single_rows(name: str, norm: str) -> None:
    played = check(PGDS[name], pgd, BALLS[norm], "untargeted")
    assert 0 < played.reached.sum() < ROWS


@pytest.mark.parametrize("goal", ["targeted", "diverge"])
@pytest.mark.parametrize("name", ["as it is", "restarts", "last", "mifgsm"])
def test_other_goals_are_the_loop_over_single_rows(name: str, goal: str) -> None:
    check(replace(PGDS[name], loss="ce"), pgd, Linf(eps=0.2), goal)


@pytest.mark.parametrize("queries", [0, 1, 3, 5, 9, 14])
@pytest.mark.parametrize("name", ["as it is", "restarts", "last", "eot", "mifgsm", "fgsm"])
def test_a_search_ends_with_the_budget(name: str, queries: int) -> None:
    played = check(PGDS[name], pgd, BALLS["linf"], "untargeted", queries=queries)
    assert int(played.meter.queries.max()) <= queries


@pytest.mark.slow
@pytest.mark.parametrize("name", ["as it is", "restarts", "last", "mifgsm"])
def test_rows_go_on_where_the_oracle_does_not_decide(name: str) -> None:
    played = check(PGDS[name], pgd, BALLS["l2"], "untargeted", decides=False)
    assert bool((played.meter.backwards == played.meter.backwards.max()).all())


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(
    "attack",
    [
        APGDCE(steps=25),
        APGDCE(steps=12, restarts=3, loss="margin"),
        APGDCE(steps=12, restarts=2, stop=False),
        APGDCE(steps=9, eot=2, loss="dlr"),
        APGDCE(steps=1),
    ],
    ids=str,
)
def test_apgd_is_the_loop_over_single_rows(attack: Any, norm: str) -> None:
    played = check(attack, apgd, BALLS[norm], "untargeted")
    assert 0 < played.reached.sum() < ROWS


@pytest.mark.parametrize("queries", [0, 1, 5, 13, 30])
def test_apgd_ends_with_the_budget(queries: int) -> None:
    played = check(APGDCE(steps=12, restarts=3), apgd, BALLS["linf"], "untargeted", queries=queries)
    assert int(played.meter.queries.max()) <= queries


def test_a_suite_passes_on_the_rows_that_are_left_and_returns_the_first_success() -> None:
    class Pair(Suite):
        def stages(self) -> tuple[Stage, ...]:
            return (
                Stage(name="weak", attack=PGD(steps=2, start="origin", step_size=0.25)),
                Stage(name="strong", attack=PGD(steps=9, restarts=2)),
                Stage(name="later", attack=FGSM(), when="escalated"),
            )

    net, x, ball = victim(), uniform(5, ROWS, 12), BALLS["linf"]
    goal = goals(net, x)["untargeted"]
    weak, strong = (stage.attack for stage in Pair().stages()[:2])
    first = play(weak, net, x, goal, ball, lanes=LANES)
    left = ~first.reached
    rng = RowRng.from_ids(0, names(ROWS)).at("strong").take(left)
    second = play(strong, net, x[left], goal.take(left), ball, lanes=LANES, rng=rng)
    both = play(Pair(), net, x, goal, ball, lanes=LANES)
    assert 0 < first.reached.sum() < both.reached.sum() < ROWS
    assert torch.equal(both.z[first.reached], first.z[first.reached])
    broken = left.nonzero().squeeze(1)[second.reached]
    assert torch.equal(both.z[broken], second.z[second.reached])
    # Between stages the suite asks once itself.
    assert torch.equal(both.meter.forwards[~left], first.meter.forwards[~left] + 1)
    assert torch.equal(both.meter.forwards[left], first.meter.forwards[left] + second.meter.forwards + 2)


def search_of(rows: int = 6, **settings: Any) -> tuple[Search, MeteredOracle, Any]:
    net = linear(space=Box(-1000.0, 1000.0))
    x = uniform(0, rows, 8)
    oracle = MeteredOracle(net, rows, **settings)
    goal = Untargeted(net(x).argmax(1))
    return Search(oracle, x, goal, RowRng.from_ids(0, names(rows))), oracle, goal


def test_everything_a_search_shows_is_of_the_active_rows() -> None:
    search, _, goal = search_of()
    x, values = search.x, torch.arange(6)
    assert search.drop(torch.tensor([True, False, False, True, False, False])).tolist() == [1, 2, 4, 5]
    assert search.drop(torch.tensor([False, True, False, False])).tolist() == [0, 2, 3]
    left = torch.tensor([1, 4, 5])
    assert len(search) == 3
    assert torch.equal(search.x, x[left])
    assert torch.equal(search.goal.labels, goal.labels[left])
    assert search.of(values).tolist() == left.tolist()
    assert torch.equal(search.rng.uniform(search.x), RowRng.from_ids(0, names(6)).uniform(x)[left])
    assert search.drop(torch.zeros(3, dtype=torch.bool)) is None
    assert torch.equal(search.best, x)


def test_a_step_keeps_what_the_attack_knows_beside_its_rows() -> None:
    search, _, goal = search_of()
    search.z = torch.where(torch.arange(6)[:, None] % 2 == 0, search.x + 100 * descent(search, goal), search.x)
    state = Best(search.x, goal)  # anything would do that has rows; here only `numbers` is looked at
    numbers = Numbers(torch.arange(6))
    for step in search.steps(1):
        assert step.kept(numbers).values.tolist() == [1, 3, 5]
        assert len(step.z) == len(step.x) == len(step.gradient) == len(step.loss) == 3
        assert torch.equal(step.loss, search.goal.loss(linear(space=Box(-1000.0, 1000.0))(step.z)))
    assert not state.reached.any()


def descent(search: Search, goal: Any) -> Tensor:
    net = linear(space=Box(-1000.0, 1000.0))
    return -(net.weight[goal.labels] - net.weight[1 - goal.labels])


class Numbers:
    def __init__(self, values: Tensor) -> None:
        self.values = values

    def take(self, rows: Tensor) -> Numbers:
        return Numbers(self.values[rows])


def test_another_goal_is_descended_and_the_best_points_are_shared() -> None:
    search, oracle, goal = search_of()
    aside = search.toward(Targeted(goal.labels, "margin"))  # the wrong way
    aside.z = search.x + 1e-3
    for step in aside.steps(1):
        assert torch.allclose(step.gradient, descent(search, goal), atol=1e-6)
    assert len(aside) == len(search) == 6
    assert torch.equal(aside.best, search.best)
    assert bool((search.best != search.x).any()), "what one saw, the other has"
    assert (oracle.meter.forwards == 1).all()


def test_points_are_put_unscored_or_offered_with_answers_known() -> None:
    search, oracle, _ = search_of()
    search.put(search.x + 1)
    assert torch.equal(search.best, search.x + 1)
    search.offer(search.x + 2, torch.full((6, 2), torch.nan))
    assert torch.equal(search.best, search.x + 1)
    assert (oracle.meter.forwards == 0).all()


def bare_step(oracle: MeteredOracle, x: Tensor, goal: Any, ball: Any, steps: int) -> None:
    """What no projected gradient descent that keeps its best point can do without."""
    z, best, lowest = x, x, torch.full((len(x),), torch.inf)
    for _ in range(steps):
        loss, gradient, answer = oracle.gradient(z, goal)
        if bool(goal.none_reached(answer)):
            lower = loss < lowest
            lowest = torch.where(lower, loss, lowest)
            best = torch.where(lower.view(-1, 1), z, best)
        z = ball.descend(z, gradient, x, 0.1)


def per_step(run: Any) -> float:
    """Operations that reach torch's dispatcher per step, of rows none of which is broken."""
    counted = []
    for steps in (10, 30):
        net, x = victim(), uniform(5, 16, 12)
        goal = goals(net, x)["untargeted"]
        ball = Linf(eps=1e-6)
        oracle = MeteredOracle(net, 16, lanes=LANES)
        with frozen(net), Ops() as ops:
            run(oracle, x, goal, ball, steps)
        counted.append(ops.ops)
    return (counted[1] - counted[0]) / 20


def test_a_step_of_pgd_costs_less_than_a_bare_one() -> None:
    """It asks about its points as they are, without a copy, and compares those of eight steps at once."""
    bare = per_step(bare_step)
    rng = RowRng.from_ids(0, names(16))
    ours = per_step(lambda oracle, x, goal, ball, steps: PGD(steps=steps)(oracle, x, goal, ball, rng))
    assert ours <= bare - 4


def test_waiting_points_are_told_as_one_by_one() -> None:
    """The first of equal losses, whatever NaN and infinities are among them; of rows that leave meanwhile, too."""
    generator = torch.Generator().manual_seed(3)
    x, goal = torch.zeros(6, 2), Untargeted(torch.zeros(6, dtype=torch.long))
    waited, compared = Best(x, goal), Best(x, goal)
    answer = torch.tensor([[1.0, 0.0]]).repeat(6, 1)
    rows = torch.tensor([0, 2, 5])
    for number in range(60):
        index = rows if 25 < number < 40 else None
        n = 6 if index is None else 3
        loss = torch.randint(-number // 9, 3, (n,), generator=generator).float()
        loss[torch.rand(n, generator=generator) < 0.1] = [math.nan, math.inf, -5.0][number % 3]
        z, told = torch.rand(n, 2, generator=generator), answer[:n]
        reached = waited.step(z, told, loss, index)
        assert reached is None or not reached.any()
        compared.compare(z, told, loss, index)
        if number % 7 == 0:
            assert torch.equal(waited.x, compared.x)
            assert torch.equal(waited.loss, compared.loss)
    broken = answer.flip(1)
    assert bool(waited.step(x + 3, broken, loss=torch.ones(6)).all())
    assert torch.equal(waited.x, x + 3)
    assert bool(waited.reached.all())


def test_points_that_wait_may_not_be_written_to() -> None:
    best = Best(torch.zeros(2, 2), Untargeted(torch.zeros(2, dtype=torch.long)))
    z = torch.ones(2, 2)
    best.step(z, torch.tensor([[1.0, 0.0]]).repeat(2, 1), torch.zeros(2))
    z += 1
    with pytest.raises(RuntimeError, match="new tensor"):
        _ = best.x


def test_a_step_of_apgd_costs_a_bare_one_and_its_own_momentum_and_reviews() -> None:
    """Allowed beside that: momentum (two interpolations, a projection), what improved and the lowest loss's own point.

    That is a comparison and a sum for the improved steps, and a comparison, a view and three choices for the point of
    lowest loss; a review, in eight steps of a hundred and at most in one of three, has about twenty.
    """
    bare = per_step(bare_step)
    rng = RowRng.from_ids(0, names(16))
    ours = per_step(lambda oracle, x, goal, ball, steps: APGDCE(steps=steps)(oracle, x, goal, ball, rng))
    assert ours <= bare - 4 + 3 + 2 + 5 + 20 / 3


def test_momentum_and_averages_survive_the_rows_that_leave() -> None:
    """The accumulated gradient of a row does not depend on who left before."""
    net, x = victim(), uniform(5, ROWS, 12)
    goal = goals(net, x)["untargeted"]
    oracle = momentum(averaged(MeteredOracle(net, ROWS, lanes=LANES), 2))
    search = Search(oracle, x, goal, RowRng.from_ids(0, names(ROWS)), stop=False)
    alone = momentum(averaged(MeteredOracle(net, ROWS, lanes=LANES).take(torch.tensor([3, 7])), 2))
    for step in search.steps(3):
        _, gradient, _ = alone.gradient(step.z[[3, 7]], goal.take(torch.tensor([3, 7])))
        assert torch.equal(step.gradient[[3, 7]], gradient)
        search.z = step.z + 0.01
