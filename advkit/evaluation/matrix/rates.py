"""The figures of a matrix from decisions: accuracies and success rates, each the mean over the seeds with its range."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advkit.evaluation.report.matrix import mean_of
from advkit.evaluation.stats import wilson
from advkit.threat_models.tapm import TransferGrid

Decisions = NDArray[np.int16]
"""Classes that targets name, -1 where one abstains, NO_DECISION where there is none."""
NO_DECISION = -2
_BLOCKS = {"avg": "acc_avg", "best": "acc_best_attack", "union": "acc_per_sample"}


def errors_of(decisions: Decisions, labels: NDArray[Any]) -> NDArray[np.float64]:
    """1 where a decision is not the label, 0 where it is, NaN where there is none; labels run along the last axis."""
    wrong = (decisions != labels).astype(np.float64)
    errors: NDArray[np.float64] = np.where(decisions == NO_DECISION, np.nan, wrong)
    return errors


def over_seeds(grid: TransferGrid, errors: NDArray[np.float64]) -> dict[str, Any]:
    """A target's average, best and union accuracy, overall and by source, attack, group and knowledge.

    errors: [K, S, A, N], seed by seed, as in `TransferGrid.accuracies`, which makes the figures of each seed; here each
            is its mean over the seeds, with the smallest and the largest. A cell that one seed lacks is missing under
            all
    """
    present = np.asarray((~np.isnan(errors)).any(axis=3).all(axis=0), dtype=np.bool_)
    by_seed = [grid.accuracies(np.where(present[:, :, None], one, np.nan)) for one in errors]
    return {
        "rows": [one["rows"] for one in by_seed],
        "incomplete": [one["incomplete"] for one in by_seed],
        **{key: _merged([one[key] for one in by_seed]) for key in ("overall", "seen", "unseen")},
        **{
            key: {name: _merged([one[key][name] for one in by_seed]) for name in by_seed[0][key]}
            for key in ("by_source", "by_attack", "by_group")
        },
    }


def _merged(by_seed: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    blocks = [block for block in by_seed if block is not None]
    if not blocks:
        return None
    merged: dict[str, Any] = {"cells": blocks[0]["cells"]}
    for name, key in _BLOCKS.items():
        # The same images stand in every cell: no binomial interval holds for their average.
        merged[name] = fraction([(b[key]["numerator"], b[key]["denominator"]) for b in blocks], interval=name != "avg")
    merged["best"] |= {"s": blocks[0]["worst"]["source"], "a": blocks[0]["worst"]["attack"]}
    merged["best"]["by_seed"] = [[block["worst"]["source"], block["worst"]["attack"]] for block in blocks]
    return merged


def fraction(counts: Sequence[tuple[int, int]], interval: bool = True) -> dict[str, Any]:
    """The mean over the seeds, the smallest and the largest, the counts, and the first seed's Wilson interval."""
    values = [k / n for k, n in counts if n]
    ci = wilson(int(counts[0][0]), int(counts[0][1])).to_dict() if interval and counts[0][1] else None
    return {
        "value": mean_of(values),
        "range": [min(values), max(values)] if values else None,
        "counts": [[int(k), int(n)] for k, n in counts],
        "ci": ci,
    }


def accuracy(decisions: Decisions, labels: NDArray[Any]) -> dict[str, Any]:
    """Of decisions [N] on clean images: the fraction of those decided that is right."""
    known = decisions != NO_DECISION
    return fraction([(int((known & (decisions == labels)).sum()), int(known.sum()))])


def cell_rates(
    decisions: Decisions, clean: Decisions, labels: NDArray[Any], wanted: NDArray[Any] | None = None
) -> dict[str, Any]:
    """A cell's accuracy and its three attack success rates, which are never mixed.

    decisions: [K, N]; clean, labels: [N]; wanted: [N] or [K, N]

    acc:      fraction of all images that are right (asr_all is one minus it)
    asr_cond: fraction of the images right when clean that become wrong
    fooling:  (right when clean - right now) / right when clean; negative where the change helps
    targeted: fraction taken for the wanted class, of those that neither are nor were; None without a wanted class
    """
    known = (decisions != NO_DECISION) & (clean != NO_DECISION)
    right, before = (decisions == labels) & known, (clean == labels) & known
    base = before.sum(1)
    rates = {
        "acc": _by_seed(right, known),
        "asr_all": _by_seed(~right, known),
        "asr_cond": _by_seed(~right, before),
        "fooling": fmean(((base - right.sum(1)) / base).tolist()) if base.all() else None,
        "targeted": None,
    }
    if wanted is not None:
        rates["targeted"] = _by_seed(decisions == wanted, known & (labels != wanted) & (clean != wanted))
    return rates


def _by_seed(hits: NDArray[np.bool_], among: NDArray[np.bool_]) -> dict[str, Any]:
    """Of the rows [K, N] in `among`, the fraction that hits."""
    return fraction(list(zip((hits & among).sum(1).tolist(), among.sum(1).tolist(), strict=True)))
