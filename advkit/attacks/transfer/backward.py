"""Parts that give a surrogate another derivative than its own; its answers stay what they are.

Operations are caught while the model runs (a torch function mode), so that models which call functions are served like
those made of modules, and nothing is left behind in the model. A model compiled or traced ahead shows no operations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from advkit.attacks.base import TensorOracle, per_row
from advkit.attacks.transfer.engine import View
from advkit.attacks.transfer.layers import hooked, layer_named
from advkit.core.checks import fraction, not_negative
from advkit.core.errors import UsageError

ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
WEIGHTED = frozenset(
    {"conv1d", "conv2d", "conv3d", "linear", "matmul", "__matmul__", "bmm"}
    | {"scaled_dot_product_attention", "multi_head_attention_forward", "_native_multi_head_attention"}
)


class _Valued(torch.autograd.Function):
    """The value of one tensor with the derivative of another."""

    @staticmethod
    def forward(ctx: Any, path: Tensor, value: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream, None


class _Scaled(torch.autograd.Function):
    """x, its gradient multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        return upstream * ctx.factor, None


class _Linear(torch.autograd.Function):
    """ReLU whose derivative is 1 everywhere, its gradient as long per row as ReLU's own would be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        own = (upstream * (x > 0)).flatten(1).square().sum(1).sqrt()
        length = upstream.flatten(1).square().sum(1).sqrt()
        return upstream * per_row(torch.where(length > 0, own / length, 1.0), upstream)


def valued(path: Tensor, value: Tensor) -> Tensor:
    """The value of one tensor, the derivative of the other."""
    answer: Tensor = _Valued.apply(path, value)
    return answer


class _Watch(TorchFunctionMode):
    """Hands every operation to a rule once it is `on`."""

    def __init__(self, rule: Caught, on: bool) -> None:
        super().__init__()
        self.rule = rule
        self.on = on

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        return self.rule.call(name, func, args, kwargs) if self.on else func(*args, **kwargs)


class Caught(ABC):
    """A rule for one call of a model: what it makes of each operation, and how often it found one of its own."""

    def __init__(self) -> None:
        self.found = 0

    @abstractmethod
    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The operation's answer."""


def _relu_input(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What an operation rectifies, if it does and gradients pass through it."""
    if name not in ("relu", "relu_"):
        return None
    x = args[0] if args else kwargs.get("input")
    return x if isinstance(x, Tensor) and x.requires_grad else None


class _Linearised(Caught):
    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _relu_input(name, args, kwargs)
        if x is None:
            return func(*args, **kwargs)
        self.found += 1
        return _Linear.apply(x)


class _Softened(Caught):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = _relu_input(name, args, kwargs)
        if x is not None:
            self.found += 1
            return valued(F.silu(x), x.detach().clamp_min(0))
        answer = func(*args, **kwargs)
        if name in ("max_pool2d", "_max_pool2d") and isinstance(answer, Tensor) and answer.requires_grad:
            soft = self._pooled(*args, **kwargs)
            if soft is not None and soft.shape == answer.shape:
                self.found += 1
                return valued(soft, answer)
        return answer

    def _pooled(
        self,
        x: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Tensor | None:
        """The windows' entries weighted by the softmax of themselves; the weights have no derivative."""
        if return_indices or ceil_mode or x.ndim != 4:
            return None
        side = _pair(kernel_size)
        pad, gaps, step = _pair(padding), _pair(dilation), _pair(stride) if stride else side
        low = torch.finfo(x.dtype).min / 4 / max(1.0, self.temperature)
        height, width = ((x.shape[2 + i] + 2 * pad[i] - gaps[i] * (side[i] - 1) - 1) // step[i] + 1 for i in (0, 1))
        padded = F.pad(x, (pad[1], pad[1], pad[0], pad[0]), value=low)
        windows = torch.stack(
            [
                padded[
                    ...,
                    i * gaps[0] : i * gaps[0] + step[0] * (height - 1) + 1 : step[0],
                    j * gaps[1] : j * gaps[1] + step[1] * (width - 1) + 1 : step[1],
                ]
                for i in range(side[0])
                for j in range(side[1])
            ]
        )
        weights = (self.temperature * windows.detach()).softmax(0)
        return (windows * weights).sum(0)


def _pair(size: Any) -> tuple[int, int]:
    both = (size, size) if isinstance(size, int) else tuple(size) * 2
    return int(both[0]), int(both[1])


class _Skipped(Caught):
    """Residual additions: of two addends that both come from the input, the branch is the one with more layers on its
    longest way."""

    def __init__(self, gamma: float, x: Tensor) -> None:
        super().__init__()
        self.gamma = gamma
        self._depth: dict[int, tuple[int, Tensor]] = {id(x): (0, x)}

    def call(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in ADDS and len(args) >= 2 and not kwargs:
            answer = self._added(name, func, args)
        else:
            answer = func(*args, **kwargs)
        depths = [self._of(each) for each in (*args, *kwargs.values())]
        known = [depth for depth in depths if depth is not None]
        if known:
            depth = max(known) + (name in WEIGHTED)
            for each in answer if isinstance(answer, tuple | list) else (answer,):
                if isinstance(each, Tensor):
                    self._depth[id(each)] = (depth, each)
        return answer

    def _of(self, value: Any) -> int | None:
        if isinstance(value, Tensor):
            found = self._depth.get(id(value))
            return None if found is None else found[0]
        if isinstance(value, tuple | list):
            inner = [depth for depth in map(self._of, value) if depth is not None]
            return max(inner) if inner else None
        return None

    def _added(self, name: str, func: Any, args: tuple[Any, ...]) -> Any:
        one, other = args[:2]
        depths = self._of(one), self._of(other)
        residual = (
            depths[0] is not None
            and depths[1] is not None
            and depths[0] != depths[1]
            and one.shape == other.shape
            and one.requires_grad
        )
        if not residual:
            return func(*args)
        self.found += 1
        assert depths[0] is not None
        assert depths[1] is not None
        if depths[0] > depths[1]:
            total = _Scaled.apply(one, self.gamma) + other
        else:
            total = one + _Scaled.apply(other, self.gamma)
        return one.copy_(total) if name in ("add_", "__iadd__") else total


@dataclass(frozen=True)
class Ruled:
    """A model whose backward pass follows a rule, from a layer on.

    rule:    makes the rule of one call, from its input
    layer:   where it begins; None: at once
    missing: what to say where the rule finds nothing of its own
    """

    model: Any
    rule: Callable[[Tensor], Caught]
    layer: nn.Module | None
    missing: str

    def __call__(self, x: Tensor) -> Tensor:
        rule = self.rule(x)
        watch = _Watch(rule, self.layer is None)

        def begin(*_: Any) -> None:
            watch.on = True

        with nullcontext() if self.layer is None else hooked(self.layer.register_forward_pre_hook(begin)), watch:
            answer: Tensor = self.model(x)
        if not rule.found and x.requires_grad:
            self.modules()  # what stands in for the model in a rehearsal has none, and ends it here
            raise UsageError(self.missing)
        return answer

    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.modules())


@dataclass(frozen=True, kw_only=True)
class SGM(View):
    """Let gradients prefer skip connections: those of residual branches are multiplied by gamma (arXiv 2002.05990).

    gamma: factor per block, in [0, 1]; published: 0.2 for ResNets

    Residual blocks are found as additions of tensors of one shape that both come from the input, one through more
    layers than the other. Connections that concatenate (DenseNet) are not served. The release also divides gradients by
    their deviation at every block, which the paper does not.
    """

    gamma: float = 0.2

    def __post_init__(self) -> None:
        fraction(self, "gamma", ends="[]", what="factor")

    def through(self, oracle: TensorOracle, x: Tensor) -> TensorOracle:
        missing = "sgm found no residual addition in the source; it works on residual networks"
        return oracle.seen_as(lambda model: Ruled(model, lambda rows: _Skipped(self.gamma, rows), None, missing))


@dataclass(frozen=True, kw_only=True)
class LinBP(View):
    """Pass gradients through ReLUs as if they were linear, from a layer on (arXiv 2012.03528).

    layer: name of a module of the source; empty: the one whose output is nearest to the middle in multiplications

    Where branches meet, a linear branch would outweigh the rest; the release rescales it per block. Here the gradient
    keeps at every ReLU the length per row that ReLU's own derivative leaves it: without branches the same, up to a
    factor that the sign drops.
    """

    layer: str = ""
    missing: ClassVar[str] = "found no ReLU from that layer on; name an earlier one (layer=...)"

    def through(self, oracle: TensorOracle, x: Tensor) -> TensorOracle:
        return oracle.seen_as(
            lambda model: Ruled(
                model, lambda _: _Linearised(), layer_named(model, self.layer, x, "linbp"), f"linbp {self.missing}"
            )
        )


@dataclass(frozen=True, kw_only=True)
class BPA(View):
    """Pass gradients through ReLUs as if they were SiLUs and through max-pooling by the softmax of its windows, from a
    layer on (arXiv 2306.12685).

    layer:       as in linbp
    temperature: of the softmax, the larger the nearer to the maximum, >= 0
    """

    layer: str = ""
    temperature: float = 10.0

    def __post_init__(self) -> None:
        not_negative(self, "temperature")

    def through(self, oracle: TensorOracle, x: Tensor) -> TensorOracle:
        return oracle.seen_as(
            lambda model: Ruled(
                model,
                lambda _: _Softened(self.temperature),
                layer_named(model, self.layer, x, "bpa"),
                f"bpa {LinBP.missing}",
            )
        )
