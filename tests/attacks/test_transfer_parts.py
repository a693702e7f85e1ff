"""Transforms, feature losses, backward rules and ensemble rules against what they are written to be."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import scipy.fft
import torch
import torch.nn.functional as F
from torch import nn

from advkit.attacks.transfer.backward import BPA, SGM, LinBP, _Skipped, _Watch
from advkit.attacks.transfer.engine import Composed, Draw, Run
from advkit.attacks.transfer.ensembles import snapshots
from advkit.attacks.transfer.features import BFA, FIA, ILA, ILPD, NAA, Along
from advkit.attacks.transfer.gradients import TI, separable
from advkit.attacks.transfer.layers import Tap, middle
from advkit.attacks.transfer.transforms import BSR, DI, SI, SIA, SSA, Admix, _both, _partners_of, dct_matrix
from advkit.core.errors import BadModel, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models.ensemble import Ensemble
from advkit.models.torch import TorchModel
from advkit.testing.play import names
from advkit.testing.victims import network, normal, uniform
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf


def walk_on(model, x, goal, **settings):
    settings = {"steps": 10, "step_size": 0.1, "reach": 0.1, "decay": 1.0} | settings
    return Run(
        MeteredOracle(model, len(x), decides=False),
        x,
        goal,
        Linf(0.1),
        RowRng.from_ids(0, names(len(x))),
        **settings,
    )


def applied(part, x, copies=1, seed=0, walk=None):
    """The part's copies of x, copy after copy."""
    draw = Draw(RowRng.from_ids(seed, names(len(x))), x, copies)
    walk = walk or SimpleNamespace(reach=0.1, box=Box())
    copy = torch.arange(copies).repeat_interleave(len(x))
    return part(x.repeat(copies, 1, 1, 1), copy, draw, walk)


def net(*layers, classes=3, shape=(1, 6, 6), seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(*layers)
        for part in module.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
    return TorchModel(module.double().eval(), Box(shape=shape), classes)


# --- transforms


@pytest.mark.parametrize("shape", [(16, 16), (17, 24)])
def test_di_resizes_and_pads_with_exact_zeros(shape):
    x = 0.5 + 0.5 * uniform(0, 30, 2, *shape)
    z = applied(DI(p=1.0), x)
    sizes = set()
    for row in range(30):
        filled = (z[row, 0] > 0).nonzero()
        (top, left), (bottom, right) = filled.amin(0).tolist(), filled.amax(0).tolist()
        height, width = bottom - top + 1, right - left + 1
        sizes.add((height, width))
        expected = F.interpolate(x[row : row + 1], (height, width), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(z[row, :, top : bottom + 1, left : right + 1], expected, atol=1e-5, rtol=0)
        outside = torch.ones(shape, dtype=torch.bool)
        outside[top : bottom + 1, left : right + 1] = False
        assert (z[row][:, outside] == 0).all()
    low = [math.ceil(7 / 8 * side) for side in shape]
    assert min(size[0] for size in sizes) == low[0]
    assert max(size[0] for size in sizes) == shape[0]
    assert min(size[1] for size in sizes) >= low[1]


def test_di_leaves_rows_alone_with_probability_and_draws_per_row_and_copy():
    x = 0.5 + 0.5 * uniform(0, 300, 1, 16, 16)
    z = applied(DI(p=0.7), x, copies=2).view(2, 300, 1, 16, 16)
    same = (z == x).flatten(2).all(2)
    # identity: 0.3 and, of the rest, the third of sizes 14, 15, 16 that fills the image
    assert abs(same.float().mean() - (0.3 + 0.7 / 3)) < 0.06
    assert (same[0] != same[1]).any()
    large = applied(DI(p=1.0, mode="enlarge"), x)
    assert large.shape == x.shape
    assert (large != x).flatten(1).any(1).float().mean() > 0.9
    tiny = uniform(1, 4, 1, 1, 1)
    assert torch.equal(applied(DI(p=1.0), tiny), tiny)


def test_si_divides_by_powers_of_two():
    x = uniform(0, 3, 1, 4, 4)
    z = applied(SI(copies=5), x, copies=5).view(5, 3, 1, 4, 4)
    for i in range(5):
        assert torch.equal(z[i], x / 2**i)


def test_dct_is_scipys_and_products_do_not_depend_on_the_batch():
    x = uniform(0, 21, 2, 7, 12).double()
    spectrum = _both(x, dct_matrix(7), dct_matrix(12).T)
    torch.testing.assert_close(spectrum, torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")))
    torch.testing.assert_close(_both(spectrum, dct_matrix(7).T, dct_matrix(12)), x)
    assert torch.equal(_both(x[3:4], dct_matrix(7), dct_matrix(12).T), spectrum[3:4])


def test_ssa_scales_frequencies_within_rho():
    x = uniform(0, 8, 1, 8, 8).double()
    z = applied(SSA(noise=0.0), x)
    ratio = scipy.fft.dctn(z.numpy(), axes=(2, 3), norm="ortho") / scipy.fft.dctn(x.numpy(), axes=(2, 3), norm="ortho")
    assert ratio.min() > 0.5 - 1e-6
    assert ratio.max() < 1.5 + 1e-6
    assert ratio.std() > 0.2
    assert (applied(SSA(rho=0.0, noise=2.0), x) - x).std() == pytest.approx(0.2, rel=0.2)


def test_sia_moves_scales_or_blurs_whole_blocks():
    x = 0.2 + 0.6 * uniform(0, 64, 2, 9, 11)
    z = applied(SIA(), x)
    assert z.shape == x.shape
    assert z.min() >= 0
    assert z.max() <= 1
    changed = (z != x).float().mean()
    assert 0.5 < changed < 1
    # One block: the seven operations, told apart by what they leave as it was.
    z = applied(SIA(blocks=1), x)
    ops = {
        "flip v": (z == x.flip(2)),
        "flip h": (z == x.flip(3)),
        "turn": (z == x.flip(2, 3)),
        "roll v": torch.stack([z == x.roll(-k, 2) for k in range(9)]).flatten(2).all(2).any(0),
        "roll h": torch.stack([z == x.roll(-k, 3) for k in range(11)]).flatten(2).all(2).any(0),
        "noise": ((z - x).abs() <= 16 / 255 + 1e-6),
        "scale": ((z / x).flatten(1).std(1) < 1e-5),
    }
    rows = {name: (each if each.ndim == 1 else each.flatten(1).all(1)) for name, each in ops.items()}
    assert torch.stack(list(rows.values())).any(0).all()
    assert all(each.any() for each in rows.values())


@pytest.mark.parametrize("shape", [(8, 8), (7, 12)])
def test_bsr_without_turns_is_a_permutation_and_with_them_stays_between_black_and_white(shape):
    x = uniform(0, 30, 1, *shape)
    z = applied(BSR(angle=0.0), x)
    torch.testing.assert_close(z.flatten(1).sort(1).values, x.flatten(1).sort(1).values)
    assert (z != x).flatten(1).any(1).float().mean() > 0.6
    turned = applied(BSR(), x)
    assert turned.min() >= -1e-6
    assert turned.max() <= 1 + 1e-6
    one = applied(BSR(blocks=1, angle=0.0), x)
    assert torch.equal(one, x)


def test_bsr_turns_a_single_strip_as_affine_grids_do():
    x = uniform(0, 12, 1, 9, 9).double()
    part = BSR(blocks=1, angle=24.0)
    z = part._shuffled(x, Draw(RowRng.from_ids(0, names(12)), x, 1), "rows")
    turn = (2 * Draw(RowRng.from_ids(0, names(12)), x, 1).uniform("bsr turn rows", 1) - 1) * math.radians(24)
    c, s = turn.cos(), turn.sin()
    theta = torch.stack([torch.cat([c, s, 0 * c], 1), torch.cat([-s, c, 0 * c], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    expected = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    torch.testing.assert_close(z, expected, atol=1e-9, rtol=0)


def pool_of_grey(classes, n, shape=(1, 6, 6)):
    """Every image is flat, its grey level its class / 100."""
    y = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(0))
    return Data((y / 100).view(-1, 1, 1, 1).expand(n, *shape).clone(), y, Box(shape=shape), classes)


def test_admix_partners_are_of_another_class_and_every_one_comes_up():
    data, x = pool_of_grey(4, 50), uniform(0, 200, 1, 6, 6)
    y = torch.arange(200) % 4
    walk = walk_on(lambda z: z, x, Untargeted(y))
    walk.notes["data"] = data
    seen = set()
    for step in range(5):
        walk.step = step
        levels = (_partners_of(walk, 0)[:, 0, 0, 0] * 100).round().long()
        assert (levels != y).all()
        seen |= set(zip(y.tolist(), levels.tolist(), strict=True))
    assert len(seen) == 12
    walk.notes["data"] = pool_of_grey(1, 5)
    walk.notes.pop("admix")
    with pytest.raises(UsageError, match="own class"):
        _partners_of(walk, 0)


def test_admix_partners_of_targeted_goals_differ_from_the_surrogates_decision():
    model, x = network(), uniform(0, 20, 2, 6, 6)
    decided = model(x).argmax(1)
    walk = walk_on(model, x, Targeted((decided + 1) % 3))
    walk.notes["data"] = pool_of_grey(3, 30, (2, 6, 6))
    levels = (_partners_of(walk, 0)[:, 0, 0, 0] * 100).round().long()
    assert (levels != decided).all()


def test_admix_copies_share_a_mixture_over_the_scales():
    x = uniform(0, 6, 1, 6, 6)
    walk = walk_on(lambda z: z, x, Untargeted(torch.zeros(6).long()))
    walk.notes["data"] = pool_of_grey(4, 50)
    part = Admix(scales=2, mixes=3)
    z = applied(part, x, part.copies, walk=walk).view(3, 2, *x.shape)
    assert torch.equal(z[:, 0], z[:, 1] * 2)
    level = (z[:, 0] - x) / 0.2
    torch.testing.assert_close(level, level[:, :, :1, :1, :1].expand_as(level), atol=1e-5, rtol=0)


def test_ti_kernel_is_the_normalised_gaussian_product():
    x = normal(0, 2, 3, 9, 8).double()
    for k in (1, 3, 5, 15):
        w = TI(kernel=k).weights(x)
        torch.testing.assert_close(w.sum(), torch.ones(()).double())
        torch.testing.assert_close(w, w.flip(0))
        kernel = torch.outer(w, w).expand(3, 1, k, k)
        torch.testing.assert_close(separable(x, w), F.conv2d(x, kernel, padding=k // 2, groups=3))
    density = torch.exp(-(torch.linspace(-3, 3, 5).double() ** 2) / 2)
    torch.testing.assert_close(TI().weights(x), density / density.sum())


# --- features


@pytest.fixture
def layered():
    """A smooth network, its two halves, rows and labels."""
    model = net(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 3))
    return model, model.module[:2], model.module[2:], uniform(1, 7, 1, 6, 6).double(), torch.arange(7) % 3


def slope(head, score, h):
    h = h.detach().requires_grad_()
    return torch.autograd.grad(score(head(h)).sum(), h)[0]


def direction_of(part, layered, goal=None):
    """The part's first gradient, and what it walks down."""
    model, _, _, x, y = layered
    walk = walk_on(model, x, Untargeted(y) if goal is None else goal)
    return part.begin(walk)(x), walk


def down(first, weight, x):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad((first(leaf) * weight).sum(), leaf)[0]


def test_naa_as_written(layered):
    _, first, head, x, y = layered

    def p(logits):
        return logits.softmax(1).gather(1, y[:, None])

    weight = sum(slope(head, p, first(x * i / 30)) for i in range(1, 31)) / 30
    got, walk = direction_of(NAA(layer="1"), layered)
    torch.testing.assert_close(got, down(first, weight, x))
    assert (walk.oracle.meter.forwards == 31).all()


def test_targeted_naa_raises_what_the_target_rests_on(layered):
    _, first, head, x, y = layered

    def p(logits):
        return -logits.softmax(1).gather(1, y[:, None])

    weight = sum(slope(head, p, first(x * i / 30)) for i in range(1, 31)) / 30
    torch.testing.assert_close(direction_of(NAA(layer="1"), layered, Targeted(y))[0], down(first, weight, x))


def test_fia_as_written(layered):
    _, first, head, x, y = layered
    rng = RowRng.from_ids(0, names(7))

    def p(logits):
        return logits.softmax(1).gather(1, y[:, None])

    weight = sum(slope(head, p, first(x * (rng.at("fia", i).uniform(x) < 0.7))) for i in range(30))
    weight = weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(direction_of(FIA(layer="1"), layered)[0], down(first, weight, x))


def test_bfa_as_written(layered):
    model, first, head, x, y = layered
    point, weight = x, 0.0
    for _ in range(30):
        leaf = point.clone().requires_grad_()
        g = torch.autograd.grad(F.cross_entropy(model(leaf), y, reduction="sum"), leaf)[0]
        point = x + 28 * 6 / math.sqrt(3 * 224 * 224) * g / g.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        weight = weight + slope(head, lambda logits: logits.gather(1, y[:, None]), first(point))
    weight = weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    torch.testing.assert_close(direction_of(BFA(layer="1"), layered)[0], down(first, weight, x))


def test_ila_and_ilpd_as_written(layered):
    model, first, head, x, y = layered
    rng = RowRng.from_ids(0, names(7))
    got, walk = direction_of(ILA(layer="1", base=("bim",)), layered)
    found = Composed().one_run(walk.oracle, x, walk.goal, walk.ball, rng)
    torch.testing.assert_close(got, down(first, (first(x) - first(found)).detach(), x))

    noisy = x + 0.05 * rng.at("ilpd", 0).normal(x)
    leaf = (x + 0.01).requires_grad_()
    h = 0.1 * first(leaf) + 0.9 * first(noisy).detach()
    expected = -torch.autograd.grad(F.cross_entropy(head(h), y, reduction="sum"), leaf)[0]
    walk = walk_on(model, x, Untargeted(y))
    torch.testing.assert_close(ILPD(layer="1").begin(walk)(x + 0.01), expected)


def test_features_go_down_their_direction(layered):
    model, first, _, x, y = layered
    for part in (NAA(layer="1"), FIA(layer="1"), BFA(layer="1")):
        walk = walk_on(model, x, Untargeted(y))
        ask = part.begin(walk)
        z = x
        for _ in range(5):
            z = z - 0.02 * ask(z).sign()
        weight = ask.__closure__ and next(
            cell.cell_contents.weight for cell in ask.__closure__ if isinstance(cell.cell_contents, Along)
        )
        assert ((first(z) - first(x)).flatten(1) * weight).sum(1).max() < 0


def test_the_middle_layer_is_nearest_to_half_the_multiplications():
    model = net(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 3),
    )  # fmt: skip
    x = uniform(0, 2, 1, 6, 6).double()
    # 36 * 36, then 36 * 144, then 9 * 144, then 108: 1296, 6480, 7776, 7884
    assert middle(model, x) == "4"
    tap = Tap(model, model.module[4])
    torch.testing.assert_close(tap(x), model.module[:5](x))
    assert not model.module[4]._forward_hooks
    flat = net(nn.Flatten(), nn.Linear(36, 3))
    with pytest.raises(UsageError, match="name a layer"):
        middle(flat, x)
    flat.module.train()
    with pytest.raises(BadModel, match="training mode"):
        middle(flat, x)


# --- backward rules


def gradient_through(part, model, x, y):
    oracle = MeteredOracle(model, len(x))
    return -part.through(oracle, x).gradient(x, Untargeted(y))[1], oracle


def plain_gradient(function, x, y):
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(function(leaf), y, reduction="sum"), leaf)[0]


def unit(g):
    return g / g.flatten(1).norm(dim=1).view(-1, *(1 for _ in g.shape[1:]))


@pytest.mark.parametrize("functional", [False, True])
def test_linbp_is_linear_from_its_layer_on(functional):
    class Functional(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, z):
            z = torch.relu(self.layers[0](z)).flatten(1)
            return self.layers[5](F.relu(self.layers[3](z)))

    model = net(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, 3))
    layers, x, y = model.module, uniform(1, 5, 1, 6, 6).double(), torch.arange(5) % 3
    name = "3"
    if functional:
        model, name = model.with_module(Functional(layers).eval()), "layers.3"
    got, _ = gradient_through(LinBP(layer=name), model, x, y)
    with torch.no_grad():
        logits = model(x)
        pull = logits.softmax(1) - F.one_hot(y, 3)
        back = (pull @ layers[5].weight @ layers[3].weight).view(-1, 4, 4, 4)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layers[1](layers[0](leaf)), leaf, back)
    torch.testing.assert_close(unit(got), unit(expected))
    # From the very first layer on, the first ReLU is linear, too.
    got, _ = gradient_through(LinBP(layer="layers.0" if functional else "0"), model, x, y)
    (expected,) = torch.autograd.grad(layers[0](leaf), leaf, back)
    torch.testing.assert_close(unit(got), unit(expected))


def test_bpa_is_silu_and_soft_pooling_backwards():
    model = net(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1), nn.Flatten(), nn.Linear(36, 3)
    )
    x, y = uniform(1, 5, 1, 6, 6).double(), torch.arange(5) % 3
    got, oracle = gradient_through(BPA(layer="0"), model, x, y)
    conv, linear = model.module[0], model.module[4]
    leaf = x.clone().requires_grad_()
    h = conv(leaf)
    active = h.clamp_min(0).detach()
    padded = F.pad(active, (1, 1, 1, 1), value=-1e9)
    windows = F.unfold(padded, 3, stride=2).view(5, 4, 9, 9)
    weights = (10 * windows).softmax(2)
    with torch.no_grad():
        pooled = windows.amax(2).flatten(1)
        pull = (linear(pooled).softmax(1) - F.one_hot(y, 3)) @ linear.weight
        spread = weights * pull.view(5, 4, 1, 9)
        back = F.fold(spread.reshape(5, 36, 9), (8, 8), 3, stride=2)[..., 1:-1, 1:-1]
        sigma = torch.sigmoid(h)
        back = back * sigma * (1 + h * (1 - sigma))
    (expected,) = torch.autograd.grad(h, leaf, back)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(oracle.seen_as(lambda m: m)(x), model(x))


class Residual(nn.Module):
    """Two residual blocks, written in the four ways in which people add."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))
        self.head = nn.Linear(8, 3)

    def add(self, skip, branch):
        if self.way == "skip first":
            return skip + branch
        if self.way == "torch.add":
            return torch.add(branch, skip)
        if self.way == "in place":
            branch += skip
            return branch
        if self.way == "method":
            branch.add_(skip)
            return branch
        return branch + skip

    def forward(self, x):
        h = self.stem(x.flatten(1)) + 0.0
        for block in self.blocks:
            h = self.add(h, block(h))
        return self.head(h)


@pytest.mark.parametrize("way", ["branch first", "skip first", "torch.add", "in place", "method"])
def test_sgm_scales_the_gradients_of_branches(way):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Residual(way).double().eval()
    model = TorchModel(module, Box(shape=(8,)), 3)
    x, y = uniform(1, 5, 8).double(), torch.arange(5) % 3

    def scaled(z, gamma):
        h = module.stem(z)
        for block in module.blocks:
            branch = block(h)
            h = h + gamma * branch + (1 - gamma) * branch.detach()
        return module.head(h)

    got, _ = gradient_through(SGM(gamma=0.2), model, x, y)
    torch.testing.assert_close(got, plain_gradient(lambda z: scaled(z, 0.2), x, y))
    got, _ = gradient_through(SGM(gamma=1.0), model, x, y)
    torch.testing.assert_close(got, plain_gradient(module, x, y))
    oracle = MeteredOracle(model, 5)
    assert torch.equal(SGM().through(oracle, x)(x), model(x))


def test_sgm_finds_the_blocks_of_torchvision():
    models = pytest.importorskip("torchvision.models")
    with torch.random.fork_rng(devices=[]):
        resnet = models.resnet18(num_classes=4).eval()
        vit = models.VisionTransformer(32, 16, num_layers=3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)
    for module, blocks in ((resnet, 8), (vit.eval(), 6)):
        x = uniform(0, 1, 3, 32, 32).requires_grad_()
        rule = _Skipped(0.2, x)
        with _Watch(rule, True):
            module(x)
        assert rule.found == blocks


# --- ensembles


def test_svre_as_written():
    models = [net(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3), seed=seed) for seed in (0, 1)]
    both, x, y = Ensemble(models), uniform(1, 5, 1, 6, 6).double(), torch.arange(5) % 3

    def n(g):
        return g / g.abs().mean((1, 2, 3), keepdim=True)

    rng = RowRng.from_ids(0, names(5)).at("restart", 0)
    z, g = x, 0.0
    for step in range(3):
        full = plain_gradient(both, z, y)
        inner, m = z, 0.0
        picks = torch.randint(2, (8,), generator=rng.at("svre", step).generator("cpu")).tolist()
        assert set(picks) <= {0, 1}
        for k in picks:
            m = m + n(plain_gradient(models[k], inner, y) - plain_gradient(models[k], z, y) + full)
            inner = (inner + 0.1 / 3 * m.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
        g = g + n(m)
        z = (z + 0.1 / 3 * g.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    oracle = MeteredOracle(both, 5, decides=False)
    got = Composed(parts="svre", steps=3)(oracle, x, Untargeted(y), Linf(0.1), RowRng.from_ids(0, names(5)))
    torch.testing.assert_close(got, z, atol=1e-9, rtol=0)


def test_cwa_as_written():
    models = [net(nn.Flatten(), nn.Linear(36, 8), nn.Tanh(), nn.Linear(8, 3), seed=seed) for seed in (0, 1, 2)]
    both, x, y = Ensemble(models), uniform(1, 5, 1, 6, 6).double(), torch.arange(5) % 3
    z, g, m = x, 0.0, 0.0
    for _ in range(3):
        inner = (z - 0.1 / 15 * plain_gradient(both, z, y).sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
        for model in models:
            m = m + unit(plain_gradient(model, inner, y))
            inner = (inner + 250 * 6 / math.sqrt(3 * 224 * 224) * m).clamp(x - 0.1, x + 0.1).clamp(0, 1)
        way = inner - z
        g = g + way / way.abs().mean((1, 2, 3), keepdim=True)
        z = (z + 0.2 / 3 * g.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    oracle = MeteredOracle(both, 5, decides=False)
    got = Composed(parts="cwa", steps=3, path=2.0)(oracle, x, Untargeted(y), Linf(0.1), RowRng.from_ids(0, names(5)))
    torch.testing.assert_close(got, z, atol=1e-9, rtol=0)


def test_snapshots_leave_the_model_alone_and_differ():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TorchModel(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).eval(), Box(shape=(1, 6, 6)), 3)
    data = Data(uniform(0, 40, 1, 6, 6), torch.arange(40) % 3, model.space, 3)
    before = model.state_sha256()
    rng = RowRng.from_ids(0, ["lgv"])
    found = snapshots(model, data, rng, epochs=2, each=2, batch_size=10)
    assert model.state_sha256() == before
    assert len({each.state_sha256() for each in found}) == len(found) == 4
    assert [each.state_sha256() for each in snapshots(model, data, rng, epochs=2, each=2, batch_size=10)] == [
        each.state_sha256() for each in found
    ]
    assert not any(part.training for each in found for root in each.modules() for part in root.modules())
    with pytest.raises(UsageError, match="epochs=0"):
        snapshots(model, data, rng, epochs=0)
    x, y = uniform(1, 4, 1, 6, 6), torch.arange(4) % 3
    oracle = MeteredOracle(Ensemble(found), 4, decides=False)
    z = Composed(parts="mi+lgv")(oracle, x, Untargeted(y), Linf(0.1), rng.take(torch.zeros(4).long()))
    assert (F.cross_entropy(model(z), y) > F.cross_entropy(model(x), y)).item()
    assert (oracle.meter.forwards == 10).all()
