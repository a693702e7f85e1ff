"""Models seen at a layer: what an attacker who holds a surrogate may look at beside its answers.

Each view is a callable like the model it wraps. Hooks live for one call of it, also where that call raises.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from advkit.attacks.base import model_name
from advkit.core.errors import BadModel, UnknownName, UsageError
from advkit.core.protocols import Composite


def modules_of(model: Any, part: str) -> dict[str, nn.Module]:
    """Every module inside a model but the outermost, by name; UsageError where it is a black box or several models."""
    ask = getattr(model, "modules", None)
    roots: Sequence[nn.Module] = [] if isinstance(model, type) or not callable(ask) else tuple(cast(Any, ask)())
    if isinstance(model, nn.Module):
        roots = (model,)
    if isinstance(model, Composite) and len(model.models) > 1:
        raise UsageError(f"{part} looks into one source, and there are {len(model.models)}; name one source")
    named: dict[str, nn.Module] = {}
    for number, root in enumerate(roots):
        prefix = f"{number}." if len(roots) > 1 else ""
        named.update({f"{prefix}{name}": module for name, module in root.named_modules() if name})
    if not named:
        raise UsageError(f"{part} looks at the layers of a source, and {model_name(model)} shows none")
    if any(module.training for module in named.values()):
        raise BadModel(f"{part}: the source is in training mode, where rows depend on one another; call eval() first")
    return named


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    """The hook of a handle inside the block only."""
    try:
        yield
    finally:
        handle.remove()


def layer_named(model: Any, layer: str, x: Tensor, part: str) -> nn.Module:
    """The module of that name, or the one in the middle of the network where it is empty."""
    named = modules_of(model, part)
    name = layer or middle(model, x, part)
    if name not in named:
        raise UnknownName(f"{part}: the source has no layer {name!r}; it has {', '.join(named)}")
    return named[name]


def middle(model: Any, x: Tensor, part: str = "a feature attack") -> str:
    """The layer whose output is nearest to the middle of the network in multiplications, the last one among equals.

    Found by one call of the model on a black row like x's, which is no question about any row.
    """
    named = modules_of(model, part)
    done: list[tuple[str, int]] = []
    spent = 0
    handles = []

    def note(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, __: Any, answer: Any) -> None:
            nonlocal spent
            spent += _multiplications(module, answer)
            if isinstance(answer, Tensor) and answer.ndim > 1 and answer.is_floating_point():
                done.append((name, spent))

        return hook

    try:
        for name, module in named.items():
            handles.append(module.register_forward_hook(note(name, module)))
        with torch.no_grad():
            answer = model(torch.zeros_like(x[:1]))
    finally:
        for handle in handles:
            handle.remove()
    counts: dict[str, int] = {}
    for name, _ in done:
        counts[name] = counts.get(name, 0) + 1
    # Neither a layer that runs several times nor one before the first weights or after the last says anything.
    inner = [(name, at) for name, at in done if counts[name] == 1 and 0 < at < spent]
    if not inner:
        raise UsageError(
            f"{part}: nothing lies between the first weights and the answer {list(answer.shape)}; name a layer "
            f"(layer=...), one of {', '.join(named)}"
        )
    nearest = min(abs(2 * at - spent) for _, at in inner)
    return [name for name, at in inner if abs(2 * at - spent) == nearest][-1]


def _multiplications(module: nn.Module, answer: Any) -> int:
    """Of one layer with weights; 0 for others."""
    if not isinstance(answer, Tensor):
        return 0
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return answer.numel() * module.weight[0].numel()
    if isinstance(module, nn.Linear):
        return answer.numel() * module.in_features
    return 0


class _Seen(Exception):
    """The layer was reached: the rest of the model need not run."""


@dataclass(frozen=True)
class Tap:
    """A model that answers the features [B, ...] of a layer and computes nothing after it."""

    model: Any
    layer: nn.Module

    def __call__(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []

        def hook(_: nn.Module, __: Any, answer: Any) -> None:
            found.append(_features(answer))
            raise _Seen

        with hooked(self.layer.register_forward_hook(hook)):
            try:
                self.model(x)
            except _Seen:
                return found[0]
        raise UsageError("the layer was not reached by a call of the source; name another one")

    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.modules())


@dataclass(frozen=True)
class Steered:
    """A model whose features at a layer are `keep` times their own plus what comes with the rows.

    Called with x and that addition packed into one row (`packed`), so that both travel together and have gradients.

    rows, features: shapes of one row's x and features
    """

    model: Any
    layer: nn.Module
    rows: tuple[int, ...]
    features: tuple[int, ...]
    keep: float = 1.0

    def __call__(self, both: Tensor) -> Tensor:
        x, added = self.unpacked(both)

        def hook(_: nn.Module, __: Any, answer: Any) -> Tensor:
            return self.keep * _features(answer) + added.view(-1, *self.features).to(answer)

        with hooked(self.layer.register_forward_hook(hook)):
            answer: Tensor = self.model(x)
        return answer

    def unpacked(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, ...] and the addition [B, features] of packed rows, or of their gradients."""
        size = math.prod(self.rows)
        return both[:, :size].reshape(-1, *self.rows), both[:, size:]

    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.modules())


def packed(x: Tensor, added: Tensor) -> Tensor:
    """x and what is added to its features as one row each [B, n]."""
    return torch.cat([x.flatten(1), added.flatten(1).to(x)], 1)


def _features(answer: Any) -> Tensor:
    if not isinstance(answer, Tensor):
        raise UsageError(f"the layer answers a {type(answer).__name__}, not a tensor; name another one")
    return answer
