"""The numbers of rows in a call that a probe finds to give a row the same bits, network by network."""

from __future__ import annotations

from typing import Any

import torch

from advkit.benchmark.sides import one_thread
from advkit.core.errors import AdvkitError
from advkit.core.lanes import Lanes
from advkit.core.rng import RowRng
from advkit.core.state import frozen
from advkit.models import MODELS


def _built(name: str, shape: tuple[int, ...]) -> Any:
    if name == "small ViT":
        return _vit(shape)
    return MODELS.build(name)(shape, 1000 if shape[-1] == 224 else 10, RowRng.from_ids(0, ["network"]))


def _vit(shape: tuple[int, ...]) -> torch.nn.Module:
    from torchvision.models import VisionTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = VisionTransformer(shape[-1], 8, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10)
        torch.nn.init.normal_(made.heads.head.weight, std=0.1)  # zeros as it comes
    module: torch.nn.Module = made.eval()
    return module


NETWORKS = {
    "mlp": (1, 28, 28),
    "cnn": (1, 28, 28),
    "resnet8": (3, 32, 32),
    "resnet18": (3, 32, 32),
    "small ViT": (3, 32, 32),
    "snn": (1, 28, 28),
    "efficientnet-lite0": (3, 224, 224),
}
"""Each with the shape of its images. The weights are random but for EfficientNet's."""


def call_sizes() -> list[dict[str, Any]]:
    """The sizes of a call for every network: as a run of few rows tries them, forward and backward, on noise."""
    found = []
    for name, shape in NETWORKS.items():
        entry: dict[str, Any] = {"model": name, "image": list(shape)}
        try:
            model = _built(name, shape)
        except AdvkitError as error:
            found.append({**entry, "left_out": str(error)})
            continue
        x = torch.rand(64, *shape, generator=torch.Generator().manual_seed(0))
        with one_thread(), frozen(*model.modules()):
            lanes = Lanes.probed(model, x)
        found.append({**entry, "sizes": list(lanes.sizes) or [lanes.chunk]})
    return found
