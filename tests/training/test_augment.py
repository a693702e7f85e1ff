"""crop-flip: every image is a shift and mirror of its own, drawn from its own stream."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from advkit.core.errors import BadInput
from advkit.core.rng import RowRng
from advkit.training.augment import AUGMENTATIONS, crop_flip

IDS = [str(i) for i in range(1500)]


def candidates(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    """Every shift and mirror of one image, by numpy alone."""
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)))
    found = {}
    for top in range(9):
        for left in range(9):
            cut = padded[:, top : top + image.shape[1], left : left + image.shape[2]]
            found[cut.tobytes()] = (top, left, False)
            found[np.ascontiguousarray(cut[:, :, ::-1]).tobytes()] = (top, left, True)
    return found


def test_images_are_uniform_shifts_and_mirrors() -> None:
    image = torch.rand(2, 6, 9) + 0.5
    x = image.expand(len(IDS), 2, 6, 9).clone()
    made = crop_flip(x, RowRng.from_ids(0, IDS))
    known = candidates(image.numpy())
    drawn = [known[row.numpy().tobytes()] for row in made]
    for axis in (0, 1):
        counts = Counter(each[axis] for each in drawn)
        assert set(counts) == set(range(9))
        assert sum((counts[i] - 1500 / 9) ** 2 / (1500 / 9) for i in range(9)) < 26.1  # chi-squared, 8 df, 0.999
    assert abs(sum(each[2] for each in drawn) - 750) < 3.3 * (1500 * 0.25) ** 0.5
    assert len(set(drawn)) > 150  # of 162: the three draws are independent


def test_a_row_does_not_depend_on_its_batch() -> None:
    x = torch.rand(20, 3, 7, 7)
    rng = RowRng.from_ids(0, IDS[:20])
    whole = crop_flip(x, rng)
    rows = torch.tensor([13, 2, 7])
    assert torch.equal(crop_flip(x[rows], rng.take(rows)), whole[rows])
    assert not torch.equal(crop_flip(x, rng.at("again")), whole)


def test_only_images() -> None:
    with pytest.raises(BadInput, match="augment=none"):
        crop_flip(torch.rand(3, 8), RowRng.from_ids(0, list("abc")))
    assert AUGMENTATIONS["none"] is None
