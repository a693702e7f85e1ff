"""Kernels of support vector machines as dense matrices, which learners and attacks on labels share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from advkit.core.checks import check, positive
from advkit.core.errors import BadInput

Floats = NDArray[np.float64]
Name = Literal["rbf", "linear", "poly"]

LARGEST = 4 * 2**30
"""Bytes that one dense kernel matrix may have."""


def check_dense(rows: int, columns: int, what: str) -> None:
    """BadInput where a kernel matrix of so many rows and columns in float64 would have more than `LARGEST` bytes.

    what: needs the matrix; begins the message
    """
    if 8 * rows * columns > LARGEST:
        most = int((LARGEST / 8) ** 0.5)
        raise BadInput(
            f"{what} needs a kernel matrix of {rows:,} x {columns:,} numbers ({8 * rows * columns / 2**30:.1f} GiB); "
            f"expected at most {LARGEST / 2**30:.0f} GiB: take {most:,} training samples or fewer"
        )


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel by name, as scikit-learn's SVC defines it.

    name:   "rbf" exp(-gamma |x - z|^2), "linear" x.z, "poly" (gamma x.z + coef0)^degree
    gamma:  above 0; None is scikit-learn's "scale", 1 / (d * variance of all training values)
    degree, coef0: of "poly"
    """

    name: Name = "rbf"
    gamma: float | None = None
    degree: int = 3
    coef0: float = 0.0

    def __post_init__(self) -> None:
        check(self, "name", self.name in ("rbf", "linear", "poly"), "one of rbf, linear, poly")
        positive(self, "gamma", "degree")

    def fitted(self, x: Floats) -> Kernel:
        """The same with a number for gamma, from the training samples x [n, d]."""
        if self.gamma is not None:
            return self
        variance = float(x.var())
        gamma = 1.0 / (x.shape[1] * variance) if variance > 0 else 1.0
        return Kernel(name=self.name, gamma=gamma, degree=self.degree, coef0=self.coef0)

    def __call__(self, x: Floats, z: Floats, what: str = "this kernel machine") -> Floats:
        """The matrix k(x_i, z_j), [n, m] float64; BadInput where it would be larger than `LARGEST` bytes.

        what: needs it; begins the message
        """
        check_dense(len(x), len(z), what)
        kernel = self.fitted(x)
        product: Floats = x @ z.T
        if kernel.name == "linear":
            return product
        assert kernel.gamma is not None
        if kernel.name == "poly":
            power: Floats = (kernel.gamma * product + kernel.coef0) ** kernel.degree
            return power
        apart = (x * x).sum(1)[:, None] + (z * z).sum(1)[None] - 2 * product
        close: Floats = np.exp(-kernel.gamma * np.maximum(apart, 0.0))
        return close
