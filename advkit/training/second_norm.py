"""A second set of batch normalisation for another stream of inputs (AdvProp, Xie et al., arXiv 1911.09665)."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


class SecondNorm:
    """Running statistics, scale and shift of every batch normalisation layer of a module once more.

    They begin as copies and are used in place of the module's own inside `active()`. The module itself never changes
    its form: its checkpoint is that of the first set, by which it is evaluated. Where there is no such layer, nothing
    is swapped.
    """

    def __init__(self, module: nn.Module) -> None:
        self._pairs = {
            name: (layer, copy.deepcopy(layer))
            for name, layer in module.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        }

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self._pairs)

    @contextmanager
    def active(self) -> Iterator[None]:
        """The module computes with the second set, and moves its statistics."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for layer, second in self._pairs.values():
            for kind in ("_parameters", "_buffers"):
                vars(layer)[kind], vars(second)[kind] = vars(second)[kind], vars(layer)[kind]

    def parameters(self) -> list[nn.Parameter]:
        """Scales and shifts of the second set, while it is not active."""
        return [parameter for _, second in self._pairs.values() for parameter in second.parameters()]

    def buffers(self) -> list[Tensor]:
        """Running statistics and counters of the second set, while it is not active."""
        return [buffer for _, second in self._pairs.values() for buffer in second.buffers()]

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the second set by name, while it is not active; not copied."""
        return {
            f"{name}.{key}": tensor.detach()
            for name, (_, second) in self._pairs.items()
            for key, tensor in chain(second.named_parameters(), second.named_buffers())
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take these values, by the names of `tensors`."""
        with torch.no_grad():
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])
