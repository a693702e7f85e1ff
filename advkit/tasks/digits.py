"""Handwritten digits of 8x8 pixels (Alpaydin & Kaynak, 1998, UCI), as scikit-learn ships them: no download at all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advkit.core.protocols import TaskDefaults
from advkit.core.spaces import Box
from advkit.tasks.base import ImbalancedTask, Rows, by_hash

TRAIN = 1_437


@cache
def _shuffled() -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """x in [0, 1], y and each row's place in scikit-learn's file, in the order of the hashes of these places."""
    images, labels = _held()
    order = by_hash([f"digits/{row}" for row in range(len(labels))])
    x = torch.from_numpy(images[order]).float().unsqueeze(1) / 16
    return x, torch.from_numpy(labels[order]).long(), tuple(order)


def _held() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Images (1797, 8, 8) with levels 0 to 16, and labels, as `sklearn.datasets.load_digits` gives them.

    Its file is read where it lies: importing scikit-learn for it costs more than a small evaluation. Where the file is
    not at its place, scikit-learn is asked.
    """
    package = find_spec("sklearn")
    for folder in (package.submodule_search_locations or ()) if package else ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            table = np.loadtxt(file, delimiter=",")
            if table.shape == (1_797, 65):
                return table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    from sklearn.datasets import load_digits

    held = load_digits()
    return held.images, held.target


@dataclass(frozen=True, kw_only=True)
class Digits(ImbalancedTask):
    """Handwritten digits: ten classes, 8x8 grey images with 17 levels; 1,437 to train on and 360 to test.

    split: "test" or "train"

    The file is grouped by writer, so samples are shuffled: in the order of sha256("digits/PLACE"), the first 1,437 are
    the training set. An id names the sample's position in scikit-learn's file.
    """

    split: Literal["test", "train"] = "test"

    name = "digits"
    classes = 10
    defaults = TaskDefaults(model="mlp:hidden=64", threat_model="linf:eps=0.2")

    @property
    def space(self) -> Box:
        return Box(0.0, 1.0, (1, 8, 8))

    def load(self) -> Rows:
        x, y, places = _shuffled()
        rows = self.kept(y[:TRAIN]) if self.split == "train" else torch.arange(TRAIN, len(y))
        ids = tuple(f"digits/{self.split}/{places[row]:05d}" for row in rows.tolist())
        return Rows(x[rows], y[rows], ids)

    def load_training(self) -> tuple[Tensor, Tensor]:
        x, y, _ = _shuffled()
        rows = self.kept(y[:TRAIN])
        return x[rows], y[rows]
