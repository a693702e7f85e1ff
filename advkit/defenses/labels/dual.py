"""The dual of the kernel SVM: gradient steps under flipped labels, the offset of a dual point, and the optimum.

min_a 1/2 a^T Q a - 1^T a  with  Q = (y y^T) * K,  y^T a = 0,  0 <= a_i <= C_i;  f(x) = sum_i a_i y_i k(x_i, x) + b
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np

from advkit.defenses.labels.kernels import Dense, Gram, largest_eigenvalue
from advkit.defenses.labels.projection import Array, Method, projected

Bias = Literal["margin", "all_sv"]
SUPPORT: Final = 1e-5
"""Dual variables above this are support vectors, as in FLORAL's released code."""
_FREE: Final = 1e-8
"""Of C: a dual variable this far from both bounds is free, so that its sample lies on the margin."""


def objective(gram: Gram, a: Array, y: Array) -> float:
    """D(a; y) = 1/2 a^T Q a - 1^T a, which the SVM minimises."""
    signed = y * a
    return float(signed @ gram.times(signed) / 2 - a.sum())


def stepped(scores: Array, a: Array, y: Array, upper: Array, step: float, method: Method) -> Array:
    """One projected gradient step from a; scores: K (y * a)."""
    return projected(a - step * (y * scores - 1), y, upper, method)


def offset(scores: Array, a: Array, y: Array, upper: Array, rule: Bias) -> float:
    """The offset b of a dual point; scores: K (y * a).

    margin: the mean of y_i - scores_i over free dual variables, those of samples on the margin; where there are none,
    the middle of the interval that the optimality conditions leave. all_sv: the mean over all support vectors, those at
    their bound, too, as FLORAL's released code has it; it is no SVM's offset.
    """
    residual = y - scores
    if rule == "all_sv":
        chosen = a > SUPPORT
        if chosen.any():
            return float(residual[chosen].mean())
    free = (a > _FREE * upper) & (a < (1 - _FREE) * upper)
    if free.any():
        return float(residual[free].mean())
    at_zero = a <= _FREE * upper
    below = np.where(at_zero, y > 0, y < 0)  # b >= residual there, b <= residual elsewhere
    least = residual[below].max() if below.any() else None
    most = residual[~below].min() if not below.all() else None
    ends = [each for each in (least, most) if each is not None]
    return float(np.mean(ends)) if ends else 0.0


def best_offset(scores: Array, y: Array, upper: Array) -> float:
    """The b that makes the weighted hinge loss sum_i C_i max(0, 1 - y_i (scores_i + b)) smallest."""
    kinks = y - scores
    order = np.argsort(kinks, kind="stable")
    slope = np.cumsum(upper[order]) - upper[y > 0].sum()  # of the loss, right of each kink
    return float(kinks[order][min(int(np.searchsorted(slope, 0.0)), len(kinks) - 1)])


def gap(scores: Array, a: Array, y: Array, upper: Array) -> tuple[float, float]:
    """The duality gap of a dual point, at least 0, and the value of the dual that it is relative to."""
    norm = float((y * a) @ scores)
    hinge = np.maximum(0.0, 1 - y * (scores + best_offset(scores, y, upper)))
    value = float(a.sum()) - norm / 2
    return norm / 2 + float(upper @ hinge) - value, value


def svm(gram: Gram, y: Array, upper: Array, *, tol: float = 1e-4, most: int = 2000) -> Array:
    """The dual optimum of the SVM with labels -1 and +1 and bounds `upper` [n], all above 0.

    A dense kernel goes to scikit-learn's SVC. A factored one goes to accelerated projected gradient descent with
    restarts (O'Donoghue and Candes, arXiv 1204.3982), until the duality gap is `tol` of the value or `most` steps are
    done: LinearSVC, which is made for such kernels, penalises the offset and hands out no dual variables.
    """
    if isinstance(gram, Dense):
        return _by_svc(gram, y, upper, tol)
    # On vectors with y^T a = 0, K and the centred H K H are the same form, and y * constant is lost in the projection.
    step = 1 / max(largest_eigenvalue(gram, centred=True), np.finfo(float).tiny)
    a = ahead = np.zeros(len(y))
    speed = 1.0
    for done in range(1, most + 1):
        slope = y * gram.times(y * ahead) - 1
        new = projected(ahead - step * slope, y, upper)
        if (ahead - new) @ (new - a) > 0:  # the momentum points uphill
            speed = 1.0
        faster = (1 + np.sqrt(1 + 4 * speed * speed)) / 2
        ahead, a, speed = new + (speed - 1) / faster * (new - a), new, faster
        if done % 20 == 0:
            distance, value = gap(gram.times(y * a), a, y, upper)
            if distance <= tol * abs(value):
                break
    return a


def _by_svc(gram: Dense, y: Array, upper: Array, tol: float) -> Array:
    from sklearn.svm import SVC

    C = float(upper.max())
    # The first label is taken for positive, so that negated labels have the same dual variables to the last bit.
    machine = SVC(C=C, kernel="precomputed", tol=tol, random_state=0)  # which draws nothing; see `SVM`
    machine.fit(gram.matrix, y * y[0], sample_weight=upper / C)
    a = np.zeros(len(y))
    a[machine.support_] = np.abs(machine.dual_coef_[0])
    return np.minimum(a, upper)
