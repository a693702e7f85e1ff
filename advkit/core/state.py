"""The caller's settings of torch: put aside while advkit works, in force again for modules and functions of his own.

A default dtype of float64, a default device, inference mode or autocast would otherwise change what is computed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from torch import nn

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Settings:
    """What a caller has set: the dtype and the device of new tensors, by their names in torch."""

    dtype: str = "float32"
    device: str = "cpu"

    @classmethod
    def current(cls) -> Settings:
        """Those in force now."""
        import torch

        return cls(str(torch.get_default_dtype()).removeprefix("torch."), str(torch.get_default_device()))

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """These settings inside the block, and those of before after it."""
        import torch

        now = Settings.current()
        with ExitStack() as stack:
            if now.device != self.device:
                stack.enter_context(torch.device(self.device))
            if now.dtype != self.dtype:
                stack.callback(torch.set_default_dtype, getattr(torch, now.dtype))
                torch.set_default_dtype(getattr(torch, self.dtype))
            yield


PLAIN = Settings()
_callers: ContextVar[Settings] = ContextVar("what the caller has set", default=PLAIN)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Torch as advkit's code takes it to be: float32, the CPU, gradients, no inference mode, no autocast."""
    import torch

    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if not torch.is_grad_enabled():
            stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        now = Settings.current()
        if now != PLAIN:
            stack.callback(_callers.reset, _callers.set(now))
            stack.enter_context(PLAIN.in_force())
        yield


def as_caller(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """A call of code of the caller's own, under his settings; they differ inside `plain_torch` alone."""
    asked = _callers.get()
    if asked == PLAIN:
        return function(*args, **kwargs)
    with asked.in_force():
        return function(*args, **kwargs)


def callers_settings() -> Settings:
    """What the caller of `plain_torch` has set."""
    return _callers.get()


def remember(settings: Settings) -> None:
    """Take these for the caller's settings: a worker process has none of its own."""
    _callers.set(settings)


def plainly(function: Callable[P, R]) -> Callable[P, R]:
    """A function that runs in `plain_torch`."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with plain_torch():
            return function(*args, **kwargs)

    return called


_FP32 = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@contextmanager
def full_precision() -> Iterator[None]:
    """No autocast, and float32 computed as float32 (no TF32, no bfloat16 inside products): given back afterwards."""
    import torch

    with ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        cudnn = torch.backends.cudnn
        try:
            held = cudnn.allow_tf32, torch.get_float32_matmul_precision()
        except RuntimeError:  # the caller has used torch 2.9's names for the same, which exclude the older ones
            for name in _FP32:
                part: object = functools.reduce(getattr, name.split("."), torch.backends)
                stack.callback(setattr, part, "fp32_precision", part.fp32_precision)  # type: ignore[attr-defined]
                part.fp32_precision = "ieee"  # type: ignore[attr-defined]
        else:
            stack.callback(setattr, cudnn, "allow_tf32", held[0])
            stack.callback(torch.set_float32_matmul_precision, held[1])
            cudnn.allow_tf32 = False
            torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Parameters without gradient inside the block; the flags are given back as they were.

    An attack differentiates with respect to the input alone; live parameters would cost 2-38 % of every backward.
    """
    live = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in live:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in live:
            parameter.requires_grad_(True)
