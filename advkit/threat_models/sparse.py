"""The L0 ball: a few positions, changed at will (compare Croce and Hein, arXiv 1909.05040)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from advkit.core.checks import check, one_of
from advkit.core.errors import UsageError
from advkit.core.protocols import Rng
from advkit.core.spaces import Box
from advkit.threat_models.capability import checked_shape
from advkit.threat_models.lp import NormBall, beyond_spacing, lattice_index, lattice_value, row_sum, usable, wide


def positions(values: Tensor, per: str) -> Tensor:
    """Values [B, ...] summed over what counts as one position in L0, [B, positions]; see `L0.per`."""
    if _channels(per, values.ndim - 1):
        values = values.sum(-3)
    return values.flatten(1) if values.ndim > 1 else values.unsqueeze(1)


def everywhere(chosen: Tensor, like: Tensor, per: str) -> Tensor:
    """A mask over positions [B, positions] as one that broadcasts against rows `like` [B, ...]."""
    if _channels(per, like.ndim - 1):
        return chosen.reshape(*like.shape[:-3], *like.shape[-2:]).unsqueeze(-3)
    return chosen.reshape(like.shape)


def changed_positions(move: Tensor, per: str) -> Tensor:
    """How many positions a perturbation changes, float [B]."""
    # NaN differs from everything, and the norm of something with a NaN in it is NaN
    changed = torch.where(move.isnan(), move, (move != 0).to(move.dtype))
    return row_sum(positions(changed, per).clamp_max(1))


def _channels(per: str, dimensions: int) -> bool:
    return per == "pixel" and dimensions >= 3


@dataclass(frozen=True)
class L0(NormBall):
    """L0 ball: at most eps positions change, each to any legal value.

    eps: a whole number of positions
    per: "pixel" counts a spatial position of an image [B, ..., C, H, W] once, whatever happens to its channels;
         "feature" counts every value. Samples of fewer than three dimensions have no channels: the two agree.

    Raises UsageError for an eps that is no whole number and (in `bind`) for an unbounded box, in which neither a random
    value nor the edge exists.
    """

    norm: ClassVar[str] = "L0"
    _: KW_ONLY
    per: Literal["pixel", "feature"] = "pixel"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "eps", int(self.eps) == self.eps, "a whole number of positions such as 10 (in L0)")
        one_of(self, "per", ("pixel", "feature"))

    def _details(self) -> dict[str, Any]:
        return {**super()._details(), "per": self.per}

    def _largest(self, space: Box) -> float | None:
        if not space.bounded:
            raise UsageError(f"{space!r} is unbounded and L0 changes values at will; declare bounds")
        if space.shape is None:
            return None
        features = math.prod(space.shape)
        return float(features // space.shape[-3] if self._has_channels(len(space.shape)) else features)

    def _has_channels(self, dimensions: int) -> bool:
        return _channels(self.per, dimensions)

    def _positions(self, values: Tensor) -> Tensor:
        """Summed over channels: [B, positions]."""
        return positions(values, self.per)

    def _everywhere(self, chosen: Tensor, like: Tensor) -> Tensor:
        """A mask over positions as one that broadcasts against rows."""
        return everywhere(chosen, like, self.per)

    def _best(self, score: Tensor) -> Tensor:
        """Bool [B, positions]: the eps positions of the largest score, none where it is zero."""
        count = min(int(self.eps), score.shape[1])
        best, where = score.topk(count, dim=1)
        return torch.zeros_like(score, dtype=torch.bool).scatter(1, where, best > 0)

    def _length(self, move: Tensor) -> Tensor:
        return changed_positions(move, self.per)

    @override
    def distance(self, x: Tensor, origin: Tensor) -> Tensor:
        """Positions that changed by more than the round-off of their values, per row [B], in float64."""
        checked_shape(x, origin)
        return self._length(beyond_spacing(x, origin))

    def project(self, z: Tensor, origin: Tensor) -> Tensor:
        """Keep the positions whose undoing would cost most: (z - x)**2 - (z - clip(z))**2, summed over channels."""
        lower, upper = self._walls(origin)
        inside = torch.clamp(z, lower, upper)
        precise, x = z.to(wide(z)), origin.to(wide(origin))
        gain = (precise - x).square() - (precise - inside.to(x.dtype)).square()
        return torch.where(self._everywhere(self._best(self._positions(gain)), origin), inside, origin)

    def sample(self, origin: Tensor, rng: Rng) -> Tensor:
        """eps positions drawn without replacement, values uniform in the box."""
        low, high = self.box.bounds_like(origin)
        values = low + (high - low) * rng.at("values").uniform(origin)
        score = rng.at("positions").uniform(self._positions(torch.zeros_like(origin)))
        chosen = self._everywhere(self._best(score + 1), origin)
        return torch.where(chosen, torch.clamp(values, low, high), origin)

    def steepest(self, gradient: Tensor, at: Tensor) -> Tensor:
        """The eps positions that promise most, moved to the edge of the box."""
        gradient = usable(gradient)
        low, high = self.box.bounds_like(at)
        move = torch.where(gradient > 0, high - at, low - at) * (gradient != 0)
        promise = gradient.to(wide(at)) * move
        return torch.where(self._everywhere(self._best(self._positions(promise)), at), move, 0.0)

    def descend(self, z: Tensor, gradient: Tensor, origin: Tensor, size: float | Tensor) -> Tensor:
        """z after `size` of the way to the box's edge, in the positions that promise most from the origin.

        The other positions go back to the origin: a fraction of a step never outweighs a position that has changed
        already, so that a run would stay with the first positions it took.
        """
        move = self.steepest(-gradient, origin)
        return self.project(torch.where(move != 0, z + size * move, origin), origin)

    def _on_lattice(self, z: Tensor, origin: Tensor) -> Tensor:
        low, step = self._lattice_of(origin)
        index = lattice_index(z.to(low.dtype), low, step).round()
        settled = self._settle(lattice_value(index, low, step, self.lattice), origin)
        return torch.where(z == origin, origin, settled)
