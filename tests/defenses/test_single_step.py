"""Single-step training: the laws of the step, closed forms of the losses, passes counted, and resumes to the bit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from advkit.core.errors import UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.free_at import FreeAT
from advkit.defenses.adversarial.grad_align import GradAlign, misalignment
from advkit.defenses.adversarial.one_step import correct_after, take
from advkit.defenses.adversarial.single_step import FGSMAT, FGSMRS, NFGSM
from advkit.models.torch import TorchModel
from advkit.threat_models.lp import L1, L2, Linf
from advkit.training.loop import Recipe, fit

EPS = 0.1
ROWS = torch.arange(12)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def streams(n=12, seed=0):
    return RowRng.from_ids(seed, [str(row) for row in range(n)])


def smooth(seed=0, inputs=6, dtype=torch.float32, space=None):
    """Differentiable twice, with batch statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(inputs, 8), nn.BatchNorm1d(8), nn.Softplus(), nn.Linear(8, 3)).to(dtype)
    return TorchModel(module, Box(0.0, 1.0) if space is None else space, 3)


def linear(inputs=6, classes=3, seed=4):
    layer = nn.Linear(inputs, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, inputs, generator=generator(seed)))
        layer.bias.zero_()
    return TorchModel(layer, Box(0.0, 1.0), classes)


@pytest.fixture
def batch():
    return torch.rand(12, 6, generator=generator(1)), torch.randint(3, (12,), generator=generator(2))


def toy(n=96):
    y = torch.arange(n) % 3
    x = (0.5 * torch.rand(n, 6, generator=generator(5)) + 0.2 * functional.one_hot(y, 6)).clamp(0, 1)
    return Data(x, y, Box(0.0, 1.0), 3, "toy")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def moved(defense, model, x, y, seed=0):
    return take(model, x, y, defense.ball(model.space), defense.step, streams(len(x), seed), defense.mode)


def many(n=4_000):
    """Interior rows, so that the walls of the space bend no law, of two classes.

    The sign of a linear model's gradient is then the same everywhere, and so independent of the noise.
    """
    return 0.4 + 0.2 * torch.rand(n, 6, generator=generator(7)), torch.randint(2, (n,), generator=generator(8))


def test_fgsm_at_is_the_sign_of_the_gradient(batch):
    x, y = batch
    model = smooth()
    model.module.train()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(smooth().module.train()(leaf), y), leaf)
    found = moved(FGSMAT(eps=EPS), model, x, y)
    assert torch.equal(found.start, x)
    assert torch.allclose(found.end, (x + EPS * gradient.sign()).clamp(0, 1), atol=1e-7)


def test_fgsm_rs_starts_uniformly_in_the_ball():
    x, y = many()
    start = moved(FGSMRS(eps=EPS), linear(), x, y).start - x
    unit = (start / EPS).flatten().double()
    assert unit.abs().max() <= 1 + 1e-5
    n = len(unit)
    # Kolmogorov and Smirnov's distance to the uniform law on [-1, 1]; beyond 1.95 / sqrt(n) once in a thousand
    ranked = (unit.sort().values + 1) / 2
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert max((ranked - steps).abs().max(), (ranked - steps + 1 / n).abs().max()) < 1.95 / math.sqrt(n)
    # independent of one another: between features, and from row to row
    columns = (start / EPS).double()
    correlation = torch.corrcoef(columns.T) - torch.eye(6)
    assert correlation.abs().max() < 4 / math.sqrt(len(x))
    assert torch.corrcoef(torch.stack((columns[:-1, 0], columns[1:, 0])))[0, 1].abs() < 4 / math.sqrt(len(x))


def test_fgsm_rs_ends_where_its_formula_says():
    x, y = many()
    model = linear(classes=2)
    found = moved(FGSMRS(eps=EPS), model, x, y)
    start = found.start - x
    probabilities = model(found.start).softmax(1) - functional.one_hot(y, 2)
    sign = (probabilities @ model.module.weight).sign()
    expected = (start + 1.25 * EPS * sign).clamp(-EPS, EPS)
    assert torch.allclose(found.end - x, expected, atol=1e-6)
    # P(|delta| = eps) = P(u > -0.25) with u uniform on [-1, 1]: five eighths
    at_the_edge = ((found.end - x).abs() > EPS - 1e-6).double().mean()
    assert abs(float(at_the_edge) - 0.625) < 4 * math.sqrt(0.625 * 0.375 / x.numel())


def test_n_fgsm_leaves_the_ball_and_stays_within_three_radii():
    x, y = many()
    found = moved(NFGSM(eps=EPS), linear(classes=2), x, y)
    start, end = (found.start - x).abs(), (found.end - x).abs()
    assert start.max() <= 2 * EPS + 1e-6
    assert end.max() <= 3 * EPS + 1e-6
    assert end.max() > 2.9 * EPS
    # |u + s| > 1 with u uniform on [-2, 2] and s = 1 or -1: half of the time
    assert abs(float((end > EPS).double().mean()) - 0.5) < 4 * math.sqrt(0.25 / x.numel())


@pytest.mark.parametrize("kind", [FGSMAT, FGSMRS, NFGSM])
def test_rows_stay_in_the_space(kind):
    x = torch.rand(200, 6, generator=generator(3)).round()
    found = moved(kind(eps=0.4), linear(), x, torch.zeros(200, dtype=torch.long))
    for rows in (found.start, found.end):
        assert rows.min() >= 0
        assert rows.max() <= 1
    assert (found.end - x).abs().max() > 0.3


@pytest.mark.parametrize("kind", [FGSMRS, NFGSM])
def test_without_noise_and_with_a_unit_step_all_are_fgsm(batch, kind):
    x, y = batch
    found, plain = (
        moved(each, smooth(), x, y).end for each in (kind(eps=EPS, noise=0.0, step_size=1.0), FGSMAT(eps=EPS))
    )
    assert torch.equal(found, plain)


def test_a_box_of_other_units_takes_the_radius_in_its_own():
    x = 100 + 50 * torch.rand(12, 6, generator=generator(1))
    model = smooth(space=Box(0.0, 255.0))
    found = moved(FGSMRS(eps=8.0), model, x, torch.arange(12) % 3)
    assert 7.9 < (found.end - x).abs().max() <= 8 + 1e-4


@pytest.mark.parametrize(("norm", "ball"), [("l2", L2), ("l1", L1)])
@pytest.mark.parametrize("kind", [FGSMAT, FGSMRS, NFGSM])
def test_other_norms_keep_their_ball(norm, ball, kind):
    x, y = many(300)
    found = moved(kind(eps=0.3, norm=norm), linear(), x, y)
    reach = 0.9 if kind is NFGSM else 0.3
    distance = ball(reach).distance(found.end, x)
    assert distance.max() <= reach * (1 + 1e-5)
    assert distance.max() > 0.29


def test_the_step_leaves_weights_without_gradients_and_modes_alone(batch):
    x, y = batch
    model = smooth()
    model.module.train()
    before = weights(model)
    moved(FGSMRS(eps=EPS, mode="eval"), model, x, y)
    assert same(weights(model), before)
    moved(FGSMRS(eps=EPS), model, x, y)
    assert not torch.equal(model.module[1].running_mean, before["1.running_mean"])
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())
    assert model.module[1].training


def test_loss_is_cross_entropy_at_the_end_of_the_step(batch):
    x, y = batch
    model, other = smooth(), smooth()
    defense = FGSMRS(eps=EPS)
    loss = defense.objective().loss(model, x, y, ROWS, streams())
    found = take(other, x, y, Linf(EPS), defense.step, streams())
    assert torch.equal(loss, functional.cross_entropy(other(found.end), y))
    grads = torch.autograd.grad(loss, list(model.module.parameters()))
    direct = torch.autograd.grad(functional.cross_entropy(other(found.end), y), list(other.module.parameters()))
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(grads, direct, strict=True))


def test_no_abnormal_example_on_a_linear_model_inside_the_space():
    x, y = many(500)
    for defense in (FGSMAT(eps=EPS), FGSMRS(eps=EPS), NFGSM(eps=EPS)):
        objective = defense.objective()
        objective.loss(linear(), x, y, torch.arange(500), streams(500))
        assert objective.noted() == {"abnormal_share": 0.0}


def test_fgsm_accuracy_counts_every_row_after_its_step(batch):
    x, y = batch
    model = smooth()
    with torch.no_grad():
        model.module[3].weight.mul_(20)
    model.module.eval()
    before = weights(model)
    model.module.train()
    found = correct_after(model, x, y, Linf(0.3), streams())
    assert same(weights(model), before)
    model.module.eval()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(model(leaf), y, reduction="sum"), leaf)
    assert torch.equal(found, model((x + 0.3 * gradient.sign()).clamp(0, 1)).argmax(1) == y)
    # A step that overshoots a dip of the loss: wrong before, right after it. The attack leaves such rows alone.
    bumpy = TorchModel(Bump(), Box(0.0, 1.0), 2)
    row, label = torch.tensor([[0.5]]), torch.tensor([0])
    assert bumpy(row).argmax(1).item() == 1
    assert correct_after(bumpy, row, label, Linf(0.4), streams(1)).tolist() == [True]


class Bump(nn.Module):
    """Class 1 within 0.2 of 0.52, class 0 further away."""

    def __init__(self):
        super().__init__()
        self.width = nn.Parameter(torch.tensor(0.2))

    def forward(self, x):
        far = (x - 0.52).abs().squeeze(1)
        return torch.stack((far - self.width, self.width - far), 1)


# ---- GradAlign


def direct_misalignment(one, two):
    cosines = [
        float(a.double() @ b.double() / (a.double().norm() * b.double().norm()))
        for a, b in zip(one.flatten(1), two.flatten(1), strict=True)
        if a.norm() > 0 and b.norm() > 0
    ]
    return 1 - sum(cosines) / len(cosines) if cosines else 0.0


def test_misalignment_is_one_minus_the_mean_cosine_of_rows_with_gradients():
    one, two = (torch.randn(5, 2, 3, generator=generator(s), dtype=torch.float64) for s in (1, 2))
    one[1] = 0
    two[3] = 0
    assert float(misalignment(one, two)) == pytest.approx(direct_misalignment(one, two), abs=1e-12)
    assert float(misalignment(one[:1], 7 * one[:1])) == pytest.approx(0.0, abs=1e-12)
    assert float(misalignment(one[:1], -one[:1])) == pytest.approx(2.0, abs=1e-12)
    assert float(misalignment(one[1:2], two[1:2])) == 0.0
    assert float(misalignment(1e-30 * one.float(), two.float())) == pytest.approx(
        direct_misalignment(one, two), abs=1e-5
    )


def test_misalignment_has_the_gradient_of_its_formula():
    one, two = (torch.randn(4, 5, generator=generator(s), dtype=torch.float64) for s in (1, 2))
    one[0] = 0
    assert torch.autograd.gradcheck(lambda second: misalignment(one, second), two.requires_grad_())
    two = two.detach().clone()
    two[2] = 0
    two.requires_grad_()
    (gradient,) = torch.autograd.grad(misalignment(one, two), two)
    assert torch.isfinite(gradient).all()
    assert (gradient[0] == 0).all()
    assert (gradient[2] == 0).all()


def test_grad_align_against_a_direct_computation(batch):
    x, y = batch
    x, y = x.double(), y
    model = smooth(dtype=torch.float64)
    model.module.train()
    defense = GradAlign(eps=EPS, weight=1.7)

    def direct(module):
        ball = Linf(EPS)
        start = ball.sample(x, streams().at("start"))
        leaf = start.clone().requires_grad_()
        each = functional.cross_entropy(module(leaf), y, reduction="sum")
        first = torch.autograd.grad(each, leaf)[0].detach()
        end = ball.project(start + 1.25 * EPS * first.sign(), x)
        other = ball.sample(x, streams().at("second")).requires_grad_()
        mean = functional.cross_entropy(module(other), y)  # its scale does not matter to the cosine
        (second,) = torch.autograd.grad(mean, other, create_graph=True)
        cosine = functional.cosine_similarity(first, second, dim=1, eps=0).mean()
        return functional.cross_entropy(module(end), y) + 1.7 * (1 - cosine)

    loss = defense.objective().loss(model, x, y, ROWS, streams())
    parameters = list(model.module.parameters())
    found = torch.autograd.grad(loss, parameters)
    twin = smooth(dtype=torch.float64)
    twin.module.train()
    expected = direct(twin.module)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    wanted = torch.autograd.grad(expected, list(twin.module.parameters()))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(found, wanted, strict=True))
    # The penalty's gradient flows through the second gradient: finite differences of the loss with the step held, in
    # evaluation mode so that the batch statistics do not move.
    weight = parameters[0]
    model.module.eval()
    held = moved(replace(defense, mode="eval"), model, x, y)
    second_at = Linf(EPS).sample(x, streams().at("second"))

    def penalty():
        leaf = second_at.clone().requires_grad_()
        each = functional.cross_entropy(model(leaf), y, reduction="sum")
        return misalignment(held.gradient, torch.autograd.grad(each, leaf, create_graph=True)[0])

    (analytic,) = torch.autograd.grad(penalty(), weight)
    h = 1e-6
    for place in ((0, 0), (3, 2), (7, 5)):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * h
            values.append(float(penalty().detach()))
            with torch.no_grad():
                weight[place] -= sign * h
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(float(analytic[place]), abs=1e-7)


def test_grad_align_without_weight_is_fgsm_rs_and_zero_where_the_gradient_is_constant(batch):
    x, y = batch
    recipe = Recipe(epochs=2, batch_size=32, validation=0.0, select="last")
    trained = [
        fit(smooth(), toy(), d.objective(), recipe, streams(1), progress=False).model
        for d in (GradAlign(eps=EPS, weight=0.0), FGSMRS(eps=EPS))
    ]
    assert same(*map(weights, trained))
    # With two classes the input gradient of a linear model has one direction whatever the point: cosine 1.
    model = linear(classes=2)
    losses = [
        d.objective().loss(model, x, y % 2, ROWS, streams()) for d in (GradAlign(eps=EPS, weight=5.0), FGSMRS(eps=EPS))
    ]
    assert torch.allclose(*losses, atol=1e-5)


# ---- Free-AT


class Counting(nn.Module):
    """Counts calls, and backward passes that reach its weights or its input."""

    def __init__(self, inputs=6):
        super().__init__()
        self.layer = nn.Linear(inputs, 3)
        self.forwards = self.backwards = 0
        self.seen = []

    def forward(self, x):
        if self.training:
            self.forwards += 1
            self.seen.append(x.detach().clone())
        answer = self.layer(x)
        if answer.requires_grad and self.training:
            answer.register_hook(self._count)
        return answer

    def _count(self, gradient):
        self.backwards += 1


def counting():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return TorchModel(Counting(), Box(0.0, 1.0), 3)


class Kept:
    """An objective whose model and steps can be looked at: fit trains a copy."""

    def __init__(self, objective):
        self.inner, self.steps = objective, 0
        stepped = objective.stepped

        def noted(model):
            self.model = model
            self.steps += 1
            stepped(model)

        objective.stepped = noted


@pytest.mark.parametrize(("epochs", "m", "passes"), [(10, 4, 3), (8, 4, 2), (3, 8, 1), (5, 1, 5)])
def test_free_at_makes_so_many_passes_and_one_backward_a_step(epochs, m, passes):
    objective = FreeAT(eps=EPS, replays=m).objective()
    kept = Kept(objective)
    recipe = Recipe(epochs=epochs, batch_size=32, validation=0.0, select="last")
    done = fit(counting(), toy(), objective, recipe, streams(1), progress=False)
    steps = passes * 3 * m  # 96 rows in batches of 32
    assert len(done.log) == done.best_epoch == passes == max(1, math.ceil(epochs / m))
    assert kept.steps == kept.model.module.forwards == kept.model.module.backwards == steps


def test_free_at_moves_its_perturbation_with_the_gradient_of_the_loops_backward():
    objective = FreeAT(eps=EPS, replays=3).objective()
    data = toy(40)
    kept = Kept(objective)
    recipe = Recipe(epochs=3, batch_size=20, validation=0.0, select="last", optimizer="sgd", lr=0.1, momentum=0.0)
    fit(counting(), data, objective, recipe, streams(1), progress=False)
    # The same by hand: which rows were in which batch is read off the seen inputs' first replay.
    seen = kept.model.module.seen
    layer = counting().module.layer.double()
    delta = torch.zeros(20, 6, dtype=torch.float64)
    order = torch.randperm(40, generator=streams(1).at("shuffle", 1).generator())
    for number, z in enumerate(seen):
        rows = order[:20] if number < 3 else order[20:]
        x, y = data.x[rows].double(), data.y[rows]
        leaf = delta.clone().requires_grad_()
        point = (x + leaf).clamp(0, 1)
        assert torch.allclose(point.float(), z, atol=1e-6)
        loss = functional.cross_entropy(layer(point), y)
        loss.backward()
        with torch.no_grad():
            for p in layer.parameters():
                p -= 0.1 * p.grad
                p.grad = None
            delta = (delta + EPS * leaf.grad.sign()).clamp(-EPS, EPS)
    assert torch.allclose(objective.delta.double(), delta, atol=1e-6)
    assert objective.delta.abs().max() == pytest.approx(EPS)
    assert len(seen) == 6


def test_free_at_slices_the_perturbation_for_a_smaller_batch():
    objective = FreeAT(eps=EPS, replays=2).objective()
    data = toy(50)  # batches of 32 and 18
    recipe = Recipe(epochs=2, batch_size=32, validation=0.0, select="last")
    fit(counting(), data, objective, recipe, streams(1), progress=False)
    assert objective.delta.shape == (32, 6)
    assert (objective.delta != 0).any(dim=1).all()


# ---- what all of them owe

SINGLE = ["fgsm_at", "fgsm_rs", "n_fgsm", "grad_align", "free_at:replays=2", "aaer", "aaer:base=n_fgsm,warm_up=2"]


class Stopped(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("spec", SINGLE)
def test_resumed_runs_end_with_the_same_bits(spec, tmp_path):
    # Resuming is a law of the loop; what is checked here is that an objective's own state is complete.
    defense = DEFENSES.build(f"{spec}{',' if ':' in spec else ':'}eps=0.2")
    recipe = Recipe(epochs=6, batch_size=16, lr=0.02, validation=0.2, ema=0.9, select="last")
    whole = fit(smooth(), toy(), defense.objective(), recipe, streams(1), progress=False)
    cut = defense.objective()
    loss, calls = cut.loss, []

    def stops(*given):
        calls.append(1)
        if len(calls) == 15:  # in the third epoch
            raise Stopped
        return loss(*given)

    cut.loss = stops
    with pytest.raises(Stopped):
        fit(smooth(), toy(), cut, recipe, streams(1), out=tmp_path, progress=False)
    again = fit(smooth(), toy(), defense.objective(), recipe, streams(1), out=tmp_path, progress=False)
    assert again.last.state_sha256() == whole.last.state_sha256()
    assert [replace(e, seconds=0) for e in again.log] == [replace(e, seconds=0) for e in whole.log]


@pytest.mark.parametrize(
    ("spec", "forwards"),
    [("fgsm_at", 2), ("fgsm_rs", 2), ("n_fgsm", 2), ("grad_align", 3), ("free_at", 1), ("aaer", 2),
     ("aaer:base=n_fgsm,ce_grad=true", 2)],
)  # fmt: skip
def test_passes_per_step(spec, forwards, batch):
    x, y = batch
    model = counting()
    model.module.train()
    DEFENSES.build(spec).objective().loss(model, x, y, ROWS, streams()).backward()
    assert model.module.forwards == forwards
    # the second gradient of GradAlign is differentiated again: one more pass backwards
    assert model.module.backwards == forwards + (spec == "grad_align")


def test_an_epoch_of_aaer_costs_what_one_of_fgsm_rs_costs():
    passes = []
    for spec in ("fgsm_rs", "aaer"):
        objective = DEFENSES.build(spec).objective()
        kept = Kept(objective)
        fit(counting(), toy(), objective, Recipe(epochs=1, batch_size=16), streams(1), progress=False)
        passes.append(kept.model.module.forwards + kept.model.module.backwards)
    assert passes[1] <= 1.1 * passes[0]
    assert passes[0] == 2 * 2 * 6  # 87 rows: five batches of 16 and one of 7


def test_half_precision_trains():
    for spec in SINGLE:
        defense = DEFENSES.build(f"{spec}{',' if ':' in spec else ':'}eps=0.1")
        done = fit(smooth(), toy(), defense.objective(), Recipe(epochs=1, amp=True), streams(1), progress=False)
        assert math.isfinite(done.log[0].loss)
        assert all(p.dtype == torch.float32 for p in done.model.module.parameters())


@pytest.mark.parametrize(
    "spec",
    [
        "fgsm_rs:eps=0.0",
        "pgd_at:eps=0.0",
        "fgsm_rs:eps=-0.1",
        "fgsm_rs:norm=l0,eps=3",
        "fgsm_rs:step_size=0.0",
        "fgsm_rs:noise=-1.0",
        "fgsm_rs:mode=test",
        "fgsm_rs:overfitting=ignore",
        "fgsm_rs:overfitting=stop,recipe=[validation=0]",
        "grad_align:weight=-1.0",
        "free_at:replays=0",
        "free_at:norm=l2",
        "free_at:step_size=0.0",
        "aaer:lambda1=-1.0",
        "aaer:base=pgd_at",
        "aaer:base=aaer",
        "aaer:base=nothing",
        "aaer:base=[fgsm_rs:eps=0.1]",
        "aaer:when_all=never",
        "aaer:warm_up=-1",
    ],
)
def test_nonsense_is_refused(spec):
    with pytest.raises(UsageError):
        DEFENSES.build(spec)


@pytest.mark.parametrize("spec", ["fgsm_rs", "n_fgsm", "grad_align", "free_at", "aaer", "fgsm_at"])
def test_a_radius_beyond_the_box_is_said_before_the_first_epoch(spec, tmp_path):
    defense = DEFENSES.build(f"{spec}:eps=1.5")
    with pytest.raises(UsageError, match="larger than the box"):
        fit(smooth(), toy(), defense.objective(), Recipe(epochs=1), streams(1), out=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spec", SINGLE)
def test_specs_round_trip(spec):
    defense = DEFENSES.build(spec)
    assert DEFENSES.build(DEFENSES.spec(defense)) == defense
    assert defense.claims == f"linf:eps={8 / 255!r}"
