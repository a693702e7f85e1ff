"""The table of a matrix: every attack on every source, its images made once and shown to every target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from advkit.core.watching import watcher
from advkit.evaluation.matrix.answers import Answers
from advkit.evaluation.matrix.images import Images, ImageSet, Unsupported, as_seen
from advkit.evaluation.matrix.participants import NamedAttack
from advkit.evaluation.matrix.plan import NOISE, MatrixPlan
from advkit.evaluation.matrix.rates import NO_DECISION, Decisions
from advkit.evaluation.sources import Participant

Watch = Callable[[str, int, int], None]  # what is going on, units done, units in all


@dataclass(frozen=True)
class Pair:
    """An attack on a source.

    decisions: [T, K, N] of every target, seed by seed
    sets:      figures of the images by seed; of the first seed alone where a second one gives the same images
    missing:   why the attack could not be made on the source; empty where it could
    """

    source: Participant
    attack: NamedAttack
    decisions: Decisions
    sets: tuple[ImageSet, ...] = ()
    missing: str = ""


@dataclass(frozen=True)
class Table:
    """What targets say of every attack on every source, and of noise.

    pairs: source by source, in each attack by attack
    noise: [T, K, N]
    """

    attacks: tuple[NamedAttack, ...]
    pairs: tuple[Pair, ...]
    noise: Decisions

    @property
    def decisions(self) -> Decisions:
        """[T, S, A, K, N]."""
        flat = np.stack([pair.decisions for pair in self.pairs], axis=1)
        targets, pairs, *rest = flat.shape
        return flat.reshape(targets, pairs // len(self.attacks), len(self.attacks), *rest)

    def of(self, attack: NamedAttack) -> list[Pair]:
        """The pairs of an attack."""
        return [pair for pair in self.pairs if pair.attack.name == attack.name]


class Progress:
    """Tells where the matrix is: `watch`, and whoever watches (`core.watching`)."""

    def __init__(self, watch: Watch | None, units: int) -> None:
        self.watch, self.units, self.done = watch, units, 0

    def begin(self, text: str) -> None:
        """A unit is being worked on."""
        if self.watch is not None:
            self.watch(text, self.done, self.units)
        if (told := watcher()) is not None:
            told.works("matrix", self.done, self.units, text)

    def end(self, text: str) -> None:
        """The unit is done."""
        self.done += 1
        self.begin(text)


@dataclass(frozen=True)
class Tables:
    """Makes tables of a plan."""

    plan: MatrixPlan
    images: Images
    answers: Answers
    progress: Progress

    def make(self, attacks: Sequence[NamedAttack]) -> Table:
        """The table of these attacks on every source of the plan."""
        noise = self._noise()
        pairs = tuple(self._pair(source, attack) for source in self.plan.sources for attack in attacks)
        return Table(tuple(attacks), pairs, noise)

    def clean(self) -> Decisions:
        """Decisions [T, N] about the rows as they are."""
        return np.stack([self.answers.about(target, self.plan.rows.x, 0) for target in self.plan.targets])

    def similarity(self) -> dict[str, Any]:
        """Mean cosine over the rows between the perturbations of every two pairs; pairs that agree tell nothing new."""
        names, moves = [], []
        for source in self.plan.sources:
            for attack in self.plan.attacks:
                try:
                    images = self.images.get(self.plan.cell(source, attack, self.plan.seeds[0]), self.plan.rows)
                except Unsupported:
                    continue
                move = (as_seen(images.images) - self.plan.rows.x.float()).flatten(1)
                moves.append(move / move.norm(dim=1, keepdim=True).clamp_min(1e-12))
                names.append([source.name, attack.name])
        cosine = [[float((a * b).sum(1).mean()) for b in moves] for a in moves]
        return {"pairs": names, "cosine": [[round(value, 6) for value in line] for line in cosine]}

    def _noise(self) -> Decisions:
        rows = self.plan.rows
        shown = [self._shown(self.images.get(self.plan.noise(seed), rows), seed) for seed in self.plan.seeds]
        self.progress.end(NOISE.name)
        return np.stack(shown, axis=1)

    def _pair(self, source: Participant, attack: NamedAttack) -> Pair:
        text, seeds = f"{attack.name} on {source.name}", self.plan.seeds
        self.progress.begin(text)
        try:
            sets, shown = self._seed_by_seed(source, attack)
            pair = Pair(source, attack, np.broadcast_to(shown, (*shown.shape[:1], len(seeds), shown.shape[2])), sets)
        except Unsupported as error:
            nothing = np.full((len(self.plan.targets), len(seeds), len(self.plan.rows.ids)), NO_DECISION, np.int16)
            pair = Pair(source, attack, nothing, missing=str(error))
        self.progress.end(text)
        return pair

    def _seed_by_seed(self, source: Participant, attack: NamedAttack) -> tuple[tuple[ImageSet, ...], Decisions]:
        """The sets and the decisions [T, K or 1, N]; one seed is enough for an attack that draws nothing."""
        seeds, rows = self.plan.seeds, self.plan.rows
        first = self.images.get(self.plan.cell(source, attack, seeds[0]), rows)
        sets, shown = [first.without_images()], [self._shown(first, seeds[0])]
        if len(seeds) > 1 and not self._repeats(source, attack, first):
            for seed in seeds[1:]:
                images = self.images.get(self.plan.cell(source, attack, seed), rows)
                sets.append(images.without_images())
                shown.append(self._shown(images, seed))
        return tuple(sets), np.stack(shown, axis=1)

    def _repeats(self, source: Participant, attack: NamedAttack, first: ImageSet) -> bool:
        """Whether the second seed makes the images of the first rows once more."""
        cell = self.plan.cell(source, attack, self.plan.seeds[1])
        again = self.images.get(cell, self.plan.rows.first_piece()).images
        return torch.equal(again, first.images[: len(again)])

    def _shown(self, images: ImageSet, seed: int) -> Decisions:
        """Decisions [T, N] about a set."""
        return np.stack([self.answers.about_set(target, images, seed) for target in self.plan.targets])
