"""Threat models in which the attacker sets parameters and the harness renders the input: what they share.

Whether an image is some rotation of another one can only be answered by a search, with a tolerance that an attack may
use. So no image is handed in: candidates are parameters, what is admitted is a comparison of numbers, and the harness
renders what it judges.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.errors import UsageError
from advkit.core.protocols import Measures, Renders, Rng
from advkit.core.spaces import Box
from advkit.threat_models.capability import Capability
from advkit.threat_models.lp import row_max, usable, wide


def image_box(space: Any, name: str) -> Box:
    """The space, where it is a box of images [C, H, W] or does not say its shape; UsageError otherwise."""
    if not isinstance(space, Box):
        raise UsageError(f"{name} changes images and this model's space is {space!r}; choose another threat model")
    if space.shape is not None and len(space.shape) != 3:
        raise UsageError(
            f"{name} changes images [C, H, W] and this model's inputs have shape {space.shape}; choose another threat "
            "model such as linf:eps=0.1"
        )
    return space


def images_only(origin: Tensor, name: str) -> None:
    """UsageError unless these are images [B, C, H, W]."""
    if origin.ndim != 4:
        raise UsageError(
            f"{name} changes images [C, H, W] and these inputs have shape {tuple(origin.shape[1:])}; choose another "
            "threat model such as linf:eps=0.1"
        )


class NoRadius(UsageError, AttributeError):
    """An attack wants to know how far it may go, and parameters have limits of their own."""

    def __init__(self, name: str, made: str) -> None:
        super().__init__(
            f"{name} has no radius: parameters are set, within limits of their own. Use an attack that is made for it "
            f"({made}) or pgd, or a ball such as linf:eps=8/255"
        )


class Rendering(Capability, Renders, Measures):
    """A threat model whose candidates are parameters in the cube [-1, 1], in units of its limits; 0 changes nothing.

    A dataclass below it declares `access`, `queries` and `box`. Distances are the largest parameter; the figures in
    units that people use are in `measures`. It is a ball of parameters, so any attack that walks by `project`,
    `sample` and `steepest`, such as pgd, works in it.
    """

    norm: ClassVar[str | None] = None
    made: ClassVar[str] = ""  # the attacks that are made for it

    box: Box

    @abstractmethod
    def identity(self, origin: Tensor) -> Tensor: ...

    @abstractmethod
    def render(self, z: Tensor, origin: Tensor) -> Tensor: ...

    def _limits(self) -> str:
        """The limits as people write them."""
        return ", ".join(f"{name}={value:g}" for name, value in self._limit().items())

    @abstractmethod
    def _limit(self) -> dict[str, float]:
        """The limits by their names."""

    def _budget(self) -> tuple[float | None, str | None]:
        return None, self._limits()

    def _details(self) -> dict[str, Any]:
        return {**self._limit(), "box": self.box.text()}

    def bind(self, space: Any) -> Self:
        """The same threat model in a model's box; UsageError for inputs that are no images."""
        return replace(self, box=image_box(space, self._name()))  # type: ignore[type-var]

    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """The largest parameter's size in units of its limit, float [B]."""
        return row_max((x.to(wide(x)) - origin.to(wide(origin))).abs())

    def admits(self, x: Tensor, origin: Tensor) -> Tensor:
        """Bool [B]: finite parameters within [-1, 1], exactly."""
        if x.shape != origin.shape:
            return torch.zeros(len(origin), dtype=torch.bool, device=origin.device)
        return row_max(torch.nan_to_num(x.abs(), nan=torch.inf)) <= 1

    def finish(self, x: Tensor, origin: Tensor) -> Tensor:
        """Parameters are handed in as they are."""
        return x

    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """The nearest admitted parameters."""
        return z.clamp(-1, 1)

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """Uniform in the cube."""
        return 2 * rng.uniform(origin) - 1

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """The sign of the gradient: every parameter moves by its limit."""
        return usable(gradient).sign()

    @override
    def measures(self, x: Tensor, origin: Tensor) -> dict[str, Tensor]:
        return {}

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            # No property: it would count as a radius (`Radius`), whatever it raised.
            if name == "eps":
                raise NoRadius(self._name(), self.made)
            raise AttributeError(f"{type(self).__name__} has no {name}")
