"""Labels as people write them, texts or numbers, as numbers from 0; and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advkit.core.errors import BadInput

MOST = 1_000
"""Different texts that are taken for classes; what has more is no column of labels."""


def numbered(labels: Sequence[Any], what: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels as long numbers [n] from 0, and the name of each class, in the order of the numbers.

    Whole numbers are sorted by their value, everything else by its text. `names[number]` gives the label back.

    what: for messages. Raises BadInput for empty labels, and for more than 1,000 different ones
    """
    texts = [str(label).strip() for label in labels]
    if (lost := next((row for row, text in enumerate(texts) if not text), None)) is not None:
        raise BadInput(f"{what}: sample {lost + 1} has an empty label; expected a text or a number")
    different = sorted(set(texts))
    if len(different) > MOST:
        raise BadInput(f"{what} has {len(different):,} different labels; expected at most {MOST:,} classes")
    if all(_whole(text) for text in different):
        different.sort(key=int)
    place = {text: number for number, text in enumerate(different)}
    return torch.tensor([place[text] for text in texts], dtype=torch.long), tuple(different)


def _whole(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def are_texts(array: Any) -> bool:
    """Whether an array of labels holds texts."""
    return isinstance(array, np.ndarray) and array.dtype.kind in "US"


def as_texts(array: Any) -> list[str]:
    """The texts of an array of str or bytes, which are taken for UTF-8."""
    return [each.decode(errors="replace") if isinstance(each, bytes) else str(each) for each in array.ravel().tolist()]
