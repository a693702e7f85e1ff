"""ConAdv: the schedule of old weights against hand-written loops, and a second batch normalisation that stays apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advkit.attacks.gradient.pgd import PGD
from advkit.core.errors import UsageError
from advkit.core.protocols import Data
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.base import correct_under
from advkit.defenses.adversarial.conadv import ConAdv, ConAdvObjective
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.threat_models.lp import Linf
from advkit.training.loop import Objective, Recipe, fit
from advkit.training.second_norm import SecondNorm


def streams(n: int = 8, seed: int = 0) -> RowRng:
    return RowRng.from_ids(seed, [str(row) for row in range(n)])


def batches(steps: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    drawn = torch.Generator().manual_seed(1)
    return [
        (
            0.3 + 0.4 * torch.rand(rows, 5, generator=drawn, dtype=torch.float64),
            torch.randint(3, (rows,), generator=drawn),
        )
        for _ in range(steps)
    ]


def linear() -> TorchModel:
    layer = nn.Linear(5, 3).double()
    with torch.no_grad():
        layer.weight.copy_(torch.arange(15).reshape(3, 5) / 10 - 0.7)
        layer.bias.zero_()
    return TorchModel(layer, Box(0.0, 1.0), 3)


def network() -> TorchModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double().train()
    return TorchModel(module, Box(0.0, 1.0), 3)


def prepared(model: TorchModel, **settings: Any) -> ConAdvObjective:
    objective: Any = ConAdv(**settings).objective()
    x, y = batches(1)[0]
    objective.prepare(model, Data(x, y, model.space, 3), streams(1))
    return objective


def stepped(objective: ConAdvObjective, model: TorchModel, optimizer: Any, x: Tensor, y: Tensor) -> Tensor:
    """One step of training; returns what the loss was taken on."""
    optimizer.zero_grad()
    rows, rng = torch.arange(len(x)), streams()
    made = objective.examples(model, x, y, rows, rng)
    objective.loss_on(made, model, x, y, rows, rng).backward()
    optimizer.step()
    objective.stepped(model)
    return made


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("tau", [0, 1, 2, 5])
@pytest.mark.parametrize("weight", [0.5, 0.2])
def test_logistic_regression_follows_a_hand_written_loop(tau: int, norm: str, weight: float) -> None:
    eps, rate, steps = 0.05, 0.4, 8
    model = linear()
    objective = prepared(model, eps=eps, norm=norm, tau=tau, weight=weight)
    optimizer = torch.optim.SGD(model.module.parameters(), lr=rate)
    w, b = model.module.weight.detach().clone(), model.module.bias.detach().clone()
    history = [(w, b)]
    for step, (x, y) in enumerate(batches(steps)):
        made = stepped(objective, model, optimizer, x, y)

        def error(z: Tensor, w: Tensor, b: Tensor, y: Tensor = y) -> Tensor:
            return (z @ w.T + b).softmax(1) - functional.one_hot(y, 3)

        old_w, old_b = history[max(0, step - tau)]
        gradient = error(x, old_w, old_b) @ old_w
        move = gradient.sign() if norm == "linf" else gradient / gradient.norm(dim=1, keepdim=True)
        z = x + eps * move
        assert torch.allclose(made, z, atol=1e-12)
        at = [(1 - weight, x, error(x, w, b)), (weight, z, error(z, w, b))]
        w = w - rate * sum(share * e.T @ u / len(x) for share, u, e in at)
        b = b - rate * sum(share * e.mean(0) for share, _, e in at)
        history.append((w, b))
        assert torch.allclose(model.module.weight, w, atol=1e-12)
        assert torch.allclose(model.module.bias, b, atol=1e-12)


class Sequential(Objective):
    """DisAdv in ten lines: both streams from the present weights, one network, no second normalisation."""

    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Any) -> Tensor:
        model.module.eval()
        leaf = x.clone().requires_grad_()
        loss = functional.cross_entropy(model(leaf), y, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        z = (x + 0.1 * gradient.sign()).clamp(0, 1)
        model.module.train()
        return 0.5 * functional.cross_entropy(model(x), y) + 0.5 * functional.cross_entropy(model(z), y)


def digits(rows: int = 300) -> Data:
    data = TASKS.build("digits").training()
    return Data(data.x[:rows], data.y[:rows], data.space, data.classes, data.name)


def trained(objective: Objective, spec: str = "cnn:width=4", **recipe: Any) -> str:
    data = digits()
    model = MODELS.build(spec)((1, 8, 8), 10, streams(1), space=data.space)
    given = Recipe(**{"epochs": 2, "batch_size": 60, **recipe})
    return fit(model, data, objective, given, streams(1), progress=False).last.state_sha256()


@pytest.mark.slow
def test_without_delay_it_is_the_sequential_method_to_the_bit() -> None:
    for spec in ("mlp:hidden=16", "cnn:width=4"):
        made = trained(ConAdv(eps=0.1, tau=0, dual_bn=False).objective(), spec)
        assert made == trained(Sequential(), spec)
        assert made != trained(ConAdv(eps=0.1, tau=1, dual_bn=False).objective(), spec)


def test_examples_depend_on_the_old_weights_alone() -> None:
    for tau in (1, 3):
        model = network()
        objective = prepared(model, eps=0.1, tau=tau)
        optimizer = torch.optim.SGD([*model.module.parameters(), *objective.parameters()], lr=0.5)
        data = batches(5)
        for x, y in data[:4]:
            stepped(objective, model, optimizer, x, y)
        x, y = data[4]
        rows, rng = torch.arange(8), streams()
        expected = objective.examples(model, x, y, rows, rng)
        live = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
        with torch.no_grad():
            for tensor in (*model.module.parameters(), *objective.parameters()):
                tensor.normal_()
        assert torch.equal(objective.examples(model, x, y, rows, rng), expected)
        model.module.load_state_dict(live)
        with torch.no_grad():
            for held in objective.schedule._past[0].values():
                held.add_(torch.randn(held.shape, dtype=torch.float64).to(held.dtype).abs())
        assert not torch.equal(objective.examples(model, x, y, rows, rng), expected)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_examples_are_inside_the_ball_and_the_box(norm: str) -> None:
    model = network()
    objective = prepared(model, eps=0.2, norm=norm)
    x, y = torch.rand(8, 5, dtype=torch.float64).round(decimals=1), torch.arange(8) % 3
    x[:, 0] = 0
    made = objective.examples(model, x, y, torch.arange(8), streams())
    length = (made - x).abs().amax(1) if norm == "linf" else (made - x).norm(dim=1)
    assert (length <= 0.2 + 1e-7).all()
    assert (length > 0).all()
    assert length.max() > 0.2 - 1e-7  # where the box is not in the way, the step ends on the sphere
    assert made.min() >= 0
    assert made.max() <= 1


def test_without_steps_of_the_weights_every_delay_is_the_same() -> None:
    found = []
    for tau in (0, 1, 4):
        model = linear()
        objective = prepared(model, eps=0.1, tau=tau)
        optimizer = torch.optim.SGD(model.module.parameters(), lr=0.0)
        found.append([stepped(objective, model, optimizer, x, y) for x, y in batches(6)])
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_clean_statistics_never_see_an_adversarial_input() -> None:
    model, twin = network(), network()
    objective = prepared(model, eps=0.1)
    x, y = batches(1)[0]
    rows = torch.arange(8)
    before = {name: tensor.clone() for name, tensor in objective.live.second.tensors().items()}
    objective.loss_on(torch.full_like(x, 1e6), model, x, y, rows, streams()).backward()
    twin.module(x)
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        assert torch.equal(model.module.state_dict()[name], twin.module.state_dict()[name])
    after = objective.live.second.tensors()
    assert (after["1.running_mean"] - before["1.running_mean"]).abs().max() > 1e3
    assert model.module[1].weight.grad is not None
    assert all(parameter.grad is not None for parameter in objective.parameters())
    with torch.no_grad():  # the clean branch is what is evaluated: the second set has no say
        model.module.eval()
        held = model(x)
        for parameter in objective.parameters():
            parameter.fill_(7.0)
        assert torch.equal(model(x), held)


def test_the_second_set_is_trained_and_one_set_serves_both_where_that_is_asked_for() -> None:
    model = network()
    objective = prepared(model, eps=0.1)
    first = [parameter.detach().clone() for parameter in objective.parameters()]
    assert [tuple(parameter.shape) for parameter in first] == [(8,), (8,)]
    optimizer = torch.optim.SGD([*model.module.parameters(), *objective.parameters()], lr=0.1)
    for x, y in batches(3):
        stepped(objective, model, optimizer, x, y)
    assert all(not torch.equal(a, b) for a, b in zip(first, objective.parameters(), strict=True))
    shared = prepared(network(), eps=0.1, dual_bn=False)
    assert list(shared.parameters()) == []


def test_the_loop_trains_the_second_set_and_hands_out_a_model_of_the_usual_form() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)).eval()
    model = TorchModel(module, Box(0.0, 1.0, (1, 8, 8)), 10)
    objective: Any = ConAdv(eps=0.1, tau=1).objective()
    done = fit(model, digits(), objective, Recipe(epochs=2, batch_size=60), streams(1), progress=False)
    assert set(done.model.module.state_dict()) == set(module.state_dict())
    own = dict(objective.live.second.tensors())
    assert not torch.equal(own["2.weight"], torch.ones(16))
    assert not torch.equal(own["2.running_mean"], done.last.module[2].running_mean)


def test_a_second_set_swaps_in_and_out() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2)))
    second = SecondNorm(module)
    assert len(second) == 2
    own = dict(module.named_parameters())

    def fail() -> None:
        with second.active():
            assert module[1].weight is not own["1.weight"]
            assert sum(p is own["1.weight"] for p in module.parameters()) == 0
            module(torch.rand(3, 1, 5, 5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert dict(module.named_parameters()) == own
    assert module[1].num_batches_tracked == 0
    assert second.tensors()["1.num_batches_tracked"] == 1
    assert second.tensors()["2.0.num_batches_tracked"] == 1
    held = {name: tensor.clone() + 1 for name, tensor in second.tensors().items()}
    second.fill(held)
    assert all(torch.equal(tensor, held[name]) for name, tensor in second.tensors().items())


def test_the_cosine_of_old_and_present_gradients_is_watched() -> None:
    data = digits()

    def logged(tau: int) -> tuple[list[float], str]:
        model = MODELS.build("mlp:hidden=16")((1, 8, 8), 10, streams(1), space=data.space)
        objective = ConAdv(eps=0.1, tau=tau, watch=2).objective()
        done = fit(model, data, objective, Recipe(epochs=3, batch_size=60), streams(1), progress=False)
        return [entry.figures["stale_cosine"] for entry in done.log], done.last.state_sha256()

    fresh, _ = logged(0)
    assert fresh == pytest.approx([1.0] * 3)
    old, weights = logged(3)
    assert all(0.3 < cosine < 1 - 1e-4 for cosine in old)
    unwatched = ConAdv(eps=0.1, tau=3).objective()
    assert trained(unwatched, "mlp:hidden=16", epochs=3) == weights  # looking changes nothing


def test_any_attack_can_see_old_weights() -> None:
    x, y = batches(1)[0]
    model = network()
    objective = prepared(model, eps=0.1, attack="pgd:steps=3,keep=last")
    one = prepared(network(), eps=0.1)
    rows, rng = torch.arange(8), streams()
    walked, stepped_once = (each.examples(model, x, y, rows, rng) for each in (objective, one))
    assert not torch.equal(walked, stepped_once)
    assert bool(Linf(0.1).admits(walked, x).all())


def test_specs_round_trip() -> None:
    for spec in ("conadv", "conadv:eps=2/255,tau=4,weight=0.3,dual_bn=false", "conadv:attack=pgd:steps=3,watch=5"):
        defense = DEFENSES.build(spec)
        assert DEFENSES.build(DEFENSES.spec(defense)) == defense


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("conadv:tau=-1", "tau is -1"),
        ("conadv:weight=1.5", "weight is 1.5"),
        ("conadv:weight=-0.1", "weight is -0.1"),
        ("conadv:eps=0", "eps is 0.0"),
        ("conadv:attack=nothing", "unknown attack"),
        ("conadv:watch=-2", "watch is -2"),
        ("conadv:dual_bn=perhaps", "dual_bn expects"),
    ],
)
def test_nonsense_is_refused(spec: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        DEFENSES.build(spec)
    assert said in str(refused.value)


@pytest.mark.slow
def test_weights_one_step_old_cost_nothing_in_large_batches_of_digits() -> None:
    """Three steps per epoch. benchmarks/stale_attacks.py has the protocol on Fashion-MNIST."""
    data = TASKS.build("digits").training()
    test = next(iter(TASKS.build("digits").batches(360)))
    recipe = Recipe(
        epochs=40, batch_size=480, optimizer="sgd", lr=0.3, schedule="onecycle", validation=0.0, select="last"
    )
    found: dict[str, list[tuple[float, float]]] = {}
    cosines = []
    for seed in (0, 1, 2):
        for name in ("none", "conadv:eps=0.1,tau=0", "conadv:eps=0.1,tau=1,watch=1"):
            rng = RowRng.from_ids(seed, ["training"]).at("train")
            model = MODELS.build("mlp:hidden=64")((1, 8, 8), 10, rng.at("init"), space=data.space)
            objective: Any = DEFENSES.build(name).objective()
            done = fit(model, data, objective, recipe, rng, progress=False)
            clean = float((done.last(test.x).argmax(1) == test.labels).float().mean())
            attack = PGD(steps=10, step_size=0.25)
            right = correct_under(done.last, attack, test.x, test.labels, Linf(0.1), streams(360))
            found.setdefault(name, []).append((clean, float(right.float().mean())))
            cosines += [each.figures["stale_cosine"] for each in done.log[30:] if "stale_cosine" in each.figures]
    (plain, plain_pgd), (fresh, fresh_pgd), (old, old_pgd) = (
        [sum(values) / 3 for values in zip(*runs, strict=True)] for runs in found.values()
    )
    assert abs(old - fresh) <= 0.015
    assert abs(old_pgd - fresh_pgd) <= 0.03
    assert min(old_pgd, fresh_pgd) >= plain_pgd + 0.1
    assert plain > 0.9
    assert min(cosines) >= 0.95
