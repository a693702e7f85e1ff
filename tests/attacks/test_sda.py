"""SDA against exhaustive search, its phases one by one, and the rows' independence of everything around them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import advkit
from advkit.attacks import ATTACKS
from advkit.attacks.events import sda
from advkit.attacks.events.sda import SDA, RandomFlips, TopKGrad
from advkit.core.errors import BadModel, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Outcome
from advkit.core.rng import RowRng
from advkit.evaluation.run.store import read_records
from advkit.models import MODELS
from advkit.tasks import TASKS
from advkit.threat_models.events import Flips
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf

SHAPE = (2, 2, 3, 3)
P = math.prod(SHAPE)
ROWS = 16
EVERY = SDA(early=True, prefix=True, prune=True)


class Net:
    """tanh features of 36 bits, four classes: most rows fall to one flip, some to two or three."""

    def __init__(self, seed):
        draw = torch.Generator().manual_seed(seed)
        self.first = 1.2 / 6 * torch.randn(24, P, generator=draw)
        self.bias = 0.3 * torch.randn(24, generator=draw)
        self.last = torch.randn(4, 24, generator=draw)
        self.x = (torch.rand(ROWS, *SHAPE, generator=draw) < 0.3).float()
        self.ids = [f"{seed}-{row}" for row in range(ROWS)]
        self.y = self(self.x).argmax(1)

    def __call__(self, x):
        return torch.tanh(x.flatten(1) @ self.first.T + self.bias) @ self.last.T


NETS = [Net(seed) for seed in range(6)]


def find(attack, model, x, goal, threat=None, *, ids=None, seed=0, queries=None, decides=True):
    oracle = MeteredOracle(model, len(x), attack.needs, queries, decides)
    rng = RowRng.from_ids(seed, ids or [str(row) for row in range(len(x))])
    if isinstance(attack, SDA):
        return attack.find(oracle, x, goal, threat or Flips(), rng), oracle.meter
    return attack(oracle, x, goal, threat or Flips(), rng), oracle.meter


def on(net, attack, threat=None, **settings):
    return find(attack, net, net.x, Untargeted(net.y), threat, ids=net.ids, **settings)


def count(z, x):
    return (z != x).flatten(1).sum(1)


@pytest.fixture(scope="module")
def fewest():
    """The fewest flips that change each row's decision, by enumeration; 4 where three do not."""
    found = []
    for net in NETS:
        best = torch.full((ROWS,), 4)
        for size in (3, 2, 1):
            chosen = torch.tensor(list(itertools.combinations(range(P), size)))
            flips = torch.zeros(len(chosen), P).scatter_(1, chosen, 1.0)
            for row in range(ROWS):
                z = (net.x[row].flatten() - flips).abs()
                if bool((net(z).argmax(1) != net.y[row]).any()):
                    best[row] = size
        found.append(best)
    return torch.cat(found)


def flips_of(attack):
    return torch.cat([on(net, attack)[0].flips for net in NETS]), torch.cat(
        [on(net, attack)[0].reached for net in NETS]
    )


def test_the_nets_are_no_child_s_play(fewest):
    counts = torch.bincount(fewest, minlength=5)
    assert counts[1] >= 20
    assert counts[2] + counts[3] >= 15


@pytest.mark.slow
def test_never_below_the_optimum_and_early_finds_every_single_flip(fewest):
    one = fewest == 1
    plain, fell = flips_of(SDA())
    assert bool((plain >= fewest)[fell].all())
    assert float((plain[one] == 1).float().mean()) >= 0.75
    early, reached = flips_of(SDA(early=True, k_init=P))
    assert bool((early[one] == 1).all())
    assert bool(reached[one].all())
    assert bool((early >= fewest)[reached].all())
    every, both = flips_of(EVERY)
    both = both & fell
    assert float(every[both].float().mean()) <= float(plain[both].float().mean())
    assert bool((every >= fewest)[both].all())


@pytest.mark.parametrize("attack", [SDA(), SDA(k_init=P), EVERY, SDA(filter=False), SDA(steps=1, k_init=2)], ids=str)
def test_what_is_returned_is_what_is_said(attack):
    for net in NETS[:3]:
        found, meter = on(net, attack)
        x, z = net.x, found.x
        assert z.shape == x.shape
        assert bool(((z == 0) | (z == 1)).all())
        assert torch.equal(found.reached, net(z).argmax(1) != net.y)
        assert torch.equal(count(z, x) > 0, found.reached)
        assert torch.equal(count(z, x), found.flips)
        assert bool((found.flips <= found.before).all())
        assert torch.equal(found.forwards, meter.forwards)
        assert torch.equal(found.backwards, meter.backwards)
        assert bool((found.steps <= attack.steps).all())
    if attack.steps == 1:
        assert not bool(found.reached.all())


@pytest.mark.slow
def test_every_row_is_its_own(monkeypatch):
    net = NETS[0]
    for attack in (SDA(k_init=3), EVERY):
        whole, meter = on(net, attack)
        again, _ = on(net, attack)
        assert torch.equal(whole.x, again.x)
        for rows in (torch.tensor([5]), torch.arange(7), torch.arange(ROWS).flip(0)):
            part, alone = find(
                attack, net, net.x[rows], Untargeted(net.y[rows]), ids=[net.ids[row] for row in rows.tolist()]
            )
            assert torch.equal(part.x, whole.x[rows])
            assert torch.equal(alone.forwards, meter.forwards[rows])
        for chunk in (1, 5 * P, 10**9):
            other, _ = on(net, type(attack)(**{**vars(attack), "chunk": chunk}))
            assert torch.equal(other.x, whole.x)
        with monkeypatch.context() as patch:
            patch.setattr(sda, "HELD", 3 * P)  # three rows at a time
            other, grouped = on(net, attack)
        assert torch.equal(other.x, whole.x)
        assert torch.equal(grouped.forwards, meter.forwards)


def test_candidates_of_many_rows_share_a_batch():
    net, sizes = NETS[0], []

    def counted(x):
        sizes.append(len(x))
        return net(x)

    attack = SDA(k_init=4, reduce=False)
    found, meter = find(attack, counted, net.x, Untargeted(net.y), ids=net.ids)
    # Per iteration one look and one batch of candidates, each in calls of 64 at most.
    assert len(sizes) <= 2 * (int(found.steps.max()) + 1) + int(meter.forwards.sum()) // 64
    assert max(sizes) == 64


def decisive(bit, bits=P):
    """The margin is 1 - 2 x[bit]: no other bit matters."""

    def answer(x):
        score = 1 - 2 * x.flatten(1)[:, bit]
        return torch.stack([score, torch.zeros_like(score)], 1)

    return answer


@pytest.mark.parametrize("k_init", [10, P])
def test_reduction_leaves_the_one_decisive_bit(k_init):
    x = torch.zeros(3, *SHAPE)
    goal = Untargeted(torch.zeros(3, dtype=torch.long))
    whole, _ = find(SDA(k_init=k_init, reduce=False), decisive(7), x, goal)
    assert whole.flips.tolist() == [k_init] * 3  # a flip that changes nothing is kept, as published
    found, _ = find(SDA(k_init=k_init), decisive(7), x, goal)
    assert found.flips.tolist() == [1, 1, 1]
    assert found.x.flatten(1)[:, 7].tolist() == [1, 1, 1]
    assert bool((found.forwards - whole.forwards <= math.ceil(math.log2(k_init + 1))).all())
    early, _ = find(SDA(k_init=k_init, early=True), decisive(7), x, goal)
    assert torch.equal(early.x, found.x)
    assert early.forwards.tolist() == [1 + k_init] * 3


def test_pruned_rows_are_1_minimal():
    smaller = 0
    for net in NETS:
        reduced, _ = on(net, SDA(filter=False, k_init=6))
        pruned, _ = on(net, SDA(filter=False, k_init=6, prune=True))
        assert torch.equal(reduced.reached, pruned.reached)
        assert bool((pruned.flips <= reduced.flips).all())
        smaller += int((reduced.flips - pruned.flips).sum())
        for row in pruned.reached.nonzero().flatten().tolist():
            z, x = pruned.x[row].flatten(), net.x[row].flatten()
            for bit in (z != x).nonzero().flatten().tolist():
                restored = z.clone()
                restored[bit] = x[bit]
                assert net(restored[None]).argmax(1) == net.y[row]
    assert smaller > 0


def test_prefix_flips_the_shortest_prefix_that_is_enough():
    """Three bits of one unit each against a margin of two and a half, and a fourth that undoes them all together."""
    weight = torch.zeros(P)
    weight[:4] = torch.tensor([1.0, 1.0, 1.0, 0.9])

    def answer(x):
        flat = x.flatten(1)
        score = 2.5 - flat @ weight + 5 * (flat[:, 0] * flat[:, 3])
        return torch.stack([score, torch.zeros_like(score)], 1)

    x, goal = torch.zeros(1, *SHAPE), Untargeted(torch.zeros(1, dtype=torch.long))
    kept, _ = find(SDA(k_init=4, reduce=False, prefix=True), answer, x, goal)
    assert kept.x.flatten(1).nonzero()[:, 1].tolist() == [0, 1, 2]
    assert kept.steps.tolist() == [1]
    together, _ = find(SDA(k_init=4, reduce=False), answer, x, goal)
    assert together.before.tolist() != [3]


def test_targets_directions_and_budgets():
    net = NETS[1]
    goal = Targeted((net.y + 1) % 4)
    found, _ = find(SDA(), net, net.x, goal, ids=net.ids)
    assert torch.equal(found.reached, net(found.x).argmax(1) == goal.targets)
    assert int(found.reached.sum()) >= ROWS // 2
    for allow, sign in (("add", 1), ("delete", -1)):
        z = on(net, SDA(), Flips(allow=allow))[0].x
        move = z - net.x
        assert bool((move * sign >= 0).all())
        assert bool((move != 0).any())
    free = on(net, SDA())[0]
    for n in (0, 1, 2):
        bound, _ = on(net, SDA(), Flips(n=n))
        within = free.reached & (free.flips <= n)
        assert torch.equal(bound.reached, within)
        assert torch.equal(bound.x, torch.where(within.view(-1, 1, 1, 1, 1), free.x, net.x))


def test_forwards_are_kept_within_the_budget():
    net = NETS[2]
    for most in (1, 2, 3, 9, 20):
        for attack in (SDA(max_forwards=most), SDA(max_forwards=most, prefix=True, prune=True)):
            found, meter = on(net, attack)
            assert int(meter.forwards.max()) <= most
            assert torch.equal(found.reached, net(found.x).argmax(1) != net.y)
    limited, meter = on(net, SDA(), queries=9)
    assert int(meter.queries.max()) <= 9
    assert torch.equal(limited.x, on(net, SDA(max_forwards=9))[0].x)


def test_more_bits_than_there_are_and_rows_that_can_t_be_won():
    x = torch.zeros(2, 1, 2, 2, 2)
    goal = Untargeted(torch.zeros(2, dtype=torch.long))

    def never(z):
        return torch.stack([1 + 0 * z.flatten(1).sum(1), 0 * z.flatten(1).sum(1)], 1)

    for attack in (SDA(k_init=50), TopKGrad(k_init=50), RandomFlips(first=50)):
        z, meter = find(attack, never, x, goal)
        assert torch.equal(z.x if isinstance(attack, SDA) else z, x)
        assert int(meter.forwards.max()) <= 12
    found, meter = find(SDA(), never, x, goal)
    assert found.reached.tolist() == [False, False]
    wrong, meter = find(SDA(), never, x, Untargeted(torch.ones(2, dtype=torch.long)))
    assert torch.equal(wrong.x, x)
    assert meter.forwards.tolist() == [1, 1]
    empty, _ = find(SDA(), never, x[:0], goal.take(torch.arange(0)))
    assert empty.x.shape == (0, 1, 2, 2, 2)


def test_a_rejected_bit_is_not_asked_about_again_where_nothing_changed():
    """A bit that hides behind useless ones: the points asked about are all different."""
    seen = []

    def answer(x):
        seen.extend(tuple(row.flatten().tolist()) for row in x.detach())
        flat = x.flatten(1)
        score = 1 + 0.1 * flat[:, :30].sum(1) - 2 * flat[:, 35] + 1e-3 * (flat[:, 30:35] ** 2 - flat[:, 30:35]).sum(1)
        return torch.stack([score, torch.zeros_like(score)], 1)

    x = torch.zeros(1, *SHAPE)
    oracle = MeteredOracle(answer, 1, lanes=sda_lanes())
    found = SDA(k_init=1).find(
        oracle, x, Untargeted(torch.zeros(1, dtype=torch.long)), Flips(), RowRng.from_ids(0, ["a"])
    )
    assert found.reached.all()
    assert len(set(seen)) >= len(seen) - 1  # the point that the single candidate won is looked at once more


def sda_lanes():
    from advkit.core.lanes import Lanes

    return Lanes(64, 1)


class Switchable(nn.Module):
    """Bits through a step whose gradient is the rule's: none of its own."""

    def __init__(self, net, rule=None):
        super().__init__()
        self.net, self.rule = net, rule
        self.asked = []

    def with_rule(self, rule):
        self.asked.append(rule)
        return Switchable(self.net, rule)

    def forward(self, x):
        hard = (x > 0.5).to(x.dtype)
        if self.rule == "pdsg":
            hard = hard + x - x.detach()
        return self.net(hard)


def test_the_surrogate_is_the_attacker_s_choice():
    net = NETS[3]
    model = Switchable(net)
    found, meter = on_model(model, net, SDA())
    assert model.asked == ["pdsg"]
    assert torch.equal(found.x, on(net, SDA())[0].x)
    assert not bool(meter.zero_gradient.any())
    other, meter = on_model(model, net, SDA(surrogate="own"))
    assert model.asked == ["pdsg"]
    assert bool(meter.zero_gradient.all())
    assert int(other.forwards.sum()) > int(found.forwards.sum())
    # Without a gradient all bits are drawn: every row from its own stream, whatever company it has.
    goal = Untargeted(net.y)
    for rows in (torch.tensor([9]), torch.arange(ROWS).flip(0)[:6]):
        ids = [net.ids[row] for row in rows.tolist()]
        part, alone = find(SDA(surrogate="own"), model, net.x[rows], goal.take(rows), ids=ids)
        assert torch.equal(part.x, other.x[rows])
        assert torch.equal(alone.forwards, meter.forwards[rows])
    assert bool(on(net, SDA(surrogate="own"))[0].reached.any())
    with pytest.raises(UsageError, match="spik"):
        on(net, SDA(surrogate="atan"))


def on_model(model, net, attack):
    return find(attack, model, net.x, Untargeted(net.y), ids=net.ids)


def test_a_convolutional_victim_of_events():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(1, 2), nn.Conv2d(6, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(72, 5)).eval()
        x = (torch.rand(6, 3, 2, 5, 5) < 0.2).float()
    y = net(x).argmax(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    found, _ = find(SDA(), net, x, Untargeted(y))
    assert bool((net(found.x).argmax(1) != y)[found.reached].all())
    assert bool(found.reached.any())
    for row in range(6):
        alone, _ = find(SDA(), net, x[row : row + 1], Untargeted(y[row : row + 1]), ids=[str(row)])
        assert torch.equal(alone.x[0], found.x[row])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_baselines_need_more_flips():
    net = NETS[4]
    best = on(net, SDA())[0]
    greedy, _ = on(net, TopKGrad(k_init=3))
    drawn, meter = on(net, RandomFlips(first=2))
    both = best.reached & (count(greedy, net.x) > 0)
    assert set(count(greedy, net.x)[both].tolist()) <= {3, 9, 18, 30}
    assert float(count(greedy, net.x)[both].float().mean()) > float(best.flips[both].float().mean())
    assert set(count(drawn, net.x).tolist()) <= {0, 2, 4, 8, 16, 32, P}
    fell = count(drawn, net.x) > 0
    assert torch.equal(fell, net(drawn).argmax(1) != net.y)
    assert float(count(drawn, net.x)[fell].float().median()) > float(best.flips[fell].float().median())
    assert int(meter.forwards.max()) <= 6
    again, _ = on(net, RandomFlips(first=2), seed=1)
    assert not torch.equal(again, drawn)
    three, _ = on(net, RandomFlips(first=2, restarts=3))
    some = count(three, net.x)
    assert bool((some[fell] <= count(drawn, net.x)[fell]).all())
    bound, _ = on(net, RandomFlips(first=2), Flips(n=5, allow="add"))
    assert set(count(bound, net.x).tolist()) <= {0, 2, 4, 5}
    assert bool((bound >= net.x).all())
    assert RandomFlips().needs == Access.LABELS


@pytest.fixture(scope="module")
def filmed():
    """The embedded spiking victim on filmed digits, a dozen rows it gets right, their labels and ids."""
    task = TASKS.build("digits-dvs")
    model = MODELS.build("zoo:digits-dvs-snn")(task.space.shape, task.classes, RowRng.from_ids(0, ["a"]))
    batch = next(iter(task.batches(20)))
    with torch.no_grad():
        right = (model(batch.x).argmax(1) == batch.labels).nonzero().squeeze(1)[:12]
    assert len(right) == 12
    return model, batch.x[right], batch.labels[right], [batch.ids[row] for row in right.tolist()]


def flipped(filmed, attack):
    model, x, y, ids = filmed
    result, meter = find(attack, model, x, Untargeted(y), ids=ids)
    z = result.x if isinstance(attack, SDA) else result
    with torch.no_grad():
        assert bool((model(z).argmax(1) != y).all())
    return count(z, x).double(), meter


@pytest.mark.slow
def test_effects_on_a_spiking_victim(filmed):
    """Few flips under PDSG, many under a narrow surrogate, and far more at random; what the reduction saves."""
    few, meter = flipped(filmed, SDA())
    bits = filmed[1][0].numel()
    assert float(few.mean()) <= 0.02 * bits
    narrow, cost = flipped(filmed, SDA(surrogate="atan:alpha=50"))
    assert float(few.mean()) <= 0.6 * float(narrow.mean())
    assert int(cost.forwards.sum()) > 3 * int(meter.forwards.sum())
    whole, _ = flipped(filmed, SDA(reduce=False))
    assert bool((few <= whole).all())
    assert float(few.mean()) <= 0.9 * float(whole.mean())
    pruned, _ = flipped(filmed, SDA(prune=True))
    assert bool((pruned <= few).all())
    assert float(pruned.mean()) < 0.95 * float(few.mean())
    drawn, _ = flipped(filmed, RandomFlips())
    assert float(drawn.median()) >= 10 * float(few.median())
    greedy, _ = flipped(filmed, TopKGrad())
    assert float(greedy.mean()) > float(few.mean())


@pytest.mark.slow
@pytest.mark.parametrize("attack", [SDA(), SDA(prefix=True, prune=True, max_forwards=150)], ids=str)
def test_rows_of_a_spiking_victim_are_their_own(filmed, attack):
    model, x, y, ids = filmed
    before = {name: value.clone() for name, value in model.state().items()}
    whole, meter = find(attack, model, x, Untargeted(y), ids=ids)
    for rows in (torch.tensor([7]), torch.tensor([3, 11, 4, 0, 9])):
        part, alone = find(attack, model, x[rows], Untargeted(y[rows]), ids=[ids[row] for row in rows.tolist()])
        assert torch.equal(part.x, whole.x[rows])
        assert torch.equal(alone.forwards, meter.forwards[rows])
    chunked = replace(attack, chunk=50 * x[0].numel())
    assert torch.equal(find(chunked, model, x, Untargeted(y), ids=ids)[0].x, whole.x)
    assert all(torch.equal(value, before[name]) for name, value in model.state().items())
    assert all(each.grad is None for each in model.module.parameters())
    assert not any(each.training for each in model.module.modules())


@pytest.mark.slow
def test_rows_that_were_wrong_before_are_counted_apart(tmp_path):
    report = advkit.evaluate("sda:steps=1", task="digits-dvs", n=60, device="cpu", out=tmp_path / "run")
    records = read_records(tmp_path / "run" / "records.jsonl")
    wrong = [record for record in records if record.outcome == Outcome.WRONG]
    assert 0 < len(wrong) < 20
    assert {record.forwards for record in wrong} <= {0, 1}
    rate = report.to_dict()["metrics"]["attack_success_rate"]
    assert rate["denominator"] == 60 - len(wrong)
    assert rate["numerator"] == sum(record.outcome == Outcome.BROKEN for record in records)


def test_senseless_settings_and_other_threat_models_are_refused():
    for make in (
        lambda: SDA(steps=0),
        lambda: SDA(k_init=0),
        lambda: SDA(max_forwards=0),
        lambda: SDA(surrogate=""),
        lambda: TopKGrad(k_init=0),
        lambda: RandomFlips(first=0),
    ):
        with pytest.raises(UsageError):
            make()
    for attack in (SDA(), TopKGrad(), RandomFlips()):
        assert attack.default_threat_model == "flips"
        with pytest.raises(UsageError, match="flips"):
            on(NETS[0], attack, Linf(0.1))
    with pytest.raises(UsageError, match=r"sda, topk_grad"):
        find(ATTACKS.build("pgd"), NETS[0], NETS[0].x, Untargeted(NETS[0].y))
    assert ATTACKS.spec(ATTACKS.build("sda:k_init=5,early=true")) == "sda:k_init=5,early=true"
    assert issubclass(BadModel, UsageError)
