"""SVCKernel matrices for learners of labels: dense up to a limit, or a product of features (Nystroem, linear)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import scipy.linalg
import scipy.sparse
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from sklearn.metrics.pairwise import pairwise_kernels

from advkit.defenses.labels.projection import Array, LabelInputError

NAMED: Final = ("linear", "poly", "rbf", "sigmoid")
_BLOCK: Final = 1 << 24
"""SVCKernel values that are computed at once: 128 MiB."""
_SMALL: Final = 64
_ROUND_OFF: Final = 1e-8
"""Of the largest eigenvalue: a smallest one above minus this is round-off."""
_ASYMMETRY: Final = 1e-6

KernelFunction = Callable[[Any, Any], Any]


@dataclass(frozen=True, kw_only=True)
class SVCKernel:
    """A kernel of scikit-learn's SVC by name, or a function of two arrays of samples that returns the matrix.

    name: linear, poly, rbf, sigmoid, precomputed, or a function (X [n, d], Y [m, d]) -> [n, m]
    gamma, degree, coef0: numbers, as SVC has them
    """

    name: str | KernelFunction
    gamma: float = 1.0
    degree: float = 3
    coef0: float = 0.0

    def __call__(self, x: Any, y: Any) -> Array:
        """The kernel between the rows of x [n, d] and y [m, d], float64 [n, m]."""
        if callable(self.name):
            values = np.asarray(self.name(x, y), dtype=np.float64)
            if values.shape != (x.shape[0], y.shape[0]):
                raise LabelInputError(
                    f"the kernel function returned shape {values.shape}; expected {(x.shape[0], y.shape[0])}"
                )
            return values
        settings = {"gamma": self.gamma, "degree": self.degree, "coef0": self.coef0}
        values = pairwise_kernels(x, y, metric=self.name, filter_params=True, **settings)
        return np.asarray(values.toarray() if scipy.sparse.issparse(values) else values, dtype=np.float64)

    @property
    def surely_psd(self) -> bool:
        """Whether every matrix of this kernel is positive semi-definite."""
        known = self.name == "linear" or (self.name == "rbf" and self.gamma >= 0)
        return known or (
            self.name == "poly" and self.gamma >= 0 and self.coef0 >= 0 and float(self.degree).is_integer()
        )


class Gram(Protocol):
    """The kernel matrix K [n, n] of the training samples, as far as the solver needs it."""

    def __len__(self) -> int: ...

    def times(self, v: Array) -> Array:
        """K v, [n]."""
        ...


@dataclass(frozen=True)
class Dense:
    """K itself: 8 n^2 bytes."""

    matrix: Array

    def __len__(self) -> int:
        return len(self.matrix)

    def times(self, v: Array) -> Array:
        """K v, [n]."""
        product: Array = self.matrix @ v
        return product


@dataclass(frozen=True)
class Factored:
    """K = Z Z^T for features Z [n, m], dense or sparse: 8 n m bytes and O(n m) for a product."""

    features: Any

    def __len__(self) -> int:
        return int(self.features.shape[0])

    def weights(self, v: Array) -> Array:
        """Z^T v, [m]: the weights of the linear function that v stands for."""
        return np.asarray(self.features.T @ v)

    def times(self, v: Array) -> Array:
        """K v, [n]."""
        return np.asarray(self.features @ self.weights(v))


@dataclass(frozen=True)
class Landmarks:
    """Nystroem features (Williams and Seeger, 2001): z(x) = k(x, landmarks) L, so that z(x)^T z(x') is about k(x, x').

    scikit-learn's Nystroem calls a kernel function on pairs of rows; SVC's functions take whole arrays, as here.
    """

    kernel: SVCKernel
    rows: Any
    root: Array

    @classmethod
    def chosen(cls, kernel: SVCKernel, rows: Any) -> Landmarks:
        """Features for landmarks that are given; directions of no weight are left out."""
        values, vectors = scipy.linalg.eigh(_symmetric(kernel(rows, rows)))
        if values[0] < -_ROUND_OFF * max(values[-1], 0.0):
            raise LabelInputError(
                f"landmarks needs a positive semi-definite kernel; that of the {len(values)} landmarks has the "
                f"smallest eigenvalue {values[0]:.6g}, largest {values[-1]:.6g}. Use another kernel or landmarks=None"
            )
        kept = values > 1e-12 * values[-1]
        return cls(kernel, rows, vectors[:, kept] / np.sqrt(values[kept]))

    def __call__(self, x: Any) -> Array:
        """The features of x [n, d], float64 [n, m]."""
        size = max(1, _BLOCK // self.rows.shape[0])
        if x.shape[0] <= size:
            return self.kernel(x, self.rows) @ self.root
        features = np.empty((x.shape[0], self.root.shape[1]))
        for start in range(0, x.shape[0], size):
            features[start : start + size] = self.kernel(x[start : start + size], self.rows) @ self.root
        return features


def combined(kernel: SVCKernel, x: Any, rows: Any, coefficients: Array) -> Array:
    """k(x, rows) @ coefficients, [n, k], without ever holding more than a block of the kernel."""
    size = max(1, _BLOCK // max(1, rows.shape[0]))
    blocks = [kernel(x[start : start + size], rows) @ coefficients for start in range(0, x.shape[0], size)]
    return np.concatenate(blocks) if blocks else np.zeros((0, coefficients.shape[1]))


def _symmetric(matrix: Array) -> Array:
    """The matrix, once it is known to be finite and symmetric."""
    if not np.isfinite(matrix).all():
        raise LabelInputError("the kernel matrix holds values that are not finite; expected real numbers")
    scale = np.abs(matrix).max(initial=0.0)
    starts = range(0, len(matrix), 512)  # in blocks, so that no second matrix is held
    gap = max((np.abs(matrix[i : i + 512] - matrix[:, i : i + 512].T).max() for i in starts), default=0.0)
    if gap > _ASYMMETRY * scale:
        raise LabelInputError(
            f"the kernel matrix is not symmetric: two of its values differ by {gap:.3g} (largest value {scale:.3g}); "
            "expected k(x, x') = k(x', x)"
        )
    return matrix


def dense(kernel: SVCKernel, x: Any) -> Dense:
    """The kernel matrix of x; a precomputed one is x. Warns, with its smallest eigenvalue, where it is not PSD."""
    gram = Dense(_symmetric(np.asarray(x) if kernel.name == "precomputed" else kernel(x, x)))
    if not kernel.surely_psd:
        largest = largest_eigenvalue(gram)
        if not _is_psd(gram.matrix, max(_ROUND_OFF * largest, np.finfo(float).tiny)):
            warnings.warn(
                "the kernel matrix is not positive semi-definite: its smallest eigenvalue is "
                f"{smallest_eigenvalue(gram):.6g}, its largest {largest:.6g}. The dual is not convex then, and "
                "training may end off its minimum",
                UserWarning,
                stacklevel=4,
            )
    return gram


def _is_psd(matrix: Array, slack: float) -> bool:
    """Whether K + slack I has a Cholesky factor. Lanczos could tell, too, but not where eigenvalues crowd near 0."""
    shifted = matrix.copy()
    np.einsum("ii->i", shifted)[:] += slack
    try:
        scipy.linalg.cholesky(shifted, lower=True, overwrite_a=True, check_finite=False)
    except np.linalg.LinAlgError:
        return False
    return True


def largest_eigenvalue(gram: Gram, *, centred: bool = False) -> float:
    """The largest eigenvalue of K, or of H K H with H = I - 11^T / n: K as vectors see it that sum to 0."""
    n = len(gram)

    def times(v: Array) -> Array:
        v = np.ravel(v)
        if not centred:
            return gram.times(v)
        product = gram.times(v - v.mean())
        centre: Array = product - product.mean()
        return centre

    if n <= _SMALL:
        matrix = np.stack([times(row) for row in np.eye(n)])
        return float(scipy.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])
    v = np.random.RandomState(0).uniform(0.5, 1.5, n)
    operator = LinearOperator((n, n), matvec=times, dtype=np.float64)
    try:
        return float(eigsh(operator, k=1, which="LA", v0=v, tol=1e-4, maxiter=20, return_eigenvectors=False)[0])
    except ArpackNoConvergence:  # many eigenvalues crowd at the top: any vector of theirs tells their size
        for _ in range(100):
            v = times(v / np.linalg.norm(v))
        return float(v @ times(v) / (v @ v))


def smallest_eigenvalue(gram: Dense) -> float:
    """The smallest eigenvalue of K."""
    if len(gram) > _SMALL:
        start = np.random.RandomState(0).standard_normal(len(gram))
        try:
            return float(eigsh(gram.matrix, k=1, which="SA", v0=start, tol=1e-8, return_eigenvectors=False)[0])
        except ArpackNoConvergence:
            pass
    return float(scipy.linalg.eigvalsh(gram.matrix, subset_by_index=(0, 0))[0])
