"""Write advkit/models/recognised.json: hashes of the tensors of torchvision's networks and of many of timm's.

    python scripts/recognised_networks.py

Networks are built without memory; those that can't be are built with it where they are small. Of two that are made of
the same tensors the first keeps its place: torchvision's stand before timm's.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import partial

import timm
import torch
import torchvision.models
from torch import nn

from advkit.models.recognised import TABLE, names_hash, shapes_hash

FAMILIES = [
    "resnet??",
    "resnet??d",
    "resnet101",
    "wide_resnet50_2",
    "resnext50_32x4d",
    "seresnet50",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_base_patch32_224",
    "vit_large_patch16_224",
    "deit_*",
    "deit3_small*",
    "deit3_base*",
    "beit_base*",
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "convnextv2_tiny",
    "convnextv2_base",
    "swin_tiny*",
    "swin_small*",
    "swin_base*",
    "efficientnet_b?",
    "tf_efficientnet_b?",
    "tf_efficientnetv2_s",
    "mobilenetv2_100",
    "mobilenetv3_*_100",
    "densenet121",
    "mixer_b16_224",
    "xcit_small_12_p16_224",
    "regnety_0??",
    "inception_v3",
    "inception_v4",
    "mobilevit_s",
]
LARGE = ("128gf", "32gf", "16gf")


def networks() -> Iterator[tuple[str, nn.Module]]:
    """Name and network."""
    for name in torchvision.models.list_models(module=torchvision.models):
        if not name.endswith(LARGE):
            yield from built(f"torchvision:{name}", partial(torchvision.models.get_model, name, weights=None))
    for name in timm.list_models(FAMILIES):
        yield from built(f"timm:{name}", partial(timm.create_model, name, pretrained=False))


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
    logging.basicConfig(level=logging.INFO, format="%(message)s")
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
    logging.info("%d networks in %s", sum(map(len, table.values())), TABLE)


if __name__ == "__main__":
    main()
