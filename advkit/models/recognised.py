"""Which network of torchvision or timm a file of weights belongs to, told by the names and shapes of its tensors.

`recognised.json` holds hashes of what many of their networks are made of, written by `scripts/recognised_networks.py`:
to build them all for one message would take minutes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from torch import Tensor

TABLE = Path(__file__).with_name("recognised.json")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What data-parallel training, torch.compile and Lightning put before every name."""

Known = list[tuple[str, str, str]]  # network, its last layer, hash of all other shapes


def names_hash(names: Iterable[str]) -> str:
    """Of the names of a network's tensors, in any order."""
    return _hash(sorted(names))


def shapes_hash(tensors: Mapping[str, Tensor], head: str) -> str:
    """Of names and shapes of all tensors but those of the last layer, whose size is the number of classes."""
    return _hash(f"{name} {list(tensors[name].shape)}" for name in sorted(tensors) if name.rpartition(".")[0] != head)


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@cache
def _table() -> Mapping[str, Known]:
    return {
        names: [(str(network), str(head), str(shapes)) for network, head, shapes in found]
        for names, found in json.loads(TABLE.read_text(encoding="utf-8")).items()
    }


def advice(tensors: Mapping[str, Tensor], path: str | Path) -> str:
    """How to name the model whose weights these are, "" where no network is known that has them."""
    held = dict(tensors)
    while held and names_hash(held) not in _table():
        prefix = next((each for each in PREFIXES if all(name.startswith(each) for name in held)), None)
        if prefix is None:
            return ""
        held = {name.removeprefix(prefix): tensor for name, tensor in held.items()}
    found = _table().get(names_hash(held), [])
    for network, head, shapes in found:
        if shapes_hash(held, head) == shapes:
            return f"its tensors are those of {network}{_classes(held, head)}: say {network},checkpoint={path}"
    if not found:
        return ""
    return (
        f"its tensors have the names of {found[0][0]} and other shapes: say python:MODULE:FACTORY,checkpoint={path} "
        "with a factory of that network"
    )


def _classes(held: Mapping[str, Tensor], head: str) -> str:
    last = held.get(f"{head}.bias", held.get(f"{head}.weight"))
    return "" if last is None or not last.ndim else f" ({last.shape[0]} classes)"
