"""Architectures: shapes, published sizes, weights from the seed alone, the global generator untouched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from advkit.core.errors import AdvkitError, BadModel, UnknownName, UsageError
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models import MODELS
from advkit.models.resnet import PreActivationBlock

RNG = RowRng.from_ids(0, ["a"])


@pytest.mark.parametrize(
    "spec", ["cnn", "cnn:width=3,kernel=5", "mlp", "mlp:hidden=8+4", "resnet8:width=4", "resnet18:width=4"]
)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 14, 14), (3, 15, 11), (1, 28, 28), (2, 5, 7)])
def test_any_image_shape(spec: str, shape: tuple[int, ...]) -> None:
    model = MODELS.build(spec)(shape, 7, RNG)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)
    assert model.space == Box(0.0, 1.0, shape)
    assert not any(each.training for each in model.module.modules())
    assert model.architecture == spec == model.describe().architecture


def test_linear_and_tabular() -> None:
    model = MODELS.build("mlp:hidden=")((13,), 3, RNG)
    assert [type(layer) for layer in model.module] == [nn.Flatten, nn.Linear]
    assert model(torch.zeros(4, 13)).shape == (4, 3)


@pytest.mark.parametrize(
    ("spec", "shape", "parameters"),
    [
        ("cnn", (1, 14, 14), 16 * 9 + 16 + 32 * 16 * 9 + 32 + 512 * 64 + 64 + 640 + 10),
        ("resnet18", (3, 32, 32), 11_172_170),
        ("wrn-28-10", (3, 32, 32), 36_479_194),
    ],
)
def test_sizes_as_published(spec: str, shape: tuple[int, ...], parameters: int) -> None:
    model = MODELS.build(spec)(shape, 10, RNG)
    assert model.describe().n_parameters == parameters


def test_residual_block_is_its_formula() -> None:
    torch.manual_seed(0)
    block = PreActivationBlock(3, 3, 1).eval()
    x = torch.rand(2, 3, 6, 6)
    branch = block.conv2(torch.relu(block.norm2(block.conv1(torch.relu(block.norm1(x))))))
    assert torch.allclose(block(x), x + branch)
    assert PreActivationBlock(3, 6, 2)(x).shape == (2, 6, 3, 3)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    build = MODELS.build("resnet8:width=4")
    one = build((1, 8, 8), 3, RNG)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert build((1, 8, 8), 3, RNG).describe().state_sha256 == one.describe().state_sha256
    assert build((1, 8, 8), 3, RowRng.from_ids(1, ["a"])).describe().state_sha256 != one.describe().state_sha256


def test_mean_and_std_are_fields() -> None:
    model = MODELS.build("cnn:mean=0.5,std=0.25")((1, 8, 8), 3, RNG)
    x = torch.rand(2, 1, 8, 8)
    assert torch.allclose(model(x), model.module((x - 0.5) / 0.25))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("cnn", (16,)),
        ("cnn:kernel=4", (1, 8, 8)),
        ("cnn", (1, 1, 9)),
        ("wrn-28-10:depth=27", (3, 32, 32)),
        ("mlp:hidden=0", (4,)),
    ],
)
def test_what_can_not_be_built_is_refused(spec: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(BadModel):
        MODELS.build(spec)(shape, 3, RNG)


@pytest.mark.slow
@pytest.mark.parametrize("package", ["timm", "torchvision"])
def test_external_models(package: str) -> None:
    model = MODELS.build(f"{package}:resnet18,pretrained=false")((3, 40, 40), 6, RNG)
    assert model(torch.zeros(1, 3, 40, 40)).shape == (1, 6)
    assert model.mean == pytest.approx((0.485, 0.456, 0.406))
    assert not model.module.training
    again = MODELS.build(model.architecture)((3, 40, 40), 6, RNG)
    assert again.describe().state_sha256 == model.describe().state_sha256
    with pytest.raises(UnknownName, match="resnet18"):
        MODELS.build(f"{package}:resnet1888,pretrained=false")((3, 40, 40), 6, RNG)


def test_external_weights_that_can_not_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import WeightsEnum

    def unreachable(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", unreachable)
    with pytest.raises(UsageError, match="checkpoint=FILE"):
        MODELS.build("torchvision:resnet18")((3, 40, 40), 1000, RNG)


def test_wrong_number_of_classes_or_channels_of_an_external_model() -> None:
    with pytest.raises(BadModel, match="samples of shape"):
        MODELS.build("torchvision:resnet18,pretrained=false")((1, 40, 40), 6, RNG)


def test_python_factory(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks_for_advkit.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "def make(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(torch.Size(shape).numel(), classes))\n"
        "def fixed():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))\n"
        "def words():\n"
        "    return 'no model'\n"
    )
    (tmp_path / "my_trained_network_for_advkit.py").write_text("from torch import nn\nready = nn.Linear(4, 2)\n")
    monkeypatch.chdir(tmp_path)
    import sys

    path = list(sys.path)
    state = torch.get_rng_state()
    model = MODELS.build("python:my_networks_for_advkit:make")((1, 3, 3), 4, RNG)
    assert sys.path == path
    assert torch.equal(torch.get_rng_state(), state)
    assert model(torch.zeros(2, 1, 3, 3)).shape == (2, 4)
    assert not model.module.training
    assert MODELS.build("python:my_networks_for_advkit:fixed")((4,), 2, RNG).classes == 2
    ready = MODELS.build("python:my_trained_network_for_advkit:ready")((4,), 2, RNG)
    own = sys.modules["my_trained_network_for_advkit"].ready
    assert torch.equal(ready(torch.ones(1, 4)), own(torch.ones(1, 4)))
    assert not ready.module.training
    assert own.training
    for spec, shape in [
        ("python:my_networks_for_advkit:fixed", (5,)),  # other rows
        ("python:my_networks_for_advkit:words", (4,)),
        ("python:my_networks_for_advkit:absent", (4,)),
        ("python:no_such_module_anywhere:make", (4,)),
        ("python:my_networks_for_advkit", (4,)),
    ]:
        with pytest.raises(AdvkitError):
            MODELS.build(spec)(shape, 2, RNG)
