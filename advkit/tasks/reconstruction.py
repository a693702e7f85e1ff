"""Recover images from what is measured of them: the second task of arXiv 2203.14195, on images that are at hand."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from typing_extensions import override

from advkit.core.protocols import AnswersSamples, Batch, Data, Hashed, KnowsIds, OfKind, TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import ArrayTask
from advkit.tasks.digits import Digits
from advkit.tasks.fashion_mnist import FashionMNIST
from advkit.threat_models.goals.reconstruction import ReconstructionRule


class ReconstructionTask(AnswersSamples, Hashed, KnowsIds, OfKind):
    """The images of a labelled task, without labels: the right answer to an image is that image.

    There are no classes, and the samples are those of the labelled task under the same ids.
    """

    name: str
    version: str = "1"
    split: str
    classes: int = 0
    kind: ClassVar[str] = "reconstruction"
    defaults: TaskDefaults

    @property
    @abstractmethod
    def _images(self) -> ArrayTask:
        """The labelled task whose images these are."""

    @property
    def space(self) -> Box:
        return self._images.space

    @property
    @override
    def answer_shape(self) -> tuple[int, ...]:
        """That of an image."""
        return self._images.shape

    @property
    @override
    def ids(self) -> tuple[str, ...]:
        return self._images.ids

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, size: int, skip: Container[str] = (), n: int | None = None) -> Iterator[Batch]:
        """The first n images (all by default) in order, without those in skip."""
        rule = ReconstructionRule()
        for batch in self._images.batches(size, skip, n):
            yield replace(batch, goal=rule.about(batch.x), labels=None)

    def training(self) -> Data | None:
        """The labelled task's training images."""
        return self._training

    @cached_property
    def _training(self) -> Data | None:
        data = self._images.training()
        if data is None:
            return None
        nothing = torch.zeros(len(data), dtype=torch.long)
        return Data(data.x, nothing, data.space, 0, f"{self.name}/train", tuple(data.x.shape[1:]))

    @override
    def digest(self) -> str:
        """sha256 of the labelled task's digest under this task's name."""
        return hashlib.sha256(f"{self.kind}|{self._images.digest()}".encode()).hexdigest()

    def class_names(self) -> tuple[str, ...]:
        """None."""
        return ()


@dataclass(frozen=True, kw_only=True)
class DigitsReconstruction(ReconstructionTask):
    """Digits to be recovered from measurements: 8x8 grey images; 1,437 to train on and 360 to test.

    split: "test" or "train"

    What is measured is a setting of the model: reconstructor:measurements=16.
    """

    split: Literal["test", "train"] = "test"

    name = "digits-reconstruction"
    defaults = TaskDefaults(model="reconstructor", threat_model="l2:eps=0.5", goal="reconstruction")

    def __post_init__(self) -> None:
        _ = self._images

    @cached_property
    def _images(self) -> ArrayTask:
        return Digits(split=self.split)


@dataclass(frozen=True, kw_only=True)
class FashionMNISTReconstruction(ReconstructionTask):
    """Fashion-MNIST to be recovered from measurements: 28x28 grey images; the first 1,000 test images need no download.

    split: "test", or "train" to attack training images (needs root)
    root:  folder of the published idx(.gz) files; needed for training and for more than 1,000 test samples
    size:  side of the images: 28, or 14, 7, 4, 2 where blocks of 2x2 and more are averaged
    train: training samples: the first so many of the file; 0 for all 60,000
    test:  test samples: the first so many of the file; 0 for all 10,000 where root is said, else the 1,000 embedded

    What is measured is a setting of the model: reconstructor:measurements=196.
    """

    split: Literal["test", "train"] = "test"
    root: str = ""
    size: int = 28
    train: int = 0
    test: int = 0

    name = "fashion-mnist-reconstruction"
    defaults = TaskDefaults(model="reconstructor", threat_model="l2:eps=2", n=1_000, goal="reconstruction")

    def __post_init__(self) -> None:
        _ = self._images

    @cached_property
    def _images(self) -> ArrayTask:
        return FashionMNIST(split=self.split, root=self.root, size=self.size, train=self.train, test=self.test)
