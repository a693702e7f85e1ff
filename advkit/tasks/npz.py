"""A task from a numpy archive of the user's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from torch import Tensor

from advkit.core.archives import archive_keys, read_archive
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.arrays import as_labels, as_rows
from advkit.tasks.base import ArrayTask, Counted, Rows, default_ball, row_ids

KEYS = ("x", "y", "x_train", "y_train")
MEMORY = 16 * 2**30
"""Bytes of arrays that are read into memory at most."""


@dataclass(frozen=True, kw_only=True)
class Npz(ArrayTask):
    """NumPy archive (.npz) of samples and labels: keys x and y, and x_train and y_train for a training set.

    path:    the file. x: floats in [low, high], or 8-bit images, whose 0 to 255 become low to high. y: labels from 0.
             Never unpickled
    layout:  "rows": x as it is; "hwc": images with channels last; "hw": images without a channel
    low:     smallest legal value
    high:    largest legal value
    classes: how many there are; none takes the model's, or the largest label and one
    """

    path: str
    layout: Literal["rows", "hwc", "hw"] = "rows"
    low: float = 0.0
    high: float = 1.0
    classes: int | None = Counted()  # type: ignore[assignment]

    version = "1"
    split = "test"

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise UsageError(f"there is no file {self.path}; npz:path= names an archive written by numpy.savez")
        held = archive_keys(file)
        missing = [key for key in ("x", "y") if key not in held]
        if missing:
            raise UsageError(
                f"{self.path} has the keys {', '.join(held) or 'none'}, not {' and '.join(missing)}; "
                "write it as numpy.savez(path, x=..., y=...)"
            )
        if ("x_train" in held) != ("y_train" in held):
            raise UsageError(f"{self.path} has only one of x_train and y_train; expected both or none")
        return read_archive(file, MEMORY, KEYS)

    @property
    def name(self) -> str:  # type: ignore[override]
        return Path(self.path).stem

    @cached_property
    def count_classes(self) -> int:
        """The largest label and one."""
        labels = [self._labels(key) for key in ("y", "y_train") if key in self._arrays]
        return 1 + max((int(each.max()) for each in labels if each.numel()), default=0)

    @property
    def counts_labels(self) -> bool:
        return vars(self)["classes"] is None

    def with_classes(self, classes: int) -> Self:
        return replace(self, classes=classes)

    @property
    def defaults(self) -> TaskDefaults:  # type: ignore[override]
        return TaskDefaults(model="cnn" if len(self.shape) == 3 else "mlp", threat_model=default_ball(self.space))

    @property
    def space(self) -> Box:
        eight_bit = self._arrays["x"].dtype == np.uint8
        return Box(self.low, self.high, tuple(self._rows("x").shape[1:]), levels=255 if eight_bit else None)

    @cached_property
    def _converted(self) -> dict[str, Tensor]:
        return {}

    def _rows(self, key: str) -> Tensor:
        if key not in self._converted:
            x = as_rows(self._arrays[key], f"{self.path}: {key}", Box(self.low, self.high))
            wanted = {"rows": None, "hwc": 4, "hw": 3}[self.layout]
            if wanted is not None and x.dim() != wanted:
                raise BadInput(f"{self.path}: {key} is {list(x.shape)}; layout={self.layout} wants {wanted} axes")
            if self.layout == "hwc":
                x = x.permute(0, 3, 1, 2).contiguous()
            elif self.layout == "hw":
                x = x.unsqueeze(1)
            self._converted[key] = x
        return self._converted[key]

    def _labels(self, key: str) -> Tensor:
        return as_labels(self._arrays[key], f"{self.path}: {key}")

    def load(self) -> Rows:
        y = self._labels("y")
        return Rows(self._rows("x"), y, row_ids(self.name, "test", len(y)))

    def load_training(self) -> tuple[Tensor, Tensor] | None:
        return (self._rows("x_train"), self._labels("y_train")) if "x_train" in self._arrays else None
