import pytest
import torch
from torch import nn
from torch.nn import functional

from advkit.attacks.gradient.pgd import PGD
from advkit.core.errors import NoTrainingData, UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.base import attacked, correct_under, in_mode
from advkit.defenses.adversarial.pgd_at import PGDAT
from advkit.defenses.adversarial.trades import TRADES, divergence
from advkit.defenses.none import NoDefense
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.threat_models.goals.diverge import Diverge
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf
from advkit.training.loop import Recipe, fit

EPS = 0.1
ROWS = torch.arange(12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def streams(n=12, seed=0):
    return RowRng.from_ids(seed, [str(row) for row in range(n)])


def linear(weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return TorchModel(layer, Box(0.0, 1.0), weight.shape[0])


def normalised(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return TorchModel(module, Box(0.0, 1.0), 3)


@pytest.fixture
def batch():
    return torch.rand(12, 6, generator=generator(1)), torch.randint(3, (12,), generator=generator(2))


@pytest.fixture(scope="module")
def digits():
    data = TASKS.build("digits").training()
    return Data(data.x[:400], data.y[:400], data.space, data.classes, data.name)


def perceptron(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), classes=10)


def weights(model):
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_inner_attack_on_a_linear_model_ends_at_the_corner():
    weight = torch.tensor([[1.0, -2.0, 0.5, 0.0], [-1.0, 1.0, 0.25, 0.0]])
    model = linear(weight)
    x = 0.3 + 0.4 * torch.rand(5, 4, generator=generator(3))
    y = torch.tensor([0, 1, 0, 1, 0])
    z = attacked(model, PGDAT(eps=EPS).attack, x, Untargeted(y), Linf(EPS), streams(5))
    towards = weight[1 - y] - weight[y]
    moved = towards != 0
    assert torch.allclose(z[moved], (x + EPS * towards.sign())[moved], atol=1e-7)


def test_pgd_at_is_cross_entropy_at_the_end_of_the_walk(batch):
    x, y = batch
    model, defense = normalised(), PGDAT(eps=EPS, steps=3)
    model.module.eval()
    loss = defense.objective().loss(model, x, y, ROWS, streams())
    z = attacked(
        model,
        PGD(steps=3, step_size=2.5 / 3, keep="last", stop=False),
        x,
        Untargeted(y),
        Linf(EPS),
        streams().at("attack"),
    )
    assert torch.equal(loss, functional.cross_entropy(model(z), y))
    assert (z - x).abs().max() <= EPS + 1e-6
    assert loss > functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("defense", [PGDAT(eps=EPS, steps=2), TRADES(eps=EPS, steps=2)])
def test_an_evaluation_mode_attack_leaves_statistics_modes_and_flags_alone(batch, defense):
    x, y = batch
    model = normalised()
    model.module.train()
    model.module[2].eval()  # a mode of its own must come back too
    model.module[0].bias.requires_grad_(False)
    before = weights(model)
    goal = Diverge(model.module(x)) if isinstance(defense, TRADES) else Untargeted(y)
    before = weights(model)
    attacked(model, defense.attack, x, goal, Linf(EPS), streams())
    assert same(weights(model), before)
    assert [m.training for m in model.module] == [True, True, False, True]
    assert [p.requires_grad for p in model.module.parameters()] == [True, False, True, True, True, True]
    assert all(p.grad is None for p in model.module.parameters())


def test_a_training_mode_attack_moves_batch_statistics(batch):
    x, y = batch
    model = normalised()
    before = weights(model)
    attacked(model, PGDAT(eps=EPS, steps=2).attack, x, Untargeted(y), Linf(EPS), streams(), "train")
    assert not torch.equal(before["1.running_mean"], model.module[1].running_mean)


def test_modes_are_given_back_when_the_block_raises():
    model = normalised()
    model.module.train()
    seen = []

    def fail():
        with in_mode(model, False):
            seen.extend(m.training for m in model.module.modules())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not any(seen)
    assert all(m.training for m in model.module.modules())


def test_divergence_is_kl_from_clean_to_adversarial_over_the_real_batch():
    for rows in (1, 3, 5):
        clean, adversarial = (torch.randn(rows, 4, generator=generator(s), dtype=torch.float64) for s in (rows, 9))
        p, q = clean.softmax(1), adversarial.softmax(1)
        expected = (p * (p / q).log()).sum() / rows
        assert torch.allclose(divergence(clean, adversarial), expected)
        assert expected >= 0


def test_divergence_and_its_gradient_vanish_where_the_answers_agree():
    clean = torch.randn(5, 4, generator=generator(), dtype=torch.float64, requires_grad=True)
    adversarial = clean.detach().clone().requires_grad_()
    found = divergence(clean, adversarial)
    found.backward()
    assert found.abs() < 1e-15
    assert clean.grad.abs().max() < 1e-15
    assert adversarial.grad.abs().max() < 1e-15


def test_divergence_passes_gradients_to_both_answers():
    pair = [torch.randn(3, 4, generator=generator(s), dtype=torch.float64, requires_grad=True) for s in (0, 1)]
    assert torch.autograd.gradcheck(divergence, pair)
    found = divergence(*pair)
    assert all(g.abs().max() > 1e-3 for g in torch.autograd.grad(found, pair))


def test_trades_is_clean_loss_plus_beta_times_divergence(batch):
    x, y = batch
    model, defense = normalised(), TRADES(eps=EPS, steps=3, beta=2.5)
    model.module.eval()
    loss = defense.objective().loss(model, x, y, ROWS, streams())
    z = attacked(model, defense.attack, x, Diverge(model(x)), Linf(EPS), streams().at("attack"))
    expected = functional.cross_entropy(model(x), y) + 2.5 * divergence(model(x), model(z))
    assert torch.allclose(loss, expected)
    assert divergence(model(x), model(z)) > 0


def test_trades_needs_its_noise(batch):
    x, _ = batch
    model, defense = normalised(), TRADES(eps=EPS, steps=2)
    model.module.eval()
    goal = Diverge(model(x).detach())
    sizes = []
    for start in (x, x + 0.001 * streams().normal(x)):
        leaf = start.clone().requires_grad_()
        sizes.append(float(torch.autograd.grad(goal.loss(model(leaf)).sum(), leaf)[0].norm()))
    # At the image itself only round-off is left, which a sign step would follow.
    assert sizes[0] < 1e-5
    assert sizes[1] > 1_000 * sizes[0]
    z = attacked(model, defense.attack, x, goal, Linf(EPS), streams())
    assert divergence(model(x), model(z)) > 100 * divergence(model(x), model(start))


def test_trades_without_beta_is_clean_training_bit_for_bit(digits):
    recipe = Recipe(epochs=2, validation=0.0, select="last")
    trained = [
        fit(perceptron(), digits, d.objective(), recipe, streams(1), progress=False).model
        for d in (TRADES(eps=EPS, beta=0.0, recipe=recipe), NoDefense(recipe=recipe))
    ]
    assert same(weights(trained[0]), weights(trained[1]))


@pytest.mark.parametrize("kind", [PGDAT, TRADES])
def test_same_seed_same_weights_and_another_seed_others(digits, kind):
    defense = kind(eps=EPS, steps=2, recipe=Recipe(epochs=1))
    one, again, other = (defense.protect(perceptron(), digits, streams(1, seed)) for seed in (0, 0, 1))
    assert same(weights(one), weights(again))
    assert not same(weights(one), weights(other))


def test_protect_trains_a_copy(digits):
    model = perceptron()
    before = weights(model)
    defended = PGDAT(eps=EPS, steps=1, recipe=Recipe(epochs=1)).protect(model, digits, streams(1))
    assert same(weights(model), before)
    assert not same(weights(defended), before)


@pytest.mark.slow
def test_adversarial_training_buys_robustness(digits):
    recipe = Recipe(epochs=25, batch_size=64, lr=5e-3, validation=0.0, select="last")
    test = next(iter(TASKS.build("digits").batches(200)))
    robust = {}
    for defense in (
        NoDefense(recipe=recipe),
        PGDAT(eps=EPS, steps=3, recipe=recipe),
        TRADES(eps=EPS, steps=3, recipe=recipe),
    ):
        model = fit(perceptron(), digits, defense.objective(), recipe, streams(1), progress=False).model
        right = correct_under(model, PGD(steps=10, step_size=0.25), test.x, test.labels, Linf(EPS), streams(200))
        robust[type(defense)] = float(right.float().mean())
    assert robust[PGDAT] > robust[NoDefense] + 0.1
    assert robust[TRADES] > robust[NoDefense] + 0.1


def test_checkpoints_are_judged_under_attack(batch):
    x, y = batch
    model, defense = normalised(), PGDAT(eps=EPS, steps=4)
    model.module.eval()
    score = defense.objective().score(model, x, y, ROWS, streams())
    z = PGD(steps=4, step_size=2.5 / 4)
    right = correct_under(model, z, x, y, Linf(EPS), streams().at("judge"))
    assert torch.equal(score, right.float())
    clean = model(x).argmax(1) == y
    assert (score <= clean.float()).all()


@pytest.mark.parametrize(
    ("defense", "forwards"), [(PGDAT(eps=EPS, steps=5), 5 + 1), (TRADES(eps=EPS, steps=5), 5 + 1 + 2)]
)
def test_passes_per_step(batch, defense, forwards):
    x, y = batch
    model, calls = normalised(), []
    model.module.register_forward_hook(lambda *_: calls.append(1))
    defense.objective().loss(model, x, y, ROWS, streams()).backward()
    assert len(calls) == forwards


def test_defaults_and_claims():
    assert PGDAT().attack == PGD(steps=10, step_size=0.25, keep="last", stop=False)
    assert TRADES(steps=5).attack.step_size == 0.5
    assert TRADES().attack.start == "gaussian"
    assert TRADES().beta == 6.0
    assert PGDAT(eps=0.1).claims == "linf:eps=0.1"
    assert PGDAT(eps=0.5, norm="l2").claims == "l2:eps=0.5"


def test_l2_training_stays_in_the_l2_ball(batch):
    x, y = batch
    model, defense = normalised(), PGDAT(eps=0.3, norm="l2", steps=4)
    z = attacked(model, defense.attack, x, Untargeted(y), defense.ball(model.space), streams())
    assert ((z - x).norm(dim=1) <= 0.3 + 1e-5).all()
    assert ((z - x).norm(dim=1) > 0.1).all()


@pytest.mark.parametrize(
    "spec",
    [
        "none",
        "pgd_at:eps=8/255,steps=7",
        "trades:eps=0.1,beta=3.0,norm=l2",
        "pgd_at:recipe=[epochs=3,lr=0.1],mode=train",
    ],
)
def test_specs_round_trip(spec):
    defense = DEFENSES.build(spec)
    assert DEFENSES.build(DEFENSES.spec(defense)) == defense


def test_no_defense_hands_the_model_back():
    model = perceptron()
    assert NoDefense().protect(model, None, streams(1)) is model
    assert DEFENSES.spec(NoDefense()) == "none"


@pytest.mark.parametrize("defense", [PGDAT(), TRADES()])
def test_training_needs_data(defense):
    with pytest.raises(NoTrainingData):
        defense.protect(perceptron(), None, streams(1))


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (PGDAT, {"eps": -1.0}),
        (PGDAT, {"steps": 0}),
        (PGDAT, {"step_size": -0.1}),
        (PGDAT, {"norm": "l7"}),
        (PGDAT, {"mode": "test"}),
        (TRADES, {"beta": -1.0}),
    ],
)
def test_nonsense_is_refused(kind, arguments):
    with pytest.raises(UsageError):
        kind(**arguments)
