"""Image folders: one sub-folder per class, decoded as they are needed; ImageNet among them.

Reading is torchvision's ImageFolder: classes are the sub-folders in alphabetical order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Data, TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import DATA_VARIABLE, ClassificationTask, by_hash, data_folder

MEMORY = 16 * 2**30
"""Bytes of training images that are decoded into memory at most."""


class _Images(ClassificationTask):
    """What folders share: scaled so that the shorter side is `resize`, then the middle `crop` x `crop` pixels."""

    resize: int
    crop: int
    limit: int
    train: int

    def _place(self) -> Path:
        raise NotImplementedError

    def _check_sizes(self) -> None:
        if self.crop < 1 or self.resize < self.crop:
            raise UsageError(f"crop={self.crop}, resize={self.resize}; expected 1 <= crop <= resize")
        if self.limit < 0 or self.train < 0:
            raise UsageError(f"limit={self.limit}, train={self.train}: a number of rows is not negative; 0 means all")

    @property
    def space(self) -> Box:
        return Box(0.0, 1.0, (3, self.crop, self.crop), levels=255)

    def _open(self, split: str) -> Any:
        from torchvision.datasets import ImageFolder

        place = self._place() / split
        if not place.is_dir():
            raise UsageError(f"there is no folder {place}; expected one sub-folder of images per class in it")
        try:
            return ImageFolder(str(place))
        except (FileNotFoundError, RuntimeError, OSError) as error:
            raise UsageError(f"{place} is no image folder ({error}); expected a sub-folder per class") from error

    @cached_property
    def _held(self) -> Any:
        return self._open(self.split)

    @property
    def classes(self) -> int:  # type: ignore[override]
        return len(self._held.classes)

    def class_names(self) -> tuple[str, ...]:
        return tuple(self._held.classes)

    def _ordered(self, held: Any, rows: int) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
        """The first rows in the order of the hash of their relative names: any first n are a mixture of classes."""
        names = [Path(path).relative_to(held.root).as_posix() for path, _ in held.samples]
        if rows > len(names):
            raise UsageError(f"{rows} rows were asked for, {held.root} has {len(names)} images")
        order = by_hash(names)[: rows or None]
        return [(Path(held.samples[i][0]), int(held.samples[i][1])) for i in order], tuple(names[i] for i in order)

    @cached_property
    def _samples(self) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
        return self._ordered(self._held, self.limit)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"{self.name}/{self.split}/{name}" for name in self._samples[1])

    def _decode(self, path: Path) -> Tensor:
        from PIL import Image, UnidentifiedImageError
        from torchvision.transforms import functional

        try:
            with Image.open(path) as image:
                scaled = functional.center_crop(functional.resize(image.convert("RGB"), [self.resize]), [self.crop])
                pixels: Tensor = functional.pil_to_tensor(scaled)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise BadInput(f"{path} is no readable image ({error}); repair or remove it") from error
        return pixels.float().div_(255)

    def fetch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = [self._samples[0][row] for row in rows]
        return torch.stack([self._decode(path) for path, _ in chosen]), torch.tensor([label for _, label in chosen])

    @cached_property
    def _training(self) -> Data | None:
        if not (self._place() / "train").is_dir():
            return None
        held = self._open("train")
        if held.classes != self._held.classes:
            raise BadInput(f"{held.root} and the {self.split} folder differ in their classes (sub-folders)")
        samples, _ = self._ordered(held, self.train)
        size = len(samples) * 3 * self.crop * self.crop * 4
        if size > MEMORY:
            raise UsageError(
                f"{len(samples)} training images of {self.crop}x{self.crop} take {size / 2**30:.0f} GiB of memory; "
                f"say train=N with N up to {MEMORY // (3 * self.crop * self.crop * 4)}"
            )
        x = torch.empty(len(samples), 3, self.crop, self.crop)
        for row, (path, _) in enumerate(samples):
            x[row] = self._decode(path)
        y = torch.tensor([label for _, label in samples])
        return Data(x=x, y=y, space=self.space, classes=self.classes, name=f"{self.name}/train")

    def training(self) -> Data | None:
        return self._training

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(f"resize={self.resize}|crop={self.crop}|".encode())
        for path, label in self._samples[0]:
            content = path.read_bytes()
            digest.update(len(content).to_bytes(8, "little") + content + label.to_bytes(8, "little"))
        digest.update("\n".join(self.ids).encode())
        return digest.hexdigest()

    def digest(self) -> str:
        """sha256 over sizes, then the files as they lie on disk with their labels, then the ids.

        The files and not the decoded pixels: decoding a whole validation set costs minutes.
        """
        return self._digest


@dataclass(frozen=True, kw_only=True)
class Folder(_Images):
    """Images in a folder of the user's: path/SPLIT/CLASS/*.png (or .jpg...), with path/train where one trains.

    path:   the folder above the splits
    split:  sub-folder that is evaluated
    resize: the shorter side is scaled to so many pixels
    crop:   then the middle crop x crop pixels are taken
    limit:  rows: the first so many in the order of the hashes of the file names; 0 for all
    train:  training rows, likewise
    """

    path: str
    split: str = "test"
    resize: int = 256
    crop: int = 224
    limit: int = 0
    train: int = 0

    defaults = TaskDefaults(model="resnet18", threat_model="linf:eps=8/255")

    def __post_init__(self) -> None:
        self._check_sizes()

    @property
    def name(self) -> str:  # type: ignore[override]
        return Path(self.path).expanduser().resolve().name

    def _place(self) -> Path:
        place = Path(self.path).expanduser()
        if not place.is_dir():
            raise UsageError(f"there is no folder {self.path}; expected {self.path}/{self.split}/CLASS/*.png")
        return place


@dataclass(frozen=True, kw_only=True)
class ImageNet(_Images):
    """ImageNet (Russakovsky et al., 2015): root/val/CLASS/*.JPEG with its thousand class folders n01440764 and so on.

    root:   folder that holds val/, and train/ where one trains; default: ADVKIT_DATA/imagenet
    split:  sub-folder that is evaluated
    resize: the shorter side is scaled to so many pixels
    crop:   then the middle crop x crop pixels are taken
    limit:  rows: the first so many in the order of the hashes of the file names; 0 for all 50,000
    train:  training rows, likewise
    """

    root: str = ""
    split: str = "val"
    resize: int = 256
    crop: int = 224
    limit: int = 5_000
    train: int = 0

    name = "imagenet"
    defaults = TaskDefaults(model="torchvision:resnet50", threat_model="linf:eps=4/255", n=1_000)

    def __post_init__(self) -> None:
        self._check_sizes()

    def _place(self) -> Path:
        place = data_folder(self.root, self.name)
        if place is None:
            raise UsageError(
                f"imagenet does not ship with advkit: say root=FOLDER that holds val/ with its thousand class folders "
                f"(from https://image-net.org, after registering), or set {DATA_VARIABLE} above a folder imagenet"
            )
        return place

    def _open(self, split: str) -> Any:
        held = super()._open(split)
        if len(held.classes) != 1_000:
            raise UsageError(
                f"{held.root} has {len(held.classes)} class folders, ImageNet has 1000; for a subset use "
                "folder:path=..., whose labels are counted from its own folders"
            )
        return held
