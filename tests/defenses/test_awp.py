"""AWP: how far the weights go, that they come back exactly, and that it goes around every training defense."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from advkit.core.errors import UsageError
from advkit.core.protocols import Data, Trains, TrainsFront
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.defenses import DEFENSES
from advkit.defenses.adversarial.awp import AWP, AWPObjective, perturbation, perturbed_names
from advkit.defenses.adversarial.base import attacked
from advkit.defenses.adversarial.watched import WatchedObjective
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import Linf
from advkit.training.loop import Recipe, fit

ROWS = torch.arange(12)
BASES = [
    name
    for name, part in ((name, DEFENSES.build(name)) for name in DEFENSES.names())
    if isinstance(part, Trains) and not isinstance(part, TrainsFront) and name not in ("awp", "pubdef")
]


def streams(n: int = 12, seed: int = 0) -> RowRng:
    return RowRng.from_ids(seed, [str(row) for row in range(n)])


def batch() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return torch.rand(12, 6, generator=drawn), torch.arange(12) % 3


def network(dropout: float = 0.0) -> TorchModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)
        ).train()
    return TorchModel(module, Box(0.0, 1.0), 3)


def tensors(model: TorchModel) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.module.state_dict().items()}


def prepared(spec: str, model: TorchModel) -> AWPObjective:
    objective: Any = DEFENSES.build(spec).objective()
    x, y = batch()
    objective.prepare(model, Data(x, y, model.space, 3), streams(1))
    return objective


@pytest.mark.parametrize("base", ["none", "pgd_at:steps=2", "[trades:beta=6,steps=2]", "[mart:steps=2]"])
def test_weights_move_by_gamma_of_their_own_length_up_the_loss(base: str) -> None:
    x, y = batch()
    model = network()
    objective = prepared(f"awp:base={base},gamma=0.03", model)
    held = tensors(model)
    plain: Any = DEFENSES.build(base.strip("[]")).objective()
    twin = network()
    names = perturbed_names(twin.module)
    assert names == ["0.weight", "4.weight"]
    loss = plain.loss(twin, x, y, ROWS, streams())
    directions = torch.autograd.grad(loss, [twin.module.get_parameter(name) for name in names])
    objective.loss(model, x, y, ROWS, streams())
    moved = dict(model.module.named_parameters())
    for name, direction in zip(names, directions, strict=True):
        change = (moved[name] - held[name]).detach()
        assert float(change.norm()) == pytest.approx(0.03 * float(held[name].norm()), rel=1e-4)
        assert functional.cosine_similarity(change.flatten(), direction.flatten(), dim=0) > 1 - 1e-5
    assert all(torch.equal(moved[name], held[name]) for name in moved if name not in names)


def test_the_loss_at_the_perturbed_weights_is_larger_and_the_examples_are_those_of_the_unperturbed() -> None:
    x, y = batch()
    model, defense = network(), DEFENSES.build("pgd_at:eps=0.1,steps=2")
    objective = prepared("awp:base=[pgd_at:eps=0.1,steps=2],gamma=0.01", model)
    model.module.eval()  # else the first of the passes below would move the statistics that the attack sees
    z = attacked(model, defense.attack, x, Untargeted(y), Linf(0.1), streams().at("attack"))
    before = functional.cross_entropy(model(z), y)
    found = objective.loss(model, x, y, ROWS, streams())
    assert found > before
    assert torch.allclose(found, functional.cross_entropy(model(z), y), atol=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_sees_the_perturbed_weights(half: torch.dtype) -> None:
    # autocast keeps the copies that it made of the weights, also when these have changed
    x, y = batch()
    model = network()
    model.module.eval()
    objective = prepared("awp:base=none,gamma=0.5", model)
    with torch.autocast("cpu", dtype=half):
        before = functional.cross_entropy(model(x), y)
        found = objective.loss(model, x, y, ROWS, streams())
    with torch.autocast("cpu", dtype=half):
        at_moved = functional.cross_entropy(model(x), y)
    assert found > before + 0.1
    assert torch.equal(found, at_moved)


@pytest.mark.parametrize("gamma", [0.01, 3.0])
def test_weights_come_back_to_the_bit_where_no_step_was_made(gamma: float) -> None:
    x, y = batch()
    model = network()
    objective = prepared(f"awp:base=none,gamma={gamma}", model)
    held = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    objective.loss(model, x, y, ROWS, streams())
    objective.loss(model, x, y, ROWS, streams())  # a second loss before the step does not start from moved weights
    objective.stepped(model)
    assert all(torch.equal(parameter, held[name]) for name, parameter in model.module.named_parameters())


def test_ten_steps_are_those_of_a_hand_written_loop() -> None:
    """Logistic regression, sgd with momentum and weight decay: the step is made at the moved weights."""
    x, y = batch()
    x, gamma = x.double(), 0.05
    w = torch.zeros(3, 6, dtype=torch.float64) + torch.arange(18).reshape(3, 6) / 40
    b = torch.zeros(3, dtype=torch.float64)
    layer = nn.Linear(6, 3).double()
    with torch.no_grad():
        layer.weight.copy_(w)
        layer.bias.copy_(b)
    model = TorchModel(layer, Box(0.0, 1.0), 3)
    objective = prepared(f"awp:base=none,gamma={gamma}", model)
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias]}]
    optimizer = torch.optim.SGD(groups, lr=0.3, momentum=0.9)
    speed_w, speed_b = torch.zeros_like(w), torch.zeros_like(b)

    def gradients(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        error = (x @ w.T + b).softmax(1) - functional.one_hot(y, 3)
        return error.T @ x / len(x), error.mean(0)

    for step in range(10):
        optimizer.zero_grad()
        objective.loss(model, x, y, ROWS, streams()).backward()
        optimizer.step()
        objective.stepped(model)
        d, _ = gradients(w, b)
        v = gamma * w.norm() * d / d.norm()
        at_w, at_b = gradients(w + v, b)
        at_w = at_w + 0.1 * (w + v)
        speed_w = at_w if step == 0 else 0.9 * speed_w + at_w
        speed_b = at_b if step == 0 else 0.9 * speed_b + at_b
        w, b = (w + v) - 0.3 * speed_w - v, b - 0.3 * speed_b
        assert torch.allclose(layer.weight, w, atol=1e-12)
        assert torch.allclose(layer.bias, b, atol=1e-12)


def test_a_weight_without_gradient_stays() -> None:
    weight = torch.ones(2, 2)
    assert torch.equal(perturbation(weight, torch.zeros(2, 2), 0.1), torch.zeros(2, 2))


def test_batch_statistics_and_dropout_are_those_of_one_pass() -> None:
    x, y = batch()
    one, other = network(0.5), network(0.5)
    objective = prepared("awp:base=none,gamma=1e-6", one)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = objective.loss(one, x, y, ROWS, streams())
        state = torch.get_rng_state()
        objective.stepped(one)
        torch.manual_seed(3)
        expected = functional.cross_entropy(other(x), y)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.allclose(found, expected, atol=1e-4)  # another mask would be far from it
    assert one.module[1].num_batches_tracked == 1
    assert torch.allclose(one.module[1].running_mean, other.module[1].running_mean, atol=1e-5)


def digits(rows: int = 300) -> Data:
    data = TASKS.build("digits").training()
    return Data(data.x[:rows], data.y[:rows], data.space, data.classes, data.name)


def trained(defense: Any, recipe: Recipe) -> str:
    data = digits()
    model = MODELS.build("mlp:hidden=16")((1, 8, 8), 10, streams(1), space=data.space)
    return fit(model, data, defense.objective(), recipe, streams(1), progress=False).last.state_sha256()


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_gamma_zero_and_a_long_warm_up_are_the_base_to_the_bit(base: str) -> None:
    recipe = Recipe(epochs=2 * DEFENSES.build(base).objective().replays, batch_size=50)
    alone = trained(replace(DEFENSES.build(base), recipe=recipe), recipe)
    assert trained(AWP(base=base, gamma=0.0, recipe=recipe), recipe) == alone
    assert trained(AWP(base=base, gamma=0.02, warm_up=2, recipe=recipe), recipe) == alone
    assert trained(AWP(base=base, gamma=0.02, warm_up=1, recipe=recipe), recipe) != alone


@pytest.mark.parametrize("base", BASES)
def test_it_goes_around_every_training_defense(base: str) -> None:
    """The weights move in every step, come back, and what the base keeps moves as if there were one loss a step."""
    x, y = batch()
    model = network()
    objective = prepared(f"awp:base={base},gamma=0.02", model)
    optimizer = torch.optim.SGD([*model.module.parameters(), *objective.parameters()], lr=0.0)
    for step in range(1, 4):
        held = {name: p.detach().clone() for name, p in model.module.named_parameters()}
        optimizer.zero_grad()
        loss = objective.loss(model, x, y, ROWS, streams().at(step))
        assert {m.live.data_ptr() for m in objective.moved} == {
            model.module.get_parameter(name).data_ptr() for name in perturbed_names(model.module)
        }
        loss.backward()
        optimizer.step()
        objective.stepped(model)
        assert all(torch.equal(p, held[name]) for name, p in model.module.named_parameters())
        if isinstance(objective.base, WatchedObjective) and base != "free_at":
            assert len(objective.base._lowered) == step
        if "counts" in objective.base.state():
            assert objective.base.state()["counts"].tolist() == [step, step]


@pytest.mark.parametrize(("base", "passes"), [("pgd_at:steps=3", 3 + 2), ("[trades:steps=3]", 3 + 1 + 4), ("none", 2)])
def test_it_costs_one_more_outer_loss(base: str, passes: int) -> None:
    x, y = batch()
    model = network()
    objective = prepared(f"awp:base={base}", model)
    calls: list[int] = []
    model.module.register_forward_hook(lambda *_: calls.append(1))
    objective.loss(model, x, y, ROWS, streams()).backward()
    assert len(calls) == passes


def test_specs_nest_and_claims_are_the_base_s() -> None:
    defense = DEFENSES.build("awp:base=[trades:beta=3,eps=0.1],gamma=0.01,recipe=[epochs=3]")
    assert DEFENSES.build(DEFENSES.spec(defense)) == defense
    assert defense.based_on.beta == 3
    assert defense.based_on.recipe.epochs == 3
    assert defense.claims == "linf:eps=0.1"
    assert DEFENSES.build("awp:base=free_at").objective().replays == 8


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("awp:gamma=-0.1", "gamma is -0.1"),
        ("awp:warm_up=-1", "warm_up is -1"),
        ("awp:base=bit-depth", "base=bit-depth trains nothing; expected"),
        ("awp:base=zo_ds", "base=zo_ds trains what stands in front of a finished model"),
        ("awp:base=awp", "base=awp is awp itself"),
        ("awp:base=[pgd_at:recipe=[epochs=2]]", "set it outside of the brackets"),
        ("awp:base=[trades:beta=-1]", "in trades:beta=-1: beta is -1.0"),
        ("awp:base=pgdat", "did you mean 'pgd_at'"),
        ("awp:base=[fgsm_rs:overfitting=stop],recipe=[validation=0]", "overfitting=stop with validation=0"),
    ],
)
def test_nonsense_is_refused(spec: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        DEFENSES.build(spec)
    assert said in str(refused.value)
