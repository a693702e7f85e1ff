"""Image folders: one sub-folder per class, decoded as they are needed.

Reading is torchvision's ImageFolder: classes are the sub-folders in alphabetical order.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Data, TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import ClassificationTask, by_hash

MEMORY = 16 * 2**30
"""Bytes of training images that are decoded into memory at most."""


Interpolation = Literal["bilinear", "bicubic"]


def decode(source: Any, resize: int, crop: int, interpolation: str, name: str) -> Tensor:
    """An image file as float [3, crop, crop] of values k/255, in RGB.

    Scaled by Pillow's antialiased filter so that the shorter side is `resize`, rounded to 8 bits there, then the middle
    `crop` x `crop` pixels. BadInput where it can't be read.
    """
    from PIL import Image, UnidentifiedImageError
    from torchvision.transforms import InterpolationMode, functional

    try:
        with Image.open(source) as image:
            scaled = functional.resize(image.convert("RGB"), [resize], InterpolationMode(interpolation))
            pixels: Tensor = functional.pil_to_tensor(functional.center_crop(scaled, [crop]))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        raise BadInput(f"{name} is no readable image ({error}); repair or remove it") from error
    return pixels.float().div_(255)


def check_sizes(resize: int, crop: int) -> None:
    """UsageError unless 1 <= crop <= resize."""
    if crop < 1 or resize < crop:
        raise UsageError(f"crop={crop}, resize={resize}; expected 1 <= crop <= resize")


@dataclass(frozen=True)
class Listing:
    """The images of one split: the folder that they lie below, each with its label, and the classes' names."""

    root: Path
    files: tuple[tuple[Path, int], ...]
    classes: tuple[str, ...]


def class_folders(place: Path) -> Listing:
    """The images in the sub-folders of a folder, one per class in alphabetical order."""
    from torchvision.datasets import ImageFolder

    if not place.is_dir():
        raise UsageError(f"there is no folder {place}; expected one sub-folder of images per class in it")
    try:
        held = ImageFolder(str(place))
    except (FileNotFoundError, RuntimeError, OSError) as error:
        raise UsageError(f"{place} is no image folder ({error}); expected a sub-folder per class") from error
    return Listing(place, tuple((Path(path), int(label)) for path, label in held.samples), tuple(held.classes))


class Images(ClassificationTask):
    """What folders share: scaled so that the shorter side is `resize`, then the middle `crop` x `crop` pixels."""

    resize: int
    crop: int
    interpolation: Interpolation
    limit: int
    train: int

    @abstractmethod
    def place(self) -> Path:
        """The folder above the splits; UsageError where there is none."""

    def listing(self, split: str) -> Listing:
        """The images of a split."""
        return class_folders(self.place() / split)

    def order(self, listing: Listing) -> list[int]:
        """A fixed order of the images: by the hash of their relative names, any first n are a mixture of classes."""
        return by_hash([path.relative_to(listing.root).as_posix() for path, _ in listing.files])

    def _check(self) -> None:
        check_sizes(self.resize, self.crop)
        if self.limit < 0 or self.train < 0:
            raise UsageError(
                f"limit={self.limit}, train={self.train}: a number of samples is not negative; 0 means all"
            )

    @property
    def space(self) -> Box:
        return Box(0.0, 1.0, (3, self.crop, self.crop), levels=255)

    @cached_property
    def _held(self) -> Listing:
        return self.listing(self.split)

    @property
    def classes(self) -> int:  # type: ignore[override]
        return len(self._held.classes)

    def class_names(self) -> tuple[str, ...]:
        return self._held.classes

    def _first(self, listing: Listing, rows: int) -> list[tuple[Path, int]]:
        if rows > len(listing.files):
            raise UsageError(
                f"{rows} samples were asked for, {listing.root} has {len(listing.files)} images; 0 takes all"
            )
        return [listing.files[row] for row in self.order(listing)[: rows or None]]

    @cached_property
    def _samples(self) -> list[tuple[Path, int]]:
        return self._first(self._held, self.limit)

    @cached_property
    def _ids(self) -> tuple[str, ...]:
        root = self._held.root
        return tuple(f"{self.name}/{self.split}/{path.relative_to(root).as_posix()}" for path, _ in self._samples)

    @property
    def ids(self) -> tuple[str, ...]:
        return self._ids

    def _decode(self, path: Path) -> Tensor:
        return decode(path, self.resize, self.crop, self.interpolation, str(path))

    def fetch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = [self._samples[row] for row in rows]
        return torch.stack([self._decode(path) for path, _ in chosen]), torch.tensor([label for _, label in chosen])

    @cached_property
    def _training(self) -> Data | None:
        if not (self.place() / "train").is_dir():
            return None
        held = self.listing("train")
        if held.classes != self._held.classes:
            raise BadInput(f"{held.root} and the {self.split} folder differ in their classes (sub-folders)")
        samples = self._first(held, self.train)
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
        digest = hashlib.sha256(f"{self.interpolation}|resize={self.resize}|crop={self.crop}|".encode())
        for path, label in self._samples:
            content = path.read_bytes()
            digest.update(len(content).to_bytes(8, "little") + content + label.to_bytes(8, "little"))
        digest.update("\n".join(self.ids).encode())
        return digest.hexdigest()

    def digest(self) -> str:
        """sha256 over interpolation and sizes, then the files as they lie on disk with their labels, then the ids.

        The files and not the decoded pixels: decoding a whole validation set costs minutes.
        """
        return self._digest


@dataclass(frozen=True, kw_only=True)
class Folder(Images):
    """Image folder of the user's: path/SPLIT/CLASS/*.png (or .jpg...), path/train where a defense trains.

    path:          the folder above the splits
    split:         sub-folder that is evaluated
    resize:        the shorter side is scaled to so many pixels
    crop:          then the middle crop x crop pixels are taken
    interpolation: of the scaling: bilinear or bicubic
    limit:         samples: the first so many in the order of the hashes of the file names; 0 for all
    train:         training samples, likewise
    """

    path: str
    split: str = "test"
    resize: int = 256
    crop: int = 224
    interpolation: Interpolation = "bilinear"
    limit: int = 0
    train: int = 0

    defaults = TaskDefaults(model="resnet18", threat_model="linf:eps=8/255")

    def __post_init__(self) -> None:
        self._check()

    @property
    def name(self) -> str:  # type: ignore[override]
        return Path(self.path).expanduser().resolve().name

    def place(self) -> Path:
        place = Path(self.path).expanduser()
        if not place.is_dir():
            raise UsageError(f"there is no folder {self.path}; expected {self.path}/{self.split}/CLASS/*.png")
        return place
