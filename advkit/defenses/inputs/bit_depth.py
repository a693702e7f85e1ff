"""Bit-depth reduction, the first of the feature squeezers (Xu et al., arXiv 1704.01155)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from advkit.core.checks import check
from advkit.defenses.inputs.base import InputDefense


@dataclass(frozen=True, kw_only=True)
class BitDepth(InputDefense):
    """Bit-depth reduction: rounds every value to 2**bits levels between 0 and 1 before the model sees it.

    The paper uses squeezers to detect attacks, by comparing answers with and without them; this is the squeezer alone,
    whose answer counts. Rounding has no derivative: the attacker's view takes the identity's.

    bits: per value, 1 to 16; inputs are taken to lie in [0, 1]
    """

    bits: int = 3

    def __post_init__(self) -> None:
        check(self, "bits", 1 <= self.bits <= 16, "a whole number from 1 to 16")

    def transform(self, x: Tensor) -> Tensor:
        """x on the grid of k / (2**bits - 1)."""
        steps: int = 2**self.bits - 1
        return (x * steps).round() / steps

    def backward(self, x: Tensor) -> Tensor:
        """x: rounding moves it little."""
        return x
