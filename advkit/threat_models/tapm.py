"""TAPM: transfer attacks from public models, a grid of sources times attacks (PubDef, arXiv 2310.17645)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import override

from advkit.core.errors import UsageError
from advkit.core.protocols import BringsAttacks, Surrogates
from advkit.threat_models.transfer import SurrogateBall, Transfer, checked_sources, source_names

PUBLIC = "public"


@dataclass(frozen=True, kw_only=True)
class Tapm(SurrogateBall, Surrogates, BringsAttacks):
    """TAPM, transfer attacks from public models: every attack on every source, judged on a victim that is never
    queried.

    Its accuracies say nothing about attackers who hold the victim's weights or query it: print the white-box figure
    beside them.

    sources: model specs or models; `public` stands for every public surrogate of the task's zoo
    attacks: attack specs or attacks; the paper's eleven become `attacks=...` as they are registered
    seen:    names of the sources that the defense was trained on; the others are the unseen ones
    """

    scenario: ClassVar[str] = "grid"
    attacks_all: ClassVar[bool] = True

    sources: tuple[str, ...] = (PUBLIC,)
    attacks: tuple[str, ...] = ("fgsm", "pgd:steps=20,step_size=0.25", "mifgsm:steps=10")
    seen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_sources(self.sources)
        for name in ("attacks", "seen"):
            if isinstance(getattr(self, name), str):
                raise UsageError(f"{name} {getattr(self, name)!r} is one text; expected a tuple of texts")
        if not self.sources or not self.attacks:
            raise UsageError("tapm needs at least one source and one attack; leave both out for the defaults")
        for name, labels in (("sources", self.source_names), ("attacks", self.attack_names)):
            twice = sorted({one for one in labels if labels.count(one) > 1})
            if twice:
                raise UsageError(f"tapm {name} hold {', '.join(twice)} more than once; give each its own name")

    @property
    @override
    def surrogates(self) -> tuple[Any, ...]:
        """Specs or models; (`public`,) until the task's surrogates were filled in by `with_sources`."""
        return self.sources

    @property
    def source_names(self) -> tuple[str, ...]:
        """Sources as records name them."""
        return source_names(self.sources)

    @property
    @override
    def attack_names(self) -> tuple[str, ...]:
        """Attacks as records name them."""
        return tuple(label for label, _ in self.algorithms())

    @property
    def cells(self) -> tuple[tuple[str, str], ...]:
        """(source, attack) of the whole grid, source by source."""
        if PUBLIC in self.source_names:
            raise UsageError("the grid's public sources are not known yet; fill them in with with_sources(...)")
        return tuple((source, attack) for source in self.source_names for attack in self.attack_names)

    @override
    def with_sources(self, sources: Iterable[Any], seen: Iterable[str] = ()) -> Self:
        """The same grid over these sources, and the names among them that the defense was trained on."""
        return replace(self, sources=tuple(sources), seen=self.seen or tuple(seen))

    @override
    def algorithms(self, build: Callable[[Any], Any] | None = None) -> tuple[tuple[str, Any], ...]:
        """(label, attack) pairs; `build` makes an attack of a spec (the attacks' registry lies above this package)."""
        return tuple(
            (attack if isinstance(attack, str) else str(attack), attack if build is None else build(attack))
            for attack in self.attacks
        )

    @override
    def cell(self, source: Any = None) -> Transfer:
        """The threat model inside one cell: transfer from one source, or from all where none is named."""
        sources = self.sources if source is None else (source,)
        return Transfer(
            eps=self.eps, norm=self.norm, lattice=self.lattice, box=self.box, sources=sources, attacks_all=True
        )


@dataclass(frozen=True, kw_only=True)
class TransferGrid:
    """The names of a grid of transfer attacks, and what is known of its sources.

    sources:   S names
    attacks:   A names
    groups:    training group of each source; empty for none
    seen:      the sources that the defender trained on
    white_box: the sources that hold the victim's weights: reported by source, left out of everything else

    Raises UsageError where a name stands twice or is unknown.
    """

    sources: tuple[str, ...]
    attacks: tuple[str, ...]
    groups: tuple[str, ...] = ()
    seen: frozenset[str] = frozenset()
    white_box: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if len(set(self.sources)) < len(self.sources) or len(set(self.attacks)) < len(self.attacks):
            raise UsageError("source and attack names must differ from one another")
        for what, names in (("seen", self.seen), ("white_box", self.white_box)):
            strangers = sorted(names - set(self.sources))
            if strangers:
                raise UsageError(
                    f"{what} names {', '.join(strangers)}, not among the sources {', '.join(self.sources)}"
                )
        if self.groups and len(self.groups) != len(self.sources):
            raise UsageError(f"{len(self.groups)} groups for {len(self.sources)} sources")

    def accuracies(self, errors: ArrayLike) -> dict[str, Any]:
        """The three accuracies from the success tensor, overall and by source, attack, group and knowledge.

        acc_avg averages the cells, acc_best_attack is the worst cell's accuracy (the paper's headline), acc_per_sample
        counts images right under every cell; always per-sample <= best-attack <= average. Images that are wrong when
        clean count like any other.

        errors: [S, A, N], 1 where the victim errs on the image, NaN where the entry is missing

        A cell with no entry at all is listed under `missing` and counts neither way; an image that lacks an entry in a
        present cell is left out everywhere and counted under `incomplete`. Every rate carries integer counts. Raises
        UsageError where names and shape do not fit, or where an entry is neither 0, 1 nor NaN.
        """
        values = self._checked(errors)
        known = ~np.isnan(values)
        present: NDArray[np.bool_] = np.asarray(known.any(2))
        complete = known[present].all(0) if present.any() else np.zeros(values.shape[2], dtype=bool)
        right = values[:, :, complete] == 0.0
        counted = present & ~self._are(self.white_box)

        def block(of: NDArray[np.bool_]) -> dict[str, Any] | None:
            return self._block(right, of)

        columns = np.arange(len(self.attacks))
        members = {group: self._of_group(group) for group in sorted(set(self.groups))}
        return {
            "rows": int(complete.sum()),
            "incomplete": int((~complete).sum()),
            "missing": [[self.sources[s], self.attacks[a]] for s, a in zip(*np.nonzero(~present), strict=True)],
            "white_box": sorted(self.white_box),
            "overall": block(counted),
            "by_source": {name: block(present & self._are({name})) for name in self.sources},
            "by_attack": {name: block(counted & (columns == a)) for a, name in enumerate(self.attacks)},
            "by_group": {group: block(counted & self._are(names)) for group, names in members.items()},
            "seen": block(counted & self._are(self.seen)),
            "unseen": block(counted & ~self._are(self.seen)),
        }

    def _checked(self, errors: ArrayLike) -> NDArray[np.float64]:
        values = np.asarray(errors, dtype=np.float64)
        if values.ndim != 3 or values.shape[:2] != (len(self.sources), len(self.attacks)):
            raise UsageError(
                f"errors of shape {values.shape} for {len(self.sources)} sources and {len(self.attacks)} attacks; "
                "expected [sources, attacks, images]"
            )
        if not np.isin(values[~np.isnan(values)], (0.0, 1.0)).all():
            raise UsageError("errors must be 0 (right), 1 (wrong) or NaN (missing)")
        return values

    def _are(self, names: Collection[str]) -> NDArray[np.bool_]:
        """Which sources are among these, [S, 1]."""
        return np.array([name in names for name in self.sources], dtype=np.bool_)[:, None]

    def _of_group(self, group: str) -> set[str]:
        return {name for name, one in zip(self.sources, self.groups, strict=True) if one == group}

    def _block(self, right: NDArray[np.bool_], present: NDArray[np.bool_]) -> dict[str, Any] | None:
        """The three accuracies over the present cells of right [S, A, N]; None where there is no cell."""
        cells = [(int(s), int(a)) for s, a in zip(*np.nonzero(present), strict=True)]
        if not cells:
            return None
        rows = right.shape[2]
        counts = {cell: int(right[cell].sum()) for cell in cells}
        # Ties go to the first name, so that the answer does not depend on the listing order.
        worst = min(cells, key=lambda cell: (counts[cell], self.sources[cell[0]], self.attacks[cell[1]]))
        union = int(right[present].all(0).sum())
        return {
            "cells": len(cells),
            "acc_avg": _rate(sum(counts.values()), len(cells) * rows),
            "acc_best_attack": _rate(counts[worst], rows),
            "acc_per_sample": _rate(union, rows),
            "worst": {"source": self.sources[worst[0]], "attack": self.attacks[worst[1]]},
        }


def _rate(correct: int, images: int) -> dict[str, Any]:
    return {"value": correct / images if images else None, "numerator": correct, "denominator": images}


def game_value(accuracies: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Optimal mixes and value of the zero-sum game: (defender mix [m], attacker mix [n], value).

    accuracies: [m, n], accuracy of defender i under attacker j

    The defender solves max v subject to P^T p >= v and p on the simplex, the attacker the same for -P^T. Raises
    UsageError on anything but a finite matrix.
    """
    payoff = np.asarray(accuracies, dtype=np.float64)
    if payoff.ndim != 2 or 0 in payoff.shape or not np.isfinite(payoff).all():
        raise UsageError(f"a game needs a finite matrix [defenders, attackers]; got shape {payoff.shape}")
    defender, value = _maximin(payoff)
    attacker, _ = _maximin(-payoff.T)
    return defender, attacker, value


def _maximin(payoff: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """The row player's mix and what it guarantees."""
    from scipy.optimize import linprog

    rows, columns = payoff.shape
    # A shift and a scale change no mix; they keep the solver's absolute tolerances meaningful.
    low, scale = float(payoff.min()), float(np.ptp(payoff)) or 1.0
    found = linprog(
        c=np.r_[np.zeros(rows), -1.0],
        A_ub=np.c_[-((payoff - low) / scale).T, np.ones(columns)],
        b_ub=np.zeros(columns),
        A_eq=np.r_[np.ones(rows), 0.0][None],
        b_eq=[1.0],
        bounds=[(0.0, None)] * rows + [(None, None)],
        method="highs",
    )
    if not found.success:
        raise UsageError(f"the game's linear programme was not solved: {found.message}")
    mix = np.clip(found.x[:rows], 0.0, None)
    mix /= mix.sum()
    return mix, float((mix @ payoff).min())
