"""Write advkit/models/recognised.json: hashes of the tensors of torchvision's networks and of many of timm's.

    python scripts/recognised_networks.py

Networks are built without memory; those that can't be are built with it where they are small. Of two that are made of
the same tensors the first keeps its place: torchvision's stand before timm's.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator

import timm
import torch
import torchvision.models
from torch import nn

from advkit.models.recognised import TABLE, names_hash, shapes_hash

FAMILIES = (
    "resnet* wide_resnet* resnext* seresnet* vit_tiny_* vit_small_* vit_base_* vit_large_* deit* beit* convnext* swin_* "
    "swinv2_* efficientnet_b* efficientnetv2_* tf_efficientnet_b* tf_efficientnetv2_* mobilenet* densenet* vgg* mixer_* "
    "xcit_* regnety_0* inception_* mobilevit_* edgenext_* maxvit_tiny_*"
).split()
LARGE = ("128gf", "32gf")


def networks() -> Iterator[tuple[str, nn.Module]]:
    """Name and network."""
    for name in torchvision.models.list_models(module=torchvision.models):
        if not name.endswith(LARGE):
            yield from built(f"torchvision:{name}", lambda: torchvision.models.get_model(name, weights=None))
    for name in timm.list_models(FAMILIES):
        yield from built(f"timm:{name}", lambda: timm.create_model(name, pretrained=False))


def built(name: str, make: Callable[[], nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                yield name, make()
        except (NotImplementedError, RuntimeError):  # it computes with tensors of its own
            if name.startswith("torchvision:"):
                yield name, make()


def main() -> None:
    table: dict[str, list[tuple[str, str, str]]] = {}
    for name, module in networks():
        tensors = module.state_dict()
        head = list(tensors)[-1].rpartition(".")[0]
        found = table.setdefault(names_hash(tensors), [])
        shapes = shapes_hash(tensors, head)
        if all(known[1:] != (head, shapes) for known in found):
            found.append((name, head, shapes))
    lines = ",\n".join(f"{json.dumps(names)}: {json.dumps(table[names])}" for names in sorted(table))
    TABLE.write_text("{\n" + lines + "\n}\n", encoding="utf-8")
    print(f"{sum(map(len, table.values()))} networks in {TABLE}")


if __name__ == "__main__":
    main()
