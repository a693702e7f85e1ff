"""A task from a numpy archive of the user's."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.arrays import as_labels, as_rows
from advkit.tasks.base import ArrayTask, Rows, row_ids


@dataclass(frozen=True, kw_only=True)
class Npz(ArrayTask):
    """NumPy archive (.npz) of samples and labels: keys x and y, and x_train and y_train for a training set.

    path:   the file. x: floats in [low, high], or 8-bit images, which become k/255. y: labels from 0. Never unpickled
    layout: "rows": x as it is; "hwc": images with channels last; "hw": images without a channel
    low:    smallest legal value
    high:   largest legal value
    """

    path: str
    layout: Literal["rows", "hwc", "hw"] = "rows"
    low: float = 0.0
    high: float = 1.0

    version = "1"
    split = "test"

    @cached_property
    def _arrays(self) -> dict[str, Any]:
        file = Path(self.path).expanduser()
        if not file.is_file():
            raise UsageError(f"there is no file {self.path}; npz:path= names an archive written by numpy.savez")
        try:
            with np.load(file, allow_pickle=False) as held:
                if not hasattr(held, "files"):
                    raise ValueError("it holds a single array")
                missing = [key for key in ("x", "y") if key not in held.files]
                if missing:
                    raise UsageError(
                        f"{self.path} has the keys {', '.join(held.files) or 'none'}, not {' and '.join(missing)}; "
                        "write it as numpy.savez(path, x=..., y=...)"
                    )
                if ("x_train" in held.files) != ("y_train" in held.files):
                    raise UsageError(f"{self.path} has only one of x_train and y_train; expected both or none")
                return {key: held[key] for key in ("x", "y", "x_train", "y_train") if key in held.files}
        except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise BadInput(f"{self.path} is no archive of plain numpy arrays ({error})") from error

    @property
    def name(self) -> str:  # type: ignore[override]
        return Path(self.path).stem

    @cached_property
    def classes(self) -> int:  # type: ignore[override]
        labels = [self._labels(key) for key in ("y", "y_train") if key in self._arrays]
        return 1 + max(int(each.max()) for each in labels if each.numel())

    @property
    def defaults(self) -> TaskDefaults:  # type: ignore[override]
        return TaskDefaults(model="cnn" if len(self.shape) == 3 else "mlp", threat_model="linf:eps=8/255")

    @property
    def space(self) -> Box:
        eight_bit = self._arrays["x"].dtype == np.uint8
        return Box(self.low, self.high, tuple(self._rows("x").shape[1:]), levels=255 if eight_bit else None)

    @cached_property
    def _converted(self) -> dict[str, Tensor]:
        return {}

    def _rows(self, key: str) -> Tensor:
        if key not in self._converted:
            x = as_rows(self._arrays[key], f"{self.path}: {key}")
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
