"""Ordered top-K attacks: the loop's arithmetic, its promises per row, what it serves, and the published effects."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from advkit.attacks import ATTACKS
from advkit.attacks.optimiser import AdamW
from advkit.attacks.ordered import quadattack
from advkit.attacks.ordered.ad_topk import ADTopK, cosines
from advkit.attacks.ordered.cw_topk import CWTopK
from advkit.attacks.ordered.quadattack import QuadAttack
from advkit.core.errors import UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models.torch import TorchModel
from advkit.testing import play
from advkit.threat_models.goals import polyhedron
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.ordered_topk import OrderedTopK, OutOfTopK, TopK, drawn_targets
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L2, Linf
from advkit.threat_models.minimum import MinimumL2

THREE = {"quadattack": QuadAttack, "cw_topk": CWTopK, "ad_topk": ADTopK}
GRADIENT = ["fgsm", "pgd", "mifgsm", "apgd-ce", "apgd-margin", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
methods = pytest.mark.parametrize("name", THREE)


class WithHead(MeteredOracle):
    """Shows the model's last layer, whatever it wraps."""

    def head(self):
        return self.model.head()


def ids(n):
    return [f"row-{i}" for i in range(n)]


def goal_of(labels, k, classes=10, seed=0, names=None):
    return OrderedTopK(drawn_targets(labels, classes, k, RowRng.from_ids(seed, names or ids(len(labels))).at("goal")))


def find(attack, model, x, goal, *, names=None, seed=0, box=None, oracle=None):
    oracle = WithHead(model, len(x)) if oracle is None else oracle
    threat = MinimumL2(box=model.space if box is None else box)
    return attack.find(oracle, x, goal, threat, RowRng.from_ids(seed, names or ids(len(x))))


@pytest.fixture(scope="module")
def deep():
    """(model, x, y): an MLP 64-64-64-10 on digits and 200 test images that it reads rightly."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[:360], order[360:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
        module = nn.Sequential(nn.Flatten(), *layers)
        optimizer = torch.optim.Adam(module.parameters(), 3e-3)
        for _ in range(60):
            for rows in train[torch.randperm(len(train))].split(128):
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x[rows]), y[rows]).backward()
                optimizer.step()
    module.eval()
    x, y = x[test], y[test]
    with torch.no_grad():
        right = module(x).argmax(1) == y
    return TorchModel(module, Box(shape=(1, 8, 8)), 10), x[right][:200], y[right][:200]


def test_adamw_is_torchs():
    start = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=0.03, weight_decay=0.01)
    ours, value = AdamW(start, 0.03, 0.01), start
    for step in range(30):
        gradient = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1 + step)) * 10 ** (step % 5 - 2)
        theirs.grad = gradient.clone()
        optimizer.step()
        value = ours.step(value, gradient)
        torch.testing.assert_close(value, theirs.detach(), rtol=2e-6, atol=2e-7)


def test_the_loop_is_the_published_one(digits):
    """The same walk by torch's own AdamW and plain autograd, row by row, gives the same points."""
    model, x, y = digits
    x, y = x[:4], y[:4]
    goal = goal_of(y, 2)
    attack = CWTopK(budget="1x25", lr=0.05, coefficient=20.0)
    found = find(attack, model, x, goal)
    noise = RowRng.from_ids(0, ids(4)).at("start", 0).normal(x)
    for row in range(4):
        delta = ((x[row : row + 1] + 2e-3 * noise[row]).clamp(0, 1) - x[row : row + 1]).requires_grad_()
        weight, best, least = 10.0, x[row : row + 1], float("inf")
        aim = goal.take(torch.tensor([row])).under("cw")
        for step in range(25):
            if step in (0, 5):
                optimizer = torch.optim.AdamW([delta], lr=0.05, weight_decay=0.01)
            answer = model(x[row : row + 1] + delta)
            energy = float(delta.detach().norm())
            nearer = bool(aim.reached(answer.detach())) and energy <= least
            if nearer:
                best, least = (x[row : row + 1] + delta).detach().clone(), energy
            optimizer.zero_grad()
            (weight * aim.loss(answer).sum() + delta.square().sum()).backward()
            optimizer.step()
            weight *= 0.75 if nearer else 1
            with torch.no_grad():
                delta.copy_((x[row : row + 1] + delta).clamp(0, 1) - x[row : row + 1])
        assert torch.isfinite(found.energy[row]) == (least < float("inf"))
        torch.testing.assert_close(found.x[row : row + 1], best, rtol=0, atol=2e-4)


@methods
def test_what_it_says_is_so(name, digits):
    """In the box; success as a fresh forward says; energy the distance; failures untouched; a batch of strangers."""
    model, x, y = digits
    x, y = x[:40], y[:40]
    goal = goal_of(y, 3)
    found = find(THREE[name](budget="1x25"), model, x, goal)
    with torch.no_grad():
        reached = goal.reached(model(found.x))
    assert torch.equal(found.reached, reached)
    assert 5 < reached.sum() < 40
    assert found.x.min() >= 0
    assert found.x.max() <= 1
    torch.testing.assert_close(found.energy[reached], (found.x - x).flatten(1).double().norm(dim=1)[reached])
    assert torch.equal(found.x[~reached], x[~reached])
    assert (found.energy[~reached] == torch.inf).all()
    assert torch.equal(found.first >= 0, reached)
    assert found.first.max() < 25


@methods
def test_a_row_gets_in_any_batch_what_it_gets_alone(name, digits):
    model, x, y = digits
    x, y, names = x[:70], y[:70], ids(70)
    goal = goal_of(y, 4)
    attack = THREE[name](budget="2x8")
    whole = find(attack, model, x, goal)
    for rows in (torch.tensor([3]), torch.arange(69, 40, -1), torch.arange(7)):
        part = find(attack, model, x[rows], goal.take(rows), names=[names[i] for i in rows.tolist()])
        assert torch.equal(part.x, whole.x[rows])
        assert torch.equal(part.energy, whole.energy[rows])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["auto", "identity"])
@pytest.mark.parametrize("size", [1, 7])
def test_batches_of_one_seven_and_all_agree(size, head, digits):
    """Each program starts from the row's own last one, whatever rows it is solved with."""
    model, x, y = digits
    rows = 70  # more than the oracle asks about at a time
    x, y, names = x[:rows], y[:rows], ids(rows)
    goal = goal_of(y, 7)
    attack = QuadAttack(budget="1x6", head=head)
    whole = find(attack, model, x, goal)
    for part in torch.arange(rows).split(size)[:: 1 if size > 1 else 6]:
        alone = find(attack, model, x[part], goal.take(part), names=[names[i] for i in part.tolist()])
        assert torch.equal(alone.x, whole.x[part])
        assert torch.equal(alone.energy, whole.energy[part])
        assert torch.equal(alone.first, whole.first[part])


@pytest.mark.slow
def test_programs_start_from_the_last_step(digits, monkeypatch):
    """Warm starts save most of the linear systems and change nothing else."""
    model, x, y = digits
    x, y = x[:70], y[:70]
    goal = goal_of(y, 7)

    def run(warmly):
        systems, starts = [], []

        def counted(logits, gram, pairs, margin, warm=None):
            starts.append(warm)
            solution = polyhedron.solve(logits, gram, pairs, margin, warm=warm if warmly else None)
            systems.append(int(solution.rounds.sum()))
            return solution

        monkeypatch.setattr(quadattack, "solve", counted)
        return find(QuadAttack(budget="1x20"), model, x, goal), sum(systems), starts

    cold, cold_systems, _ = run(False)
    warm, warm_systems, starts = run(True)
    assert len(starts) == 20  # one call for all rows
    assert starts[0] is None
    assert all(start.shape == (len(x), 9) for start in starts[1:])
    assert warm_systems < 0.6 * cold_systems
    assert torch.equal(cold.reached, warm.reached)
    torch.testing.assert_close(cold.x, warm.x, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_thousand_classes_do_not_mix_rows():
    """The solver's working sets grow by batch; what a row gets does not."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 256), nn.Tanh(), nn.Linear(256, 1000))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    model = TorchModel(net.eval(), Box(shape=(3, 4, 4)), 1000)
    x = torch.rand(5, 3, 4, 4, generator=generator)
    goal = goal_of(model(x).argmax(1), 20, 1000)
    attack = QuadAttack(budget="1x6")
    points = []
    for rows in (torch.arange(5), torch.tensor([2]), torch.tensor([4, 2])):
        asked = []

        class Listening(WithHead):
            def gradient(self, z, aim, of=None, asked=asked):
                asked.append(z)
                return super().gradient(z, aim, of)

        names = [ids(5)[i] for i in rows.tolist()]
        oracle = Listening(model, len(rows), lanes=Lanes())
        find(attack, model, x[rows], goal.take(rows), names=names, oracle=oracle)
        points.append(torch.stack(asked)[:, rows.tolist().index(2)])
    assert not torch.equal(points[0][0], points[0][-1])
    assert torch.equal(points[0], points[1])
    assert torch.equal(points[0], points[2])


@pytest.mark.slow
@methods
def test_more_coefficients_come_nearer_and_lose_nothing(name, digits):
    model, x, y = digits
    x, y = x[:24], y[:24]
    goal = goal_of(y, 2)
    one, four = (find(THREE[name](budget=budget), model, x, goal) for budget in ("1x30", "3x30"))
    assert not (one.reached & ~four.reached).any()
    both = one.reached & four.reached
    assert (four.energy[both] <= one.energy[both]).all()
    assert four.energy[both].mean() < 0.95 * one.energy[both].mean()


def test_the_last_step_is_seen_where_asked_for(digits):
    model, x, y = digits
    x, y = x[:30], y[:30]
    goal = goal_of(y, 2)
    without, with_ = WithHead(model, 30), WithHead(model, 30)
    blind = find(CWTopK(budget="2x10"), model, x, goal, oracle=without)
    seeing = find(CWTopK(budget="2x10", eval_last=True), model, x, goal, oracle=with_)
    counts = [(oracle.meter.forwards, oracle.meter.backwards) for oracle in (without, with_)]
    assert all((forwards == answers).all() for (forwards, _), answers in zip(counts, (20, 22), strict=True))
    assert all((backwards == 20).all() for _, backwards in counts)
    longer = find(CWTopK(budget="1x11"), model, x, goal)
    ten = find(CWTopK(budget="1x10", eval_last=True), model, x, goal)
    assert torch.equal(longer.x, ten.x)
    assert seeing.reached.sum() >= blind.reached.sum()


@pytest.mark.slow
def test_expanding_reaches_what_a_small_coefficient_can_not(digits):
    model, x, y = digits
    x, y = x[:20], y[:20]
    goal = goal_of(y, 2)
    small = CWTopK(coefficient=0.1, budget="6x30")
    assert find(small, model, x, goal).reached.float().mean() < 0.2
    assert find(replace(small, expand=True), model, x, goal).reached.float().mean() > 0.6


def test_the_first_success_is_counted_in_steps_of_the_whole_attack(digits):
    model, x, y = digits
    goal = goal_of(y[:20], 1)
    long = find(CWTopK(budget="1x40"), model, x[:20], goal)
    just = int(long.first.median())
    cut = find(CWTopK(budget=f"1x{just + 1}"), model, x[:20], goal)
    assert torch.equal(cut.reached, (long.first <= just) & long.reached)
    late = find(CWTopK(budget="2x40", coefficient=0.4), model, x[:20], goal)
    assert ((late.first < 80) & (late.first >= -1)).all()


@pytest.mark.slow
def test_goals_that_are_served(digits):
    """A targeted goal is one place; classes in any order and out of the top K are polyhedra too."""
    model, x, y = digits
    x, y = x[:24], y[:24]
    rng = RowRng.from_ids(0, ids(24))
    target = drawn_targets(y, 10, 1, rng)
    three = drawn_targets(y, 10, 3, rng)
    for attack in (QuadAttack(budget="1x30"), CWTopK(budget="1x30"), ADTopK(budget="1x30")):
        targeted = find(attack, model, x, Targeted(target[:, 0]))
        assert torch.equal(targeted.x, find(attack, model, x, OrderedTopK(target)).x)
        assert targeted.reached.float().mean() > 0.9
        unordered, in_order = find(attack, model, x, TopK(three)), find(attack, model, x, OrderedTopK(three))
        assert unordered.reached.float().mean() >= in_order.reached.float().mean()
        assert unordered.reached.float().mean() > 0.8
        if isinstance(attack, ADTopK):
            with pytest.raises(UsageError, match=r"ad_topk was given the goal OutOfTopK.*ordered-topk, topk, targeted"):
                find(attack, model, x, OutOfTopK(y, 2))
        else:
            assert find(attack, model, x, OutOfTopK(y, 2)).reached.float().mean() > 0.9


@methods
def test_goals_and_threat_models_that_are_refused(name, digits):
    model, x, y = digits
    attack = THREE[name]()
    for goal in (Untargeted(y), Diverge(model(x).detach())):
        with pytest.raises(
            UsageError, match=f"{name} was given the goal {type(goal).__name__}; it serves ordered-topk"
        ):
            find(attack, model, x, goal)
    for ball in (Linf(0.1), L2(1.0)):
        with pytest.raises(UsageError, match=f"{name} was asked for {type(ball).__name__}; .* works in minimum-l2"):
            attack(WithHead(model, len(x)), x, goal_of(y, 2), ball, RowRng.from_ids(0, ids(len(x))))


@pytest.mark.slow
def test_the_head_is_asked_for_and_matters(digits, caplog):
    model, x, y = digits
    x, y = x[:12], y[:12]
    goal = goal_of(y, 3)
    through = find(QuadAttack(budget="1x20"), model, x, goal)
    logits = find(QuadAttack(budget="1x20", head="identity"), model, x, goal)
    assert not torch.equal(through.x, logits.x)

    class Headless(WithHead):
        def head(self):
            return None

    with caplog.at_level(logging.INFO, logger="advkit"):
        without = find(QuadAttack(budget="1x20"), model, x, goal, oracle=Headless(model, 12))
    assert torch.equal(without.x, logits.x)
    assert "no linear last layer" in caplog.text


def test_similarities_of_the_distillation(digits):
    model, x, y = digits
    x, y = x[:12], y[:12]
    goal = goal_of(y, 3)
    weight = model.head().double().numpy()
    length = (weight**2).sum(1) ** 0.5
    expected = weight @ weight.T / length[:, None] / length
    torch.testing.assert_close(cosines(model.head()), torch.as_tensor(expected))
    by_head = find(ADTopK(budget="1x15"), model, x, goal)
    given = find(ADTopK(budget="1x15", similarity=cosines(model.head())), model, x, goal)
    alone = find(ADTopK(budget="1x15", similarity="none"), model, x, goal)
    identity = find(ADTopK(budget="1x15", similarity=torch.eye(10)), model, x, goal)
    assert torch.equal(by_head.x, given.x)
    assert torch.equal(alone.x, identity.x)
    assert not torch.equal(by_head.x, alone.x)


def test_a_head_that_can_not_order_the_classes_is_said_and_survived(caplog):
    """A single feature orders classes by slope or backwards: most orders have no features at all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 1), nn.Linear(1, 8)).eval()
    model = TorchModel(net, Box(shape=(6,)), 8)
    x = torch.rand(10, 6, generator=torch.Generator().manual_seed(1))
    goal = goal_of(model(x).argmax(1), 6, 8)
    with caplog.at_level(logging.WARNING, logger="advkit"):
        found = find(QuadAttack(budget="1x10"), model, x, goal)
    assert not found.reached.any()
    assert torch.equal(found.x, x)
    assert caplog.text.count("no features of this head order the classes") == 1


def test_settings_and_defaults():
    attack = ATTACKS.build("quadattack:k=10,budget=9x30")
    assert attack == QuadAttack(k=10, budget="9x30")
    assert (attack.default_goal, attack.default_threat_model) == ("ordered-topk:k=10", "minimum-l2")
    assert attack.effort == (9, 30)
    for wrong in (
        "budget=60", "budget=0x60", "budget=9x", "lr=0", "coefficient=0", "decay=0", "decay=1.5", "warmup=-1",
        "noise=-1", "weight_decay=-1", "k=0", "eot=0", "margin=0", "head=none",
    ):  # fmt: skip
        with pytest.raises(UsageError, match=wrong.split("=")[0]):
            ATTACKS.build(f"quadattack:{wrong}")
    with pytest.raises(UsageError, match="kappa"):
        ATTACKS.build("cw_topk:kappa=-1")
    with pytest.raises(UsageError, match="beta"):
        ATTACKS.build("ad_topk:beta=-0.3")


@pytest.mark.slow
@pytest.mark.parametrize("name", GRADIENT)
def test_every_attack_serves_the_ordered_goals_in_balls(name, digits):
    """No attack of the registry was written for them; each reaches them where the ball is large enough."""
    model, x, y = digits
    rows = 16
    x, y = x[:rows], y[:rows]
    targets = drawn_targets(y, 10, 2, RowRng.from_ids(0, ids(rows)))
    attack = ATTACKS.build(name)
    cut = {n: v for n, v in (("steps", 25), ("queries", 250)) if hasattr(attack, n) and name != "fgsm"}
    attack = replace(attack, **cut)
    for ball in (Linf(0.35), L2(2.0)):
        for goal, floor in ((OrderedTopK(targets), 0.6), (TopK(targets), 0.7), (OutOfTopK(y, 2), 0.9)):
            played = play(attack, model, x, goal, ball)
            assert ball.admits(played.z, x).all()
            assert not goal.reached(model(x)).any()
            # One step, 250 guesses, or the worst pair alone as boundary only start on the way; they must come nearer
            # than the untouched rows are.
            if name in ("fgsm", "square", "fab", "fab-t"):
                assert (played.margin < goal.margin(model(x))).float().mean() > 0.6
            else:
                assert played.reached.float().mean() >= floor, (ball, goal)


@pytest.mark.parametrize(("loss", "floor"), [("cw", 0.5), ("ad", 0.25), ("quad", 0.5)])
def test_their_losses_serve_any_gradient_attack(loss, floor, digits):
    model, x, y = digits
    goal = goal_of(y[:30], 4)
    reached = play(ATTACKS.build(f"pgd:steps=30,loss={loss}"), model, x[:30], goal, L2(2.5)).reached
    assert reached.float().mean() > floor


@pytest.mark.slow
def test_seven_places_in_sixty_steps(deep):
    """The published effect: the exact projection orders seven classes of ten where the others mostly fail."""
    model, x, y = deep
    goal = goal_of(y, 7)
    rate = {name: float(find(made(), model, x, goal).reached.float().mean()) for name, made in THREE.items()}
    assert rate["quadattack"] >= 0.80
    assert rate["quadattack"] - rate["cw_topk"] >= 0.25
    assert rate["quadattack"] - rate["ad_topk"] >= 0.40


@pytest.mark.slow
def test_the_search_buys_energy(deep):
    model, x, y = deep
    x, y = x[:100], y[:100]
    goal = goal_of(y, 3)
    one, nine = (find(QuadAttack(budget=budget), model, x, goal) for budget in ("1x60", "9x60"))
    assert one.reached.float().mean() >= 0.98
    both = one.reached & nine.reached
    assert nine.energy[both].mean() <= 0.85 * one.energy[both].mean()
