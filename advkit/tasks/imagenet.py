"""ImageNet (Russakovsky et al., arXiv 1409.0575): a folder of the user's, and twenty images that a package ships.

Labels are the places of the 1,000 wnids (n01440764 and so on) in alphabetical order, as every library counts them.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from advkit.core.errors import BadInput, MissingExtra, UsageError
from advkit.core.protocols import TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import DATA_VARIABLE, ArrayTask, Rows, by_hash, check_names, data_folder
from advkit.tasks.folder import Images, Interpolation, Listing, check_sizes, class_folders, decode

CLASSES = 1_000
SAMPLES = 20
SAMPLES_SHA256 = "58661a8dcf221c6d44765164717127433bcad1ae934b0e9951289d9957d08181"


@cache
def wnids() -> tuple[str, ...]:
    """The identifiers of the classes, in the order of the labels."""
    from timm.data.imagenet_info import ImageNetInfo

    listed: list[str] = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    return tuple(listed)


@cache
def class_names() -> tuple[str, ...]:
    """A short English name of each class, in the order of the labels."""
    from torchvision.models import ResNet18_Weights

    return tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


@cache
def _places() -> dict[str, int]:
    places = {str(label): label for label in range(CLASSES)}
    return places | {wnid: label for label, wnid in enumerate(wnids())}


@dataclass(frozen=True, kw_only=True)
class ImageNet(Images):
    """ImageNet: its validation set, or part of it, in a folder of the user's; root/train where a defense trains.

    root:          folder that holds val/; default: ADVKIT_DATA/imagenet
    split:         its sub-folder that is evaluated: class folders named by wnid (n01440764) or label (0 to 999), any
                   number of them, or the images themselves with a file of labels
    labels:        the file of labels, for a folder without class folders: lines `FILE LABEL` with a space or comma
                   between them and a wnid or a label from 0 to 999, or a wnid per line, in the order of the file names
    resize:        the shorter side is scaled to so many pixels
    crop:          then the middle crop x crop pixels are taken
    interpolation: of the scaling: bilinear or bicubic
    limit:         samples: the first so many of the order; 0 for all
    train:         training samples, likewise
    balanced:      order: the first image of each class, then the second of each, and so on, instead of a random mixture

    Images are in the order of the hashes of their file names, in whichever of the three ways the labels are given.
    Numbers alone in a file of labels are refused: those of the development kit count the classes in another order.
    """

    root: str = ""
    split: str = "val"
    labels: str = ""
    resize: int = 256
    crop: int = 224
    interpolation: Interpolation = "bilinear"
    limit: int = 5_000
    train: int = 0
    balanced: bool = False

    name = "imagenet"
    version = "2"
    defaults = TaskDefaults(model="torchvision:resnet50", threat_model="linf:eps=4/255", n=1_000)

    def __post_init__(self) -> None:
        self._check()

    @property
    def classes(self) -> int:  # type: ignore[override]
        return CLASSES

    def class_names(self) -> tuple[str, ...]:
        return class_names()

    def place(self) -> Path:
        place = data_folder(self.root, self.name)
        if place is None:
            raise UsageError(
                f"imagenet does not ship with advkit: say root=FOLDER that holds val/ with its thousand class folders "
                f"(from https://image-net.org, after registering), or set {DATA_VARIABLE} above a folder imagenet; "
                "imagenet-samples needs no folder"
            )
        return place

    def listing(self, split: str) -> Listing:
        place = self.place() / split
        if not place.is_dir():
            raise UsageError(
                f"there is no folder {place}; expected class folders n01440764 and so on, or images, in it"
            )
        if self.labels and split == self.split:
            return _labelled(place, Path(self.labels).expanduser())
        if _images(place) and not any(each.is_dir() for each in place.iterdir()):
            raise UsageError(f"{place} holds images without class folders; say labels=FILE for what they show")
        held = class_folders(place, "name")
        strange = [name for name in held.classes if name not in _places()]
        if strange:
            raise UsageError(
                f"{place} has {len(strange)} folders that name none of ImageNet's 1000 classes ({_few(strange)}); "
                "expected wnids such as n01440764, or labels from 0 to 999; for other classes use folder:path=..."
            )
        labels = [_places()[name] for name in held.classes]
        if len(set(labels)) != len(labels):
            raise UsageError(f"{place} has two folders of one class, by its wnid and by its label; merge them")
        return replace(held, files=tuple((path, labels[row]) for path, row in held.files), classes=wnids())

    def sequence(self, listing: Listing) -> list[int]:
        order = by_hash([path.name for path, _ in listing.files])
        if not self.balanced:
            return order
        seen = [0] * CLASSES
        rank = {}
        for row in order:
            label = listing.files[row][1]
            rank[row] = seen[label]
            seen[label] += 1
        return sorted(order, key=rank.__getitem__)


def _images(place: Path) -> list[Path]:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found = sorted(each for each in place.iterdir() if each.suffix.lower() in IMG_EXTENSIONS and each.is_file())
    check_names(each.relative_to(place) for each in found)
    return found


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _labelled(place: Path, file: Path) -> Listing:
    """The images that lie in a folder, with the labels that a file says."""
    images = _images(place)
    if not images:
        raise UsageError(f"{place} holds no images; labels= is for images that lie in no class folders")
    try:
        lines = [line.split() for line in file.read_text("utf-8-sig").replace(",", " ").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"can't read the labels in {file} ({error}); expected lines FILE LABEL") from error
    lines = [words for words in lines if words]
    if all(len(words) == 1 for words in lines):
        labels = dict(zip((path.name for path in images), _in_order(lines, len(images), file), strict=True))
    else:
        labels = _by_name(lines, images, file)
    missing = [path.name for path in images if path.name not in labels]
    if missing:
        raise BadInput(f"{file} says nothing of {len(missing)} images in {place} ({_few(missing)})")
    return Listing(place, tuple((path, labels[path.name]) for path in images), wnids())


def _in_order(lines: list[list[str]], images: int, file: Path) -> Iterator[int]:
    if len(lines) != images:
        raise BadInput(f"{file} has {len(lines)} labels for {images} images; expected one each, or lines FILE LABEL")
    known = {wnid: label for label, wnid in enumerate(wnids())}
    for (word,) in lines:
        if word not in known:
            raise BadInput(
                f"{file} says {word!r} without a file name; expected a wnid such as n01440764 (the numbers of the "
                "development kit count the classes in another order), or lines FILE LABEL"
            )
        yield known[word]


def _by_name(lines: list[list[str]], images: list[Path], file: Path) -> dict[str, int]:
    names = {path.stem: path.name for path in images} | {path.name: path.name for path in images}
    labels: dict[str, int] = {}
    for number, words in enumerate(lines):
        name = names.get(Path(words[0]).name)
        label = _places().get(words[1]) if len(words) > 1 else None
        if label is None:
            if number == 0 and name is None:
                continue  # a heading
            raise BadInput(
                f"{file} says {' '.join(words[:2])!r}; expected FILE LABEL with a wnid such as n01440764 or a label "
                "from 0 to 999"
            )
        if name is None:
            continue  # of an image that is not here
        if labels.setdefault(name, label) != label:
            raise BadInput(f"{file} gives {name} two labels, {labels[name]} and {label}")
    return labels


@cache
def _samples() -> tuple[tuple[str, bytes], ...]:
    """Names and contents of the images that foolbox ships, in the order of their names."""
    package = importlib.util.find_spec("foolbox")  # where it is, without importing it
    folders = [] if package is None else [Path(each) / "data" for each in package.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.glob("imagenet_*_*.jpg"))
    if not files:
        raise MissingExtra(
            "imagenet-samples are images that the package foolbox ships, and they are not installed: "
            "pip install 'advkit[imagenet-demo]' brings them"
        )
    held = tuple((file.name, file.read_bytes()) for file in files)
    digest = hashlib.sha256()
    for name, content in held:
        digest.update(name.encode() + hashlib.sha256(content).digest())
    if digest.hexdigest() != SAMPLES_SHA256:
        raise BadInput(
            f"the {len(held)} ImageNet images of the installed foolbox are not the {SAMPLES} that imagenet-samples, "
            "version 1, is made of; install foolbox 3.3.4"
        )
    return held


@dataclass(frozen=True, kw_only=True)
class ImageNetSamples(ArrayTask):
    """ImageNet samples: twenty labelled photographs that the package foolbox ships; no download at run time.

    resize:        the shorter side is scaled to so many pixels (Pillow, antialiased, rounded to 8 bits)
    crop:          then the middle crop x crop pixels are taken
    interpolation: of the scaling: bilinear or bicubic

    Rows are RGB in [0, 1], values k/255, in the order of the file names (imagenet_00_243.jpg: number and label). The
    default is the preprocessing that EfficientNet-Lite0 was released with, under which it has 18 of the 20 right;
    256 and 224 with bilinear scaling, and 224 and 224 with either, give it 17. Two labels are the same class (jeep).
    Far too few for an accuracy; enough to see what an attack does to pictures.

    Raises MissingExtra without foolbox, BadInput where its images are not those of this version.
    """

    resize: int = 256
    crop: int = 224
    interpolation: Interpolation = "bicubic"

    name = "imagenet-samples"
    version = "1"
    split = "samples"
    classes = CLASSES
    defaults = TaskDefaults(model="efficientnet-lite0", threat_model="linf:eps=4/255")

    def __post_init__(self) -> None:
        check_sizes(self.resize, self.crop)

    @property
    def space(self) -> Box:
        return Box(0.0, 1.0, (3, self.crop, self.crop), levels=255)

    def load(self) -> Rows:
        held = _samples()
        x = torch.stack([decode(content, self.resize, self.crop, self.interpolation, name) for name, content in held])
        y = torch.tensor([int(Path(name).stem.split("_")[2]) for name, _ in held])
        return Rows(x, y, tuple(f"{self.name}/{name}" for name, _ in held))

    def class_names(self) -> tuple[str, ...]:
        return class_names()
