"""Verdicts of a victim by sample, which tests of two victims on the same samples need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True, eq=False)
class Rows:
    """What became of each sample of a victim, for paired tests.

    ids:  of the samples, sorted
    bits: whether the sample counts in the score's numerator, bool [n]
    """

    ids: tuple[str, ...]
    bits: Bools = field(repr=False)

    @classmethod
    def of(cls, found: dict[str, bool]) -> Rows:
        """From id -> verdict."""
        ids = tuple(sorted(found))
        return cls(ids, np.array([found[each] for each in ids], dtype=bool))
