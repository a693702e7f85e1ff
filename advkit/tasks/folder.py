"""Image folders: one sub-folder per class, decoded as they are needed.

Classes are the sub-folders: those that are numbered in the order of their numbers, others in alphabetical order, as
torchvision's ImageFolder has all of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import warnings
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import one_of
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Data, OfFiles, TaskDefaults
from advkit.core.spaces import Box
from advkit.core.text import first_line
from advkit.tasks.base import ClassificationTask, Counted, all_of, by_hash, check_names, mark_of

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("advkit")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Those that torchvision's ImageFolder reads."""
HELPERS = ("__macosx", "__pycache__", "@eadir", "lost+found", "$recycle.bin", "system volume information")
"""Folders that systems and tools leave between the user's own; so are those whose name begins with a dot."""
SPLITS = ("test", "train", "training", "val", "valid", "validation", "eval", "dev")
"""Names of folders that hold class folders and are none."""
MEMORY = 16 * 2**30
"""Bytes of training images that are decoded into memory at most."""


FORMATS = ("JPEG", "PNG", "PPM", "BMP", "DIB", "TIFF", "WEBP", "GIF")
"""What is decoded, whatever a file is called: Pillow goes by the content, and hands PostScript to a program."""
PIXELS = 2**24
"""Pixels that an image may declare whatever its size; larger ones need a byte for every `SPARSE` pixels."""
SPARSE = 8_192

Interpolation = Literal["bilinear", "bicubic"]
Order = Literal["auto", "number", "name"]


def decode(content: bytes, resize: int, crop: int, interpolation: str, name: str) -> Tensor:
    """An image file's content as float [3, crop, crop] of values k/255, in RGB.

    Scaled by Pillow's antialiased filter so that the shorter side is `resize`, rounded to 8 bits there, then the middle
    `crop` x `crop` pixels. Transparency is dropped and a rotation that EXIF asks for is not made, as in torchvision's
    ImageFolder. BadInput where it can't be read, has more than 8 bits per value (Pillow would cut them), or
    declares more pixels than its bytes can stand for.
    """
    from PIL import Image
    from torchvision.transforms import InterpolationMode, functional

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = _opened(content)
        with image:
            if image.width * image.height > max(PIXELS, SPARSE * len(content)):
                raise ValueError(f"it declares {image.width} x {image.height} pixels in {len(content):,} bytes")
            if resize * resize * max(image.size) > max(PIXELS, 16 * resize * resize) * min(image.size):
                raise ValueError(f"{image.width} x {image.height} pixels are too narrow to be scaled to {resize}")
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}, more than 8 bits per value: save it with 8 bits")
            scaled = functional.resize(image.convert("RGB"), [resize], InterpolationMode(interpolation))
            pixels: Tensor = functional.pil_to_tensor(functional.center_crop(scaled, [crop]))
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise BadInput(f"{name} is no readable image ({first_line(error)}); repair or remove it") from error
    return pixels.float().div_(255)


def _opened(content: bytes) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if not content:
        raise ValueError("it is empty")
    try:
        return Image.open(BytesIO(content), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"its content is none of {', '.join(FORMATS)}") from None


def content_of(path: Path) -> bytes:
    """The bytes of a sample's file; BadInput where it can't be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} can't be read ({error.strerror or error}); repair or remove it") from error


def check_sizes(resize: int, crop: int) -> None:
    """UsageError unless 1 <= crop <= resize."""
    if crop < 1 or resize < crop:
        raise UsageError(f"crop={crop}, resize={resize}; expected 1 <= crop <= resize, such as resize=32,crop=32")


@dataclass(frozen=True)
class Listing:
    """The images of one split: the folder that they lie below, each with its label, and the classes' names."""

    root: Path
    files: tuple[tuple[Path, int], ...]
    classes: tuple[str, ...]


def class_folders(place: Path, order: Order = "auto") -> Listing:
    """The images in the sub-folders of a folder, one per class, in the order of `label_order`.

    Hidden folders and files, and those that systems leave behind, are no classes and no images. Files of other kinds
    are left out, and a warning says so.
    """
    if not place.is_dir():
        raise UsageError(f"there is no folder {place}; expected one sub-folder of images per class in it")
    try:
        names = sorted(each.name for each in place.iterdir() if each.is_dir() and not _helper(each.name))
        listed = [_images_below(place / name) for name in label_order(names, order, str(place))]
    except OSError as error:
        raise UsageError(f"{place} is no image folder ({error}); expected a sub-folder per class") from error
    names = label_order(names, order)
    empty = [name for name, (images, _) in zip(names, listed, strict=True) if not images]
    if empty or not names:
        what = f"no images in its folders {', '.join(empty[:3])}" if empty else "no folders"
        raise UsageError(
            f"{place} has {what}; expected one sub-folder per class with images ({', '.join(EXTENSIONS[:3])}) in it"
        )
    others = Counter(kind for _, kinds in listed for kind in kinds)
    if others:
        kinds = ", ".join(f"{count} {kind}" for kind, count in others.most_common(4))
        log.warning("%s: %d files are no images by their names and are left out: %s", place, others.total(), kinds)
    files = tuple((path, label) for label, (images, _) in enumerate(listed) for path in images)
    check_names(path.relative_to(place) for path, _ in files)
    return Listing(place, files, tuple(names))


def _helper(name: str) -> bool:
    return name.startswith(".") or name.casefold() in HELPERS


def _images_below(folder: Path) -> tuple[list[Path], list[str]]:
    """The images in a folder and the folders in it, in the order of their names, and the kinds of other files."""
    images: list[Path] = []
    others: list[str] = []
    start = Path(os.path.realpath(folder))
    above = {str(folder): {start, *start.parents}}
    for root, below, files in os.walk(folder, followlinks=True):
        below[:] = sorted(name for name in below if not _helper(name))
        for name in tuple(below):
            place = os.path.join(root, name)
            real = Path(os.path.realpath(place))
            above[place] = above[root] | {real}
            if real in above[root]:  # its images would be taken again, and with the label of this class
                log.warning("%s leads back to a folder that it lies in, and is left out", place)
                below.remove(name)
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                images.append(Path(root) / name)
            elif not name.startswith(".") and name.casefold() not in ("thumbs.db", "desktop.ini"):
                others.append(Path(name).suffix or "without an extension")
    return images, others


def numbers_of(names: Sequence[str]) -> list[int] | None:
    """The numbers in names that differ in nothing else (7, class_7); None where they are not all so."""
    parts = [re.fullmatch(r"(\D*)([0-9]{1,9})(\D*)", name) for name in names]
    if not names or any(part is None for part in parts):
        return None
    told = [part.groups() for part in parts if part is not None]
    numbers = [int(number) for _, number, _ in told]
    same = len({(before, after) for before, _, after in told}) == 1 and len(set(numbers)) == len(numbers)
    return numbers if same else None


def label_order(names: Sequence[str], order: Order = "auto", place: str = "") -> list[str]:
    """Names of class folders in the order of their labels.

    Folders that are numbered go by their numbers: as text 10 comes before 2. Where the two differ a warning names the
    `place`: networks that were trained on torchvision's ImageFolder count in the order of the text.
    """
    text, numbers = sorted(names), numbers_of(names)
    if order == "name" or numbers is None:
        if order == "number":
            raise UsageError(f"order=number, and the class folders {', '.join(text[:3])} are not numbered")
        return text
    counted = [name for _, name in sorted(zip(numbers, names, strict=True))]
    if counted != text and order == "auto" and place:
        log.warning(
            "%s: the class folders are numbered; labels are in the order of the numbers (%s, ...), not of the text, in "
            "which ImageFolder counts (%s, ...): say order=name for a network that was trained so, order=number "
            "without this warning",
            place,
            ", ".join(counted[:3]),
            ", ".join(text[:3]),
        )
    return counted


class Images(ClassificationTask, OfFiles):
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

    def sequence(self, listing: Listing) -> list[int]:
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
        return [listing.files[row] for row in self.sequence(listing)[: rows or None]]

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
        return decode(content_of(path), self.resize, self.crop, self.interpolation, str(path))

    @override
    def look(self, n: int) -> None:
        all_of(self._decode, [path for path, _ in self._samples[:n]])

    @override
    def marks(self, n: int) -> dict[str, str]:
        samples = self._samples[:n]
        return {row: mark_of(content_of(path), label) for row, (path, label) in zip(self.ids[:n], samples, strict=True)}

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
        x = torch.empty(len(samples), 3, self.crop, self.crop, dtype=torch.float32)
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
            content = content_of(path)
            if _suspect(content):
                decode(content, self.resize, self.crop, self.interpolation, str(path))
            digest.update(len(content).to_bytes(8, "little") + content + label.to_bytes(8, "little"))
        digest.update("\n".join(self.ids).encode())
        return digest.hexdigest()

    def digest(self) -> str:
        """sha256 over interpolation and sizes, then the files as they lie on disk with their labels, then the ids.

        The files and not the decoded pixels: decoding a whole validation set costs minutes. Files that look cut off are
        decoded all the same, so that BadInput names them before a run begins and not after hours.
        """
        return self._digest


def _suspect(content: bytes) -> bool:
    """Whether an image file may be cut off: JPEG and PNG end with a mark of their own, other kinds do not tell."""
    if content.startswith(b"\xff\xd8"):
        return not content.rstrip(b"\0").endswith(b"\xff\xd9")
    if content.startswith(b"\x89PNG"):
        return b"IEND" not in content[-16:]
    return True


@dataclass(frozen=True, kw_only=True)
class Folder(Images):
    """Image folder of the user's: path/CLASS/*.png (or .jpg...), or path/SPLIT/CLASS/*.png; path/train where a defense
    trains.

    path:          the folder above the splits, or the class folders' own
    split:         sub-folder that is evaluated; where there is no sub-folder `test` and none of another split, the
                   class folders are taken from `path` itself
    resize:        the shorter side is scaled to so many pixels
    crop:          then the middle crop x crop pixels are taken
    interpolation: of the scaling: bilinear or bicubic
    limit:         samples: the first so many in the order of the hashes of the file names; 0 for all
    train:         training samples, likewise
    order:         labels: "number" in the order of the folders' numbers (7, class_7), "name" in that of their names as
                   text, as ImageFolder has it, "auto" by number where all are numbered
    classes:       how many there are; none takes as many as there are folders, or, where the folders are numbered from
                   0, as many as the model has. With more classes than folders, folders' numbers are the labels
    """

    path: str
    split: str = "test"
    resize: int = 256
    crop: int = 224
    interpolation: Interpolation = "bilinear"
    limit: int = 0
    train: int = 0
    order: Order = "auto"
    classes: int | None = Counted()  # type: ignore[assignment]

    defaults = TaskDefaults(model="resnet18", threat_model="linf:eps=8/255")

    def __post_init__(self) -> None:
        self._check()
        one_of(self, "order", ("auto", "number", "name"))

    @property
    def count_classes(self) -> int:
        """One per folder."""
        return len(self._held.classes)

    @property
    def counts_labels(self) -> bool:
        """Where the folders are numbered a model may have classes that no folder shows."""
        return vars(self)["classes"] is None and self.order != "name" and numbers_of(self._held.classes) is not None

    def with_classes(self, classes: int) -> Self:
        return replace(self, classes=classes)

    def listing(self, split: str) -> Listing:
        held = class_folders(self._above(split), self.order)
        classes = vars(self)["classes"]
        if classes in (None, len(held.classes)):
            return held
        numbers = None if self.order == "name" else numbers_of(held.classes)
        if numbers is None or max(numbers) >= classes:
            raise UsageError(
                f"{held.root} has {len(held.classes)} class folders and classes is {classes}: which of the classes "
                f"they are is told by folders that are numbered from 0 to {classes - 1}; found "
                f"{', '.join(held.classes[:3])}"
            )
        names = dict(zip(numbers, held.classes, strict=True))
        files = tuple((path, numbers[label]) for path, label in held.files)
        return Listing(held.root, files, tuple(names.get(label, str(label)) for label in range(classes)))

    def _above(self, split: str) -> Path:
        """The folder of the class folders of a split: the path itself where it has no splits."""
        place = self.place()
        if (place / split).is_dir():
            return place / split
        others = sorted(each.name for each in place.iterdir() if each.is_dir() and each.name.casefold() in SPLITS)
        if others:
            raise UsageError(
                f"{self.path} has no folder {split} and has {', '.join(others)}: say "
                f"folder:path={self.path},split={others[-1]}"
            )
        if split != "test":
            raise UsageError(f"there is no folder {place / split}; expected one sub-folder of images per class in it")
        log.info("%s has no folder test: its own sub-folders are the classes", self.path)
        return place

    @property
    def name(self) -> str:  # type: ignore[override]
        return Path(self.path).expanduser().resolve().name

    def place(self) -> Path:
        place = Path(self.path).expanduser()
        if not place.is_dir():
            raise UsageError(
                f"there is no folder {self.path}; expected {self.path}/CLASS/*.png, or "
                f"{self.path}/{self.split}/CLASS/*.png"
            )
        return place
