"""FLORAL: adversarial training of kernel SVMs against label poisoning (Bal et al., arXiv 2502.17121)."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from advkit.defenses.labels.dual import SUPPORT, Bias, offset, stepped, svm
from advkit.defenses.labels.kernels import (
    NAMED,
    Factored,
    Gram,
    KernelFunction,
    Landmarks,
    SVCKernel,
    combined,
    dense,
    largest_eigenvalue,
)
from advkit.defenses.labels.projection import Array, LabelInputError, Method, project

__all__ = ["FLORAL", "Game", "Round", "project"]

Codes = NDArray[np.int64]

_TOO_MANY: Final = 0.1
"""Of the samples: an internal budget above this destroyed learning on every data set tried."""
_CHOICES: Final = {
    "output": ("average", "last", "best"),
    "init": ("svm", "zero"),
    "bias": ("margin", "all_sv"),
    "projection": ("exact", "fpi"),
}


@dataclass(frozen=True)
class Round:
    """What one round left: dual variables, the labels they belong to, and the decision function.

    duals: [k, n] for k machines: one for two classes, else one for each class
    signs: the labels -1 and +1 of each machine in this round, flips included, [k, n]
    scores: K (signs * duals), [k, n]
    offsets: b, [k]
    """

    duals: Array
    signs: Array
    scores: Array
    offsets: Array

    @property
    def coefficients(self) -> Array:
        """signs * duals, [k, n]: the decision function is their combination of kernels."""
        return self.signs * self.duals


@dataclass(frozen=True, kw_only=True)
class Game:
    """FLORAL's rounds: the internal attacker flips labels of influential samples, the SVM takes one step.

    gram: the kernel matrix of n samples
    codes: the received labels, 0 to classes - 1, [n]
    upper: bounds of the dual variables, [n], above 0
    budget: labels that are flipped in a round, at most
    step: length of a gradient step, absolute
    """

    gram: Gram
    codes: Codes
    classes: int
    upper: Array
    budget: int
    step: float
    rounds: int
    pool_factor: float = 2.0
    decay: float = 1.0
    decay_every: int = 100
    bias: Bias = "margin"
    projection: Method = "exact"

    def signs(self, codes: Codes) -> Array:
        """Labels -1 and +1 of every machine, [k, n]: class 1 against class 0, or each class against all others."""
        positive = np.array([1]) if self.classes == 2 else np.arange(self.classes)
        return np.where(codes[None] == positive[:, None], 1.0, -1.0)

    def pool(self, duals: Array, rng: np.random.RandomState) -> Codes:
        """The most influential samples, at most pool_factor times the budget; ties are broken at random.

        The influence is the dual variable, with several classes the largest of them; 1e-5 and less is none. Where rows
        are sorted by class and many duals stand at C, breaking ties by position would flip one class alone.
        """
        influence = duals.max(axis=0)
        order = rng.permutation(len(influence))
        order = order[np.argsort(-influence[order], kind="stable")]
        order = order[influence[order] > SUPPORT]
        return np.asarray(order[: math.floor(self.pool_factor * self.budget)], dtype=np.int64)

    def flipped(self, last: Round, rng: np.random.RandomState) -> Codes:
        """The received labels with those of a random part of the pool flipped.

        With several classes a label becomes the wrong class of the largest score.
        """
        if not self.budget:
            return self.codes
        pool = self.pool(last.duals, rng)
        drawn = rng.choice(pool, min(self.budget, len(pool)), replace=False) if len(pool) else pool
        codes = self.codes.copy()
        if self.classes == 2:
            codes[drawn] = 1 - codes[drawn]
        else:
            scores = last.scores[:, drawn] + last.offsets[:, None]
            scores[codes[drawn], np.arange(len(drawn))] = -np.inf
            codes[drawn] = scores.argmax(axis=0)
        return codes

    def start(self, init: str) -> Round:
        """The round before the first: the SVM of the received labels, or all dual variables 0."""
        signs = self.signs(self.codes)
        zero = init == "zero"
        duals = np.zeros_like(signs) if zero else np.stack([svm(self.gram, y, self.upper) for y in signs])
        return self._round(duals, signs)

    def play(self, first: Round, rng: np.random.RandomState) -> Iterator[Round]:
        """Every round in turn."""
        yield from self.against(first, lambda last: self.flipped(last, rng))

    def against(self, first: Round, attacker: Callable[[Round], Codes]) -> Iterator[Round]:
        """Every round in turn against an attacker who answers the last round with labels [n]."""
        last = first
        for t in range(self.rounds):
            signs = self.signs(attacker(last))
            step = self.step * self.decay ** (t // self.decay_every)
            duals = np.empty_like(signs)
            for k, y in enumerate(signs):
                same = np.array_equal(y, last.signs[k])
                scores = last.scores[k] if same else self.gram.times(y * last.duals[k])
                duals[k] = stepped(scores, last.duals[k], y, self.upper, step, self.projection)
            last = self._round(duals, signs)
            yield last

    def _round(self, duals: Array, signs: Array) -> Round:
        scores = np.stack([self.gram.times(y * a) for a, y in zip(duals, signs, strict=True)])
        offsets = [offset(s, a, y, self.upper, self.bias) for s, a, y in zip(scores, duals, signs, strict=True)]
        return Round(duals, signs, scores, np.array(offsets))


class FLORAL(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """FLORAL (Bal et al., ICLR 2025, arXiv 2502.17121): a kernel SVM, trained while an attacker flips labels.

    A classifier of scikit-learn for training sets in which an attacker may have changed labels. Each round an attacker
    inside the training flips the received labels of influential samples, those of the largest dual variables; then the
    dual variables take one projected gradient step on these labels. No flip is kept: each round starts from the labels
    that were given.

    C: bound of the dual variables, above 0; C times its weight for a sample with a weight
    kernel: rbf, linear, poly, sigmoid, precomputed ([n, n] to fit, [m, n] to predict), or a function (X, Y) -> [n, m]
    gamma: of rbf, poly and sigmoid: scale (1 / (features * variance of X)), auto (1 / features) or a number above 0
    degree: of poly
    coef0: of poly and sigmoid
    budget: labels that the internal attacker flips in a round: a whole number, or a fraction of the samples in (0, 1),
        rounded up; 0 for none, which is plain projected gradient descent. More than a tenth warns
    pool_factor: the attacker draws from the pool_factor * budget most influential samples, at least 1
    rounds: at least 1. After 200 the average still depends on the draws by several points; after 500 by about two
    step_size: of the gradient step, in absolute units, or auto: 0.5 over the largest eigenvalue of the kernel matrix.
        Without attacker every step below 2 over it converges
    decay: the step size is multiplied by it after every `decay_every` rounds, in (0, 1]
    decay_every: rounds, at least 1
    init: svm, the SVM of the received labels, or zero
    output: average (of the decision functions of the second half of the rounds), last, or best: the round of the
        highest accuracy on the `validation` set that fit takes. The released code's is clean; who has none with labels
        that are surely right has no use for it
    bias: margin, the SVM's offset, or all_sv, the mean over all support vectors
    projection: exact, or fpi, the fixed-point iteration of the released code
    landmarks: landmarks of a Nystroem kernel, for training sets beyond dense_limit; None for the kernel itself
    dense_limit: training sets of more samples need landmarks or the linear kernel. A dense kernel takes 8 n^2 bytes,
        0.8 GB at 10,000
    random_state: seed of the attacker's draws and of the landmarks

    After fit: `classes_`, `n_features_in_`, `n_iter_`; `support_`, the rows of the training set that have coefficients
    [s]; `dual_coef_`, these coefficients (label times dual variable, averaged over rounds) [k, s]; `intercept_` [k];
    `coef_`, weights of the features [k, d], where the kernel is linear and was not formed; `budget_` in labels;
    `step_size_`; `best_round_`, from 1, with output best. k is 1 for two classes, else the number of classes.

    Raises LabelInputError (a UsageError and a ValueError) for settings out of range, a single class, a class whose
    samples all have weight 0, a kernel that is not symmetric, and a dense kernel beyond dense_limit. A kernel matrix
    that is not positive semi-definite warns with its smallest eigenvalue.

    Deviations from the paper and its released code. They return the last round, whose accuracy swings by tens of points
    from one round to the next; the average is the default here. The code takes the mean over all support vectors for
    the offset, starts from zero, and has a step size of 1e-4, at which C = 10 never binds; `bias`, `init`, `output` and
    `step_size` bring these back. Ties between dual variables are broken at random, not by position. With several
    classes, for which the code has no version, there is one machine for each class against all others; the attacker
    takes the samples whose largest dual variable is largest, and gives each the wrong class of the largest score. The
    paper's version for neural networks is not here.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        kernel: str | KernelFunction = "rbf",
        gamma: float | str = "scale",
        degree: float = 3,
        coef0: float = 0.0,
        budget: float = 0.05,
        pool_factor: float = 2.0,
        rounds: int = 500,
        step_size: float | str = "auto",
        decay: float = 1.0,
        decay_every: int = 100,
        init: Literal["svm", "zero"] = "svm",
        output: Literal["average", "last", "best"] = "average",
        bias: Bias = "margin",
        projection: Method = "exact",
        landmarks: int | None = None,
        dense_limit: int = 10_000,
        random_state: Any = None,
    ) -> None:
        self.C = C
        self.kernel = kernel
        self.gamma = gamma
        self.degree = degree
        self.coef0 = coef0
        self.budget = budget
        self.pool_factor = pool_factor
        self.rounds = rounds
        self.step_size = step_size
        self.decay = decay
        self.decay_every = decay_every
        self.init = init
        self.output = output
        self.bias = bias
        self.projection = projection
        self.landmarks = landmarks
        self.dense_limit = dense_limit
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = self.kernel == "precomputed"
        tags.input_tags.sparse = self.kernel != "precomputed"
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, validation: tuple[Any, Any] | None = None) -> FLORAL:
        """Train on samples [n, d] (an array or a sparse matrix; the kernel [n, n] if precomputed) and labels [n].

        sample_weight: [n], at least 0; a sample of weight 0 has no influence
        validation: samples and their true labels, for output="best" alone
        """
        self._check_settings(validation)
        X, y = validate_data(self, X, y, accept_sparse=self._sparse, dtype=np.float64, order="C")
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        rows = np.arange(X.shape[0]) if weights is None else np.flatnonzero(weights)
        self._check_classes(codes, rows)
        if self.kernel == "precomputed" and X.shape[0] != X.shape[1]:
            raise LabelInputError(f"the precomputed kernel has shape {X.shape}; expected a square matrix [n, n] to fit")
        used = X if len(rows) == X.shape[0] else X[np.ix_(rows, rows)] if self.kernel == "precomputed" else X[rows]
        rng = check_random_state(self.random_state)
        gram = self._gram(used, rng)
        # In whole n, n being the samples that count: those of weight 0 change nothing.
        game = Game(
            gram=gram,
            codes=codes[rows].astype(np.int64),
            classes=len(self.classes_),
            upper=np.full(len(rows), float(self.C)) if weights is None else self.C * weights[rows],
            budget=self._flips(len(rows)),
            step=self._step(gram),
            rounds=int(self.rounds),
            pool_factor=float(self.pool_factor),
            decay=float(self.decay),
            decay_every=int(self.decay_every),
            bias=self.bias,
            projection=self.projection,
        )
        self.budget_, self.step_size_, self.n_iter_ = game.budget, game.step, game.rounds
        coefficients, self.intercept_ = self._outcome(game, gram, used, rng, validation)
        self._keep(gram, used, rows, coefficients, X.shape[0])
        return self

    def decision_function(self, X: Any) -> Array:
        """Scores: [m] for two classes, above 0 for the second of `classes_`; else [m, classes]."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=self._sparse, dtype=np.float64, order="C", reset=False)
        scores = self._combine(X) + self.intercept_
        return scores[:, 0] if scores.shape[1] == 1 else scores

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of each sample [m]."""
        scores = self.decision_function(X)
        chosen = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        labels: NDArray[Any] = self.classes_[chosen]
        return labels

    @property
    def duals_(self) -> Array:
        """The size of every training sample's coefficient, from 0 to C, [n]; of several machines the largest."""
        check_is_fitted(self)
        duals = np.zeros(self._samples)
        duals[self.support_] = np.abs(self.dual_coef_).max(axis=0)
        return duals

    def gram(self, X: Any, Z: Any) -> Array:
        """The kernel of the fitted machine between X [n, d] and Z [m, d], float64 [n, m]; not if it was precomputed."""
        check_is_fitted(self)
        if self._kernel.name == "precomputed":
            raise LabelInputError("the kernel was precomputed, so that it is not known between other samples")
        if self._features is not None:
            return self._features(X) @ self._features(Z).T
        return self._kernel(X, Z)

    @property
    def _sparse(self) -> Any:
        return False if self.kernel == "precomputed" else "csr"

    def _check_settings(self, validation: Any) -> None:
        def fine(name: str, good: bool, expected: str) -> None:
            if not good:
                raise LabelInputError(f"{name} is {getattr(self, name)!r}; expected {expected}")

        def number(name: str, at_least: float, expected: str, *, whole: bool = False, open_: bool = False) -> None:
            value = getattr(self, name)
            kind = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
            fine(name, kind and math.isfinite(value) and (value > at_least if open_ else value >= at_least), expected)

        number("C", 0, "a number above 0", open_=True)
        labels = "a whole number of labels, or a fraction of the samples in (0, 1)"
        number("budget", 0, labels)
        fine("budget", self.budget < 1 or float(self.budget).is_integer(), labels)
        number("pool_factor", 1, "a number of at least 1")
        number("rounds", 1, "a whole number of at least 1", whole=True)
        number("decay", 0, "a number in (0, 1]", open_=True)
        fine("decay", self.decay <= 1, "a number in (0, 1]")
        number("decay_every", 1, "a whole number of at least 1", whole=True)
        number("dense_limit", 1, "a whole number of at least 1", whole=True)
        number("degree", 0, "a number of at least 0")
        if self.step_size != "auto":
            number("step_size", 0, "auto, or a number above 0", open_=True)
        if self.gamma not in ("scale", "auto"):
            number("gamma", 0, "scale, auto, or a number above 0", open_=True)
        if self.landmarks is not None:
            number("landmarks", 1, "None, or a whole number of at least 1", whole=True)
        for name, choices in _CHOICES.items():
            fine(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        known = (*NAMED, "precomputed")
        fine("kernel", callable(self.kernel) or self.kernel in known, f"one of {', '.join(known)}, or a function")
        if self.kernel == "precomputed" and self.landmarks is not None:
            raise LabelInputError(
                "landmarks is set and the kernel is precomputed, a dense one; expected only one of them"
            )
        if self.output == "best" and validation is None:
            raise LabelInputError("output='best' needs fit(X, y, validation=(samples, true labels)); got none")
        if self.output != "best" and validation is not None:
            raise LabelInputError(
                f"fit got a validation set, which output={self.output!r} does not use; output='best' does"
            )

    def _check_classes(self, codes: Codes, rows: Codes) -> None:
        held = np.unique(codes[rows])
        if len(self.classes_) < 2:
            raise LabelInputError(f"y holds 1 class, {self.classes_.tolist()}; expected at least 2 classes")
        if len(held) < len(self.classes_):
            left = self.classes_[held].tolist()
            raise LabelInputError(
                f"only {left} of {len(self.classes_)} classes have samples of weight above 0; expected all of them"
            )

    def _gram(self, X: Any, rng: np.random.RandomState) -> Gram:
        n, d = X.shape
        self._kernel = SVCKernel(
            name=self.kernel, gamma=self._gamma(X), degree=float(self.degree), coef0=float(self.coef0)
        )
        self._features: Landmarks | None = None
        if self.landmarks is not None:
            chosen = np.sort(rng.permutation(n)[: min(int(self.landmarks), n)])
            self._features = Landmarks.chosen(self._kernel, X[chosen])
            return Factored(self._features(X))
        if self.kernel == "linear" and (scipy.sparse.issparse(X) or 2 * d <= n or n > self.dense_limit):
            return Factored(X)
        if n > self.dense_limit and self.kernel != "precomputed":
            raise LabelInputError(
                f"the kernel matrix of {n} samples takes {8e-9 * n * n:.1f} GB and is not formed beyond dense_limit="
                f"{self.dense_limit} samples; set landmarks=1000 (Nystroem features, {8e-6 * n:.2g} GB), use "
                "kernel='linear', which needs no matrix, or raise dense_limit"
            )
        return dense(self._kernel, X)

    def _gamma(self, X: Any) -> float:
        if self.gamma == "auto":
            return 1.0 / int(X.shape[1])
        if self.gamma == "scale":
            variance = float(X.multiply(X).mean() - X.mean() ** 2 if scipy.sparse.issparse(X) else X.var())
            return 1.0 / (int(X.shape[1]) * variance) if variance > 0 else 1.0
        return float(self.gamma)

    def _flips(self, n: int) -> int:
        budget = float(self.budget)
        flips = math.ceil(budget * n) if 0 < budget < 1 else int(budget)
        if flips > math.ceil(_TOO_MANY * n):
            warnings.warn(
                f"the internal attacker flips {flips} of {n} labels each round; above a tenth little is learned "
                f"(chance accuracy at a quarter). Set budget to {math.ceil(_TOO_MANY * n)} or less",
                UserWarning,
                stacklevel=3,
            )
        return min(flips, n)

    def _step(self, gram: Gram) -> float:
        if self.step_size != "auto":
            return float(self.step_size)
        largest = largest_eigenvalue(gram)
        return 0.5 / largest if largest > 0 else 1.0

    def _outcome(
        self, game: Game, gram: Gram, X: Any, rng: np.random.RandomState, validation: tuple[Any, Any] | None
    ) -> tuple[Array, Array]:
        """Coefficients [k, n] and offsets [k] of the decision function that is returned."""
        rounds = game.play(game.start(self.init), rng)
        if self.output == "best" and validation is not None:
            judge = self._judge(gram, X, validation)
            best, self.best_round_ = -1.0, 0
            for number, each in enumerate(rounds, 1):
                accuracy = judge(each)
                if accuracy > best:
                    best, self.best_round_, kept = accuracy, number, each
            return kept.coefficients, kept.offsets
        first = game.rounds if self.output == "last" else game.rounds // 2 + 1
        coefficients, offsets, count = np.zeros_like(game.signs(game.codes)), np.zeros(0), 0
        for number, each in enumerate(rounds, 1):
            if number >= first:
                coefficients += each.coefficients
                offsets = each.offsets if not count else offsets + each.offsets
                count += 1
        return coefficients / count, offsets / count

    def _judge(self, gram: Gram, X: Any, validation: tuple[Any, Any]) -> Callable[[Round], float]:
        """The accuracy of a round on the validation set."""
        given, labels = validate_data(
            self, *validation, accept_sparse=self._sparse, dtype=np.float64, order="C", reset=False
        )
        unknown = np.setdiff1d(labels, self.classes_)
        if len(unknown):
            raise LabelInputError(f"the validation set holds the labels {unknown[:3].tolist()}, which y does not")
        codes = np.searchsorted(self.classes_, labels)
        if isinstance(gram, Factored):
            features = given if self._features is None else self._features(given)

            def scores(each: Round) -> Array:
                return np.asarray(features @ gram.features.T.dot(each.coefficients.T))
        else:
            kernel = given if self._kernel.name == "precomputed" else self._kernel(given, X)

            def scores(each: Round) -> Array:
                return np.asarray(kernel @ each.coefficients.T)

        def accuracy(each: Round) -> float:
            value = scores(each) + each.offsets
            chosen = value[:, 0] > 0 if value.shape[1] == 1 else value.argmax(axis=1)
            return float((chosen == codes).mean())

        return accuracy

    def _keep(self, gram: Gram, X: Any, rows: Codes, coefficients: Array, samples: int) -> None:
        """Keep what predicting takes: weights of features, or the samples whose coefficient is not 0."""
        needed = np.flatnonzero(coefficients.any(axis=0))
        self._samples = samples
        self.support_, self.dual_coef_ = rows[needed], coefficients[:, needed]
        self._weights: Array | None = None
        self._rows: Any = None
        if isinstance(gram, Factored):
            self._weights = np.asarray(gram.features.T @ coefficients.T)
            if self._features is None:
                self.coef_ = self._weights.T
        elif self._kernel.name != "precomputed":
            self._rows = X[needed]

    def _combine(self, X: Any) -> Array:
        if self._weights is not None:
            return np.asarray((X if self._features is None else self._features(X)) @ self._weights)
        if self._kernel.name == "precomputed":
            return np.asarray(X[:, self.support_] @ self.dual_coef_.T)
        return combined(self._kernel, X, self._rows, self.dual_coef_.T)
