"""Fashion-MNIST (Xiao et al., 2017, arXiv:1708.07747): 28x28 grey images of ten kinds of clothing, MIT licence.

The first 1,000 test images ship inside the package (advkit/tasks/data, with their notice). The training images and the
rest of the test file come from a folder of the published idx files.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import IO, Literal, cast

import numpy as np
import torch
from torch import Tensor

from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import DATA_VARIABLE, ImbalancedTask, Rows, data_folder, row_ids

EMBEDDED = 1_000
EMBEDDED_SHA256 = "99324003f90225ff171e1aec72f674b69ec6865868cc89648a79ce554830d86d"  # image bytes, label bytes
SIDE = 28
AXES = 3
LARGEST = 1 << 28
"""Bytes of one file that are read at most; the largest published one has 47 million."""
FILES = {"test": "t10k", "train": "train"}
NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
HOW = "download the four .gz files from https://github.com/zalandoresearch/fashion-mnist"


def read_idx(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """The array in an idx file of unsigned bytes, gzipped or not; BadInput where it is damaged or another kind."""
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == b"\x1f\x8b"
            stream = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if packed else raw
            shape = _idx_shape(stream.read(4 + 4 * AXES), path)
            size = math.prod(shape)
            if size > LARGEST:
                raise BadInput(f"{path} says {list(shape)}; at most {LARGEST:,} bytes are read: {HOW} again")
            stream.seek(4 + 4 * len(shape))
            content = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{path} can't be read ({error}); {HOW} again") from error
    if len(content) != size:
        raise BadInput(f"{path} says {list(shape)} and holds other than {size:,} bytes; it is damaged: {HOW} again")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _idx_shape(head: bytes, path: Path) -> tuple[int, ...]:
    if len(head) < 4 or head[:3] != b"\x00\x00\x08" or not 1 <= head[3] <= AXES or len(head) < 4 + 4 * head[3]:
        raise BadInput(f"{path} is no idx file of bytes; expected one of the four files: {HOW}")
    return tuple(int.from_bytes(head[4 + 4 * i : 8 + 4 * i], "big") for i in range(head[3]))


def find_idx(folder: Path, stem: str) -> Path | None:
    """The file of this stem in the folder itself or where torchvision puts it, gzipped or not."""
    for place in (folder, folder / "raw", folder / "FashionMNIST" / "raw"):
        for name in (f"{stem}.gz", stem):
            if (place / name).is_file():
                return place / name
    return None


def read_pair(folder: Path, split: str) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], ...]:
    """Images [N, 28, 28] and labels [N] of "train" or "test" from a folder of the idx files."""
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        stem = f"{FILES[split]}-{kind}"
        path = find_idx(folder, stem)
        if path is None:
            raise UsageError(f"{folder} holds no {stem}(.gz), nor does FashionMNIST/raw below it; {HOW}")
        found.append(read_idx(path))
    images, labels = found
    if images.shape[1:] != (SIDE, SIDE) or labels.shape != images.shape[:1]:
        raise BadInput(f"{folder}: images {list(images.shape)} and labels {list(labels.shape)} do not belong together")
    return images, labels


@cache
def embedded() -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], ...]:
    """Images and labels of the first 1,000 test rows, from inside the package."""
    place = resources.files("advkit.tasks") / "data" / "fashion_mnist_test_1000.npz"
    with resources.as_file(place) as path, np.load(path, allow_pickle=False) as held:
        images, labels = held["images"], held["labels"]
    seen = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    if seen != EMBEDDED_SHA256:
        raise BadInput(f"the images inside the package are damaged (sha256 {seen}); install advkit again")
    return images, labels


def averaged(images: np.ndarray[tuple[int, ...], np.dtype[np.uint8]], size: int) -> Tensor:
    """Float images [N, 1, size, size] in [0, 1]: k/255, or block sums over 255 times the block's area, rounded once."""
    block = SIDE // size
    sums = images.astype(np.int32).reshape(-1, size, block, size, block).sum(axis=(2, 4))
    return torch.from_numpy(sums).unsqueeze(1).float() / float(255 * block * block)


@dataclass(frozen=True, kw_only=True)
class FashionMNIST(ImbalancedTask):
    """Fashion-MNIST: ten kinds of clothing, 28x28 grey images; the first 1,000 test images need no download.

    split: "test", or "train" to attack training images (needs root)
    root:  folder of the published idx(.gz) files, also in torchvision's layout; needed for training and for more than
           1,000 test samples. Default: ADVKIT_DATA/fashion-mnist where that exists
    size:  side of the images: 28, or 14, 7, 4, 2 where blocks of 2x2 and more are averaged
    train: training samples: the first so many of the file; 0 for all 60,000
    test:  test samples: the first so many of the file; 0 for all 10,000 where root is said, else the 1,000 embedded

    An evaluation does not change with ADVKIT_DATA being set: that folder is used for training and for samples
    requested by number.
    """

    split: Literal["test", "train"] = "test"
    root: str = ""
    size: int = SIDE
    train: int = 0
    test: int = 0

    name = "fashion-mnist"
    classes = 10
    defaults = TaskDefaults(model="cnn", threat_model="linf:eps=0.1", n=1_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 < self.size <= SIDE or SIDE % self.size:
            raise UsageError(f"size={self.size} does not divide {SIDE}; expected 28, 14, 7, 4 or 2")
        if self.train < 0 or self.test < 0:
            raise UsageError(f"train={self.train}, test={self.test}: a number of samples is not negative; 0 means all")

    @property
    def space(self) -> Box:
        return Box(0.0, 1.0, (1, self.size, self.size), levels=255 if self.size == SIDE else None)

    @property
    def trains_on_all(self) -> bool:
        return super().trains_on_all and not self.train

    @property
    def _folder(self) -> Path | None:
        return data_folder(self.root, self.name)

    def load(self) -> Rows:
        if self.split == "train":
            found = self._training_arrays()
            if found is None:
                raise UsageError(f"the training images are not inside the package; {HOW} and say root=FOLDER")
            x, y, rows = found
            ids = row_ids(self.name, "train", int(rows[-1]) + 1)
            return Rows(x, y, tuple(ids[row] for row in rows.tolist()))
        images, labels = self._test_arrays()
        x, y = averaged(images, self.size), torch.from_numpy(labels.astype(np.int64))
        return Rows(x, y, row_ids(self.name, "test", len(y)))

    def _test_arrays(self) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.uint8]], ...]:
        folder = self._folder
        if not self.root and self.test <= EMBEDDED:
            images, labels = embedded()
        elif folder is None:
            raise UsageError(
                f"test={self.test} asks for more than the {EMBEDDED} images inside the package; {HOW} and say "
                f"root=FOLDER, or set {DATA_VARIABLE}"
            )
        else:
            images, labels = read_pair(folder, "test")
        if self.test > len(labels):
            raise UsageError(f"test={self.test} asks for more samples than the test file's {len(labels)}")
        rows = self.test or len(labels)
        return images[:rows], labels[:rows]

    def _training_arrays(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """x, y and their places in the file; None where the file is not at hand."""
        folder = self._folder
        if folder is None:
            return None
        images, labels = read_pair(folder, "train")
        if self.train > len(labels):
            raise UsageError(f"train={self.train} asks for more samples than the training file's {len(labels)}")
        y = torch.from_numpy(labels[: self.train or len(labels)].astype(np.int64))
        rows = self.kept(y)
        return averaged(images[rows.numpy()], self.size), y[rows], rows

    def load_training(self) -> tuple[Tensor, Tensor] | None:
        found = self._training_arrays()
        return None if found is None else found[:2]

    def class_names(self) -> tuple[str, ...]:
        return NAMES
