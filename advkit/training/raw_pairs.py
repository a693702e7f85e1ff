"""Pairs of RAW planes and RGB images to train on: photographs, camera RAW files, paired data sets.

A pair is seven planes [7, H, W] in [0, 1]: the sRGB image, then R, G, G, B of a mosaic of twice its height and width.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from advkit.core.errors import BadInput, MissingExtra, UsageError
from advkit.core.protocols import Data, Rng
from advkit.core.spaces import Box
from advkit.core.text import first_line
from advkit.models import raw
from advkit.tasks.folder import EXTENSIONS, FORMATS, PIXELS, SPARSE

log = logging.getLogger("advkit")

SHIPPED = {
    "skimage/data": (
        "astronaut.png",
        "chelsea.png",
        "coffee.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "sklearn/datasets/images": ("china.jpg", "flower.jpg"),
}
"""Colour photographs inside installed packages; scikit-learn's are always there, scikit-image's where it is."""
CAMERA = (".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".pef", ".raf", ".srw")
"""Endings of camera RAW files that are looked for."""
ZURICH_RAW, ZURICH_RGB = "huawei_raw", "canon"
ZURICH_WHITE = 1020.0
GAIN_SPREAD = 0.1
MEMORY = 2**30
"""Bytes of decoded images that are kept for further crops."""
EXPOSURES = (0.7, 1.1)


# Files


def read_rgb(path: Path) -> Tensor:
    """An 8-bit image file as float [3, H, W] of values k/255; BadInput where it can't be read."""
    from PIL import Image

    try:
        content = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(BytesIO(content), formats=FORMATS)
        with image:
            if image.width * image.height > max(PIXELS, SPARSE * len(content)):
                raise ValueError(f"it declares {image.width} x {image.height} pixels in {len(content):,} bytes")
            if image.mode[0] in "IF":
                raise ValueError(f"mode {image.mode}, more than 8 bits per value: save it with 8 bits")
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
    except Exception as error:  # decoders raise nearly anything on a damaged file
        raise BadInput(f"{path} is no readable image ({first_line(error)}); repair or remove it") from error
    return pixels.permute(2, 0, 1).float().div_(255)


@dataclass(frozen=True)
class CameraRaw:
    """What a camera RAW file holds, cut so that the pattern is RGGB and the size even.

    planes: [4, H, W] linear in [0, 1]: black level taken off, divided by what is left of the white level
    rgb:    [3, H, W] sRGB in [0, 1], developed by LibRaw with the camera's white balance, at half the sensor's size
    black, white, pattern: as the file says
    """

    planes: Tensor
    rgb: Tensor
    black: tuple[float, ...]
    white: float
    pattern: str


def read_camera_raw(path: Path, black: float | None = None) -> CameraRaw:
    """A camera RAW file with a Bayer sensor (DNG and whatever else LibRaw reads).

    black: black level in the sensor's units; None takes the file's

    Raises MissingExtra without rawpy, BadInput for a file that can't be read, another pattern than a Bayer one, and a
    file that says no black level though its darkest pixel is above 0.
    """
    try:
        import rawpy
    except ImportError as error:
        raise MissingExtra(
            f"{path} is a camera RAW file, which the package rawpy reads: pip install 'advkit[raw]' brings it"
        ) from error
    try:
        content = path.read_bytes()
        with rawpy.imread(BytesIO(content)) as held:
            pattern = _pattern_of(held, path)
            values = np.array(held.raw_image_visible, dtype=np.float32)
            levels = [float(level) for level in held.black_level_per_channel]
            white = float(held.white_level)
            cell = np.array(held.raw_pattern)
            seen = held.postprocess(
                output_bps=16, use_camera_wb=True, no_auto_bright=True, user_flip=0, gamma=(2.4, 12.92)
            )
    except (rawpy.LibRawError, OSError, ValueError, TypeError) as error:
        told = error.args[0] if error.args else error  # LibRaw's messages are bytes
        said = told.decode("utf-8", "replace") if isinstance(told, bytes) else first_line(error)
        raise BadInput(f"{path} is no readable camera RAW file ({said}); repair or remove it") from error
    if black is not None:
        levels = [black] * 4
    elif not any(levels) and values.min() > 0:
        raise BadInput(
            f"{path} says no black level, and its darkest pixel is {values.min():g} of {white:g}: give black=..., or "
            "black=0 where nothing is to be taken off"
        )
    if not max(levels) < white:
        raise BadInput(f"{path} has black level {max(levels):g} and white level {white:g}; expected black below white")
    per_pixel = torch.tensor(levels)[torch.from_numpy(cell).long()]  # [2, 2]
    tall, wide = values.shape
    floor = per_pixel.repeat(-(-tall // 2), -(-wide // 2))[:tall, :wide]
    linear = ((torch.from_numpy(values) - floor) / (white - floor)).clamp(0, 1)
    rgb = torch.from_numpy(seen.astype(np.float32)).permute(2, 0, 1) / 65535
    down, right = divmod(pattern.index("R"), 2)  # the first red pixel
    tall, wide = (tall - down) // 2 * 2, (wide - right) // 2 * 2
    cut = (slice(down, down + tall), slice(right, right + wide))
    planes = raw.pack(linear[cut][None])[0]
    return CameraRaw(planes, F.avg_pool2d(rgb[(slice(None), *cut)][None], 2)[0], tuple(levels), white, pattern)


def _pattern_of(held: Any, path: Path) -> str:
    cell, letters = held.raw_pattern, held.color_desc.decode("ascii", "replace")
    if cell is None or cell.shape != (2, 2):
        size = "none" if cell is None else f"one of {cell.shape[0]} x {cell.shape[1]} pixels"
        raise BadInput(f"{path} has no Bayer pattern (colours {letters}, pattern {size}); expected one of 2 x 2 pixels")
    pattern = "".join(letters[index] for index in np.array(cell).flatten())
    if pattern not in raw.PATTERNS:
        raise BadInput(f"{path} has the pattern {pattern}; expected one of {', '.join(raw.PATTERNS)}")
    return pattern


# Sources: each cuts a pair of crops at random


Cut = Callable[[torch.Generator, int], Tensor]


class _Decoded:
    """Files as they were read, the last ones in memory: a data set of RAW pairs does not fit."""

    def __init__(self, limit: int = MEMORY) -> None:
        self.limit = limit
        self._held: dict[Path, Tensor] = {}

    def get(self, path: Path, read: Callable[[Path], Tensor]) -> Tensor:
        """What `read` makes of a file."""
        if path not in self._held:
            found = read(path)
            while self._held and self._bytes() + found.nbytes > self.limit:
                del self._held[next(iter(self._held))]
            self._held[path] = found
        return self._held[path]

    def _bytes(self) -> int:
        return sum(each.nbytes for each in self._held.values())


@dataclass(frozen=True)
class _File:
    """A file that pairs are cut from, read when it is asked for.

    read: its content: a photograph [3, H, W], or a measured pair [7, H/2, W/2]
    """

    path: Path
    read: Callable[[Path], Tensor]
    decoded: _Decoded

    def __call__(self, generator: torch.Generator, crop: int) -> Tensor:
        content = self.decoded.get(self.path, self.read)
        measured = content.shape[0] == 7
        size = [int(side) * (2 if measured else 1) for side in content.shape[1:]]
        if min(size) < crop:
            raise BadInput(f"{self.path} has {size[0]} x {size[1]} pixels; expected at least {crop} x {crop}")
        return (_measured_pair if measured else synthetic_pair)(content, generator, crop)


def _whole(generator: torch.Generator, below: int) -> int:
    return int(torch.randint(below, (), generator=generator))


def _between(generator: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def synthetic_pair(image: Tensor, generator: torch.Generator, crop: int) -> Tensor:
    """A pair from a crop of an sRGB image: mirrored or not, another exposure, and the RAW by unprocessing.

    image: [3, H, W]; crop: the mosaic's height and width. The white balance varies by 10 % around the pipeline's.
    """
    top, left = (_whole(generator, size - crop + 1) for size in image.shape[1:])
    cut = image[:, top : top + crop, left : left + crop][None]
    if _whole(generator, 2):
        cut = cut.flip(-1)
    exposed = raw.to_srgb((raw.from_srgb(cut) * _between(generator, *EXPOSURES)).clamp(0, 1))
    gains = torch.tensor(raw.GAINS) * _between(generator, 1 - GAIN_SPREAD, 1 + GAIN_SPREAD, 3)
    planes = raw.unprocess(exposed, gains[None]).clamp(0, 1)
    return torch.cat((F.avg_pool2d(exposed, 2), planes), 1)[0]


def _measured_pair(pair: Tensor, generator: torch.Generator, crop: int) -> Tensor:
    """A crop of a pair that was measured."""
    top, left = (_whole(generator, size - crop // 2 + 1) for size in pair.shape[1:])
    return pair[:, top : top + crop // 2, left : left + crop // 2]


def shipped_photographs() -> list[Path]:
    """Colour photographs that installed packages bring along."""
    found = []
    for place, names in SHIPPED.items():
        package, _, below = place.partition("/")
        spec = importlib.util.find_spec(package)  # where it is, without importing it
        for folder in () if spec is None else spec.submodule_search_locations or ():
            found += [Path(folder) / below / name for name in names if (Path(folder) / below / name).is_file()]
    return found


def _zurich(folder: Path) -> Path | None:
    """The folder that holds the two halves of a data set in the layout of Zurich RAW-to-RGB."""
    for place in (folder, folder / "train"):
        if (place / ZURICH_RAW).is_dir() and (place / ZURICH_RGB).is_dir():
            return place
    return None


def read_zurich(mosaic: Path, image: Path) -> Tensor:
    """A pair of Zurich RAW-to-RGB (arXiv 2002.05509): a PNG with a 10-bit RGGB mosaic and a JPEG of the same size.

    The mosaic is divided by 1020, as in the released code; the image is halved, so that both share a grid.
    """
    from PIL import Image

    try:
        with Image.open(mosaic, formats=("PNG",)) as held:
            if held.mode not in ("I;16", "I", "L"):
                raise ValueError(f"mode {held.mode}; expected one channel of 16 bits")
            values = torch.from_numpy(np.array(held).astype(np.float32))
    except Exception as error:
        raise BadInput(f"{mosaic} is no readable mosaic ({first_line(error)}); repair or remove it") from error
    rgb = read_rgb(image)
    if values.shape != rgb.shape[1:] or values.shape[0] % 2 or values.shape[1] % 2:
        raise BadInput(
            f"{mosaic} is {list(values.shape)} and {image.name} {list(rgb.shape[1:])}; expected one size, even"
        )
    planes = raw.pack((values / ZURICH_WHITE).clamp(0, 1)[None])
    return torch.cat((F.avg_pool2d(rgb[None], 2), planes), 1)[0]


def sources(images: str | Path = "", crop: int = 96, black: float | None = None) -> list[tuple[str, Cut]]:
    """Names of what there is to cut pairs from, each with a function that cuts one.

    images: "" for the photographs of installed packages; or a folder: of image files, of camera RAW files, or both,
            sub-folders included; or Zurich RAW-to-RGB's (huawei_raw/*.png beside canon/*.jpg, also below train/)
    crop:   the mosaic's height and width; smaller images are left out, and a warning says so
    black:  see `read_camera_raw`

    Raises UsageError where there is nothing to train on.
    """
    decoded = _Decoded()
    if not images:
        return [(path.name, _File(path, read_rgb, decoded)) for path in shipped_photographs()]
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise UsageError(f"there is no folder {images}; images= names a folder of photographs or camera RAW files")
    paired = _zurich(folder)
    if paired is not None:
        return [(path.name, _File(path, _with_partner, decoded)) for path in _mosaics(paired)]
    held = list(_files(folder, black, decoded))
    fit = [(name, cut) for name, size, cut in held if min(size) >= crop]
    if len(fit) < len(held):
        log.warning("%s: %d of %d images are smaller than %d pixels", folder, len(held) - len(fit), len(held), crop)
    if not fit:
        kinds = ", ".join((*EXTENSIONS[:3], *CAMERA[:2]))
        raise UsageError(
            f"{images} holds no image of at least {crop} x {crop} pixels; expected files such as {kinds}, or the "
            f"folders {ZURICH_RAW} and {ZURICH_RGB} of Zurich RAW-to-RGB"
        )
    return fit


def _partner(mosaic: Path) -> Path:
    return mosaic.parent.parent / ZURICH_RGB / f"{mosaic.stem}.jpg"


def _with_partner(mosaic: Path) -> Tensor:
    return read_zurich(mosaic, _partner(mosaic))


def _mosaics(folder: Path) -> list[Path]:
    """The mosaics of a data set, each of which has an image."""
    found = sorted((folder / ZURICH_RAW).glob("*.png"))
    if not found:
        raise UsageError(f"{folder / ZURICH_RAW} holds no PNG files; expected a mosaic for every image")
    for path in found:
        if not _partner(path).is_file():
            raise BadInput(f"{path} has no partner {_partner(path)}; expected one image for every mosaic")
    return found


def _files(folder: Path, black: float | None, decoded: _Decoded) -> Iterator[tuple[str, Sequence[int], Cut]]:
    """Names, sensor sizes and cuts of all that a folder holds; camera files are read once, images only their size."""
    from PIL import Image

    for path in sorted(each for each in folder.rglob("*") if each.is_file() and not each.name.startswith(".")):
        if path.suffix.lower() in CAMERA:
            shot = _File(path, partial(_camera_pair, black=black), decoded)
            yield path.name, [2 * int(size) for size in decoded.get(path, shot.read).shape[1:]], shot
        elif path.suffix.lower() in EXTENSIONS:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                    with Image.open(path, formats=FORMATS) as image:
                        size = image.size
            except Exception as error:  # decoders raise nearly anything on a damaged file
                said = f"{path} is no readable image ({first_line(error)}); repair or remove it"
                raise BadInput(said) from error
            yield path.name, size, _File(path, read_rgb, decoded)


def _camera_pair(path: Path, black: float | None) -> Tensor:
    shot = read_camera_raw(path, black)
    return torch.cat((shot.rgb, shot.planes))


def pairs(
    rng: Rng,
    images: str | Path = "",
    crops: int = 192,
    crop: int = 96,
    black: float | None = None,
) -> Data:
    """Training pairs [crops, 7, crop/2, crop/2], an equal share from every image; labels are all 0.

    Of more images than crops those are taken that lie evenly in the order of their names.
    """
    held = sources(images, crop, black)
    generator = rng.at("pairs").generator()
    taken = [number * len(held) // crops if len(held) > crops else number % len(held) for number in range(crops)]
    cut = torch.stack([held[place][1](generator, crop) for place in taken])
    space = Box(0.0, 1.0, tuple(cut.shape[1:]))
    return Data(cut, torch.zeros(crops, dtype=torch.long), space, 1, name="RAW pairs")
