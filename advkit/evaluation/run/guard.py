"""Whether the models come out of a run as they went in: an attack that changes its victim is believed nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from advkit.core.errors import ModelChanged

KEPT = 1 << 30
"""Bytes of weights of which a copy is kept, so that a changed model can be given back as it was."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Guard:
    """How models were: modes, hooks, versions of their tensors, and a copy of them where they are not too large.

    Looking costs one read of the weights, a small part of a forward pass. Without a copy it is versions alone, and a
    hash at the end.
    """

    def __init__(self, models: Iterable[Any]) -> None:
        tops = [top for model in models for top in model.modules()]
        self.modules = list({id(each): each for top in tops for each in top.modules()}.values())
        self.modes = [module.training for module in self.modules]
        self.hooks = [_hooks(module) for module in self.modules]
        self.tensors = list({id(each): each for top in tops for each in _tensors(top)}.values())
        self.versions = [tensor._version for tensor in self.tensors]
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)
        self.copies = [tensor.detach().clone() for tensor in self.tensors] if size <= KEPT else None
        self.hash = "" if self.copies is not None else _hash(self.tensors)

    def _same_weights(self) -> bool:
        if self.copies is None:
            return _hash(self.tensors) == self.hash
        return all(_equal(tensor, copy) for tensor, copy in zip(self.tensors, self.copies, strict=True))

    def changed(self, *, last: bool = False) -> str | None:
        """What is not as it was, or None; `last` hashes weights of which there is no copy."""
        for module, mode, hooks in zip(self.modules, self.modes, self.hooks, strict=True):
            if module.training != mode:
                return f"{type(module).__name__} is in {'training' if module.training else 'evaluation'} mode"
            if _hooks(module) != hooks:
                return f"{type(module).__name__} has other hooks"
        if any(tensor._version != version for tensor, version in zip(self.tensors, self.versions, strict=True)):
            return "weights were written to"
        if (last or self.copies is not None) and not self._same_weights():
            return "weights have other values"
        return None

    def restore(self) -> bool:
        """Modes, hooks and, where a copy was kept, weights as they were; whether everything is."""
        for module, mode, hooks in zip(self.modules, self.modes, self.hooks, strict=True):
            module.training = mode
            for name, ids in zip(_HOOKS, hooks, strict=True):
                own = getattr(module, name)
                for key in [key for key in own if key not in ids]:
                    del own[key]
        if self.copies is not None:
            with torch.no_grad():
                for tensor, copy in zip(self.tensors, self.copies, strict=True):
                    if not _equal(tensor, copy):
                        tensor.data.copy_(copy)
        return self._same_weights()

    def check(self, who: object, *, last: bool = False) -> None:
        """Raise ModelChanged, and give the models back as they were, where something changed."""
        if what := self.changed(last=last):
            back = "it was given back as it was" if self.restore() else "it could not be given back: load it again"
            raise ModelChanged(
                f"{who} changed a model while it was attacked ({what}); no number of this run is to be trusted: an "
                f"attack may only query the oracle; {back}"
            )


def _tensors(top: nn.Module) -> Iterator[Tensor]:
    """Parameters; buffers are the module's own business, and spiking layers write to them."""
    yield from top.parameters()


def _hooks(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(getattr(module, name)) for name in _HOOKS)


def _equal(tensor: Tensor, copy: Tensor) -> bool:
    """The same values; NaN equals NaN."""
    return tensor.shape == copy.shape and bool(torch.equal(_bits(tensor), _bits(copy)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def _hash(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(_bits(tensor).cpu().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def unchanged(models: Iterable[Any], who: object) -> Iterator[Guard]:
    """Raise ModelChanged at the end of the block where one of the models is not as it was at its beginning."""
    guard = Guard(models)
    yield guard
    guard.check(who, last=True)
