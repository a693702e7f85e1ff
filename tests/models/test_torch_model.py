"""TorchModel: normalisation inside, a hash of the weights alone, and the caller's module left as it was."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import nn

from advkit.core.errors import BadModel
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models.ensemble import Ensemble
from advkit.models.torch import FunctionModel, TorchModel, as_model, tensors_sha256


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 5)).eval()


@pytest.fixture
def x() -> torch.Tensor:
    return RowRng.from_ids(0, list("abc")).uniform(torch.empty(3, 2, 8, 8))


def test_hash_is_the_documented_bytes() -> None:
    tensors = {"b": torch.tensor([1.5, -2.0]), "a": torch.tensor([[1], [258]], dtype=torch.int32)}
    expected = hashlib.sha256(
        b"a|int32|2,1|" + b"\x01\0\0\0\x02\x01\0\0" + b"b|float32|2|" + b"\0\0\xc0\x3f\0\0\0\xc0"
    ).hexdigest()
    assert tensors_sha256(tensors.items()) == expected


def test_hash_ignores_order_and_layout_and_sees_every_change() -> None:
    a, b = torch.arange(6.0).reshape(2, 3), torch.tensor(7, dtype=torch.bfloat16)
    first = tensors_sha256([("a", a), ("b", b)])
    assert tensors_sha256([("b", b.clone()), ("a", a.t().contiguous().t())]) == first
    assert not a.t().contiguous().t().is_contiguous()
    changed = a.clone()
    changed[1, 2] = torch.nextafter(changed[1, 2], torch.tensor(9.0))
    others = [
        [("a", changed), ("b", b)],
        [("a", a.reshape(3, 2)), ("b", b)],
        [("a", a.double()), ("b", b)],
        [("c", a), ("b", b)],
        [("a", a)],
    ]
    assert len({first, *(tensors_sha256(other) for other in others)}) == 6


def test_describe_counts_buffers_and_normalisation() -> None:
    module = network()
    plain = TorchModel(module, classes=5)
    info = plain.describe()
    assert info.n_parameters == 2 * 4 * 9 + 4 + 4 + 4 + 144 * 5 + 5
    assert info.classes == 5
    assert TorchModel(module, mean=(0.5,), std=(0.2,)).describe().state_sha256 != info.state_sha256
    module[1].running_mean.add_(1e-3)
    assert plain.describe().state_sha256 != info.state_sha256


def test_normalises_inside(x: torch.Tensor) -> None:
    module = network()
    model = TorchModel(module, mean=(0.4, 0.5), std=(0.2, 0.25))
    expected = module((x - torch.tensor([0.4, 0.5])[:, None, None]) / torch.tensor([0.2, 0.25])[:, None, None])
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_gradient_after_a_first_call_in_inference_mode(x: torch.Tensor) -> None:
    model = TorchModel(network(), mean=(0.4, 0.5), std=(0.2, 0.25))
    with torch.inference_mode():
        model(x)
    z = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(z).sum(), z)
    direction = torch.ones_like(x)
    model.module.double()
    step = 1e-4
    difference = (model((x + step * direction).double()).sum() - model((x - step * direction).double()).sum()) / (
        2 * step
    )
    assert torch.allclose(gradient.sum().double(), difference, rtol=1e-4)


def test_half_precision_answers_float32(x: torch.Tensor) -> None:
    reference = TorchModel(network())(x)
    answer = TorchModel(network().bfloat16())(x)
    assert answer.dtype == torch.float32
    assert torch.allclose(answer, reference, atol=0.05)


def test_mode_and_caller_module_are_left_alone(x: torch.Tensor) -> None:
    module = network()
    module[1].train()
    modes = [each.training for each in module.modules()]
    model = TorchModel(module)
    model(x)
    moved = model.to("meta")
    assert [each.training for each in module.modules()] == modes
    assert next(module.parameters()).device.type == "cpu"
    assert moved is not model
    assert next(moved.module.parameters()).device.type == "meta"
    assert model.to("cpu") is model
    assert model.to(torch.device("cpu", 0)) is model


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_hash_is_the_same_on_a_gpu() -> None:
    model = TorchModel(network())
    assert model.to("cuda").describe().state_sha256 == model.describe().state_sha256


def test_seeing_through_as_model(x: torch.Tensor) -> None:
    class Task:
        space = Box(0.0, 1.0, (2, 8, 8))
        classes = 5

    module = network()
    wrapped = as_model(module, Task())
    assert isinstance(wrapped, TorchModel)
    assert wrapped.module is module
    assert wrapped.space == Task.space
    assert as_model(wrapped) is wrapped
    function = as_model(lambda rows: module(rows) * 2, Task())
    assert isinstance(function, FunctionModel)
    assert torch.equal(function(x), module(x) * 2)
    assert function.modules() == ()
    for nonsense in (3, "cnn", nn.Linear):
        with pytest.raises(BadModel):
            as_model(nonsense, Task())


def test_functions_share_a_hash_only_when_told_so() -> None:
    def double(rows: torch.Tensor) -> torch.Tensor:
        return rows * 2

    def key(**named: str) -> str:
        return FunctionModel(double, **named).describe().state_sha256

    assert key() != key()
    assert key(identity="v1") == key(identity="v1") != key(identity="v2")


@pytest.mark.parametrize(
    "wrong", [{"mean": (0.5,)}, {"mean": (0.5,), "std": (0.0,)}, {"mean": (0.5,), "std": (float("nan"),)}]
)
def test_wrong_normalisation_is_refused(wrong: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(BadModel):
        TorchModel(network(), **wrong)


def test_lazy_layers_have_no_hash() -> None:
    with pytest.raises(BadModel, match="lazy"):
        TorchModel(nn.LazyLinear(3)).describe()


def test_ensemble_is_the_mean_of_logits(x: torch.Tensor) -> None:
    one, other = TorchModel(network(), classes=5), TorchModel(network(), classes=5, mean=(0.5,), std=(0.5,))
    both = Ensemble([one, other])
    assert torch.allclose(both(x), (one(x) + other(x)) / 2, atol=1e-6)
    assert both.modules() == (one.module, other.module)
    assert both.describe().n_parameters == 2 * one.describe().n_parameters
    assert both.describe().state_sha256 != Ensemble([other, one]).describe().state_sha256
    assert both.attacker_view() is both
    assert both.to("cpu") is both
    with pytest.raises(BadModel, match="classes"):
        Ensemble([one, TorchModel(network(), classes=6)])
    with pytest.raises(BadModel, match="agree"):
        Ensemble([one, TorchModel(network(), Box(-1.0, 1.0), classes=5)])


def test_head_is_the_last_layer_with_a_row_per_class() -> None:
    network = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))
    head = TorchModel(network, classes=3).head()
    assert head is not None
    assert torch.equal(head, network[4].weight)
    assert not head.requires_grad
    pointwise = nn.Sequential(nn.Conv2d(2, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = TorchModel(pointwise, classes=4).head()
    assert head is not None
    assert head.shape == (4, 2)
    assert TorchModel(nn.Flatten(), classes=4).head() is None
