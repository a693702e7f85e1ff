"""Weights of other packages' networks are recognised by the names and shapes of their tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision.models
from torch import nn

from advkit.core.errors import CheckpointError
from advkit.models.checkpoint import load_checkpoint
from advkit.models.recognised import advice


def weights(name: str, **settings: int) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        state: dict[str, torch.Tensor] = torchvision.models.get_model(name, weights=None, **settings).state_dict()
    return state


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "mobilenet_v2", "vgg11", "squeezenet1_0"])
def test_a_network_of_torchvision_is_named_whatever_its_classes_and_prefix(name) -> None:
    held = weights(name, num_classes=7)
    said = advice(held, "w.pt")
    assert f"say torchvision:{name},checkpoint=w.pt" in said
    wrapped = {f"module._orig_mod.{key}": value for key, value in held.items()}
    assert advice(wrapped, "w.pt") == said
    assert advice(dict(sorted(held.items())), "w.pt") == said  # safetensors keeps no order


def test_networks_of_the_same_names_are_told_apart_by_their_shapes() -> None:
    assert "torchvision:wide_resnet50_2," in advice(weights("wide_resnet50_2"), "w.pt")
    assert "torchvision:resnext50_32x4d," in advice(weights("resnext50_32x4d"), "w.pt")
    other = weights("resnet18")
    other["conv1.weight"] = torch.empty(64, 3, 3, 3, device="meta")
    said = advice(other, "w.pt")
    assert "names of torchvision:resnet18 and other shapes" in said
    assert "python:MODULE:FACTORY,checkpoint=w.pt" in said


@pytest.mark.slow
def test_a_network_of_timm_is_named() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        held = timm.create_model("convnext_tiny", num_classes=3).state_dict()
    assert "(3 classes): say timm:convnext_tiny,checkpoint=w.pt" in advice(held, "w.pt")


def test_what_nobody_knows_is_not_guessed() -> None:
    assert advice(nn.Linear(3, 2).state_dict(), "w.pt") == ""
    assert advice({}, "w.pt") == ""


def test_a_file_without_an_architecture_or_of_another_says_how_to_name_it(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(torchvision.models.squeezenet1_1(num_classes=3).state_dict(), file)
    with pytest.raises(CheckpointError, match=r"say torchvision:squeezenet1_1,checkpoint="):
        load_checkpoint(file)
    with pytest.raises(CheckpointError, match=r"does not fit cnn.*say torchvision:squeezenet1_1,checkpoint="):
        load_checkpoint(file, architecture="cnn", shape=(3, 64, 64), classes=3)
