"""DeepFool: steps onto the nearest linearised decision boundary (Moosavi-Dezfooli et al., arXiv 1511.04599)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from advkit.attacks.base import kept, per_row
from advkit.attacks.minimal.base import NORMS, MinimalAttack, NearestSearch
from advkit.attacks.minimal.faces import NearestFace, faces_of, nearest_of
from advkit.attacks.minimal.hyperplane import close_gap
from advkit.core.checks import at_least_one, not_negative

NEWTON = 4


@dataclass(frozen=True, kw_only=True)
class DeepFool(MinimalAttack):
    name: ClassVar[str] = "deepfool"
    norms: ClassVar[tuple[str, ...]] = ("minimum-l2", "minimum-linf")

    steps: int = 50
    rivals: int = 9
    overshoot: float = 0.02

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "rivals")
        not_negative(self, "overshoot")

    def search(self, search: NearestSearch, norm: str) -> None:
        """See the class."""
        kind = NORMS[norm]
        answer, done = search.ask(search.x)
        faces = faces_of(search.goal, answer, self.rivals)
        rows = search.leave(done)
        if rows is not None:
            done, faces = done[rows], tuple(face.take(rows) for face in faces)
        if not len(search) or not search.affords():
            return
        z = search.x
        values, normals, _ = search.look_at(z, faces)
        value, normal, norms = nearest_of(values, normals, kind)
        aim = NearestFace(faces, norms)
        total = torch.zeros_like(z)
        for step in range(self.steps):
            low, high = search.threat.box.bounds_like(z)
            move = close_gap(z, normal, value, low, high, kind, NEWTON)
            done = done | ~move.flatten(1).any(1)
            total = total + torch.where(per_row(done, z), 0.0, move)
            z = search.legal(search.x + (1 + self.overshoot) * total)
            if not search.affords():
                return
            if step == self.steps - 1:
                search.ask(z)
                return
            look = search.look(z, aim)
            aim, value, normal = aim.seen(look.answer, look.gradient, kind), look.loss, look.gradient
            done = done | look.reached
            rows = search.leave(done)
            if rows is not None:
                aim = aim.take(rows)
                done, value, normal, total, z = kept(rows, done, value, normal, total, z)
            if not len(search):
                return
