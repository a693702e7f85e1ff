"""Where a row's last bits may depend on the number of rows in a call: read off the operations of one pass.

On a CPU they may for two reasons. A matrix kernel may add up in another order; that changes most numbers of a row, so
that a trial sees it. And torch computes functions such as the sigmoid a vector register at a time, and what does not
fill one, at the end of a tensor, by other code; that changes a few numbers in a thousand, which a trial misses. So the
second is ruled out by counting: a call is safe where no such function is left with an end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from advkit.core.rows import REGISTERS

EVEN = 16
"""What the rows of a call are a multiple of where some operation is not known here."""

_GRAINS = (2048, 32768)
"""Numbers from which torch's elementwise loops are shared between threads."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_EXACT = _words(
    """
    abs add alias amax amin any all arange argmax argmin as_strided bitwise_and bitwise_not bitwise_or cat ceil clamp
    clamp_max clamp_min clone constant_pad_nd contiguous copy detach div empty empty_like eq expand fill flip floor full
    full_like gather ge gt hardtanh hardtanh_backward index index_select leaky_relu leaky_relu_backward le lift_fresh
    logical_and logical_not logical_or lt masked_fill max maximum min minimum mul ne neg new_empty new_full new_ones
    new_zeros one_hot ones ones_like permute pixel_shuffle pixel_unshuffle reciprocal reflection_pad2d relu repeat
    reshape roll round rsub scalar_tensor select select_backward sgn sign slice slice_backward split split_with_sizes
    sqrt squeeze stack sub t threshold threshold_backward transpose unbind unfold unsqueeze upsample_nearest2d view
    where zeros zeros_like zero _local_scalar_dense _reshape_alias _to_copy _unsafe_view
    """
)
"""Copies, and functions whose results are correctly rounded by any code."""

_BY_ROW = _words(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _scaled_dot_product_flash_attention_for_cpu
    _scaled_dot_product_flash_attention_for_cpu_backward addmm avg_pool2d avg_pool2d_backward baddbmm bmm convolution
    convolution_backward linear max_pool2d_with_indices max_pool2d_with_indices_backward mean mm mv native_batch_norm
    native_batch_norm_backward native_group_norm native_group_norm_backward native_layer_norm native_layer_norm_backward
    reflection_pad2d_backward sum _native_batch_norm_legit_no_training
    """
)
"""Sums, and what is computed within a row: their order may depend on the rows, which a trial sees."""

_LAST = frozenset({"_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data"})
"""Within a row where they run along the last dimension."""

_VECTORED = _words(
    """
    addcdiv addcmul elu elu_backward erf exp expm1 gelu gelu_backward hardsigmoid hardsigmoid_backward hardswish
    hardswish_backward lerp log log1p log2 log_sigmoid_backward log_sigmoid_forward logit mish mish_backward pow rsqrt
    sigmoid sigmoid_backward silu silu_backward sin cos softplus softplus_backward tanh tanh_backward
    """
)
"""Elementwise, computed by other code at the end of a tensor."""

_LEAVES = frozenset({"numpy", "__array__", "tolist", "item", "__float__", "__int__", "__bool__", "data_ptr"})
"""Methods of a tensor that hand its numbers to other code than torch's."""


@dataclass(frozen=True)
class Operations:
    """What a pass of a model is made of.

    rows:     of the pass
    vectored: how many numbers the functions took that are computed a register at a time
    known:    whether all other operations are known to compute every row alike in calls of any size that a trial passes
    """

    rows: int
    vectored: frozenset[int]
    known: bool

    def allow(self, size: int) -> bool:
        """Whether no number of a call of so many rows is computed by other code than in other calls."""
        if not self.known and size % EVEN:
            return False
        return all(_filled(n // self.rows * size) for n in self.vectored)


def operations(model: Callable[[Tensor], Tensor], x: Tensor, backward: bool) -> Operations:
    """Those of one pass of these rows, forward and with `backward` back to the input."""
    seen, methods = _Seen(len(x)), _Methods()
    with methods, seen, torch.set_grad_enabled(backward):
        leaf = x.detach().clone().requires_grad_(backward)
        answer = model(leaf)
        if backward and answer.requires_grad:
            # Of a sum: with gradients of the outputs handed over torch imports sympy, a second of work.
            torch.autograd.grad((answer * answer.detach()).sum(), leaf, allow_unused=True)
    known = not (seen.unknown or methods.left or _compiled(model))
    return Operations(len(x), frozenset(seen.vectored), known)


def _filled(numbers: int) -> bool:
    """Whether loops over so many numbers fill their registers, in one thread and in as many as there are."""
    for threads in {1, torch.get_num_threads()}:
        for grain in _GRAINS:
            pieces = min(threads, max(1, math.ceil(numbers / grain)))
            if numbers % REGISTERS or math.ceil(numbers / pieces) % REGISTERS:
                return False
    return True


def _compiled(model: Any) -> bool:
    """Whether some module runs code of a compiler's, which no mode sees."""
    if isinstance(model, nn.Module):
        tops: Iterable[Any] = (model,)
    else:
        tops = model.modules() if callable(getattr(model, "modules", None)) else ()
    modules = [each for top in tops for each in top.modules()]
    return any(
        isinstance(each, torch.jit.ScriptModule)
        or getattr(each, "_compiled_call_impl", None) is not None
        or hasattr(each, "_orig_mod")
        for each in modules
    )


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sorts the operations that reach torch's dispatcher."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: torch would import its compiler for that, a second of work, and nothing is compiled here."""
        return False

    def __init__(self, rows: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows = rows
        self.vectored: set[int] = set()
        self.unknown: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        space, _, full = func._schema.name.partition("::")
        name = full.rstrip("_") if not full.endswith("__") else full
        if space != "aten":
            self.unknown.add(full)
        elif _plain(name, args, kwargs):
            pass
        elif name in _VECTORED or name in ("add", "sub", "rsub"):
            self._vectored([out, *args])
        else:
            self.unknown.add(name)
            self._vectored([out])
        return out

    def _vectored(self, values: Iterable[Any]) -> None:
        """Note how many numbers a loop runs over; where it may run otherwise, as many as rows."""
        tensors = [each for each in _tensors(values) if each.is_floating_point() and each.numel() > 1]
        for each in tensors:
            if each.numel() % self.rows == 0:
                dense = each.is_contiguous() or each.is_contiguous(memory_format=torch.channels_last)
                alike = dense and all(other.numel() == each.numel() for other in tensors)
                self.vectored.add(each.numel() if alike else self.rows)


class _Methods(TorchFunctionMode):
    """Notes whether numbers are handed to other code."""

    def __init__(self) -> None:
        super().__init__()
        self.left = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left |= getattr(func, "__name__", "") in _LEAVES
        return func(*args, **(kwargs or {}))


def _plain(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation computes every row alike in calls of any size that a trial passes."""
    if name in ("add", "sub", "rsub"):
        return kwargs.get("alpha", 1) in (1, -1) and not (len(args) > 2 and args[2] not in (1, -1))
    if name == "pow":
        return len(args) > 1 and not isinstance(args[1], Tensor) and args[1] in (1, 2)
    if name in _LAST:
        ndim = args[0].ndim
        dim = args[2] if name.endswith("_data") else args[1]
        return ndim > 1 and dim in (-1, ndim - 1)
    return name in _EXACT or name in _BY_ROW


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, (list, tuple)):
            found += _tensors(each)
    return found
