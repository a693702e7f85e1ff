"""Image classifiers of MAITE 0.10: `maite:MODULE.NAME`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkit.core.errors import AdvkitError, BadModel
from advkit.core.maite import checked, component, labels_of
from advkit.core.protocols import Rng
from advkit.core.spaces import Box
from advkit.core.text import first_line
from advkit.models.torch import FunctionModel, NumpyModel

WANTED = ("__call__",)
_PROBED = 4


@dataclass(frozen=True, kw_only=True)
class MaiteModel:
    """MAITE image classifier (protocol 0.10) by `maite:MODULE.NAME`, called with a list of images [C, H, W].

    target:    MODULE.NAME of the model, or of a class or function without arguments that makes it; the module may lie
               in the working directory
    gradients: hand it torch tensors and differentiate its answers. By default it gets numpy arrays, and attackers have
               its scores alone: the protocol does not say that a model can be differentiated

    Answers are scores per class, [classes] for each image. Where they are probabilities the report flags it: losses of
    attacks want logits. Raises UsageError for what is no MAITE model, BadModel for answers that the protocol forbids.
    """

    target: str
    gradients: bool = False

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> FunctionModel:
        name = f"maite:{self.target}"
        held = Box(0.0, 1.0, tuple(shape)) if space is None else space
        return from_maite(component(self.target, WANTED, "model"), held, name=name, gradients=self.gradients)


def from_maite(model: Any, space: Any, *, name: str = "", gradients: bool = False) -> FunctionModel:
    """An advkit model around a MAITE image classifier for samples of `space`, whose shape is one image's.

    Its hash is made of its id and of its answers to a few fixed images. Raises as `MaiteModel` does.
    """
    checked(model, WANTED, "model", name or type(model).__name__)
    name = name or str(model.metadata["id"])
    shape = tuple(space.shape)
    if len(shape) != 3:
        raise BadModel(f"{name} takes images of shape [C, H, W], this task's samples are {list(shape)}")
    low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in (space.low, space.high))
    noise = torch.rand(_PROBED, *shape, generator=torch.Generator().manual_seed(0))
    probe = low + (high - low) * noise if bool(torch.isfinite(high - low).all()) else noise
    numbers = NumpyModel(lambda x: _numbers(model, x, name), space)(probe)
    labels_of(model, numbers.shape[1], name)
    told = hashlib.sha256(numbers.numpy().tobytes()).hexdigest()
    identity = f"{model.metadata['id']}|{told}"
    if not gradients:
        return NumpyModel(lambda x: _numbers(model, x, name), space, numbers.shape[1], name, identity)
    made = FunctionModel(lambda x: _tensors(model, x, name), space, numbers.shape[1], name, identity)
    with torch.enable_grad():
        if not made(probe.requires_grad_()).requires_grad:
            raise BadModel(f"{name} answers without a gradient for torch tensors; leave gradients=true out")
    return made


def _asked(model: Any, images: Sequence[Any], name: str, hint: str = "") -> list[Any]:
    try:
        answer = list(model(images))
    except AdvkitError:
        raise
    except Exception as error:  # code of others raises whatever it likes
        raise BadModel(
            f"{name} does not take images of shape {list(images[0].shape)} ({type(error).__name__}: "
            f"{first_line(error)}){hint}"
        ) from error
    if len(answer) != len(images):
        raise BadModel(f"{name} answers {len(answer)} targets to {len(images)} images; MAITE 0.10 wants one per image")
    shapes = {tuple(np.shape(each)) if not isinstance(each, Tensor) else tuple(each.shape) for each in answer}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise BadModel(
            f"{name} answers targets of shape {' and '.join(str(list(each)) for each in sorted(shapes))}; MAITE 0.10 "
            "wants one number per class, [classes]"
        )
    return answer


def _numbers(model: Any, x: Any, name: str) -> Any:
    """float32 [B, classes] for an array [B, C, H, W]."""
    answer = _asked(model, list(x), name)
    rows = [each.detach().cpu().numpy() if isinstance(each, Tensor) else np.asarray(each) for each in answer]
    return np.stack(rows).astype(np.float32)


def _tensors(model: Any, x: Tensor, name: str) -> Tensor:
    """float [B, classes] for a tensor [B, C, H, W], with its graph."""
    answer = _asked(model, list(x.unbind(0)), name, "; it gets torch tensors because of gradients=true")
    if not all(isinstance(each, Tensor) for each in answer):
        raise BadModel(f"{name} answers {type(answer[0]).__name__} to torch tensors; leave gradients=true out")
    return torch.stack(answer)
