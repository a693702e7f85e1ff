"""Speed switches: their grammar, what a view computes, and that the caller's model is never touched."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from advkit.core import speed as speeds
from advkit.core.errors import SpecError, UsageError
from advkit.core.lanes import Lanes
from advkit.core.oracle import MeteredOracle
from advkit.core.speed import Speed, steady
from advkit.models.torch import FunctionModel, TorchModel, tensors_sha256
from advkit.threat_models.goals.untargeted import Untargeted


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3, stride=2))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 3 * 3, 5)).eval()


@pytest.fixture
def images():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.rand(64, 3, 8, 8)


def gradient(model, x, labels):
    oracle = MeteredOracle(model, len(x), lanes=Lanes())
    return oracle.gradient(x, Untargeted(labels))


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("fp32", "fp32"),
        ("bf16", "bf16"),
        ("compile+bf16", "bf16+compile"),
        (" channels_last + fp16 ", "fp16+channels_last"),
        ("fp32+compile", "compile"),
        ("compile+channels_last+bf16+compile", "bf16+channels_last+compile"),
    ],
)
def test_a_spec_has_one_canonical_text(spec, canonical):
    speed = Speed.parse(spec)
    assert str(speed) == canonical
    assert Speed.parse(canonical) == speed
    assert Speed.parse(speed) is speed
    assert (canonical == "fp32") == (speed == Speed()) == (not speed.switches)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("bf17", "did you mean bf16"),
        ("", "expected fp32"),
        ("bf16+", "expected fp32"),
        ("bf16+fp16", "two precisions"),
        ("fp32+bf16", "two precisions"),
        ("channels-last", "did you mean channels_last"),
    ],
)
def test_what_is_no_spec_is_refused(spec, says):
    with pytest.raises(SpecError, match=says):
        Speed.parse(spec)


@pytest.mark.parametrize("switch", ["bf16", "fp16", "channels_last", "compile"])
def test_a_switch_goes_off_alone(switch):
    everything = Speed.parse("bf16+channels_last+compile" if switch != "fp16" else "fp16+channels_last+compile")
    assert everything.without(switch).switches == tuple(s for s in everything.switches if s != switch)


@pytest.mark.parametrize("spec", ["bf16", "fp16", "channels_last", "bf16+channels_last"])
def test_a_view_answers_float32_near_the_model_and_touches_nothing(network, images, spec):
    seen = []
    network.register_forward_hook(lambda _, inputs, answer: seen.append(answer.dtype))
    model = TorchModel(network, classes=5, mean=(0.5,) * 3, std=(0.2,) * 3)
    labels = torch.arange(64) % 5
    _, slope, answer = gradient(model, images, labels)

    def state():
        tensors = dict(network.state_dict())
        return (
            tensors_sha256(tensors.items()),
            {name: (t.data_ptr(), t.stride()) for name, t in tensors.items()},
            [p.requires_grad for p in network.parameters()],
            [p.grad for p in network.parameters()],
            [(m.training, len(m._forward_hooks), m._compiled_call_impl) for m in network.modules()],
        )

    before = state()
    view = Speed.parse(spec).view(model, images)
    seen.clear()
    fast_loss, fast_slope, fast_answer = gradient(view, images, labels)
    assert state() == before
    assert {t.dtype for t in (fast_loss, fast_slope, fast_answer)} == {torch.float32}
    expected = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(spec.partition("+")[0], torch.float32)
    assert set(seen) == {expected}  # a copy keeps the caller's hooks
    coarse = {"bf16": 2e-2, "fp16": 3e-3}.get(spec.partition("+")[0], 1e-5)
    assert (fast_answer - answer).abs().max() < coarse * answer.abs().max()
    assert nn.functional.cosine_similarity(fast_slope.flatten(1), slope.flatten(1)).min() > 1 - 10 * coarse
    assert view.space is model.space
    assert view.describe() == model.describe()
    assert view.attacker_view() is view


def test_half_precision_keeps_gradients_too_small_for_it():
    """A row so sure of itself that its gradient, about 1e-9, is zero in fp16, where the smallest number is 6e-8."""
    linear = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 1.0, 0.0, -1.0]]))
    x = torch.tensor([[10.0, 0.0, 5.0, 0.5], [0.25, 0.5, 0.0, 0.0]])
    labels = torch.tensor([0, 1])
    _, exact, _ = gradient(linear, x, labels)
    assert 0 < exact[0].abs().max() < 6e-8
    assert exact[1].abs().max() > 0.1
    _, found, _ = gradient(Speed.parse("fp16").view(linear, x), x, labels)
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=0)

    with torch.autocast("cpu", torch.float16):
        leaf = x.clone().requires_grad_()
        answer = linear(leaf)
    naive = torch.autograd.grad(nn.functional.cross_entropy(answer.float(), labels, reduction="sum"), leaf)[0]
    assert not naive[0].any()


def test_answers_without_gradients_come_back_without(network, images):
    view = Speed.parse("fp16").view(TorchModel(network), images)
    with torch.no_grad():
        assert not view(images).requires_grad
    assert MeteredOracle(view, 64)(images).dtype == torch.float32


def test_compiling_needs_work_ahead(network, images, monkeypatch):
    monkeypatch.setattr(nn.Module, "compile", lambda *_, **__: pytest.fail("compiled"))
    model = TorchModel(network)
    assert Speed.parse("compile").settled(model, images, speeds.BREAK_EVEN) == (Speed(), None)
    kept, view = Speed.parse("bf16+compile").settled(model, images, planned=10)
    assert str(kept) == "bf16"
    assert view is not None


@pytest.mark.parametrize(("cost", "kept"), [(0.5, "channels_last"), (0.99, "fp32"), (2.0, "fp32")])
def test_channels_last_stays_only_where_it_is_faster(network, images, monkeypatch, cost, kept):
    clock = [0.0]
    real = speeds._ask

    def ask(view, x, backward):
        clock[0] += cost if getattr(getattr(view, "speed", None), "channels_last", False) else 1.0
        return real(view, x, backward)

    monkeypatch.setattr(speeds, "_ask", ask)
    monkeypatch.setattr(speeds, "clock", lambda _: clock[0])
    found, _ = Speed.parse("channels_last").settled(TorchModel(network), images)
    assert str(found) == kept


def test_channels_last_is_for_images(images):
    flat = TorchModel(nn.Linear(12, 3).eval())
    assert Speed.parse("channels_last").settled(flat, images.flatten(1)[:, :12]) == (Speed(), None)


class Sociable(nn.Module):
    """Adds to every row a trace of the row before it."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.inner = nn.Linear(12, 3)

    def forward(self, x):
        answer = self.inner(x)
        return answer + self.size * answer.roll(1, 0)


@pytest.mark.parametrize(("size", "kept"), [(0.0, "bf16"), (0.1, "fp32")])
def test_a_view_whose_bits_depend_on_the_batch_is_dropped(images, size, kept):
    rows = images.flatten(1)[:, :12]
    model = TorchModel(Sociable(size).eval())
    assert steady(model, rows, Lanes()) == (size == 0)
    found, view = Speed.parse("bf16").settled(model, rows)
    assert str(found) == kept
    assert (view is None) == (kept == "fp32")


def test_what_cannot_be_copied_is_not_changed(network, images):
    class Closure(FunctionModel):
        """Lists modules that a copy of it would share."""

        def __init__(self, module):
            super().__init__(lambda x: module(x))
            self.modules = lambda: (module,)

    model = Closure(network)
    strides = [p.stride() for p in network.parameters()]
    for spec in ("channels_last", "compile"):
        with pytest.raises(UsageError, match="without channels_last and compile"):
            Speed.parse(spec).view(model, images)
    assert Speed.parse("channels_last").settled(model, images) == (Speed(), None)
    assert [p.stride() for p in network.parameters()] == strides


def test_a_model_that_cannot_run_at_that_speed_is_a_mistake_of_the_request(images):
    def picky(x):
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel for this type")
        return x.flatten(1)[:, :3]

    with pytest.raises(UsageError, match="no kernel for this type"):
        Speed.parse("bf16").settled(FunctionModel(picky), images)


def test_compiled_views_are_called_in_one_shape(network, images):
    assert Speed.parse("compile").lanes(None, images) == Lanes(chunk=64, multiple=64)
    assert Speed.parse("bf16").lanes(TorchModel(network), images) == Lanes.probed(TorchModel(network), images)


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["compile", "bf16+compile"])
def test_a_compiled_view_answers_as_the_model_does(network, images, spec, monkeypatch):
    monkeypatch.setattr(speeds, "BREAK_EVEN", 0)
    model = TorchModel(network, classes=5)
    labels = torch.arange(64) % 5
    twin = copy.deepcopy(network.state_dict())
    kept, view = Speed.parse(spec).settled(model, images, planned=1)
    assert str(kept) == spec
    assert view is not None
    assert network._compiled_call_impl is None
    assert all(torch.equal(twin[name], tensor) for name, tensor in network.state_dict().items())
    loss, slope, answer = gradient(Speed.parse(spec).without("compile").view(model, images), images, labels)
    fast_loss, fast_slope, fast_answer = gradient(view, images, labels)
    close = {"compile": 1e-5, "bf16+compile": 3e-2}[spec]  # a compiler keeps what eager bf16 rounds between layers
    torch.testing.assert_close(fast_answer, answer, rtol=close, atol=close)
    torch.testing.assert_close(fast_loss, loss, rtol=close, atol=close)
    assert nn.functional.cosine_similarity(fast_slope.flatten(1), slope.flatten(1)).min() > 1 - close
