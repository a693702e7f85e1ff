"""A task from tensors that the caller holds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from advkit.core.errors import BadInput
from advkit.core.protocols import TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import ArrayTask, Rows, default_ball, row_ids

MOST_CLASSES = 2**24
BYTES = 255
FEW_LEVELS = 16
"""Bytes that go no higher are of another bit depth, or zeros and ones: as 8-bit images they would be nearly black."""


def as_rows(value: Any, what: str, space: Box | None = None) -> Tensor:
    """A floating tensor of the caller's rows, on the CPU, in memory of its own.

    8-bit integers are images: 0 to 255 become the box from low to high (by default k/255), which leaves them as they
    are in a box of 0 to 255. Other integers are refused, since their scale is unknown, and so are bytes and floats
    whose values are not those of the scale that the box says.
    """
    tensor = _tensor(value, what)
    if tensor.dtype == torch.uint8:
        return _from_bytes(tensor, what, space)
    if not tensor.is_floating_point():
        raise BadInput(f"{what} is of type {tensor.dtype}; expected floats in the model's space, or 8-bit images")
    x = tensor.double() if tensor.dtype == torch.float64 else tensor.float()
    if space is not None and space.extent == (0.0, 255.0) and x.numel() and 0 < float(x.max()) <= 1 and x.min() >= 0:
        raise BadInput(
            f"{what} has values from {float(x.min()):.4g} to {float(x.max()):.4g} in a box of 0 to 255: they look "
            "divided by 255 already; leave them in the box [0, 1], or multiply them by 255"
        )
    return x


def _from_bytes(tensor: Tensor, what: str, space: Box | None) -> Tensor:
    low, high = (0.0, 1.0) if space is None else (space.low, space.high)
    if low == 0 and high == BYTES:
        return tensor.float()
    widths = torch.as_tensor(high) - torch.as_tensor(low)
    if not bool(torch.isfinite(widths).all()) or bool((widths > 4).any() & (widths != BYTES).any()):
        raise BadInput(
            f"{what} is of type uint8 in Box({Box(low, high).text()}): whether 255 is the largest value is not said; "
            "write floats in that box, or say a box of 0 to 255"
        )
    largest = int(tensor.max()) if tensor.numel() else 0
    if 0 < largest <= FEW_LEVELS:
        raise BadInput(
            f"{what} is of type uint8 with values up to {largest}, where 8-bit images go up to 255 and would become "
            f"k/255; write floats, such as x / {largest}"
        )
    if low == 0 and high == 1:
        return tensor.float().div_(BYTES)
    return (tensor.float() * widths / BYTES + torch.as_tensor(low)).float()


def as_labels(value: Any, what: str) -> Tensor:
    """Whole-number labels, long [N], on the CPU, in memory of their own."""
    tensor = _tensor(value, what)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        one_hot = ": one-hot labels become numbers by y.argmax(1)" if tensor.ndim == 2 else ""
        raise BadInput(f"{what} is of type {tensor.dtype}; expected whole numbers, one label per sample{one_hot}")
    labels = tensor.long()
    wrapped = not tensor.dtype.is_signed and bool((labels < 0).any())  # 64 bits without a sign
    if wrapped or (labels.numel() and int(labels.max()) > MOST_CLASSES):
        raise BadInput(
            f"{what} has a label {'beyond 2**63' if wrapped else int(labels.max())}; expected 0 to {MOST_CLASSES}"
        )
    return labels


def _tensor(value: Any, what: str) -> Tensor:
    try:
        if isinstance(value, Tensor):
            held = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        else:
            array = np.array(value, copy=True, order="C")
            held = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        if np.asarray(value).dtype.kind in "US":
            raise BadInput(f"{what} is made of texts; expected numbers: labels count the classes from 0") from None
        raise BadInput(f"{what} is no array: {error}; expected a tensor or something numpy understands") from error
    if held.ndim == 0:
        raise BadInput(f"{what} is a single number; expected samples first, [N, ...]")
    return held


class Arrays(ArrayTask):
    """Rows and labels from memory, copied once.

    x:        [N, ...] floats in `space`, or 8-bit images: 0 to 255 become the box from low to high, by default k/255
    y:        [N] labels from 0
    classes:  default: the model's, or the largest label of both splits and one
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
        held_x, held_y = as_rows(x, f"{name}: x", space), as_labels(y, f"{name}: y")
        self._pair = None
        if training is not None:
            self._pair = (
                as_rows(training[0], f"{name}: training x", space),
                as_labels(training[1], f"{name}: training y"),
            )
        every = [held_y] if self._pair is None else [held_y, self._pair[1]]
        largest = max((int(labels.max()) for labels in every if labels.numel()), default=0)
        self.name = name
        self.split = split
        self.classes = largest + 1 if classes is None else classes
        self._counts_labels = classes is None
        model = "cnn" if held_x.dim() == 4 else "mlp"
        self._space = Box(0.0, 1.0, tuple(held_x.shape[1:])) if space is None else space
        self.defaults = defaults or TaskDefaults(model=model, threat_model=default_ball(self._space))
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

    @property
    def counts_labels(self) -> bool:
        return self._counts_labels and not self._labels

    def with_classes(self, classes: int) -> Self:
        more = copy.copy(self)
        vars(more).pop("_training", None)  # it says how many classes there are
        more.classes, more._counts_labels = classes, False
        return more

    def load(self) -> Rows:
        return self._held

    def load_training(self) -> tuple[Tensor, Tensor] | None:
        return self._pair

    def class_names(self) -> tuple[str, ...]:
        return self._labels or super().class_names()
