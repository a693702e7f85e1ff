"""Defenses that change the input before the model sees it.

Writing one takes a `transform` and a word on how it may be differentiated:

    @dataclass(frozen=True, kw_only=True)
    class Jpeg(InputDefense):
        quality: int = 75
        def transform(self, x): return jpeg(x, self.quality)
        def backward(self, x): return x
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from advkit.core.protocols import Data, Rng
from advkit.models.views import Preprocessed


@runtime_checkable
class Draws(Protocol):
    """A random transformation that says how many draws the attacker's view averages."""

    @property
    @abstractmethod
    def draws(self) -> int:
        """At least 1."""


@dataclass(frozen=True, kw_only=True)
class InputDefense(ABC):
    """An input transformation in front of any model; trains nothing.

    Subclasses say how an adaptive attacker gets through: a `backward` of their own stands for the transformation's
    derivative (BPDA); `randomized`, with a field or class variable `draws`, makes the attacker's view an average (EOT).
    """

    needs_data: ClassVar[bool] = False
    claims: ClassVar[str] = ""
    randomized: ClassVar[bool] = False

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """Rows [B, ...] as the model gets them; every row by itself."""

    def backward(self, x: Tensor) -> Tensor:
        """What is differentiated in place of `transform`: itself, where its own derivative is of use."""
        return self.transform(x)

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Preprocessed:
        """The model behind the transformation."""
        from advkit.defenses import DEFENSES

        return Preprocessed(
            model,
            self.transform,
            backward=None if type(self).backward is InputDefense.backward else self.backward,
            randomized=self.randomized,
            draws=self.draws if isinstance(self, Draws) else 1,
            label=DEFENSES.label(self),
        )
