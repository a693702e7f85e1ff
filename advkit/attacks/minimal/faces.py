"""Faces of a decision boundary: the goals whose losses are zero on it, and the one of them that seems nearest."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal
from advkit.attacks.gradient.targeted import rivals_of
from advkit.attacks.minimal.hyperplane import Norm, dual_length


@dataclass(frozen=True)
class Margin:
    """A goal whose loss is its margin: the only face of goals without rivals."""

    kind: ClassVar[str] = "face"
    goal: TensorGoal

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]."""
        return self.goal.reached(answer)

    def loss(self, answer: Tensor) -> Tensor:
        """The margin [B]."""
        return self.goal.margin(answer)

    def margin(self, answer: Tensor) -> Tensor:
        """The margin [B]."""
        return self.goal.margin(answer)

    def under(self, loss: str) -> Self:
        """Itself."""
        return self

    def take(self, rows: Tensor) -> Self:
        """That of some of the rows."""
        return replace(self, goal=self.goal.take(rows))

    def to(self, device: torch.device | str) -> Self:
        """On another device."""
        return replace(self, goal=self.goal.to(device))


@dataclass(frozen=True)
class NearestFace:
    """Several faces whose loss is that of the one that seems nearest: its value over its gradient's dual norm.

    faces: goals that are zero on their boundary
    norms: dual norms of their gradients, as last seen [B, K]
    """

    kind: ClassVar[str] = "face"
    faces: tuple[TensorGoal, ...]
    norms: Tensor

    def values(self, answer: Tensor) -> Tensor:
        """Every face's value [B, K]."""
        return torch.stack([face.loss(answer) for face in self.faces], 1)

    def nearest(self, values: Tensor) -> Tensor:
        """Which face seems nearest, long [B]; one without gradient never does."""
        away = torch.where(self.norms > 0, values.abs() / self.norms.clamp_min(1e-30), torch.inf)
        return away.nan_to_num(nan=torch.inf).argmin(1)

    def seen(self, answer: Tensor, normal: Tensor, norm: Norm) -> Self:
        """With the norm of the face that seemed nearest renewed, whose gradient was `normal`."""
        which = self.nearest(self.values(answer))[:, None]
        return replace(self, norms=self.norms.scatter(1, which, dual_length(normal, norm)[:, None]))

    def without(self, answer: Tensor, rows: Tensor) -> Self:
        """With the face that seems nearest given up in some of the rows, bool [B]."""
        which = self.nearest(self.values(answer))[:, None]
        return replace(self, norms=torch.where(rows[:, None], self.norms.scatter(1, which, 0.0), self.norms))

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]."""
        return self.faces[0].reached(answer)

    def loss(self, answer: Tensor) -> Tensor:
        """The value [B] of the face that seems nearest."""
        values = self.values(answer)
        return values.gather(1, self.nearest(values.detach())[:, None]).squeeze(1)

    def margin(self, answer: Tensor) -> Tensor:
        """The margin [B]."""
        return self.faces[0].margin(answer)

    def under(self, loss: str) -> Self:
        """Itself."""
        return self

    def take(self, rows: Tensor) -> Self:
        """Those of some of the rows."""
        return replace(self, faces=tuple(face.take(rows) for face in self.faces), norms=self.norms[rows])

    def to(self, device: torch.device | str) -> Self:
        """On another device."""
        return replace(self, faces=tuple(face.to(device) for face in self.faces), norms=self.norms.to(device))


@dataclass(frozen=True)
class Either:
    """One goal's loss in some rows, another's in the rest; both are of the same rows and reached together.

    rows: bool [B], where the first counts
    """

    kind: ClassVar[str] = "face"
    first: TensorGoal
    second: TensorGoal
    rows: Tensor

    def reached(self, answer: Tensor) -> Tensor:
        """Bool [B]."""
        return self.first.reached(answer)

    def loss(self, answer: Tensor) -> Tensor:
        """Each row's own [B]."""
        return torch.where(self.rows, self.first.loss(answer), self.second.loss(answer))

    def margin(self, answer: Tensor) -> Tensor:
        """The margin [B]."""
        return self.first.margin(answer)

    def under(self, loss: str) -> Self:
        """Itself."""
        return self

    def take(self, rows: Tensor) -> Self:
        """Those of some of the rows."""
        return replace(self, first=self.first.take(rows), second=self.second.take(rows), rows=self.rows[rows])

    def to(self, device: torch.device | str) -> Self:
        """On another device."""
        return replace(self, first=self.first.to(device), second=self.second.to(device), rows=self.rows.to(device))


def faces_of(goal: TensorGoal, answer: Tensor, k: int) -> tuple[TensorGoal, ...]:
    """The boundaries to the k likeliest rivals at `answer`, likeliest first; the margin of a goal that has none."""
    return rivals_of(goal, answer, k) or (Margin(goal),)


def nearest_of(values: Tensor, normals: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    """Of faces with values [K, B] and normals [K, B, ...], the nearest one's value and normal, and all norms [B, K]."""
    norms = dual_length(normals.flatten(0, 1), norm).view(values.shape)
    away = torch.where(norms > 0, values.abs() / norms.clamp_min(1e-30), torch.inf)
    which, rows = away.argmin(0), torch.arange(values.shape[1], device=values.device)
    return values[which, rows], normals[which, rows], norms.T
