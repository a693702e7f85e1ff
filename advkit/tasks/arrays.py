"""A task from tensors that the caller holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkit.core.errors import BadInput
from advkit.core.protocols import TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import ArrayTask, Rows, row_ids


def as_rows(value: Any, what: str) -> Tensor:
    """A floating tensor of the caller's rows, on the CPU, in memory of its own.

    8-bit integers are images and become k/255; other integers are refused, since their scale is unknown.
    """
    tensor = _tensor(value, what)
    if tensor.dtype == torch.uint8:
        return tensor.float().div_(255)
    if not tensor.is_floating_point():
        raise BadInput(f"{what} is of type {tensor.dtype}; expected floats in the model's space, or 8-bit images")
    return tensor.double() if tensor.dtype == torch.float64 else tensor.float()


def as_labels(value: Any, what: str) -> Tensor:
    """Whole-number labels, long [N], on the CPU, in memory of their own."""
    tensor = _tensor(value, what)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise BadInput(f"{what} is of type {tensor.dtype}; expected whole numbers, one label per sample")
    return tensor.long()


def _tensor(value: Any, what: str) -> Tensor:
    try:
        if isinstance(value, Tensor):
            return value.detach().to("cpu", copy=True)
        return torch.from_numpy(np.array(value, copy=True))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{what} is no array: {error}; expected a tensor or something numpy understands") from error


class Arrays(ArrayTask):
    """Rows and labels from memory, copied once.

    x:        [N, ...] floats in `space`, or 8-bit images, which become k/255
    y:        [N] labels from 0
    classes:  default: the largest label of both splits and one
    name:     for ids and reports
    space:    legal inputs (default: the box [0, 1] of the rows' shape)
    ids:      one per row (default: name/test/00000...)
    training: (x, y) to train on, or None
    labels:   names of the classes
    defaults: what a command that does not say otherwise gets

    Raises BadInput for NaN, labels out of range, rows outside the space.
    """

    def __init__(
        self,
        x: Any,
        y: Any,
        *,
        classes: int | None = None,
        name: str = "arrays",
        split: str = "test",
        space: Box | None = None,
        ids: Sequence[str] | None = None,
        training: tuple[Any, Any] | None = None,
        labels: Sequence[str] = (),
        defaults: TaskDefaults | None = None,
    ) -> None:
        held_x, held_y = as_rows(x, f"{name}: x"), as_labels(y, f"{name}: y")
        self._pair = None
        if training is not None:
            self._pair = as_rows(training[0], f"{name}: training x"), as_labels(training[1], f"{name}: training y")
        every = [held_y] if self._pair is None else [held_y, self._pair[1]]
        largest = max((int(labels.max()) for labels in every if labels.numel()), default=0)
        self.name = name
        self.split = split
        self.classes = largest + 1 if classes is None else classes
        model = "cnn" if held_x.dim() == 4 else "mlp"
        self.defaults = defaults or TaskDefaults(model=model, threat_model="linf:eps=8/255")
        self._space = Box(0.0, 1.0, tuple(held_x.shape[1:])) if space is None else space
        self._labels = tuple(labels)
        if self._labels and len(self._labels) != self.classes:
            raise BadInput(f"{name}: {len(self._labels)} class names for {self.classes} classes")
        self._held = Rows(held_x, held_y, tuple(ids) if ids is not None else row_ids(name, split, len(held_x)))
        _ = self.rows  # refuse bad data where it is handed over, not when it is first used
        _ = self.training()

    def __repr__(self) -> str:
        return f"Arrays({self.name}, {len(self)} rows, {self.classes} classes)"

    @property
    def space(self) -> Box:
        return self._space

    def load(self) -> Rows:
        return self._held

    def load_training(self) -> tuple[Tensor, Tensor] | None:
        return self._pair

    def class_names(self) -> tuple[str, ...]:
        return self._labels or super().class_names()
