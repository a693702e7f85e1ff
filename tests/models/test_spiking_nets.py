"""Spiking networks as models: rules change no answer, rows stay by themselves, other libraries' networks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import advkit
from advkit.attacks.events.spiking import under_rule
from advkit.core.errors import BadModel
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access
from advkit.core.rng import RowRng
from advkit.core.spaces import Binary, Box
from advkit.models import MODELS
from advkit.models.checkpoint import load_checkpoint, save_checkpoint
from advkit.models.spiking import RULES
from advkit.models.spiking.encoders import Direct, Frames, Integer, Poisson
from advkit.models.spiking.model import SpikingModel, neurons, stepped
from advkit.models.spiking.nets import SpikingNet
from advkit.models.spiking.neurons import LIF, Neuron
from advkit.models.torch import TorchModel, as_model
from advkit.models.views import Preprocessed
from advkit.threat_models.goals.untargeted import Untargeted

RNG = RowRng.from_ids(0, ["a"])
SMALL = "snn:widths=4+6,hidden=16"


def lively(model: SpikingModel, seed: int = 0) -> SpikingModel:
    """Normalisation with statistics, so that every layer spikes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.copy_(1 + torch.rand(layer.weight.shape, generator=generator))
                layer.bias.copy_(torch.rand(layer.bias.shape, generator=generator))
                layer.running_var.fill_(0.1)
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(3)
    return model


def small(spec: str = SMALL, shape: tuple[int, ...] = (1, 8, 8)) -> SpikingModel:
    model = lively(MODELS.build(spec)(shape, 10, RNG))
    assert isinstance(model, SpikingModel)
    return model


def images(rows: int, *shape: int, seed: int = 3) -> Tensor:
    return torch.rand(rows, *(shape or (1, 8, 8)), generator=torch.Generator().manual_seed(seed))


def gradient(model: Any, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    model(leaf).square().sum().backward()
    return leaf.grad


@pytest.mark.parametrize("spec", [SMALL, "snn:down=stride,hidden=0", "snn-resnet18:width=2", "vggsnn:width=2"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 5), (2, 1, 1), (5, 2, 6, 7)])
def test_any_shape(spec: str, shape: tuple[int, ...]) -> None:
    model = MODELS.build(spec)(shape, 7, RNG)
    assert model(torch.ones(2, *shape)).shape == (2, 7)
    assert model.space == (Binary(shape) if len(shape) == 4 else Box(0.0, 1.0, shape))
    assert model.architecture == spec == model.describe().architecture
    assert not any(each.training for each in model.module.modules())


@pytest.mark.parametrize(
    ("spec", "shape", "parameters", "spiking"),
    [
        ("snn-resnet18", (3, 32, 32), 11_173_962, 17),
        ("snn-vgg11", (3, 32, 32), 61.4e6, 10),
        ("vggsnn", (10, 2, 128, 128), 9.23e6, 8),
    ],
)
def test_sizes_as_published(spec: str, shape: tuple[int, ...], parameters: float, spiking: int) -> None:
    with torch.device("meta"):
        module = MODELS.build(spec).network(shape, 10)
    assert sum(p.numel() for p in module.parameters()) == pytest.approx(parameters, rel=2e-3)
    assert len(neurons(module)) == spiking


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("snn", (64,)),
        ("snn:encoder=direct", (4, 2, 8, 8)),
        ("snn:encoder=binary", (2, 8, 8)),
        ("snn:kernel=2", (1, 8, 8)),
        ("snn:time=0", (1, 8, 8)),
        ("snn:threshold=0", (1, 8, 8)),
        ("snn:widths=,hidden=0", (1, 8, 8)),
    ],
)
def test_what_can_not_be_built_is_refused(spec: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadModel):
        MODELS.build(spec)(shape, 3, RNG)


def test_steps_that_are_alike_are_computed_once() -> None:
    """Direct coding repeats a view; the same rows as real copies give the same bits."""
    model = small()
    x = images(16)
    net = model.module
    assert isinstance(net, SpikingNet)
    copies = x[:, None].expand(-1, 4, -1, -1, -1).transpose(0, 1).contiguous()
    expected = net.logits(net.layers(copies).mean(0))
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spec", ["snn:neuron=plif", "snn:reset=none", "snn:neuron=if", "snn:decay_input=true,time=6"])
def test_rules_change_gradients_and_no_answer(spec: str) -> None:
    model = small(spec)
    x = images(6)
    before = {name: tensor.clone() for name, tensor in model.state().items()}
    answer, own = model(x), gradient(model, x)
    for rule in RULES.names():
        swapped = model.with_rule(rule)
        assert swapped.module is model.module
        assert torch.equal(swapped(x), answer)
        assert torch.equal(swapped.copy()(x), answer)
        with torch.no_grad():
            assert torch.equal(swapped(x), answer)
        if rule != "atan":
            assert not torch.equal(gradient(swapped, x), own)
    assert torch.equal(gradient(model, x), own)
    assert torch.equal(gradient(model.with_rule("atan"), x), own)
    assert torch.equal(gradient(model.with_rule("pdsg").with_rule(None), x), own)
    after = model.state()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert model.with_rule("pdsg").describe() == model.describe()


@pytest.mark.parametrize("rule", ["pdsg", "rga", "hart", "atan"])
def test_a_rows_gradient_is_its_own_to_the_last_bit(rule: str) -> None:
    model = small().with_rule(rule)
    x = images(70)
    goal = Untargeted(torch.arange(70) % 10)

    def through(rows: Tensor) -> Tensor:
        oracle = MeteredOracle(model, len(rows), Access.GRADIENTS, lanes=Lanes())
        return oracle.gradient(x[rows], goal.take(rows))[1]

    whole = through(torch.arange(70))
    assert (whole.flatten(1).abs().sum(1) > 0).float().mean() > 0.5
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0))
    assert torch.equal(through(order), whole[order])
    for rows in (torch.tensor([41]), torch.tensor([69, 2, 17, 5, 30])):
        assert torch.equal(through(rows), whole[rows])


def test_published_statistics_mix_rows() -> None:
    model = small().with_rule("pdsg:stats=batch")
    x = images(5)
    assert not torch.allclose(gradient(model, x)[:1], gradient(model, x[:1]), rtol=1e-3)


def rescaled(model: SpikingModel, factor: float) -> SpikingModel:
    """The same function: whatever feeds a neuron, its threshold and its reset times a factor."""
    made = model.copy()
    previous: nn.Module | None = None
    for layer in made.module.modules():
        if isinstance(layer, Neuron):
            assert previous is not None
            with torch.no_grad():
                previous.weight.mul_(factor)
                previous.bias.mul_(factor)
            told = layer.dynamics
            reset = None if told.reset is None else told.reset * factor
            layer.dynamics = replace(told, threshold=told.threshold * factor, reset=reset)
        elif isinstance(layer, nn.BatchNorm2d | nn.Linear):
            previous = layer
    return made


def spikes(model: SpikingModel, x: Tensor) -> list[Tensor]:
    """What every spiking layer answers, in order."""
    seen: list[Tensor] = []
    hooks = [each.register_forward_hook(lambda _, __, found: seen.append(found)) for each in neurons(model.module)]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    assert all(0 < float(each.mean()) < 1 for each in seen)
    return seen


@pytest.mark.parametrize("reset", ["0", "-0.25", "none"])
@pytest.mark.parametrize("factor", [16.0, 2.0**-5, 3.0])
def test_scale_law(reset: str, factor: float) -> None:
    """PDSG measures in the potentials' own unit; a fixed width does not."""
    model = small(f"{SMALL},reset={reset}")
    x = images(16)
    exact = factor != 3
    if not exact:  # round-off, in a precision in which no spike hangs on it
        model.module.double()
        x = x.double()
    other = rescaled(model, factor)
    assert torch.equal(other(x), model(x)) if exact else torch.allclose(other(x), model(x), rtol=1e-5)
    assert all(torch.equal(one, two) for one, two in zip(spikes(model, x), spikes(other, x), strict=True))
    for rule in ("pdsg", "rga", "bptr"):
        one, two = gradient(model.with_rule(rule), x), gradient(other.with_rule(rule), x)
        if rule == "bptr":  # passes unchanged through the spike: every layer's factor stays
            one = one * factor**3
        assert one.abs().max() > 0
        if exact:
            assert torch.equal(one, two)
        else:
            assert torch.allclose(one, two, rtol=1e-5, atol=1e-9 * float(one.abs().max()))
    assert not torch.allclose(gradient(model, x), gradient(other, x), rtol=0.1)


def test_the_networks_past_does_not_know_its_future() -> None:
    model = small("snn:down=stride,widths=4+6,hidden=8", (6, 2, 8, 8))
    x = (images(3, 6, 2, 8, 8) > 0.7).float()
    before = spikes(model, x)
    for t in (0, 3, 5):
        changed = x.clone()
        changed[:, t] = 1 - changed[:, t]
        after = spikes(model, changed)
        assert all(torch.equal(one[:t], two[:t]) for one, two in zip(before, after, strict=True))
        assert not torch.equal(before[0][t:], after[0][t:])


@pytest.mark.parametrize("stats", ["sample", "batch"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 1, 1)])
@pytest.mark.parametrize("time", [1, 4])
def test_a_batch_of_one_has_a_gradient(stats: str, shape: tuple[int, ...], time: int) -> None:
    """The released code's deviation of one value is NaN, whose sign is 0: its attacks return the row untouched."""
    model = small(f"snn:widths=4,hidden=8,time={time}", shape)
    for x in (images(1, *shape), torch.zeros(1, *shape), torch.full((1, *shape), 0.5)):
        found = gradient(model.with_rule(f"pdsg:stats={stats}"), x)
        assert torch.isfinite(found).all()
    assert gradient(model.with_rule(f"pdsg:stats={stats}"), images(1, *shape)).abs().max() > 0


def test_frames_of_events() -> None:
    model = small("snn:down=stride,widths=4+6,hidden=0", (5, 2, 8, 8))
    x = (images(4, 5, 2, 8, 8) > 0.7).float()
    one = model(x)
    assert torch.equal(model(x * 3), one)  # counts of one or more are spikes
    counts = small("snn:down=stride,widths=4+6,hidden=0,encoder=integer", (5, 2, 8, 8))
    assert torch.equal(counts(x), one)
    assert not torch.equal(counts(x * 3), one)
    assert gradient(model.with_rule("pdsg"), x).shape == x.shape


def test_encoders() -> None:
    x = images(3, 2, 4, 4).requires_grad_()
    assert torch.equal(Direct(3)(x), torch.stack([x, x, x]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = Poisson(4000)(x)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert torch.allclose(drawn.mean(0), x, atol=0.04)  # five deviations
    drawn.mean(0).sum().backward()
    assert torch.allclose(x.grad, torch.ones_like(x))
    frames = torch.tensor([[[0.0, 1.0], [2.0, 0.5]]], requires_grad=True)  # [B=1, T=2, 2]
    assert torch.equal(Integer()(frames), frames.transpose(0, 1))
    assert torch.equal(Frames()(frames), torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]]))
    (Frames()(frames) * torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])).sum().backward()
    assert torch.equal(frames.grad, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))


def test_random_coding_says_so() -> None:
    model = small(f"{SMALL},encoder=poisson")
    assert model.describe().randomized
    assert model.attacker_view() is not model
    assert not small().describe().randomized
    assert small().attacker_view().module is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert not torch.equal(model(images(4)), model(images(4)))
        under_rule(model.attacker_view(), "pdsg")(images(4).requires_grad_()).sum().backward()


def test_checkpoints_and_defended_networks_are_spiking_still(tmp_path) -> None:
    model = small()
    x = images(4)
    save_checkpoint(model, tmp_path / "snn.safetensors")
    loaded = load_checkpoint(tmp_path / "snn.safetensors")
    assert isinstance(loaded, SpikingModel)
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(gradient(under_rule(loaded, "pdsg"), x), gradient(model.with_rule("pdsg"), x))
    defended = Preprocessed(model, lambda z: z * 0.9, label="dimmed")
    ruled = under_rule(defended, "pdsg")
    assert torch.equal(ruled(x), defended(x))
    assert torch.equal(gradient(ruled, x), gradient(model.with_rule("pdsg"), x * 0.9) * 0.9)
    assert torch.equal(gradient(ruled.with_rule(None), x), gradient(defended, x))
    with pytest.raises(BadModel, match="no spiking neurons"):
        under_rule(as_model(nn.Linear(2, 2)), "pdsg")
    with pytest.raises(BadModel, match="no spiking neuron"):
        SpikingModel(nn.Linear(2, 2))


def test_checkpoints_keep_bits_and_random_coding(tmp_path) -> None:
    events = MODELS.build(SMALL)((3, 2, 8, 8), 4, RowRng.from_ids(0, ["events"]))
    drawn = MODELS.build(f"{SMALL},encoder=poisson")((1, 8, 8), 4, RowRng.from_ids(0, ["drawn"]))
    for model in (events, drawn):
        save_checkpoint(model, tmp_path / "snn.safetensors")
        loaded = load_checkpoint(tmp_path / "snn.safetensors")
        assert loaded.space == model.space
        assert loaded.describe().randomized == model.describe().randomized
    assert drawn.describe().randomized
    assert events.space == Binary((3, 2, 8, 8))


def test_training_moves_what_attacks_leave_alone() -> None:
    model = small("snn:neuron=plif,widths=4,hidden=8")
    model.module.train()
    model(images(8)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.module.parameters())
    assert any(float(n.w.grad.abs()) > 0 for n in neurons(model.module))  # type: ignore[union-attr]


def test_a_network_of_ones_own() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.neuron, self.last = nn.Linear(6, 8), LIF(surrogate="rect"), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.neuron(self.first(x).expand(5, -1, -1))).mean(0)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Mine()
    plain = TorchModel(module, classes=3)
    x = images(4, 6)
    assert torch.equal(under_rule(plain, "pdsg")(x), plain(x))
    assert not torch.equal(gradient(under_rule(plain, "pdsg"), x), gradient(plain, x))


def spikingjelly_network(mode: str, **more: Any) -> nn.Module:
    pytest.importorskip("spikingjelly.activation_based.neuron", exc_type=ImportError)
    from spikingjelly.activation_based import functional, layer, neuron

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(
            layer.Conv2d(1, 4, 3, padding=1),
            neuron.LIFNode(tau=1.6, **more),
            layer.Flatten(),
            layer.Linear(256, 12),
            neuron.ParametricLIFNode(init_tau=3.0, **more),
            layer.Linear(12, 12),
            neuron.IFNode(**more),
            layer.Linear(12, 10),
        )
    for each in module:
        if hasattr(each, "weight"):
            each.weight.data.mul_(3)
    functional.set_step_mode(module, mode)
    return module


@pytest.mark.parametrize("mode", ["m", "s"])
@pytest.mark.parametrize("more", [{}, {"v_reset": None, "detach_reset": True}])
def test_spikingjelly(mode: str, more: dict[str, Any]) -> None:
    from advkit.models.spiking.adapters import from_spikingjelly

    module = spikingjelly_network(mode, **more)
    from spikingjelly.activation_based import functional

    model = from_spikingjelly(module, time=5, classes=10)
    assert "LIFNode" in type(module[1]).__name__
    assert all(name in model.source for name in ("1 (LIF)", "4 (PLIF)", "6 (IF)"))
    x = images(6).requires_grad_()
    expected = torch.stack([module(x) for _ in range(5)]) if mode == "s" else module(x.expand(5, *x.shape))
    functional.reset_net(module)
    for _ in range(2):  # state is reset at every call
        assert torch.allclose(model(x), expected.mean(0), rtol=1e-4, atol=1e-5)
    expected.mean(0).square().sum().backward()
    assert torch.allclose(gradient(model, x.detach()), x.grad, rtol=1e-3, atol=1e-5)
    assert gradient(model.with_rule("pdsg"), x.detach()).abs().max() > 0


def test_snntorch() -> None:
    snn = pytest.importorskip("snntorch")
    from advkit.models.spiking.adapters import from_snntorch

    class Net(nn.Module):
        def __init__(self, mechanism: str) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(64, 30), nn.Linear(30, 10)
            self.one = snn.Leaky(beta=0.8, reset_mechanism=mechanism)
            self.two = snn.Leaky(beta=0.9, threshold=0.5, init_hidden=True, reset_mechanism=mechanism)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            mem = self.one.reset_mem()
            self.two.reset_mem()
            spikes = []
            for _ in range(6):
                spk, mem = self.one(self.first(x.flatten(1)) * 3, mem)
                spikes.append(self.two(self.last(spk)))
            return torch.stack(spikes), mem

    for mechanism in ("zero", "subtract"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = Net(mechanism)
        x = images(20).requires_grad_()
        expected = module(x)[0].mean(0)
        model = from_snntorch(module, classes=10)
        for _ in range(2):
            assert torch.allclose(model(x), expected, atol=1e-6)
        expected.square().sum().backward()
        assert torch.allclose(gradient(model, x.detach()), x.grad, rtol=1e-3, atol=1e-5)
        assert gradient(model.with_rule("pdsg"), x.detach()).abs().max() > 0
    with pytest.raises(BadModel, match="Synaptic"):
        from_snntorch(nn.Sequential(snn.Synaptic(0.9, 0.8)))


class ATanFunction:
    """A surrogate function as spikingjelly's neurons hold one."""

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha


ATanFunction.__name__ = "ATan"


class LIFNode(nn.Module):
    """Stands in for spikingjelly's: its attributes, and its memory from call to call until `reset`."""

    def __init__(
        self, tau: float = 2.0, v_reset: float | None = 0.0, decay_input: bool = True, mode: str = "s"
    ) -> None:
        super().__init__()
        self.tau, self.v_reset, self.decay_input, self.step_mode = tau, v_reset, decay_input, mode
        self.v_threshold, self.detach_reset, self.surrogate_function = 1.0, False, ATanFunction(3.0)
        self.v: Any = None

    def reset(self) -> None:
        self.v = None

    def step(self, x: Tensor) -> Tensor:
        rest = self.v_reset or 0.0
        v = torch.full_like(x, rest) if self.v is None else self.v
        u = v + (x - (v - rest)) / self.tau if self.decay_input else v - (v - rest) / self.tau + x
        spike = (u >= self.v_threshold).to(x.dtype)
        self.v = u - spike * self.v_threshold if self.v_reset is None else torch.where(spike > 0, rest, u)
        return spike

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x) if self.step_mode == "s" else torch.stack([self.step(each) for each in x])


@pytest.mark.parametrize("mode", ["s", "m"])
@pytest.mark.parametrize(("v_reset", "decay"), [(0.0, True), (-0.3, False), (None, False)])
def test_neurons_that_look_like_spikingjellys(mode: str, v_reset: float | None, decay: bool) -> None:
    """Also where the library is not installed: the same answers, and no state from call to call, whatever happens."""
    from advkit.models.spiking.adapters import from_spikingjelly

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Linear(12, 20), nn.Linear(20, 5)
    gain = 8.0 if decay else 5.0
    first.weight.data.mul_(gain)
    last.weight.data.mul_(gain)
    nodes = [LIFNode(1.7, v_reset, decay, mode), LIFNode(2.0, v_reset, decay, mode)]
    module = nn.Sequential(first, nodes[0], last, nodes[1])
    frames = images(6, 4, 12)  # [B, T, 12]
    expected = torch.stack([module(each) for each in frames.transpose(0, 1)]) if mode == "s" else None
    expected = module(frames.transpose(0, 1)) if expected is None else expected
    assert 0.05 < float(expected.mean()) < 0.95
    left_over = [node.v.clone() for node in nodes]
    model = from_spikingjelly(module, classes=5)
    assert neurons(model.module)[0].surrogate == RULES.build("atan:alpha=3")
    for _ in range(2):
        assert torch.allclose(model(frames), expected.mean(0), atol=1e-6)
        gradient(model.with_rule("pdsg"), frames)
    with pytest.raises(RuntimeError):
        model(frames[:, :, :11])  # fails inside
    assert torch.allclose(model(frames), expected.mean(0), atol=1e-6)
    assert torch.allclose(model(frames[2:3]), expected.mean(0)[2:3], atol=1e-6)
    for each in stepped(model.module):
        assert each.potential is None  # nor is a graph kept alive
        each.step(torch.full((6, 20), 0.9))
    assert torch.allclose(model(frames), expected.mean(0), atol=1e-6)
    assert all(torch.equal(node.v, v) for node, v in zip(nodes, left_over, strict=True))  # the caller's own
    twice = gradient(model, frames), gradient(model, frames)
    assert torch.equal(*twice)
    assert twice[0].abs().max() > 0


class Leaky(nn.Module):
    """Stands in for snnTorch's: the reset comes one step late, fires above the threshold only."""

    def __init__(self, beta: float, mechanism: str, threshold: float = 1.0) -> None:
        super().__init__()
        self.beta, self.threshold = torch.tensor(beta), torch.tensor(threshold)
        self.reset_mechanism, self.init_hidden, self.output, self.reset_delay = mechanism, False, False, True
        self.mem: Any = None

    def reset_mem(self) -> Tensor:
        self.mem = None
        return torch.zeros(0)

    def forward(self, x: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        before = torch.zeros_like(x) if self.mem is None else self.mem
        fired = (before > self.threshold).to(x.dtype)
        if self.reset_mechanism == "zero":
            self.mem = self.beta * before * (1 - fired) + x
        else:
            self.mem = self.beta * before + x - fired * self.threshold
        return (self.mem > self.threshold).to(x.dtype), self.mem


Leaky.__module__ = "snntorch._neurons.leaky"


@pytest.mark.parametrize("mechanism", ["zero", "subtract"])
@pytest.mark.parametrize("beta", [0.8, 1.0])
def test_neurons_that_look_like_snntorchs(mechanism: str, beta: float) -> None:
    from advkit.models.spiking.adapters import from_snntorch

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(12, 20), nn.Linear(20, 5)
            self.one, self.two = Leaky(beta, mechanism), Leaky(0.9, mechanism, 0.5)

        def forward(self, x: Tensor) -> Tensor:  # forgets to reset, as many do
            return torch.stack([self.two(self.last(self.one(2 * self.first(x))[0]))[0] for _ in range(6)])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Net()
    x = images(9, 12)
    expected = module(x).mean(0)
    assert not torch.equal(module(x).mean(0), expected)  # the stand-in does keep its state
    assert 0.05 < float(expected.mean()) < 0.95
    model = from_snntorch(module, classes=5)
    for _ in range(2):
        assert torch.allclose(model(x), expected, atol=1e-6)
        assert gradient(model.with_rule("pdsg"), x).abs().max() > 0
    assert torch.allclose(model(x[4:5]), expected[4:5], atol=1e-6)


def test_networks_without_neurons_are_refused_by_the_adapters() -> None:
    from advkit.models.spiking.adapters import from_snntorch, from_spikingjelly

    for adapter in (from_snntorch, from_spikingjelly):
        with pytest.raises(BadModel, match="no spiking neuron"):
            adapter(nn.Linear(2, 2))


# What users of the two libraries write


def rates(seed: int, shape: tuple[int, ...]) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.6).float()


@pytest.mark.parametrize("library", ["spikingjelly", "snntorch"])
def test_a_converted_network_goes_through_the_harness(library: str) -> None:
    """In evaluation mode it is evaluated, wrapper and all; in training mode it is refused."""
    from advkit.models.spiking.adapters import from_snntorch, from_spikingjelly

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first, last = nn.Linear(32, 24), nn.Linear(24, 7)
    first.weight.data.mul_(3)
    last.weight.data.mul_(3)
    space = Binary((8, 32))
    if library == "spikingjelly":
        module = nn.Sequential(first, LIFNode(2.0, mode="m"), last).eval()
        model = from_spikingjelly(module, space=space, classes=7)
        training = from_spikingjelly(module.train(), space=space, classes=7)
    else:
        leaky = Leaky(0.9, "subtract", 0.5)
        leaky.init_hidden = True
        module = nn.Sequential(first, leaky, last).eval()
        model = from_snntorch(module, loops=False, space=space, classes=7)
        training = from_snntorch(module.train(), loops=False, space=space, classes=7)
    x = rates(0, (20, 8, 32))
    with torch.no_grad():
        labels = model(x).argmax(1)
    assert len(labels.unique()) > 1
    report = advkit.evaluate("sda:steps=3", task=(x, labels), model=model, threat_model="flips:n=5", device="cpu")
    assert report.clean_accuracy == 1
    with pytest.raises(BadModel, match="training mode"):
        advkit.evaluate("sda:steps=3", task=(x, labels), model=training, threat_model="flips:n=5", device="cpu")


def leaky_net(forward: Any, mechanism: str = "subtract", **changed: Any) -> nn.Module:
    """A network around one stand-in of snnTorch's Leaky (six steps, twelve inputs, five neurons)."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f, self.g, self.lif = nn.Linear(12, 5), nn.Linear(5, 5), Leaky(0.8, mechanism)
            for name, value in changed.items():
                setattr(self.lif, name, value)

        def forward(self, x: Tensor) -> Any:
            return forward(self, 3 * self.f(x))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Net().eval()


def by_hand(current: Tensor, mem: Tensor, mechanism: str) -> tuple[Tensor, Tensor]:
    """One step of the documented dynamics: reset by what the potential was, leak, charge, fire."""
    fired = (mem > 1).to(mem.dtype)
    kept = 0.8 * mem - fired if mechanism == "subtract" else 0.8 * mem * (1 - fired)
    mem = kept + current
    return (mem > 1).to(mem.dtype), mem


@pytest.mark.parametrize("mechanism", ["subtract", "zero"])
@pytest.mark.parametrize(("start", "lateral"), [(0.0, 0.0), (0.9, 0.0), (1.7, 0.0), (0.0, 0.5)])
def test_a_potential_that_the_network_hands_over_is_where_a_neuron_goes_on(
    mechanism: str, start: float, lateral: float
) -> None:
    from advkit.models.spiking.adapters import from_snntorch

    def run(step: Any, current: Tensor) -> Tensor:
        mem, spikes = torch.full_like(current, start), []
        for _ in range(6):
            spk, mem = step(current, mem)
            mem = mem - lateral * (spk.sum(1, keepdim=True) - spk) if lateral else mem
            spikes.append(spk)
        return torch.stack(spikes)

    module = leaky_net(lambda net, current: run(net.lif, current), mechanism)
    x = images(9, 12)
    with torch.no_grad():
        expected = run(lambda current, mem: by_hand(current, mem, mechanism), 3 * module.f(x)).mean(0)
    assert 0.05 < float(expected.mean()) < 0.95
    model = from_snntorch(module, classes=5)
    for _ in range(2):
        assert torch.allclose(model(x), expected, atol=1e-6)
    assert gradient(model.with_rule("pdsg"), x).abs().max() > 0


def test_one_leaky_in_two_layers_has_the_potential_of_each() -> None:
    from advkit.models.spiking.adapters import from_snntorch

    def run(net: Any, step: Any, current: Tensor) -> Tensor:
        one = two = torch.zeros_like(current)
        spikes = []
        for _ in range(6):
            spk, one = step(current, one)
            spk, two = step(9 * net.g(spk), two)
            spikes.append(spk)
        return torch.stack(spikes)

    module = leaky_net(lambda net, current: run(net, net.lif, current))
    x = images(9, 12)
    with torch.no_grad():
        expected = run(module, lambda c, m: by_hand(c, m, "subtract"), 3 * module.f(x)).mean(0)
    assert 0.05 < float(expected.mean()) < 0.95
    assert torch.allclose(from_snntorch(module, classes=5)(x), expected, atol=1e-6)


def test_a_reset_to_zero_at_once_is_in_the_potential_that_is_answered() -> None:
    from advkit.models.spiking.adapters import from_snntorch

    def forward(net: Any, current: Tensor) -> Tensor:
        mem, potentials = net.lif.reset_mem(), []
        for _ in range(6):
            _, mem = net.lif(current, mem)
            potentials.append(mem)
        return torch.stack(potentials)

    module = leaky_net(forward, "zero", reset_delay=False)
    x = images(9, 12)
    with torch.no_grad():
        current = 3 * module.f(x)
        mem, expected = torch.zeros_like(current), torch.zeros_like(current)
        for _ in range(6):
            charged = 0.8 * mem + current
            mem = torch.where(charged > 1, 0.0, charged)
            expected += mem / 6
    assert torch.allclose(from_snntorch(module, classes=5)(x), expected, atol=1e-6)
    with pytest.raises(BadModel, match="reset_delay"):
        from_snntorch(leaky_net(forward, "subtract", reset_delay=False))


def test_networks_may_read_and_set_the_potential_of_a_neuron() -> None:
    from advkit.models.spiking.adapters import from_snntorch

    def forward(net: Any, current: Tensor) -> Tensor:
        potentials = []
        for step in range(6):
            net.lif(current)
            if step == 2:
                net.lif.mem = 0.5 * net.lif.mem
            potentials.append(net.lif.mem)
        return torch.stack(potentials)

    module = leaky_net(forward)
    x = images(9, 12)
    with torch.no_grad():
        current = 3 * module.f(x)
        mem, expected = torch.zeros_like(current), torch.zeros_like(current)
        for step in range(6):
            _, mem = by_hand(current, mem, "subtract")
            mem = 0.5 * mem if step == 2 else mem
            expected += mem / 6
    assert torch.allclose(from_snntorch(module, classes=5)(x), expected, atol=1e-6)
    unread = leaky_net(lambda net, current: current * net.lif.spikes_so_far)
    with pytest.raises(BadModel, match="spikes_so_far"):
        from_snntorch(unread)(x)


class MyLeaky(Leaky):
    pass


class MyLIF(LIFNode):
    pass


class Parallel(nn.Module):
    """Stands in for the parallel neurons: of the library, without what the others are known by."""


Parallel.__module__ = "spikingjelly.activation_based.neuron.psn"


class Alpha(nn.Module):
    """Stands in for other neurons of snnTorch."""


Alpha.__module__ = "snntorch._neurons.alpha"


@pytest.mark.parametrize(
    "odd", [MyLeaky(0.9, "zero"), Alpha(), MyLIF(), Parallel()], ids=lambda odd: type(odd).__name__
)
def test_neurons_without_a_counterpart_are_refused_by_name(odd: nn.Module) -> None:
    """A class that derives from a known one may do anything; left in the network it would keep its state."""
    from advkit.models.spiking.adapters import from_snntorch, from_spikingjelly

    jelly = isinstance(odd, MyLIF | Parallel)
    known = LIFNode() if jelly else Leaky(0.9, "zero")
    with pytest.raises(BadModel, match=type(odd).__name__):
        (from_spikingjelly if jelly else from_snntorch)(nn.Sequential(nn.Linear(3, 3), odd, known))


@pytest.mark.parametrize("library", ["spikingjelly", "snntorch"])
def test_neurons_that_do_not_spike_are_refused(library: str) -> None:
    from advkit.models.spiking.adapters import from_snntorch, from_spikingjelly

    node, leaky = LIFNode(), Leaky(0.9, "zero")
    node.surrogate_function = torch.sigmoid
    leaky.spike_grad = torch.sigmoid
    with pytest.raises(BadModel, match="only neurons that spike"):
        from_spikingjelly(node) if library == "spikingjelly" else from_snntorch(leaky)
    node.surrogate_function = leaky.spike_grad = lambda v: (v > 0).float()
    assert from_spikingjelly(node) if library == "spikingjelly" else from_snntorch(leaky)


class Container(nn.Sequential):
    """Stands in for spikingjelly's container that runs through the time steps itself."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(Container, self).forward(each) for each in x])


Container.__module__ = "spikingjelly.activation_based.layer.container"


def test_containers_that_step_through_time_keep_doing_so() -> None:
    from advkit.models.spiking.adapters import from_spikingjelly

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, last = nn.Linear(12, 20), nn.Linear(20, 5)
    first.weight.data.mul_(16)
    last.weight.data.mul_(16)
    module = nn.Sequential(first, Container(LIFNode(mode="s")), last, LIFNode(1.6, mode="m"))
    frames = images(6, 4, 12)
    expected = module(frames.transpose(0, 1)).mean(0)
    assert 0.05 < float(expected.mean()) < 0.95
    model = from_spikingjelly(module, classes=5)
    assert torch.allclose(model(frames), expected, atol=1e-6)
    assert torch.allclose(model(frames[:3]), expected[:3], atol=1e-6)  # the batch is not taken for time
    with pytest.raises(BadModel, match="1 of 2 neurons are in single-step mode"):
        from_spikingjelly(nn.Sequential(LIFNode(mode="s"), LIFNode(mode="m"), Container(LIFNode(mode="s"))))


def test_a_multi_step_neuron_that_two_layers_share_is_refused() -> None:
    """The library goes on from where the first call ended; single-step neurons do so here too."""
    from advkit.models.spiking.adapters import from_spikingjelly

    for mode in ("m", "s"):
        shared = LIFNode(1.5, mode=mode)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(12, 12), shared, nn.Linear(12, 12), shared)
        module[0].weight.data.mul_(8)
        module[2].weight.data.mul_(8)
        frames = images(6, 4, 12)
        model = from_spikingjelly(module, classes=12)
        if mode == "m":
            with pytest.raises(BadModel, match="twice in a pass"):
                model(frames)
            continue
        expected = torch.stack([module(each) for each in frames.transpose(0, 1)]).mean(0)
        assert 0.05 < float(expected.mean()) < 0.95
        for _ in range(2):
            assert torch.allclose(model(frames), expected, atol=1e-6)
