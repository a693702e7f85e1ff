"""Texts that tell parts apart which no spec can describe: the user's own classes, and settings that are objects."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import pickle
import uuid
from typing import Any

from advkit.core.protocols import Describes, Hashed, ModelInfo

_PROCESS = uuid.uuid4().hex


def settings_text(part: object) -> str:
    """`steps=4,weight=Tensor-0fc1...`: what sets a part apart from others of its type; empty where nothing does.

    Two parts with other settings get other texts. A part with the same settings gets the same text in another process,
    too, unless it holds something that can't be pickled: then it is itself alone. Data sets (`digest`) are known by
    their rows.
    """
    if isinstance(part, Hashed):
        return ""
    return ",".join(f"{key}={_word(value)}" for key, value in _settings(part).items())


def _settings(part: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        return {
            each.name: getattr(part, each.name)
            for each in dataclasses.fields(part)
            if each.init and not _is_default(getattr(part, each.name), each)
        }
    if inspect.isroutine(part):
        return {"object": part}
    return dict(getattr(part, "__dict__", {}))


def _is_default(value: Any, of: dataclasses.Field[Any]) -> bool:
    default = of.default_factory() if of.default_factory is not dataclasses.MISSING else of.default
    try:
        return type(value) is type(default) and bool(value == default)
    except (TypeError, ValueError, RuntimeError):  # tensors and arrays have no single truth
        return False


def _word(value: Any) -> str:
    """Plain values as they are, models by their weights, other things by their content."""
    if value is None or isinstance(value, bool | int | float | str):
        return str(value)
    if isinstance(value, tuple | list):
        return "+".join(map(_word, value))
    info = value.describe() if isinstance(value, Describes) else None
    if isinstance(info, ModelInfo):
        return f"{info.name}-{info.state_sha256[:12]}"
    return f"{type(value).__name__}-{_content(value)[:12]}"


def _content(value: Any) -> str:
    import torch

    if isinstance(value, torch.nn.Module):
        held = {name: _content(tensor) for name, tensor in sorted(value.state_dict().items())}
        return hashlib.sha256(f"{value!r}|{held}".encode()).hexdigest()
    if any(isinstance(each, torch.Tensor) for each in getattr(value, "__dict__", {}).values()):
        held = {name: _content(each) for name, each in sorted(vars(value).items())}
        return hashlib.sha256(f"{type(value).__qualname__}|{held}".encode()).hexdigest()
    if isinstance(value, torch.Tensor):  # a pickled tensor names its memory, which differs from object to object
        value = (str(value.dtype), tuple(value.shape), value.detach().cpu().reshape(-1).tolist())
    try:
        content = pickle.dumps(value)
    except Exception:  # what can't be pickled says so in many ways
        content = f"{_PROCESS}|{id(value)}".encode()
    return hashlib.sha256(content).hexdigest()
