"""TAPM: transfer attacks from public models, a grid of sources times attacks (PubDef, arXiv 2310.17645)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import override

from advkit.core.errors import UsageError
from advkit.core.protocols import BringsAttacks, Surrogates
from advkit.threat_models.transfer import SurrogateBall, Transfer, source_name

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
        for name in ("sources", "attacks", "seen"):
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
        return tuple(source_name(source) for source in self.sources)

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


def _rate(correct: int, images: int) -> dict[str, Any]:
    return {"value": correct / images if images else None, "numerator": correct, "denominator": images}


def _block(
    right: NDArray[np.bool_], present: NDArray[np.bool_], sources: Sequence[str], attacks: Sequence[str]
) -> dict[str, Any] | None:
    """The three accuracies over the present cells of right [S, A, N]; None where there is no cell."""
    cells = [(int(s), int(a)) for s, a in zip(*np.nonzero(present), strict=True)]
    if not cells:
        return None
    rows = right.shape[2]
    counts = {cell: int(right[cell].sum()) for cell in cells}
    # Ties go to the first name, so that the answer does not depend on the listing order.
    worst = min(cells, key=lambda cell: (counts[cell], sources[cell[0]], attacks[cell[1]]))
    union = int(right[present].all(0).sum())
    return {
        "cells": len(cells),
        "acc_avg": _rate(sum(counts.values()), len(cells) * rows),
        "acc_best_attack": _rate(counts[worst], rows),
        "acc_per_sample": _rate(union, rows),
        "worst": {"source": sources[worst[0]], "attack": attacks[worst[1]]},
    }


def tapm_metrics(
    errors: ArrayLike,
    sources: Sequence[str],
    attacks: Sequence[str],
    groups: Mapping[str, str] | Sequence[str] = (),
    seen: Collection[str] = (),
    white_box: Collection[str] = (),
) -> dict[str, Any]:
    """The three accuracies of a grid from its success tensor, overall and by source, attack, group and knowledge.

    acc_avg averages the cells, acc_best_attack is the worst cell's accuracy (the paper's headline), acc_per_sample
    counts images right under every cell; always per-sample <= best-attack <= average. Images that are wrong untouched
    count like any other.

    errors:    [S, A, N], 1 where the victim errs on the image, NaN where the entry is missing
    sources:   S names
    attacks:   A names
    groups:    training group of each source, as a mapping by name or as S labels; empty for none
    seen:      names of the sources that the defender trained on
    white_box: names of the sources that are the victim itself: reported by source, left out of everything else

    A cell with no entry at all is listed under `missing` and counts neither way; an image that lacks an entry in a
    present cell is left out everywhere and counted under `incomplete`. Every rate carries integer counts. Raises
    UsageError where names and shape do not fit, where a name is unknown or where an entry is neither 0, 1 nor NaN.
    """
    values = np.asarray(errors, dtype=np.float64)
    sources, attacks = list(sources), list(attacks)
    if values.ndim != 3 or values.shape[:2] != (len(sources), len(attacks)):
        raise UsageError(
            f"errors of shape {values.shape} for {len(sources)} sources and {len(attacks)} attacks; "
            "expected [sources, attacks, images]"
        )
    if len(set(sources)) < len(sources) or len(set(attacks)) < len(attacks):
        raise UsageError("source and attack names must differ from one another")
    known = ~np.isnan(values)
    if not np.isin(values[known], (0.0, 1.0)).all():
        raise UsageError("errors must be 0 (right), 1 (wrong) or NaN (missing)")
    for what, names in (("seen", seen), ("white_box", white_box)):
        strangers = sorted(set(names) - set(sources))
        if strangers:
            raise UsageError(f"{what} names {', '.join(strangers)}, not among the sources {', '.join(sources)}")
    if isinstance(groups, Mapping):
        lost = [name for name in sources if groups and name not in groups]
        if lost:
            raise UsageError(f"groups says nothing of {', '.join(lost)}")
        groups = [groups[name] for name in sources] if groups else []
    elif groups and len(groups) != len(sources):
        raise UsageError(f"{len(groups)} groups for {len(sources)} sources")

    present: NDArray[np.bool_] = np.asarray(known.any(2))
    complete = known[present].all(0) if present.any() else np.zeros(values.shape[2], dtype=bool)
    right = values[:, :, complete] == 0.0
    counted = present.copy()
    counted[[name in white_box for name in sources]] = False

    def block(of: NDArray[np.bool_]) -> dict[str, Any] | None:
        return _block(right, of, sources, attacks)

    def of_sources(chosen: Sequence[bool], base: NDArray[np.bool_] = counted) -> dict[str, Any] | None:
        return block(base & np.asarray(chosen, dtype=bool)[:, None])

    columns = np.arange(len(attacks))
    return {
        "rows": int(complete.sum()),
        "incomplete": int((~complete).sum()),
        "missing": [[sources[s], attacks[a]] for s, a in zip(*np.nonzero(~present), strict=True)],
        "white_box": sorted(white_box),
        "overall": block(counted),
        "by_source": {name: of_sources([name == one for one in sources], present) for name in sources},
        "by_attack": {name: block(counted & (columns == a)[None, :]) for a, name in enumerate(attacks)},
        "by_group": {name: of_sources([name == one for one in groups]) for name in sorted(set(groups))},
        "seen": of_sources([name in seen for name in sources]),
        "unseen": of_sources([name not in seen for name in sources]),
    }


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
