"""Events of dynamic vision sensors: a deterministic simulator, tasks made with it, and readers for recorded files.

A sensor pixel fires whenever the logarithm of its brightness has moved by a threshold since it last fired: ON (channel
1) upwards, OFF (channel 0) downwards. Rows are frames [T, 2, H, W] that hold 1 where anything fired (the representation
of arXiv 2503.03272; N-MNIST, whose sensor moves along a triangle in front of still images, is arXiv 1507.07629).
"""

from __future__ import annotations

import hashlib
import logging
import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.archives import archive_keys, read_archive
from advkit.core.errors import BadInput, MissingExtra, UsageError
from advkit.core.protocols import Data, OfFiles, Rng, TaskDefaults
from advkit.core.rng import RowRng
from advkit.core.spaces import Binary
from advkit.tasks.base import (
    ArrayTask,
    ClassificationTask,
    Rows,
    all_of,
    check_names,
    check_rows,
    data_folder,
    mark_of,
)
from advkit.tasks.digits import Digits
from advkit.tasks.fashion_mnist import FashionMNIST

log = logging.getLogger("advkit")

SLACK = 1e-6
"""Fraction of a threshold by which a difference may fall short and still fire: round-off must not decide."""

AT_ONCE = 1 << 21
"""Pixels simulated at a time."""

LARGEST = 1 << 30
"""Bytes that the arrays of one recording may have, unpacked."""


# The simulator


def path(u: Fraction, amplitude: float) -> tuple[float, float]:
    """Position (dy, dx) at the share u in [0, 1] of the way around the triangle (0, 0), (A, A/2), (0, A)."""
    corners = ((0.0, 0.0), (amplitude, amplitude / 2), (0.0, amplitude), (0.0, 0.0))
    leg = min(int(u * 3), 2)
    share = float(u * 3 - leg)
    (y0, x0), (y1, x1) = corners[leg], corners[leg + 1]
    return (1 - share) * y0 + share * y1, (1 - share) * x0 + share * x1


def shifted(images: Tensor, dy: float, dx: float) -> Tensor:
    """Images [N, H, W] moved by dy, dx >= 0 pixels down and right, with bilinear weights and zeros outside."""
    for axis, distance in ((1, dy), (2, dx)):
        whole = math.floor(distance)
        share = distance - whole
        near = _moved(images, whole, axis)
        images = near if share == 0 else (1 - share) * near + share * _moved(images, whole + 1, axis)
    return images


def _moved(images: Tensor, by: int, axis: int) -> Tensor:
    length = images.shape[axis]
    by = min(by, length)
    empty = torch.zeros_like(images.narrow(axis, 0, by))
    return torch.cat((empty, images.narrow(axis, 0, length - by)), axis)


def crossings(
    images: Tensor, steps: int, amplitude: float, pad: int, threshold: float | Tensor, floor: float
) -> Iterator[Tensor]:
    """Events of every step, long [N, H, W]: how many, positive for ON and negative for OFF.

    images: [N, H, W] in [0, 1]; threshold: a number, or one per pixel [N, H + 2 pad, W + 2 pad]
    """
    padded = torch.nn.functional.pad(images.double(), (pad, pad, pad, pad))
    first = torch.log(padded + floor)
    fired = torch.zeros(first.shape, dtype=torch.long)  # ON minus OFF so far: the reference without its round-off
    for step in range(1, steps + 1):
        moved = torch.log(shifted(padded, *path(Fraction(step, steps), amplitude)) + floor)
        change = moved - (first + threshold * fired)
        count = (change.abs() / threshold + SLACK).floor().long() * change.sign().long()
        fired += count
        yield count


def simulate_dvs(
    images: Tensor,
    frames: int,
    substeps: int = 4,
    *,
    amplitude: float = 3.0,
    pad: int = 3,
    threshold: float = 0.3,
    floor: float = 0.05,
    binary: bool = True,
    noise_rate: float = 0.0,
    jitter: float = 0.0,
    rng: Rng | None = None,
) -> Tensor:
    """Event frames, float [N, frames, 2, H + 2 pad, W + 2 pad], of a sensor that moves once around a triangle.

    images:     [N, H, W] or [N, 1, H, W] in [0, 1]
    frames:     T, frames per row; substeps: looks per frame
    amplitude:  side of the triangle in pixels, >= 0
    pad:        zeros around the image, in pixels
    threshold:  change of log brightness that fires
    floor:      brightness added before the logarithm
    binary:     1 where anything fired; False gives counts
    noise_rate: share of the silent bits that fire all the same, drawn per row (binary only)
    jitter:     relative standard deviation of the threshold from pixel to pixel, drawn per row
    rng:        streams of the rows, for noise and jitter

    Deterministic, computed in float64; a row does not depend on the others. Raises BadInput for images outside of
    [0, 1], UsageError for settings out of range.
    """
    if images.ndim == 4 and images.shape[1] == 1:
        images = images[:, 0]
    if images.ndim != 3:
        raise BadInput(f"images of shape {list(images.shape)}; expected grey images [N, H, W] or [N, 1, H, W]")
    if len(images) and not bool(((images >= 0) & (images <= 1)).all()):
        raise BadInput("images to be filmed have values outside [0, 1]; scale them first")
    if frames < 1 or substeps < 1 or pad < 0 or not amplitude >= 0 or not threshold > 0 or not floor > 0:
        raise UsageError(
            f"frames={frames}, substeps={substeps}, pad={pad}, amplitude={amplitude:g}, threshold={threshold:g}, "
            f"floor={floor:g}; frames and substeps are at least 1, threshold and floor positive, the others >= 0"
        )
    if not 0 <= noise_rate < 1 or not jitter >= 0:
        raise UsageError(f"noise_rate={noise_rate:g}, jitter={jitter:g}; expected a fraction below 1 and a number >= 0")
    if (noise_rate or jitter) and rng is None:
        raise UsageError("noise and jitter are drawn per sample: pass rng with a stream for every image")
    height, width = images.shape[1] + 2 * pad, images.shape[2] + 2 * pad
    made = torch.zeros(len(images), frames, 2, height, width, dtype=torch.float32)
    for rows in torch.split(torch.arange(len(images)), max(1, AT_ONCE // (height * width))):
        pixels: float | Tensor = threshold
        if jitter and rng is not None:
            like = torch.empty(len(rows), height, width, dtype=torch.float64)
            factor = 1 + jitter * rng.take(rows).at("jitter").normal(like)
            pixels = threshold * factor.clamp_min(0.1)
        part = made[rows[0] : rows[-1] + 1]
        for step, count in enumerate(crossings(images[rows], frames * substeps, amplitude, pad, pixels, floor)):
            part[:, step // substeps, 1] += count.clamp_min(0)
            part[:, step // substeps, 0] += (-count).clamp_min(0)
        if binary:
            part.clamp_max_(1)
            if noise_rate and rng is not None:
                part[rng.take(rows).at("noise").uniform(part) < noise_rate] = 1
    return made


@dataclass(frozen=True)
class Events:
    """A recording: one entry per event, in the order of time.

    t: microseconds (or any unit), [N]; x, y: column and row, long [N]; p: 1 for ON, 0 for OFF, long [N]
    """

    t: np.ndarray[Any, np.dtype[Any]]
    x: np.ndarray[Any, np.dtype[np.int64]]
    y: np.ndarray[Any, np.dtype[np.int64]]
    p: np.ndarray[Any, np.dtype[np.int64]]

    def __len__(self) -> int:
        return len(self.t)


def simulate_events(image: Tensor, steps: int = 40, *, duration: int = 300_000, **settings: Any) -> Events:
    """The simulator's raw events of one image [H, W], those of a step in the order of rows and columns.

    duration: microseconds of the whole way; settings: amplitude, pad, threshold, floor as in `simulate_dvs`
    """
    chosen = {"amplitude": 3.0, "pad": 3, "threshold": 0.3, "floor": 0.05, **settings}
    columns: list[list[np.ndarray[Any, np.dtype[np.int64]]]] = [[], [], [], []]
    for step, count in enumerate(crossings(image[None], steps, **chosen)):
        where = count[0].nonzero()
        times = count[0][where[:, 0], where[:, 1]]
        repeated = where.repeat_interleave(times.abs(), 0)
        sign = (times > 0).long().repeat_interleave(times.abs())
        stamp = np.full(len(repeated), (step + 1) * duration // steps, dtype=np.int64)
        for column, values in zip(
            columns, (stamp, repeated[:, 1].numpy(), repeated[:, 0].numpy(), sign.numpy()), strict=True
        ):
            column.append(values)
    return Events(*(np.concatenate(column) for column in columns))


# Recorded files


def read_nmnist(file: Path | str) -> Events:
    """Events of an N-MNIST .bin file: five bytes each; BadInput where it is damaged.

    Byte 0 is x, byte 1 is y, the top bit of byte 2 the polarity; the other 23 bits are the time in microseconds,
    big-endian. y = 240 marks an overflow of the clock: it stands for no event and adds 2**13 to every later time.
    """
    raw = _bytes(Path(file))
    if len(raw) % 5:
        raise BadInput(f"{file} holds {len(raw)} bytes; an N-MNIST recording has five per event: it is cut off")
    table = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 5).astype(np.int64)
    time = (table[:, 2] & 0x7F) << 16 | table[:, 3] << 8 | table[:, 4]
    overflow = table[:, 1] == 240
    time = time + (np.cumsum(overflow) << 13)
    kept = ~overflow
    return Events(time[kept], table[kept, 0], table[kept, 1], table[kept, 2] >> 7)


def read_events_npz(file: Path | str) -> Events:
    """Events of an .npz archive with arrays t, x, y, p of one length, in the order of t; p is 0/1, False/True or -1/1.

    Raises BadInput for other polarities and for coordinates that are no whole numbers: what they mean would be a guess.
    """
    held = _archive(Path(file))
    missing = [key for key in "txyp" if key not in held]
    if missing:
        raise BadInput(f"{file} has the keys {', '.join(held) or 'none'}; an archive of events has t, x, y and p")
    columns = {key: _column(held[key], f"{file}: {key}") for key in "txyp"}
    if len({len(column) for column in columns.values()}) > 1:
        raise BadInput(f"{file}: t, x, y and p differ in length")
    for key in "xy":
        if bool((columns[key] % 1 != 0).any()):
            raise BadInput(
                f"{file}: {key} holds values such as {columns[key][columns[key] % 1 != 0][0]:g}; coordinates are whole "
                "columns and rows of the sensor, from 0: undo the scaling"
            )
    polarities = np.unique(columns["p"])
    if not (np.isin(polarities, (0, 1)).all() or np.isin(polarities, (-1, 1)).all()):
        seen = ", ".join(f"{each:g}" for each in polarities[:4])
        raise BadInput(
            f"{file}: p holds {seen}{', ...' if len(polarities) > 4 else ''}; expected 1 for ON with 0 or -1 for OFF: "
            "write them so"
        )
    x, y = (columns[key].astype(np.int64) for key in "xy")
    return _in_order(Events(columns["t"], x, y, (columns["p"] > 0).astype(np.int64)))


def _column(values: Any, what: str) -> np.ndarray[Any, Any]:
    """One column of a recording: plain numbers, as many as there are events."""
    column = np.asarray(values)
    if column.dtype.kind not in "biuf":
        raise BadInput(f"{what} holds values of type {column.dtype}; expected numbers")
    if sum(length != 1 for length in column.shape) > 1:
        raise BadInput(f"{what} has the shape {list(column.shape)}; expected one value per event")
    column = column.reshape(-1)
    if column.dtype.kind == "f" and not bool(np.isfinite(column).all()):
        raise BadInput(f"{what} holds values that are not finite")
    if column.dtype.kind == "b" or (column.dtype.kind == "f" and column.dtype.itemsize < 8):
        column = column.astype(np.float64)
    elif column.dtype.kind in "iu":
        if column.dtype.itemsize == 8 and len(column) and int(column.max()) > np.iinfo(np.int64).max:
            raise BadInput(f"{what} holds {int(column.max())}, which is beyond 64-bit integers")
        column = column.astype(np.int64)
    if len(column) and max(abs(float(column.min())), abs(float(column.max()))) > 2.0**62:
        raise BadInput(f"{what} holds values beyond 2**62; the file is damaged")
    return column


def _in_order(events: Events) -> Events:
    """The events in the order of time; those of one moment stay as they stand."""
    if bool((events.t[1:] >= events.t[:-1]).all()):
        return events
    order = np.argsort(events.t, kind="stable")
    return Events(events.t[order], events.x[order], events.y[order], events.p[order])


def read_frames_npz(file: Path | str) -> Tensor:
    """Counts, float [T, 2, H, W], of an .npz archive with the array `frames` (how spikingjelly caches recordings)."""
    held = _archive(Path(file))
    if "frames" not in held:
        raise BadInput(f"{file} has the keys {', '.join(held) or 'none'}; an archive of frames has `frames`")
    frames = np.asarray(held["frames"])
    if frames.ndim != 4 or frames.shape[1] != 2:
        raise BadInput(f"{file}: frames of shape {list(frames.shape)}; expected [T, 2, H, W]")
    if frames.dtype.kind not in "biuf":
        raise BadInput(f"{file}: frames of type {frames.dtype}; expected counts of events")
    if frames.dtype.kind == "f" and not bool(np.isfinite(frames).all()):
        raise BadInput(f"{file}: frames hold values that are not finite")
    if bool((frames < 0).any()) or bool((frames % 1 != 0).any() if frames.dtype.kind == "f" else False):
        raise BadInput(f"{file}: frames hold values that are no counts of events: undo the scaling")
    return torch.from_numpy(np.ascontiguousarray(frames.astype(np.float32)))


def frames_by_number(events: Events, frames: int, height: int, width: int) -> Tensor:
    """Counts, float [frames, 2, height, width], each frame of as many events as the others.

    Frame j takes the events from j * (N // frames) on in the order of time, the last one all that are left. BadInput
    for events outside of the sensor.
    """
    events = _in_order(events)
    n = len(events)
    if n and (events.x.min() < 0 or events.y.min() < 0 or events.x.max() >= width or events.y.max() >= height):
        raise BadInput(
            f"events at columns {events.x.min()} to {events.x.max()} and rows {events.y.min()} to {events.y.max()} do "
            f"not fit a sensor of {height} rows and {width} columns: say height= and width="
        )
    share = n // frames
    frame = np.minimum(np.arange(n) // share, frames - 1) if share else np.full(n, frames - 1)
    flat = ((frame * 2 + events.p) * height + events.y) * width + events.x
    counts = np.bincount(flat, minlength=frames * 2 * height * width)
    return torch.from_numpy(counts.astype(np.float32)).reshape(frames, 2, height, width)


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file} can't be read ({error.strerror or error})") from error


def _archive(file: Path) -> dict[str, Any]:
    """The arrays of an .npz file; BadInput where it is none, or says that it holds more than it does."""
    return read_archive(file, LARGEST)


# Tasks


@dataclass(frozen=True, kw_only=True)
class Filmed(ArrayTask):
    """What the simulated tasks share; the rows are made when they are first asked for and kept in memory.

    frames, substeps, amplitude, pad, threshold, floor, noise_rate, jitter: as in `simulate_dvs`
    seed:  of noise and jitter; a row's own id does the rest
    split: "test" or "train"
    """

    side: ClassVar[int]
    """Of the filmed images, in pixels."""

    frames: int = 10
    substeps: int = 4
    amplitude: float = 3.0
    pad: int = 3
    threshold: float = 0.3
    floor: float = 0.05
    noise_rate: float = 0.0
    jitter: float = 0.0
    seed: int = 0
    split: Literal["test", "train"] = "test"

    classes = 10

    @abstractmethod
    def images(self) -> Rows:
        """Grey images [N, 1, H, W] of this split."""

    @abstractmethod
    def training_images(self) -> tuple[Tensor, Tensor] | None:
        """Grey images and labels to train on."""

    @property
    def space(self) -> Any:
        length = self.side + 2 * self.pad
        return Binary((self.frames, 2, length, length))

    def film(self, images: Tensor, ids: Sequence[str]) -> Tensor:
        """The frames of these images, which are known by these names."""
        drawn = self.noise_rate or self.jitter
        return simulate_dvs(
            images,
            self.frames,
            self.substeps,
            amplitude=self.amplitude,
            pad=self.pad,
            threshold=self.threshold,
            floor=self.floor,
            noise_rate=self.noise_rate,
            jitter=self.jitter,
            rng=RowRng.from_ids(self.seed, ids).at("dvs") if drawn else None,
        )

    def load(self) -> Rows:
        still = self.images()
        ids = tuple(f"{self.name}/{row.partition('/')[2]}" for row in still.ids)
        return Rows(self.film(still.x, ids), still.y, ids)

    def load_training(self) -> tuple[Tensor, Tensor] | None:
        found = self.training_images()
        if found is None:
            return None
        images, labels = found
        return self.film(images, [f"{self.name}/training/{row:05d}" for row in range(len(labels))]), labels


@dataclass(frozen=True, kw_only=True)
class FashionMNISTDVS(Filmed):
    """Fashion-MNIST-DVS, by a simulated event camera: [10, 2, 34, 34] bits, 23,120 a sample; the first 1,000 test
    images.

    split: "test", or "train" to attack training images (needs root)
    root:  folder of the published idx(.gz) files, needed for training and for more than 1,000 test samples. Default:
           ADVKIT_DATA/fashion-mnist where that exists
    train: training samples: the first so many of the file; they are held in memory, 92 kB each
    test:  test samples: the first so many of the file; 0 for all 10,000 where root is said, else the 1,000 embedded

    The other settings are the simulator's: frames, substeps, amplitude, pad, threshold, floor, noise_rate, jitter and
    their seed.
    """

    root: str = ""
    train: int = 6_000
    test: int = 0

    name = "fashion-mnist-dvs"
    side = 28
    defaults = TaskDefaults(model="snn:widths=12+24,down=stride,hidden=0", threat_model="flips", n=100)

    @property
    def trains_on_all(self) -> bool:
        return self.train == type(self).train

    @property
    def _still(self) -> FashionMNIST:
        return FashionMNIST(split=self.split, root=self.root, train=self.train, test=self.test)

    def images(self) -> Rows:
        return self._still.rows

    def training_images(self) -> tuple[Tensor, Tensor] | None:
        if data_folder(self.root, FashionMNIST.name) is None:
            return None
        return self._still.load_training()

    def class_names(self) -> tuple[str, ...]:
        return self._still.class_names()


@dataclass(frozen=True, kw_only=True)
class DigitsDVS(Filmed):
    """Digits-DVS, digits scaled to 16x16 before a simulated event camera: [8, 2, 20, 20] bits, 6,400 a sample.

    split: "test" (360 samples) or "train" (1,437)

    The other settings are the simulator's: frames, substeps, amplitude, pad, threshold, floor, noise_rate, jitter and
    their seed.
    """

    frames: int = 8
    amplitude: float = 2.0
    pad: int = 2
    threshold: float = 0.2

    name = "digits-dvs"
    side = 16
    defaults = TaskDefaults(model="snn:widths=16+32,down=stride,hidden=0", threat_model="flips", n=100)

    def images(self) -> Rows:
        still = Digits(split=self.split).rows
        return Rows(_doubled(still.x), still.y, still.ids)

    def training_images(self) -> tuple[Tensor, Tensor]:
        x, y = Digits().load_training()
        return _doubled(x), y


def _doubled(images: Tensor) -> Tensor:
    return torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=False)


SUFFIXES = (".bin", ".npz")


@dataclass(frozen=True, kw_only=True)
class EventFolder(ClassificationTask, OfFiles):
    """Event recordings in a folder of the user's: path/SPLIT/CLASS/*.bin (N-MNIST) or *.npz (events t, x, y, p, or
    frames).

    path:   the folder above the splits
    split:  sub-folder that is evaluated; "." where the classes lie in `path` itself
    frames: frames per sample; recordings are cut so that every frame holds as many events. Archives of frames must have
            that many already
    height: rows of the sensor (34 for N-MNIST, 128 for CIFAR10-DVS and DVS-Gesture)
    width:  its columns
    limit:  samples: the first so many in the order of the hashes of the file names; 0 for all
    train:  training samples from path/train, likewise

    A bit is 1 where at least one event fell. Classes are the sub-folders in alphabetical order (numbers by value);
    names that begin with . or __ are left out, and so are files of other types, with a warning. Files are read as they
    are needed. Raises UsageError for folders that are missing or empty, BadInput for damaged, empty or foreign files.
    """

    path: str
    split: str = "test"
    frames: int = 10
    height: int = 34
    width: int = 34
    limit: int = 0
    train: int = 0

    defaults = TaskDefaults(model="snn", threat_model="flips", n=100)

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1 or min(self.limit, self.train) < 0:
            raise UsageError(
                f"frames={self.frames}, height={self.height}, width={self.width}, limit={self.limit}, "
                f"train={self.train}; lengths are at least 1, numbers of samples not negative (0 takes all)"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        return Path(self.path).expanduser().resolve().name

    @property
    def space(self) -> Any:
        return Binary((self.frames, 2, self.height, self.width))

    def place(self) -> Path:
        """The folder above the splits."""
        place = Path(self.path).expanduser()
        if not place.is_dir():
            raise UsageError(f"there is no folder {self.path}; expected {self.path}/{self.split}/CLASS/*.bin or *.npz")
        return place

    @cached_property
    def _listing(self) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
        return self._listed(self.split, self.limit)

    def _listed(self, split: str, most: int) -> tuple[tuple[str, ...], list[tuple[Path, int]]]:
        """Class names, and files with their labels in the order of the hashes of their names."""
        root = self.place() / split
        if not root.is_dir():
            raise UsageError(f"there is no folder {root}; split= names a sub-folder of {self.path}")
        names = sorted((each.name for each in root.iterdir() if each.is_dir() and not _hidden(each)), key=_by_value)
        found = [[each for each in sorted((root / name).iterdir()) if not _hidden(each)] for name in names]
        files = [(file, label) for label, inside in enumerate(found) for file in inside if _recording(file)]
        if not files:
            raise UsageError(f"{root} holds no recording; expected {root}/CLASS/*.bin or *.npz")
        filled = {label for _, label in files}
        if empty := [name for label, name in enumerate(names) if label not in filled]:
            # its place in the order would shift the labels of the others
            raise UsageError(
                f"{root} has folders without a recording ({', '.join(empty)}), and every folder is a class: put their "
                "recordings (*.bin, *.npz) in, or take them away"
            )
        if left := [each for inside in found for each in inside if not _recording(each)]:
            kinds = sorted({"folders" if each.is_dir() else each.suffix or "no suffix" for each in left})
            log.warning(
                f"{root}: {len(left)} entries are left out ({', '.join(kinds)}; the first is "
                f"{left[0].relative_to(root)}); recordings are CLASS/*.bin and CLASS/*.npz"
            )
        check_names(file.relative_to(root) for file, _ in files)
        if most > len(files):
            raise UsageError(f"{most} samples were asked for, {root} has {len(files)} recordings; 0 takes all")
        files.sort(key=lambda each: hashlib.sha256(each[0].relative_to(root).as_posix().encode()).digest())
        return tuple(names), files[: most or None]

    @property
    def classes(self) -> int:  # type: ignore[override]
        return len(self._listing[0])

    def class_names(self) -> tuple[str, ...]:
        return self._listing[0]

    @cached_property
    def _ids(self) -> tuple[str, ...]:
        root = self.place() / self.split
        return tuple(f"{self.name}/{self.split}/{file.relative_to(root).as_posix()}" for file, _ in self._listing[1])

    @property
    def ids(self) -> tuple[str, ...]:
        return self._ids

    def decode(self, file: Path) -> Tensor:
        """The bits of one recording, float [frames, 2, height, width]; BadInput where it holds no event."""
        if file.suffix.lower() == ".bin":
            counts = frames_by_number(read_nmnist(file), self.frames, self.height, self.width)
        elif "frames" in archive_keys(file):
            counts = read_frames_npz(file)
            if tuple(counts.shape) != self.space.shape:
                raise BadInput(
                    f"{file}: frames of shape {list(counts.shape)}; this task has {list(self.space.shape)}: say "
                    "frames=, height= and width="
                )
        else:
            counts = frames_by_number(read_events_npz(file), self.frames, self.height, self.width)
        bits = (counts >= 1).float()
        if not bool(bits.any()):
            raise BadInput(f"{file} holds no event; take the empty recording away")
        return bits

    @override
    def look(self, n: int) -> None:
        all_of(self.decode, [file for file, _ in self._listing[1][:n]])

    @override
    def marks(self, n: int) -> dict[str, str]:
        samples = self._listing[1][:n]
        return {row: mark_of(_bytes(file), label) for row, (file, label) in zip(self.ids[:n], samples, strict=True)}

    def fetch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = [self._listing[1][row] for row in rows]
        return torch.stack([self.decode(file) for file, _ in chosen]), torch.tensor([label for _, label in chosen])

    @cached_property
    def _training(self) -> Data | None:
        if self.split == "." or not (self.place() / "train").is_dir():
            return None
        names, files = self._listed("train", self.train)
        if names != self._listing[0]:
            raise BadInput(f"{self.path}: the train and {self.split} folders differ in their classes (sub-folders)")
        x = torch.stack([self.decode(file) for file, _ in files])
        y = torch.tensor([label for _, label in files])
        check_rows(x, y, self.classes, self.space, f"{self.name} training set")
        return Data(x=x, y=y, space=self.space, classes=self.classes, name=f"{self.name}/train")

    def training(self) -> Data | None:
        return self._training

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(f"{self.frames}|{self.height}|{self.width}|".encode())
        for file, label in self._listing[1]:
            content = _bytes(file)
            digest.update(len(content).to_bytes(8, "little") + content + label.to_bytes(8, "little"))
        digest.update("\n".join(self.ids).encode())
        return digest.hexdigest()

    def digest(self) -> str:
        """sha256 over the settings of the framing, the files as they lie on disk with their labels, then the ids."""
        return self._digest


def _hidden(path: Path) -> bool:
    """Whether a file or folder is somebody's helper, such as .ipynb_checkpoints, .DS_Store or __MACOSX."""
    return path.name.startswith((".", "__"))


def _recording(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _by_value(name: str) -> tuple[bool, int, str]:
    return (not name.isdigit(), int(name) if name.isdigit() else 0, name)


AEDAT = {
    "cifar10-dvs": ("spikingjelly.datasets.cifar10_dvs", "CIFAR10DVS", False),
    "dvs-gesture": ("spikingjelly.datasets.dvs128_gesture", "DVS128Gesture", True),
}


def decode_aedat(dataset: str, root: str, frames: int) -> Path:
    """The folder of frames that spikingjelly makes, once, of the AEDAT recordings of a data set below `root`.

    dataset: "cifar10-dvs" or "dvs-gesture". Point `events:path=FOLDER,height=128,width=128` at what comes back; in that
    of cifar10-dvs the classes lie in the folder itself (split=.).

    Raises UsageError for an unknown data set, MissingExtra without spikingjelly.
    """
    if dataset not in AEDAT:
        raise UsageError(f"dataset {dataset!r}; expected {' or '.join(AEDAT)}")
    module, name, splits = AEDAT[dataset]
    folder = Path(root).expanduser() / f"frames_number_{frames}_split_by_number"
    if folder.is_dir():
        return folder
    try:
        import importlib

        maker = getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise MissingExtra(
            f"AEDAT recordings are decoded by spikingjelly, which is not installed ({error}); install "
            "advkit[spiking], or name a folder of .npz files with events:path=FOLDER"
        ) from error
    for train in (True, False) if splits else (None,):
        said = {} if train is None else {"train": train}
        maker(str(Path(root).expanduser()), data_type="frame", frames_number=frames, split_by="number", **said)
    return folder
