"""Small tasks for poisoning, whose samples are one pool that every trial splits anew: pairs of classes, and moons."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import at_least, check, not_negative
from advkit.core.errors import UsageError
from advkit.core.protocols import Pooled, TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import ArrayTask, Rows, by_hash
from advkit.tasks.digits import Digits
from advkit.tasks.fashion_mnist import FashionMNIST


@dataclass(frozen=True, kw_only=True)
class PoolTask(ArrayTask, Pooled):
    """A task over one pool; outside of poisoning half of it, in the order of the hashes of the ids, is to train on.

    split: which half the task's samples are, "test" or "train"
    """

    split: Literal["test", "train"] = "test"

    version = "1"

    @abstractmethod
    @override
    def pool(self) -> Rows:
        """All samples."""

    def _halves(self) -> tuple[list[int], list[int]]:
        order = by_hash(self.pool().ids)
        return sorted(order[: len(order) // 2]), sorted(order[len(order) // 2 :])

    def load(self) -> Rows:
        held, (train, test) = self.pool(), self._halves()
        rows = train if self.split == "train" else test
        return Rows(held.x[rows], held.y[rows], tuple(held.ids[row] for row in rows))

    def load_training(self) -> tuple[Tensor, Tensor]:
        held, (train, _) = self.pool(), self._halves()
        return held.x[train], held.y[train]


class Chosen:
    """The field `classes` of a task of some classes of another: which ones it was asked for, and how many they are.

    default: numbers of the classes where nobody says
    """

    def __init__(self, *default: int) -> None:
        self.default = default

    def __get__(self, task: Any, owner: type) -> Any:
        return self.default if task is None else len(vars(task)["classes"])

    def __set__(self, task: Any, asked: tuple[int, ...]) -> None:
        vars(task)["classes"] = tuple(asked)


class SomeClasses(PoolTask):
    """Some classes of a task of images, numbered from 0 in the order in which they are named.

    A subclass says `everything`: all samples of the other task, with ids, and their classes' names.
    """

    classes: tuple[int, ...]  # type: ignore[assignment]

    @property
    def chosen(self) -> tuple[int, ...]:
        """Numbers of the classes in the other task."""
        return tuple(vars(self)["classes"])

    @abstractmethod
    def everything(self) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
        """x, y and ids of all samples, and the names of all classes."""

    def _checked(self, classes: int) -> None:
        chosen = self.chosen
        if len(chosen) < 2 or len(set(chosen)) < len(chosen) or not all(0 <= c < classes for c in chosen):
            raise UsageError(
                f"classes is {'+'.join(map(str, chosen))}; expected two or more different numbers from 0 to "
                f"{classes - 1}, joined by +"
            )

    @cached_property
    def _pool(self) -> Rows:
        x, y, ids, _ = self.everything()
        chosen = torch.tensor(self.chosen)
        rows = torch.isin(y, chosen).nonzero().squeeze(1)
        labels = (y[rows, None] == chosen).long().argmax(1)
        return Rows(x[rows], labels, tuple(ids[row] for row in rows.tolist()))

    def pool(self) -> Rows:
        return self._pool

    def class_names(self) -> tuple[str, ...]:
        names = self.everything()[3]
        return tuple(names[c] for c in self.chosen)


@dataclass(frozen=True, kw_only=True)
class DigitsPair(SomeClasses):
    """Handwritten digits of a few classes (scikit-learn), as one pool: 1 and 7 by default, 361 samples of 8x8 pixels.

    classes: numbers of the digits, joined by +, two or more
    split:   the half that is evaluated, "test" or "train"
    """

    classes: tuple[int, ...] = Chosen(1, 7)  # type: ignore[assignment]

    name = "digits-pair"
    defaults = TaskDefaults(model="mlp:hidden=64", threat_model="label-flips:rate=0.1")

    def __post_init__(self) -> None:
        self._checked(10)

    @property
    def space(self) -> Box:
        return Box(0.0, 1.0, (1, 8, 8))

    @override
    def everything(self) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
        train, test = Digits(split="train"), Digits()
        x, y = torch.cat((train.rows.x, test.rows.x)), torch.cat((train.rows.y, test.rows.y))
        places = [int(row.rpartition("/")[2]) for row in (*train.ids, *test.ids)]
        order = torch.tensor(places).argsort()
        ids = tuple(f"{self.name}/{place:05d}" for place in sorted(places))
        return x[order], y[order], ids, tuple(map(str, range(10)))


@dataclass(frozen=True, kw_only=True)
class FashionMNISTPair(SomeClasses):
    """Fashion-MNIST of a few classes, as one pool: T-shirts (0) and shirts (6) by default, 28x28 grey images.

    classes: numbers of the classes, joined by +, two or more
    root:    folder of the published idx files, whose 60,000 training images are the pool; empty takes the 1,000 test
             images inside the package
    samples: the first so many of these classes; 0 for all
    size:    side of the images: 28, or 14, 7, 4, 2 where blocks are averaged
    split:   the half that is evaluated, "test" or "train"
    """

    classes: tuple[int, ...] = Chosen(0, 6)  # type: ignore[assignment]
    root: str = ""
    samples: int = 0
    size: int = 28

    name = "fashion-mnist-pair"
    defaults = TaskDefaults(model="cnn", threat_model="label-flips:rate=0.1")

    def __post_init__(self) -> None:
        self._checked(10)
        at_least(self, 0, "samples")
        _ = self._images

    @cached_property
    def _images(self) -> FashionMNIST:
        return FashionMNIST(split="train" if self.root else "test", root=self.root, size=self.size)

    @property
    def space(self) -> Box:
        return self._images.space

    @override
    def everything(self) -> tuple[Tensor, Tensor, tuple[str, ...], tuple[str, ...]]:
        held = self._images.rows
        return held.x, held.y, held.ids, self._images.class_names()

    @cached_property
    def _pool(self) -> Rows:
        held = super()._pool
        most = self.samples or len(held.y)
        if most > len(held.y):
            raise UsageError(f"samples={most} of these classes are asked for, and there are {len(held.y)}")
        return Rows(held.x[:most], held.y[:most], held.ids[:most])


@dataclass(frozen=True, kw_only=True)
class Moons(PoolTask):
    """Two moons (scikit-learn's make_moons): two interleaving half circles in the plane, each feature standardised.

    samples: of the pool, >= 4
    noise:   standard deviation of the Gaussian noise, >= 0, before the features are standardised
    seed:    of the pool, >= 0
    split:   the half that is evaluated, "test" or "train"
    """

    samples: int = 1000
    noise: float = 0.2
    seed: int = 0

    name = "moons"
    classes = 2
    defaults = TaskDefaults(model="mlp:hidden=64", threat_model="label-flips:rate=0.1")

    def __post_init__(self) -> None:
        at_least(self, 4, "samples")
        not_negative(self, "noise", what="standard deviation")
        check(self, "seed", 0 <= self.seed < 2**32, "a whole number from 0 to 2**32 - 1")

    @property
    def space(self) -> Box:
        return Box(float("-inf"), float("inf"), (2,))

    @cached_property
    def _pool(self) -> Rows:
        from sklearn.datasets import make_moons

        x, y = make_moons(self.samples, noise=self.noise, random_state=self.seed)
        x = (x - x.mean(0)) / x.std(0)
        ids = tuple(f"moons/{row:05d}" for row in range(self.samples))
        return Rows(torch.from_numpy(x).float(), torch.from_numpy(np.asarray(y)).long(), ids)

    def pool(self) -> Rows:
        return self._pool

    def class_names(self) -> tuple[str, ...]:
        return ("upper moon", "lower moon")
