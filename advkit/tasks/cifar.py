"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 32x32 colour images, read by torchvision from a folder of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from advkit.core.errors import UsageError
from advkit.core.protocols import TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import DATA_VARIABLE, ImbalancedTask, Rows, data_folder, row_ids


@dataclass(frozen=True, kw_only=True)
class _Cifar(ImbalancedTask):
    """What both share; a subclass says torchvision's class and archive.

    split:    "test" or "train"
    download: fetch it into root where it is missing
    train:    training samples: the first so many of the file; 0 for all
    """

    split: Literal["test", "train"] = "test"
    root: str = ""
    download: bool = False
    train: int = 0

    archive: ClassVar[str]
    folder: ClassVar[str]
    reader: ClassVar[str]

    @property
    def space(self) -> Box:
        return Box(0.0, 1.0, (3, 32, 32), levels=255)

    @property
    def trains_on_all(self) -> bool:
        return super().trains_on_all and not self.train

    def _read(self, train: bool) -> Any:
        import torchvision.datasets

        if self.download:
            if not self.root:
                raise UsageError(f"{self.name}: download=true needs root=FOLDER to download into")
            place: Path | None = Path(self.root).expanduser()
        else:
            place = data_folder(self.root, self.name)
        if place is None:
            raise UsageError(
                f"{self.name} does not ship with advkit: say root=FOLDER that holds {self.folder}/ (unpacked from "
                f"{self.archive}), set {DATA_VARIABLE} above a folder {self.name}, or say root=FOLDER,download=true"
            )
        try:
            # torchvision compares each file's checksum with the published one before it reads it
            return getattr(torchvision.datasets, self.reader)(str(place), train=train, download=self.download)
        except (RuntimeError, OSError) as error:
            raise UsageError(
                f"{place} holds no intact {self.name} ({error}); expected {self.folder}/ unpacked from {self.archive}, "
                "or say download=true"
            ) from error

    def _rows(self, train: bool) -> tuple[Tensor, Tensor, Tensor]:
        """x, y and their places in the file."""
        held, asked = self._read(train), self.train if train else 0
        if asked > len(held.targets):
            raise UsageError(f"train={asked} asks for more samples than the training file's {len(held.targets)}")
        y = torch.tensor(held.targets[: asked or len(held.targets)], dtype=torch.long)
        rows = self.kept(y) if train else torch.arange(len(y))
        x = torch.from_numpy(held.data[rows.numpy()]).permute(0, 3, 1, 2).contiguous().float().div_(255)
        return x, y[rows], rows

    def load(self) -> Rows:
        x, y, rows = self._rows(self.split == "train")
        ids = row_ids(self.name, self.split, int(rows[-1]) + 1)
        return Rows(x, y, tuple(ids[row] for row in rows.tolist()))

    def load_training(self) -> tuple[Tensor, Tensor]:
        x, y, _ = self._rows(True)
        return x, y

    def class_names(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self._read(False).classes)


@dataclass(frozen=True, kw_only=True)
class CIFAR10(_Cifar):
    """CIFAR-10: ten kinds of objects, 32x32 colour images; 50,000 to train on and 10,000 to test, from a folder.

    root: folder that holds cifar-10-batches-py/; default: ADVKIT_DATA/cifar10
    """

    name = "cifar10"
    classes = 10
    defaults = TaskDefaults(model="resnet18", threat_model="linf:eps=8/255", n=1_000)
    archive = "cifar-10-python.tar.gz"
    folder = "cifar-10-batches-py"
    reader = "CIFAR10"


@dataclass(frozen=True, kw_only=True)
class CIFAR100(_Cifar):
    """CIFAR-100: a hundred kinds of objects, 32x32 colour images; 50,000 to train on and 10,000 to test, from a folder.

    root: folder that holds cifar-100-python/; default: ADVKIT_DATA/cifar100
    """

    name = "cifar100"
    classes = 100
    defaults = TaskDefaults(model="resnet18", threat_model="linf:eps=8/255", n=1_000)
    archive = "cifar-100-python.tar.gz"
    folder = "cifar-100-python"
    reader = "CIFAR100"
