"""The transfer engine: its walk against other libraries and references written out, its reductions, its manners."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from advkit.attacks import ATTACKS
from advkit.attacks.gradient.mifgsm import MIFGSM
from advkit.attacks.gradient.pgd import PGD
from advkit.attacks.transfer import PARTS, PUBDEF
from advkit.attacks.transfer.engine import Composed
from advkit.attacks.transfer.gradients import Scored
from advkit.core.errors import AdvkitError, SpecError, UnknownName, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Data, ModelInfo
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models import MODELS
from advkit.models.ensemble import Ensemble
from advkit.models.torch import TorchModel
from advkit.testing.attack_laws import ATTACK_LAWS, Subject
from advkit.testing.play import BALLS, names
from advkit.testing.victims import network, normal, uniform
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

PRESETS = [name for name in ATTACKS.names() if ATTACKS.target(name).startswith("advkit.attacks.transfer.presets:")]
SEVERAL = {"ens", "svre", "cwa", "lgv"}
INSIDE = {"naa", "fia", "bfa", "ila", "ilpd", "sgm", "linbp", "bpa"}
DEAR = {"emi", "vmi", "pgn", "mef", "logit", "ilpd", "bsr", "bfa"}  # their like is tested always: gra, vni, ssa, fia
COSTLY = {"mef": 4, "logit": 5, "ilpd": 4}


def residual(seed=0, shape=(2, 6, 6)):
    return MODELS.build("resnet8:width=4")(shape, 3, RowRng.from_ids(seed, ["net"]))


def source(name, shape=(2, 6, 6)):
    """A small untrained source that the preset works on."""
    if name in SEVERAL:
        return Ensemble([plain_net(0, shape), plain_net(1, shape)])
    return residual(0, shape) if name == "sgm" else plain_net(0, shape)


def plain_net(seed, shape):
    return MODELS.build("cnn:width=4,hidden=8")(shape, 3, RowRng.from_ids(seed, ["net"]))


def attack_of(name, steps=2):
    return replace(ATTACKS.build(name), steps=steps)


def run(attack, model, x, goal, ball, *, seed=0, ids=None, data=None, decides=False, **settings):
    """The points and the meter."""
    oracle = MeteredOracle(model, len(x), decides=decides, **settings)
    oracle.data = data
    z = attack(oracle, x, goal, ball, RowRng.from_ids(seed, names(len(x)) if ids is None else ids))
    return z, oracle.meter


def pool(shape=(2, 6, 6), classes=3, n=30):
    return Data(uniform(7, n, *shape), torch.arange(n) % classes, Box(shape=shape), classes)


def smooth(channels=1, side=5, classes=4, seed=0):
    """A smooth network in float64, and the layers of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(channels, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * side * side, classes)
        )
    return TorchModel(module.double().eval(), Box(shape=(channels, side, side)), classes)


def gradient_of(model, x, y):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)[0]


def mean_normalised(g):
    return g / g.abs().mean((1, 2, 3), keepdim=True)


EPS = 0.1


@pytest.fixture
def plain():
    model = smooth()
    x = uniform(1, 9, 1, 5, 5).double()
    return model, x, torch.arange(9) % 4


def walk_of(attack, plain):
    model, x, y = plain
    return run(attack, model, x, Untargeted(y), Linf(EPS))[0]


# --- against other libraries and references


@pytest.mark.parametrize("name", ["fgsm", "bim", "mi", "ni", "si+ni", "ti+mi"])
def test_walks_equal_those_of_another_library(name, plain):
    peers = pytest.importorskip("torchattacks")
    model, x, y = plain
    if name == "ti+mi":  # theirs convolves three channels
        model = smooth(3)
        model.module.float()
        plain = model, x, y = model, uniform(1, 9, 3, 5, 5), y
    ours, theirs = {
        "fgsm": (Composed(steps=1), peers.FGSM(model.module, eps=EPS)),
        "bim": (Composed(), peers.BIM(model.module, eps=EPS, alpha=EPS / 10, steps=10)),
        "mi": (Composed(parts="mi"), peers.MIFGSM(model.module, eps=EPS, alpha=EPS / 10, steps=10)),
        "ni": (Composed(parts="ni"), peers.NIFGSM(model.module, eps=EPS, alpha=EPS / 10, steps=10)),
        "si+ni": (Composed(parts="si+ni"), peers.SINIFGSM(model.module, eps=EPS, alpha=EPS / 10, steps=10, m=5)),
        "ti+mi": (
            Composed(parts="ti+mi"),
            peers.TIFGSM(
                model.module, eps=EPS, alpha=EPS / 10, steps=10, decay=1.0, len_kernel=5, nsig=3, diversity_prob=0.0
            ),
        ),
    }[name]
    torch.testing.assert_close(walk_of(ours, plain), theirs(x, y), atol=1e-6 if "ti" in name else 1e-9, rtol=0)


def test_emi_and_emi1_as_written(plain):
    model, x, y = plain
    alpha = EPS / 10
    for parts, places in (("emi", torch.linspace(-7, 7, 11).tolist()), ("emi1", [1.0])):
        z, g, q = x.clone(), 0.0, torch.zeros_like(x)
        for _ in range(10):
            raw = sum(gradient_of(model, z + c * alpha * q, y) for c in places) / len(places)
            q = mean_normalised(raw)
            g = g + q
            z = (z + alpha * g.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
        torch.testing.assert_close(walk_of(Composed(parts=parts), plain), z, atol=1e-9, rtol=0)


def test_mig_as_written(plain):
    model, x, y = plain
    z, g = x.clone(), 0.0
    for _ in range(4):
        total = 0.0
        for i in range(1, 21):
            leaf = (z * i / 20).requires_grad_()
            p = model(leaf).softmax(1).gather(1, y[:, None]).sum()
            total = total - torch.autograd.grad(p, leaf)[0]
        g = g + mean_normalised(z * total / 20)
        z = (z + EPS / 4 * g.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    torch.testing.assert_close(walk_of(Composed(parts="mig", steps=4), plain), z, atol=1e-9, rtol=0)


def test_pi_as_written(plain):
    model, x, y = plain
    kernel = torch.full((1, 1, 3, 3), 1 / 8).double()
    kernel[..., 1, 1] = 0
    z, piled = x.clone(), torch.zeros_like(x)
    for _ in range(10):
        step = 10 * EPS / 10 * gradient_of(model, z, y).sign()
        piled = piled + step
        cut = (piled.abs() - EPS).clamp_min(0) * piled.sign()
        handed = EPS * F.conv2d(cut, kernel, padding=1).sign() * (F.conv2d(cut, kernel, padding=1).abs() > 1e-12)
        piled = piled + handed
        z = (z + step + handed).clamp(x - EPS, x + EPS).clamp(0, 1)
    torch.testing.assert_close(walk_of(Composed(parts="pi"), plain), z, atol=1e-9, rtol=0)


def test_mi_is_mifgsm_that_keeps_the_last_point_and_never_stops(plain):
    assert torch.equal(walk_of(Composed(parts="mi"), plain), walk_of(MIFGSM(keep="last", stop=False), plain))
    bim = PGD(steps=10, step_size=0.1, start="origin", keep="last", stop=False)
    assert torch.equal(walk_of(Composed(), plain), walk_of(bim, plain))


# --- reductions


@pytest.mark.parametrize(
    ("long", "short"),
    [
        ("ni+mi:decay=0", "bim"),
        ("mi:decay=0", "bim"),
        ("vmi:neighbours=0", "mi"),
        ("[vmi:neighbours=3,radius=0]", "mi"),
        ("mi+si:copies=1", "mi"),
        ("mi+[admix:eta=0,mixes=1]", "mi+si"),
        ("mi+di:p=0", "mi"),
        ("mi+di:low=1", "mi"),
        ("mi+ti:kernel=1", "mi"),
        ("emi:radius=0", "mi"),
        ("emi:points=1", "mi"),
        ("[pgn:neighbours=2,radius=0,balance=0]", "mi"),
        ("[gra:neighbours=2,radius=0,shrink=1]", "mi"),
        ("[mef:neighbours=1,radius=0,push=0]+mi", "mi"),
        ("mi+[ssa:copies=2,rho=0,noise=0]", "mi"),
        ("mi+[bsr:copies=2,blocks=1,angle=0]", "mi"),
        ("gi:steps=0", "mi"),
    ],
)
def test_reductions(long, short, plain):
    expected = walk_of(Composed(parts=short), plain)
    torch.testing.assert_close(walk_of(Composed(parts=long), plain), expected, atol=1e-6, rtol=0)


def test_gra_without_a_radius_is_mi_with_shrinking_steps(plain):
    model, x, y = plain
    z, g, size = x.clone(), torch.zeros_like(x), torch.full_like(x, 1 / 0.94)
    for _ in range(10):
        after = g + mean_normalised(gradient_of(model, z, y))
        size = torch.where(after.sign() == g.sign(), size, size * 0.94)
        g = after
        z = (z + EPS / 10 * size * g.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    got = walk_of(Composed(parts="[gra:neighbours=2,radius=0]"), plain)
    torch.testing.assert_close(got, z, atol=1e-9, rtol=0)


def test_ensembles_of_one_model_are_that_model(plain):
    model, x, y = plain
    expected = walk_of(Composed(parts="mi"), plain)
    twin = Ensemble([model, model])
    for parts in ("mi+ens", "mi+lgv"):
        z = run(Composed(parts=parts), twin, x, Untargeted(y), Linf(EPS))[0]
        torch.testing.assert_close(z, expected, atol=1e-9, rtol=0)
    alone = run(Composed(parts="svre:rounds=1"), Ensemble([model]), x, Untargeted(y), Linf(EPS))[0]
    torch.testing.assert_close(alone, expected, atol=1e-6, rtol=0)


# --- the parser


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("transfer:ni+sx", ("unknown transfer part 'sx'", "si")),
        ("transfer:ni+emi1", ("ni and emi1", "probes")),
        ("transfer:vmi+gra", ("vmi and gra", "gradient rules")),
        ("transfer:si+si", ("si", "more than once")),
        ("transfer:naa+logit", ("naa and logit", "objectives")),
        ("transfer:ni+[di:q=0.5]", ("'q'", "di has p, low, copies, mode")),
        ("transfer:ni+di:p=2", ("p is 2", "probability")),
        ("transfer:ti:kernel=4", ("kernel is 4", "odd")),
        ("transfer:mi,steps=0", ("steps is 0",)),
        ("transfer:mi,step_size=-1", ("step_size is -1",)),
        ("transfer:mi,restarts=3", ("restarts", "start=random")),
        ("transfer:mi,start=corner", ("start", "random")),
        ("transfer", ("PARTS",)),
    ],
)
def test_errors_say_what_was_seen_and_what_was_expected(spec, words):
    with pytest.raises((UsageError, UnknownName, SpecError)) as error:
        ATTACKS.build(spec)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "spec",
    [
        "transfer:ni+si+ti+di",
        "transfer:mi:decay=0.5+[di:p=0.5,copies=3]+ti:kernel=3,steps=20,start=random",
        "transfer:mi+[ila:base=ni+si]",
        "ni-si-ti-dim:steps=100",
        "vmi",
    ],
)
def test_specs_round_trip(spec):
    built = ATTACKS.build(spec)
    assert ATTACKS.spec(built) == spec
    assert ATTACKS.build(ATTACKS.spec(built)) == built


def test_parts_may_be_given_as_objects_and_are_written_in_one_way():
    di = PARTS.build("di:copies=3")
    assert Composed(parts=("ni", di)) == Composed(parts="ni+di:copies=3") == Composed(parts=("ni", "[di:copies=3]"))
    assert Composed(parts=("bim",)) == Composed() == Composed(parts="bim")


def test_pubdefs_attacks_have_names_and_settings():
    assert len(PUBDEF) == 11
    for name, spec in PUBDEF.items():
        assert name in ATTACKS.names()
        attack = ATTACKS.build(spec)
        if isinstance(attack, Composed):
            assert (attack.start, attack.path, attack.steps) == ("random", 2.5, 10)
    assert ATTACKS.build("ni-si-ti-dim").parts == ("ni", "si", "ti", "di")
    assert ATTACKS.build("logit").default_goal == "targeted"
    for name in ("auto-pgd-ce", "auto-pgd-dlr"):  # more lines of the registry for the same attacks
        assert ATTACKS.spec(ATTACKS.build(name)) == name.removeprefix("auto-").replace("pgd", "apgd")


# --- manners of every preset


def battery(shape, rows):
    x = uniform(3, rows, *shape)
    x[::3] = x[::3].round()
    return x


@pytest.mark.parametrize(
    "shape", [pytest.param((1, 7, 9), id="grey"), pytest.param((3, 9, 7), id="colour", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", PRESETS)
def test_eps_and_box_hold_to_the_level_after_rounding(name, shape):
    model = source(name, shape)
    x = (battery(shape, 3) * 255).round() / 255
    goal = Untargeted(model(x).argmax(1).detach())
    ball = Linf(8 / 255, lattice=255)
    z, _ = run(attack_of(name), model, x, goal, ball, data=pool(shape))
    assert ball.admits(z, x).all()
    levels = ball.finish(z, x) * 255
    assert (levels - levels.round()).abs().max() < 1e-3
    assert (levels.round() - (x * 255).round()).abs().max() <= 8
    assert levels.min() > -1e-6
    assert levels.max() < 255 + 1e-4
    assert (z != x).flatten(1).any(1).all()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in DEAR else []) for name in PRESETS]
)
def test_a_row_gets_the_same_bits_in_every_batch(name):
    model = source(name)
    x = battery((2, 6, 6), 18)
    goal, ids, data = Untargeted(model(x).argmax(1).detach()), names(18), pool()
    whole, meter = run(attack_of(name), model, x, goal, Linf(EPS), data=data, ids=ids)
    for rows in (torch.tensor([4]), torch.tensor([11, 2, 17, 0, 7])):
        part, less = run(
            attack_of(name), model, x[rows], goal.take(rows), Linf(EPS), data=data, ids=[ids[i] for i in rows]
        )
        assert torch.equal(part, whole[rows])
        assert torch.equal(less.forwards, meter.forwards[rows])


def traces(model):
    """Weights, buffers, flags and hooks."""
    found = []
    for root in model.modules():
        for key, tensor in (*root.named_parameters(), *root.named_buffers()):
            found.append((key, tensor.detach().numpy().tobytes(), tensor.requires_grad, tensor.grad is None))
        for key, part in root.named_modules():
            hooks = [len(getattr(part, kind)) for kind in vars(part) if kind.endswith("_hooks")]
            found.append((key, part.training, hooks))
    return found


@pytest.mark.parametrize("name", sorted(INSIDE | SEVERAL))
def test_nothing_is_left_in_the_model_also_after_an_exception(name):
    model = source(name)
    x = battery((2, 6, 6), 3)
    goal = Untargeted(model(x).argmax(1).detach())
    before = traces(model)
    run(attack_of(name), model, x, goal, Linf(EPS))
    assert traces(model) == before

    calls = 0
    last = list(model.modules()[-1].modules())[-1]

    def failing(*_):
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("out of memory")

    handle = last.register_forward_pre_hook(failing)
    before = traces(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(attack_of(name, 8), model, x, goal, Linf(EPS))
    assert traces(model) == before
    handle.remove()


@pytest.mark.parametrize("ball", [L2(0.5), L1(3.0)], ids=["l2", "l1"])
@pytest.mark.parametrize("name", ["mi", "ni-si-ti-dim", "admix", "ssa", "naa", "gra", "svre", "cwa", "sgm"])
def test_other_balls(name, ball):
    model = source(name)
    x = battery((2, 6, 6), 4)
    goal = Untargeted(model(x).argmax(1).detach())
    z, _ = run(attack_of(name), model, x, goal, ball, data=pool())
    assert ball.admits(z, x).all()
    assert (z != x).flatten(1).any(1).all()


def test_balls_without_a_step_are_refused_in_words():
    model, x = network(), uniform(1, 2, 2, 6, 6)
    with pytest.raises(UsageError, match="linf, l2 and l1"):
        run(Composed(), model, x, Untargeted(torch.zeros(2).long()), L0(3))
    with pytest.raises(UsageError, match="linf"):
        run(Composed(parts="pi"), model, x, Untargeted(torch.zeros(2).long()), L2(1.0))


@pytest.mark.parametrize("name", ["bim", "mi", "ni-si-ti-dim", "naa", "fia", "mig", "logit", "ila"])
def test_targeted_goals_come_nearer(name):
    model = network()
    x = uniform(5, 24, 2, 6, 6)
    with torch.no_grad():
        before = model(x).log_softmax(1)
        targets = before.argmin(1)
        z, _ = run(replace(attack_of(name, 10), path=1.0), model, x, Targeted(targets), Linf(EPS))
        after = model(z).log_softmax(1)
    rows = torch.arange(24)
    assert (after[rows, targets] > before[rows, targets]).float().mean() > 0.9


def test_restarts_keep_the_lowest_loss():
    model, x = network(), uniform(5, 12, 2, 6, 6)
    goal = Untargeted(model(x).argmax(1).detach())
    one, three = (
        run(Composed(parts="mi", start="random", restarts=n, steps=3), model, x, goal, Linf(EPS)) for n in (1, 3)
    )
    with torch.no_grad():
        assert (goal.loss(model(three[0])) <= goal.loss(model(one[0])) + 1e-7).all()
    assert (three[1].forwards == 12).all()
    assert (three[1].backwards == 9).all()


GENERIC = ["bim", "ni", "gi", "dim", "sim", "sia", "ni-si-ti-dim", "mpgd"]
LAWS = [
    "stays_admitted",
    "leaves_no_trace",
    "zero_eps_is_identity",
    "all_wrong_batch",
    "same_seed_same_bits",
    "metered_is_counted",
    "refuses_without_access",
    "survives_nan",
    "survives_zero_gradients",
    "does_not_stop_under_transfer",
]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", GENERIC)
def test_laws_on_images(name, law):
    if (name, law) == ("dim", "same_seed_same_bits"):
        pytest.skip("six pixels can't shrink by an eighth: nothing is drawn that could differ")
    ATTACK_LAWS[law](Subject(attack_of(name), "linf", BALLS["linf"]))


@pytest.mark.parametrize("law", ["keeps_the_query_budget", "closed_form", "one_step_moves", "one_survivor"])
@pytest.mark.parametrize("name", ["bim", "mi", "ni", "mpgd"])
def test_laws_of_plain_walks(name, law):
    ATTACK_LAWS[law](Subject(ATTACKS.build(name), "linf", BALLS["linf"]))


@pytest.mark.parametrize(
    ("name", "gradients"),
    [
        *[("bim", 2), ("mi", 2), ("ni", 2), ("emi", 22), ("vni", 42), ("gra", 42), ("pgn", 80), ("mef", 40)],
        *[("gi", 7), ("sim", 10), ("admix", 30), ("di", 10), ("ssa", 40), ("naa", 32), ("fia", 32), ("bfa", 62)],
    ],
)
def test_gradients_per_row_in_two_steps(name, gradients):
    model, x = network(), uniform(5, 2, 2, 6, 6)
    goal = Untargeted(model(x).argmax(1).detach())
    _, meter = run(attack_of(name), model, x, goal, Linf(EPS), data=pool())
    assert meter.forwards.tolist() == meter.backwards.tolist() == [gradients] * 2


# --- direction


def test_the_score_of_a_goal_is_the_class_it_moves():
    answer, y = normal(0, 6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    rows = torch.arange(6)
    torch.testing.assert_close(Scored(Untargeted(y)).loss(answer), answer[rows, y])
    torch.testing.assert_close(Scored(Targeted(y)).loss(answer), -answer[rows, y])
    torch.testing.assert_close(Scored(Untargeted(y, "margin"), soft=True).loss(answer), answer.softmax(1)[rows, y])
    two = normal(1, 6, 2)
    torch.testing.assert_close(Scored(Untargeted(y % 2)).loss(two).sign(), two[rows, y % 2].sign())


@pytest.fixture(scope="module")
def sources():
    """A trained convolutional source with its rows; trained residual and several ones."""
    from advkit.models.zoo import load
    from advkit.tasks import TASKS

    task = TASKS.build("digits")
    batch = next(iter(task.batches(48)))
    one = load("digits-public-cnn")
    several = Ensemble([one, load("digits-public-cnn-b"), load("digits-public-mlp")])
    data = task.training()
    net = MODELS.build("resnet8:width=8")((1, 8, 8), 10, RowRng.from_ids(0, ["net"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net.module.train()
        optimizer = torch.optim.Adam(net.module.parameters(), 5e-3)
        for _ in range(2):
            for rows in torch.randperm(len(data.x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(data.x[rows]), data.y[rows]).backward()
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        net.module.eval()
    return one, several, net, batch.x, batch.labels, data


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in DEAR else []) for name in PRESETS if name != "bsr"],
)
def test_the_sources_loss_rises(name, sources):
    one, several, net, x, y, data = sources
    model = several if name in SEVERAL else net if name == "sgm" else one
    # Their own steps but for the dear ones, whose path is walked in fewer.
    attack = replace(ATTACKS.build(name), steps=COSTLY.get(name, 5))
    attack = replace(attack, path=min(attack.path, 2.5))
    z, _ = run(attack, model, x, Untargeted(y), Linf(EPS), data=data)
    with torch.no_grad():
        rise = F.cross_entropy(model(z), y, reduction="none") - F.cross_entropy(model(x), y, reduction="none")
    assert (rise > 0).float().mean() > 0.95


class BlackBox:
    """A network that says what it is called, and shows no module."""

    def __init__(self, network):
        self.network = network

    def __call__(self, x):
        return self.network(x)

    def modules(self):
        return ()

    def describe(self):
        return ModelInfo(name="a black box", architecture="", state_sha256="", n_parameters=0)


def test_wrong_attributes_are_refused():
    model, x = network(), uniform(5, 2, 2, 6, 6)
    goal = Untargeted(torch.zeros(2).long())
    for parts, words in (
        ("svre", "several sources"),
        ("naa:layer=nowhere", "nowhere"),
        ("sgm", "residual"),
        ("admix", "data"),
    ):
        with pytest.raises(AdvkitError, match=words):
            run(Composed(parts=parts), model, x, goal, Linf(EPS))
    with pytest.raises(UsageError, match="one source"):
        run(Composed(parts="naa"), Ensemble([network(), network()]), x, goal, Linf(EPS))
    with pytest.raises(UsageError, match="shows none"):
        run(Composed(parts="fia"), lambda z: model(z), x, goal, Linf(EPS))
    with pytest.raises(UsageError, match="a black box shows none"):  # its own name, not a class's
        run(Composed(parts="fia"), BlackBox(model), x, goal, Linf(EPS))
    flat = uniform(1, 3, 8)
    for parts in ("di", "ti", "ssa", "sia", "bsr", "pi"):
        with pytest.raises(UsageError, match="images"):
            run(Composed(parts=parts), lambda z: z[:, :3] * 2, flat, Untargeted(torch.zeros(3).long()), Linf(EPS))


@pytest.mark.exhaustive
def test_effects_on_fashion_mnist():
    """Transfer works from a convolutional source to others, correct NAA breaks its source, BSR's loss rises, too."""
    from advkit.models.zoo import load
    from advkit.tasks import TASKS

    batch = next(iter(TASKS.build("fashion-mnist").batches(100)))
    x, y = batch.x, batch.labels
    one, other, hardened = (load(f"fashion-mnist-public-{name}") for name in ("cnn", "cnn5", "cnn-at"))
    sign = 2 * (uniform(0, *x.shape) < 0.5).float() - 1
    noisy = (x + 0.1 * sign).clamp(0, 1)

    def accuracy(model, z):
        with torch.no_grad():
            return (model(z).argmax(1) == y).float().mean().item()

    found = {}
    for name in ("mpgd", "ti", "naa", "fia", "bsr"):
        z, _ = run(ATTACKS.build(name), one, x, Untargeted(y), Linf(0.1))
        found[name] = z
        with torch.no_grad():
            rise = F.cross_entropy(one(z), y, reduction="none") - F.cross_entropy(one(x), y, reduction="none")
        assert (rise > 0).float().mean() > 0.95
    assert accuracy(one, found["naa"]) < 0.4
    assert accuracy(other, found["mpgd"]) < accuracy(other, noisy) - 0.2
    assert accuracy(other, found["ti"]) < accuracy(other, found["mpgd"]) + 0.02
    assert accuracy(hardened, found["mpgd"]) > accuracy(one, found["mpgd"]) + 0.1
    assert accuracy(hardened, found["mpgd"]) > accuracy(other, found["mpgd"]) + 0.1
