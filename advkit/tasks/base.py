"""Classification tasks: rows in a fixed order, with ids and a hash of every byte; bad data is refused at once."""

from __future__ import annotations

import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import fraction
from advkit.core.errors import BadInput, UsageError
from advkit.core.protocols import Batch, Data, Hashed, KnowsIds, TaskDefaults
from advkit.core.spaces import Box

DATA_VARIABLE = "ADVKIT_DATA"


def data_folder(root: str, name: str) -> Path | None:
    """The folder that holds a data set: the one the user names, else ADVKIT_DATA/name where that exists, else None.

    Raises UsageError where the user names a folder that does not exist.
    """
    if root:
        folder = Path(root).expanduser()
        if not folder.is_dir():
            raise UsageError(f"there is no folder {root}; root= names the folder that holds the {name} files")
        return folder
    default = os.environ.get(DATA_VARIABLE, "")
    folder = Path(default).expanduser() / name
    return folder if default and folder.is_dir() else None


def raw_bytes(tensor: Tensor) -> bytes:
    """The little-endian bytes of a tensor in row-major order."""
    array = tensor.detach().cpu().contiguous().numpy()
    return array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()


def check_rows(x: Tensor, y: Tensor, classes: int, space: Any, name: str) -> None:
    """BadInput unless there is one label in range per row and every row is finite and in the space."""
    if len(x) != len(y):
        raise BadInput(f"{name}: {len(x)} samples and {len(y)} labels; expected one label per sample")
    if len(x) == 0:
        raise BadInput(f"{name} has no samples")
    if y.dim() != 1 or y.is_floating_point() or y.is_complex():
        advice = ""
        if y.dim() == 2:
            advice = ": y.squeeze(1)" if y.shape[1] == 1 else ": one-hot labels become numbers by y.argmax(1)"
        raise BadInput(
            f"{name}: labels of shape {list(y.shape)}, type {y.dtype}; expected whole numbers, one per sample{advice}"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise BadInput(
            f"{name}: labels from {low} to {high} with {classes} classes; expected 0 to {classes - 1}"
            + (": subtract one from every label" if low == 1 and high == classes else "")
        )
    complaint = space.complaint(x)
    if complaint is not None:
        raise BadInput(f"{name}: {complaint}")


@dataclass(frozen=True)
class Rows:
    """A checked set of rows: x [N, ...] float, y long [N], ids of the same length."""

    x: Tensor
    y: Tensor
    ids: tuple[str, ...]


class ClassificationTask(Hashed, KnowsIds):
    """What every labelled task shares; a subclass says `rows` or, where rows do not fit in memory, `fetch`.

    The goal of a batch is Untargeted. Batches of any size and any `skip` hand out the same rows under the same ids.
    """

    name: str
    version: str = "1"
    split: str
    classes: int
    defaults: TaskDefaults

    @property
    @abstractmethod
    def space(self) -> Box:
        """Legal inputs."""

    @property
    @override
    @abstractmethod
    def ids(self) -> tuple[str, ...]:
        """One per row, in order."""

    @abstractmethod
    def fetch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x and y of these rows."""

    @abstractmethod
    def training(self) -> Data | None:
        """The training set, or None where there is none at hand."""

    @override
    @abstractmethod
    def digest(self) -> str:
        """sha256 of the rows, labels and ids."""

    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels."""

    @property
    def trains_on_all(self) -> bool:
        """Whether the training set is the one of the task's defaults, which the zoo's models were trained on."""
        return True

    @property
    def counts_labels(self) -> bool:
        """Whether `classes` is no more than what the labels show: a model may then know of more."""
        return False

    def with_classes(self, classes: int) -> Self:
        """The same rows of a task with more classes; only where `counts_labels`."""
        raise UsageError(f"the task {self.name} has {self.classes} classes, not {classes}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row."""
        shape = self.space.shape
        return tuple(self.fetch([0])[0].shape[1:]) if shape is None else tuple(shape)

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int, skip: Container[str] = (), n: int | None = None) -> Iterator[Batch]:
        """The first n rows (all by default) in order, without those in skip."""
        from advkit.threat_models.goals.untargeted import Untargeted

        if size < 1:
            raise UsageError(f"a batch holds at least one sample, got size={size}")
        if n is not None and not 1 <= n <= len(self):
            raise UsageError(f"{self.name} has {len(self)} samples in its {self.split} split, n={n} were asked for")
        ids = self.ids
        wanted = [row for row in range(len(ids) if n is None else n) if ids[row] not in skip]
        for start in range(0, len(wanted), size):
            rows = wanted[start : start + size]
            x, y = self.fetch(rows)
            yield Batch(ids=tuple(ids[row] for row in rows), x=x, goal=Untargeted(labels=y), labels=y)


class ArrayTask(ClassificationTask):
    """A task over x, y and ids in memory; a subclass says `load` and, where it has one, `load_training`."""

    @abstractmethod
    def load(self) -> Rows:
        """The rows of this split; called once."""

    def load_training(self) -> tuple[Tensor, Tensor] | None:
        """x and y of the training set; called once."""
        return None

    @cached_property
    def rows(self) -> Rows:
        """The rows, loaded and checked at first use."""
        rows = self.load()
        check_rows(rows.x, rows.y, self.classes, self.space, self.name)
        if len(rows.ids) != len(rows.y) or len(set(rows.ids)) != len(rows.ids):
            raise BadInput(
                f"{self.name}: {len(rows.ids)} ids for {len(rows.y)} samples; expected one each, all different"
            )
        return rows

    @property
    def ids(self) -> tuple[str, ...]:
        return self.rows.ids

    def fetch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(list(rows), dtype=torch.long)
        return self.rows.x[index], self.rows.y[index]

    @cached_property
    def _training(self) -> Data | None:
        found = self.load_training()
        if found is None:
            return None
        x, y = found
        check_rows(x, y, self.classes, self.space, f"{self.name} training set")
        return Data(x=x, y=y, space=self.space, classes=self.classes, name=f"{self.name}/train")

    def training(self) -> Data | None:
        return self._training

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        digest.update(raw_bytes(self.rows.x))
        digest.update(raw_bytes(self.rows.y))
        digest.update("\n".join(self.rows.ids).encode())
        return digest.hexdigest()

    def digest(self) -> str:
        """sha256 over x bytes, then y bytes, then the ids joined by newlines."""
        return self._digest

    def class_names(self) -> tuple[str, ...]:
        return tuple(str(label) for label in range(self.classes))


ENDINGS = (1, 3, 5, 8, 9)


@dataclass(frozen=True, kw_only=True)
class ImbalancedTask(ArrayTask):
    """A task whose training set can be made imbalanced; a subclass applies `kept` where it loads training samples.

    imbalance:         share of their training samples that some classes keep, in (0, 1]; 1 keeps every sample. Test
                       samples are never dropped
    imbalance_classes: numbers of these classes, joined by +; by default all whose number ends in 1, 3, 5, 8 or 9

    Which samples are dropped: the training samples of one such class are numbered 1, 2, 3... in the order of the
    training set (after `train=` where there is one), and number i stays where floor(i * imbalance) is larger than
    floor((i - 1) * imbalance). At 0.2 that is every fifth. Of n samples floor(n * imbalance) stay. Ids do not change.

    Raises UsageError for values out of range and, when the training set is loaded, where a class would be absent.
    """

    imbalance: float = 1.0
    imbalance_classes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        fraction(self, "imbalance", what="share")
        named = self.imbalance_classes
        if named and self.imbalance == 1:
            raise UsageError(
                "imbalance_classes names classes that keep a share of their training samples; say which: imbalance=0.2"
            )
        if len(set(named)) < len(named) or any(not 0 <= label < self.classes for label in named):
            raise UsageError(
                f"imbalance_classes is {'+'.join(map(str, named))}; expected different numbers from 0 to "
                f"{self.classes - 1}, joined by +"
            )

    @property
    def trains_on_all(self) -> bool:
        return self.imbalance == 1

    @property
    def thinned_classes(self) -> tuple[int, ...]:
        """The classes that keep a share of their training samples."""
        if self.imbalance == 1:
            return ()
        return self.imbalance_classes or tuple(c for c in range(self.classes) if c % 10 in ENDINGS)

    def kept(self, y: Tensor) -> Tensor:
        """Places, long, of the training samples that stay, in order; y long [N] has the labels of all.

        Raises UsageError where a class loses its last sample.
        """
        stays = torch.ones(len(y), dtype=torch.bool)
        share = Fraction(self.imbalance).limit_denominator(10**6)  # 0.29 is meant, not the float below it
        up, down = share.numerator, share.denominator
        for label in self.thinned_classes:
            rows = (y == label).nonzero().squeeze(1)
            chosen = [i * up // down > (i - 1) * up // down for i in range(1, len(rows) + 1)]
            if len(rows) and not any(chosen):
                raise UsageError(
                    f"imbalance={self.imbalance:g} leaves no training sample of class {label} of {self.name}, which "
                    f"has {len(rows)}; expected a share of at least 1/{len(rows)}"
                )
            stays[rows] = torch.tensor(chosen, dtype=torch.bool)
        return stays.nonzero().squeeze(1)


class Counted:
    """The field `classes` of a task: what was asked for, and where nothing was, what `count_classes` finds.

    A spec of the task names it only where it was asked for.
    """

    def __get__(self, task: Any, owner: type) -> int | None:
        if task is None:
            return None  # the field's default
        asked: int | None = vars(task).get("classes")
        return int(task.count_classes) if asked is None else asked

    def __set__(self, task: Any, asked: int | None) -> None:
        if asked is not None and asked < 1:
            raise UsageError(f"classes is {asked}; expected a whole number of at least 1")
        vars(task)["classes"] = asked


def default_ball(space: Any) -> str:
    """The usual radius 8/255 as a part of the box's width; empty where the box has no one width."""
    if not isinstance(space, Box) or not space.bounded:
        return ""
    low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in (space.low, space.high))
    widths = (high - low).flatten()
    if bool((widths != widths[0]).any()) or not float(widths[0]):
        return ""
    width = float(widths[0])
    return "linf:eps=8/255" if width == 1 else f"linf:eps={8 * width / 255:.6g}"


def mark_of(content: bytes, label: int) -> str:
    """A short hash of a row's file and label."""
    return hashlib.sha256(label.to_bytes(8, "little", signed=True) + content).hexdigest()[:16]


def all_of(act: Callable[[Path], object], files: Sequence[Path]) -> None:
    """Do it to every file, several at a time; what it raises first, in their order, is raised."""

    def done(file: Path) -> None:
        act(file)  # what it gives is not kept

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for _ in pool.map(done, files):
                pass
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def check_names(paths: Iterable[Path]) -> None:
    """BadInput where a file's name is no text: its sample could have no id."""
    for path in paths:
        if any("\ud800" <= letter <= "\udfff" for letter in path.as_posix()):
            raise BadInput(f"{path} has a name that is no UTF-8 text, and samples are known by their names: rename it")


def row_ids(name: str, split: str, n: int) -> tuple[str, ...]:
    """name/split/00017: the place in the file, five digits or more."""
    return tuple(f"{name}/{split}/{row:05d}" for row in range(n))


def by_hash(keys: Sequence[str]) -> list[int]:
    """A fixed shuffle: the order of the sha256 of each key, the same with every library and on every machine."""
    return sorted(range(len(keys)), key=lambda row: hashlib.sha256(keys[row].encode()).digest())
