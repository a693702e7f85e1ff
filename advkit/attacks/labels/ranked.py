"""Flips chosen by one ranking of the training samples: at random, by distance to the boundary, by dual variable.

As in Xiao et al., "Support vector machines under adversarial label contamination" (Neurocomputing 2015), and in FLORAL
(Bal et al., arXiv 2502.17121).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from typing_extensions import override

from advkit.attacks.labels.base import LabelAttack, largest, others, with_flips
from advkit.core.checks import at_least_one
from advkit.core.errors import UsageError
from advkit.core.learners import Constant, Floats, Ints, margins
from advkit.core.protocols import Access
from advkit.core.retraining import Retraining

SUPPORT = 1e-5
"""Dual variable from which a sample is a support vector."""


@dataclass(frozen=True, kw_only=True)
class RandomLabels(LabelAttack):
    """Random label flips: labels of samples drawn uniformly, each changed to another class drawn uniformly.

    The reference for every attack that chooses. It trains nothing, and any number of classes will do.
    """

    needs: ClassVar[Access] = Access.NOTHING
    surrogate: ClassVar[str] = ""

    @override
    def flip(self, oracle: Retraining, y: Ints, budget: int, rng: np.random.Generator) -> Ints:
        chosen = rng.permutation(len(y))[:budget]
        return with_flips(y, chosen, (y + rng.integers(1, oracle.classes, len(y))) % oracle.classes)


@dataclass(frozen=True, kw_only=True)
class FarFirst(LabelAttack):
    """Farthest-first label flips: the samples farthest from the boundary of a model trained on clean labels.

    Distance is the size of the decision value, of several classes the size of the margin. Labels go to the other class
    that the model scores highest. One training.

    surrogate: what an attacker trains who does not know the defense
    """

    surrogate: str = "logreg"

    @override
    def flip(self, oracle: Retraining, y: Ints, budget: int, rng: np.random.Generator) -> Ints:
        return _by_distance(oracle, y, budget, rng, nearest=False)


@dataclass(frozen=True, kw_only=True)
class NearFirst(LabelAttack):
    """Nearest-first label flips: the samples nearest to the boundary of a model trained on clean labels.

    As `farfirst`, from the other end. One training.

    surrogate: what an attacker trains who does not know the defense
    """

    surrogate: str = "logreg"

    @override
    def flip(self, oracle: Retraining, y: Ints, budget: int, rng: np.random.Generator) -> Ints:
        return _by_distance(oracle, y, budget, rng, nearest=True)


def _by_distance(oracle: Retraining, y: Ints, budget: int, rng: np.random.Generator, *, nearest: bool) -> Ints:
    model = oracle.train(y)
    distance = np.abs(margins(model, oracle.x, y, oracle.classes))
    return with_flips(y, largest(-distance if nearest else distance, budget, rng), others(model, oracle, y))


@dataclass(frozen=True, kw_only=True)
class SVFlip(LabelAttack):
    """Support-vector flips: the samples of largest dual variable of a support vector machine on clean labels.

    Many dual variables are equal to C: among equals a draw decides. Labels go to the other class that the machine
    scores highest. One training.

    surrogate: what an attacker trains who does not know the defense; a kernel machine
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    surrogate: str = "svm"

    @override
    def flip(self, oracle: Retraining, y: Ints, budget: int, rng: np.random.Generator) -> Ints:
        model = oracle.train(y)
        return with_flips(y, largest(duals_of(self, model, len(y)), budget, rng), others(model, oracle, y))


@dataclass(frozen=True, kw_only=True)
class FloralInner(LabelAttack):
    """FLORAL's inner attacker as an attack of its own: a draw among the support vectors of largest dual variable.

    Of a support vector machine on clean labels the samples with a dual variable above 1e-5 are sorted by it, the first
    pool_factor * budget are kept, and as many as the budget drawn from them. Where there are fewer support vectors than
    flips, the rest is drawn from the other samples. One training.

    pool_factor: >= 1; 1 leaves nothing to draw, as `svflip`
    surrogate:   what an attacker trains who does not know the defense; a kernel machine
    """

    needs: ClassVar[Access] = Access.GRADIENTS
    pool_factor: int = 2
    surrogate: str = "svm"

    def __post_init__(self) -> None:
        at_least_one(self, "pool_factor")

    @override
    def flip(self, oracle: Retraining, y: Ints, budget: int, rng: np.random.Generator) -> Ints:
        model = oracle.train(y)
        duals = duals_of(self, model, len(y))
        ranked = np.argsort(-duals, kind="stable")
        pool = ranked[: min(int((duals > SUPPORT).sum()), self.pool_factor * budget)]
        order = np.concatenate((rng.permutation(pool), rng.permutation(np.setdiff1d(np.arange(len(y)), pool))))
        return with_flips(y, order[:budget], others(model, oracle, y))


def duals_of(attack: LabelAttack, model: Any, n: int) -> Floats:
    """The dual variables of a fitted kernel machine [n]; zeros of one that saw one class; UsageError for another."""
    if isinstance(model, Constant):
        return np.zeros(n)
    if not hasattr(model, "duals_"):
        raise UsageError(
            f"{type(attack).__name__} reads dual variables and {type(model).__name__} has none: name a surrogate that "
            "is a kernel machine, e.g. --threat-model label-flips:rate=0.1,attacker=oblivious,surrogate=svm"
        )
    return np.asarray(model.duals_, dtype=np.float64)
