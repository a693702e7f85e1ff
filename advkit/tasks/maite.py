"""Data sets of MAITE 0.10: `maite:MODULE.NAME`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from advkit.core.errors import AdvkitError, BadInput
from advkit.core.maite import component, datum_id, label_of, labels_of
from advkit.core.protocols import TaskDefaults
from advkit.core.spaces import Box
from advkit.core.text import first_line
from advkit.tasks.arrays import as_labels, as_rows
from advkit.tasks.base import ArrayTask, Rows, default_ball


@dataclass(frozen=True, kw_only=True)
class MaiteData(ArrayTask):
    """MAITE image classification data set (protocol 0.10) by `maite:MODULE.NAME`.

    target: MODULE.NAME of the data set, or of a class or function without arguments that makes it; the module may lie
            in the working directory
    low:    smallest legal value of an image; the protocol does not say it
    high:   largest legal value. 8-bit images are stretched from 0 to 255 to low to high

    Every datum is an image [C, H, W], a target [classes] whose largest number is the class, and metadata with an id.
    All are read at once, into memory. Raises UsageError for what is no MAITE data set, BadInput for data that the
    protocol forbids.
    """

    target: str
    low: float = 0.0
    high: float = 1.0

    version = "1"
    split = "test"

    @cached_property
    def _held(self) -> Any:
        return component(self.target, ("__getitem__", "__len__"), "data set")

    @cached_property
    def _read(self) -> tuple[Rows, bool, int]:
        """Rows, whether images are of 8 bits, and the number of classes."""
        images: list[Any] = []
        labels, ids, counts = [], [], set[int]()
        for place in range(len(self._held)):
            where = f"maite:{self.target}, sample {place}"
            image, target, metadata = self._datum(place, where)
            array = _image(image, where)
            if images and (array.shape, array.dtype) != (images[0].shape, images[0].dtype):
                raise BadInput(
                    f"{where} is {array.dtype} {list(array.shape)}, sample 0 {images[0].dtype} "
                    f"{list(images[0].shape)}; expected images of one shape and type"
                )
            label, count = label_of(target, where)
            images.append(array)
            labels.append(label)
            ids.append(datum_id(metadata, where))
            counts.add(count)
        if len(counts) != 1:
            known = " and ".join(map(str, sorted(counts))) or "no"
            raise BadInput(f"maite:{self.target} has targets of {known} classes; expected samples of one number")
        x = as_rows(np.stack(images), f"maite:{self.target}: images", Box(self.low, self.high))
        rows = Rows(x, as_labels(np.array(labels), self.name), tuple(ids))
        return rows, images[0].dtype == np.uint8, counts.pop()

    def _datum(self, place: int, where: str) -> tuple[Any, Any, Any]:
        try:
            datum = self._held[place]
        except AdvkitError:
            raise
        except Exception as error:  # code of others raises whatever it likes
            raise BadInput(f"{where} can't be read ({type(error).__name__}: {first_line(error)})") from error
        if not isinstance(datum, tuple) or len(datum) != 3:
            raise BadInput(
                f"{where} is a {type(datum).__name__}; MAITE 0.10 wants a tuple of image, target and metadata"
            )
        return datum

    @property
    def name(self) -> str:  # type: ignore[override]
        return str(self._held.metadata["id"])

    @property
    def classes(self) -> int:  # type: ignore[override]
        return self._read[2]

    @property
    def space(self) -> Box:
        rows, eight_bit, _ = self._read
        return Box(self.low, self.high, tuple(rows.x.shape[1:]), levels=255 if eight_bit else None)

    @property
    def defaults(self) -> TaskDefaults:  # type: ignore[override]
        return TaskDefaults(model="cnn", threat_model=default_ball(self.space))

    def class_names(self) -> tuple[str, ...]:
        return labels_of(self._held, self.classes, f"maite:{self.target}") or super().class_names()

    def load(self) -> Rows:
        return self._read[0]

    def load_training(self) -> None:
        return None


def _image(image: Any, where: str) -> Any:
    try:
        array = np.asarray(image)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadInput(f"{where} is no array: {first_line(error)}") from error
    if array.ndim != 3:
        raise BadInput(f"{where} is of shape {list(array.shape)}; MAITE 0.10 wants images [C, H, W]")
    return array
