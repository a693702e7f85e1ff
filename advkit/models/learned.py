"""A fitted scikit-learn classifier as a model, with a view that has gradients (BPDA, arXiv 1802.00420)."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advkit.core.kernels import Kernel
from advkit.core.learners import Constant, scores
from advkit.core.protocols import KnowsClasses, ModelInfo
from advkit.models.views import straight_through

Floats = NDArray[np.float64]
RIDGE = 1e-3
"""Weight of the penalty of the view's kernel regression, of a kernel whose diagonal is 1."""
ANCHORS = 1000
"""Training samples at most that the regression is fitted to: every k-th where there are more."""


def flat(x: Tensor) -> Floats:
    """Rows as a learner sees them: float64 [B, d]."""
    rows: Floats = x.detach().to("cpu", torch.float64).flatten(1).numpy()
    return rows


class LearnedModel(KnowsClasses):
    """A fitted classifier with scikit-learn's interface: rows in, a score for every class out, float32.

    It has no gradient. An attacker who wants one gets a view that answers the same scores and has the derivative of a
    kernel regression (rbf, ridge) which was fitted to these scores on the training samples.

    learner: fitted
    x:       what it was fitted to, [n, ...]; y: its labels, long [n]
    space, classes: of the task
    name:    for reports
    """

    def __init__(self, learner: Any, x: Tensor, y: Tensor, space: Any, classes: int, name: str) -> None:
        self.learner, self.space, self._classes, self.name = learner, space, classes, name
        self._x, self._y = flat(x), y.detach().cpu().numpy().astype(np.int64)

    def __repr__(self) -> str:
        return f"LearnedModel({self.name}, {len(self._x)} training samples, {self._classes} classes)"

    @property
    def classes(self) -> int | None:
        return self._classes

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(scores(self.learner, flat(x), self._classes)).float().to(x.device)

    def attacker_view(self) -> _View:
        """The same answers with the derivative of a kernel regression."""
        return self._view

    @cached_property
    def _view(self) -> _View:
        return _View(self, self._x[:: -(-len(self._x) // ANCHORS)])

    def modules(self) -> tuple[()]:
        return ()

    def describe(self) -> ModelInfo:
        """Known by what it answers on its training samples."""
        return self._info

    @cached_property
    def _info(self) -> ModelInfo:
        digest = hashlib.sha256(f"learned|{self.name}|{self._classes}|{self._x.shape}".encode())
        for array in (self._x, self._y, scores(self.learner, self._x, self._classes)):
            digest.update(np.ascontiguousarray(array).tobytes())
        return ModelInfo(
            name=self.name,
            architecture="none" if isinstance(self.learner, Constant) else type(self.learner).__name__,
            state_sha256=digest.hexdigest(),
            n_parameters=0,
            classes=self._classes,
            source="scikit-learn interface",
            differentiable=False,
        )

    def to(self, device: torch.device | str) -> LearnedModel:
        """Itself: it computes on the CPU and answers where the rows are."""
        return self


class _View(KnowsClasses):
    """See `LearnedModel`."""

    def __init__(self, model: LearnedModel, anchors: Floats) -> None:
        self.model, self.space = model, model.space
        kernel = Kernel().fitted(anchors)
        assert kernel.gamma is not None
        every = scores(model.learner, anchors, model.classes or 0)
        self._offset = every.mean(0)
        gram = kernel(anchors, anchors, "the attacker's view") + RIDGE * np.eye(len(anchors))
        self._gamma, self._anchors = kernel.gamma, torch.from_numpy(anchors)
        self._weights = torch.from_numpy(np.linalg.solve(gram, every - self._offset))
        self._answer = straight_through(model, self._smooth)

    @property
    def classes(self) -> int | None:
        return self.model.classes

    def _smooth(self, x: Tensor) -> Tensor:
        rows = x.flatten(1).double()
        anchors, weights = self._anchors.to(x.device), self._weights.to(x.device)
        apart = rows.square().sum(1, keepdim=True) + anchors.square().sum(1) - 2 * rows @ anchors.T
        answer: Tensor = torch.exp(-self._gamma * apart.clamp(min=0)) @ weights
        return answer.float()

    def __call__(self, x: Tensor) -> Tensor:
        return self._answer(x)

    def attacker_view(self) -> _View:
        return self

    def modules(self) -> tuple[()]:
        return ()

    def describe(self) -> ModelInfo:
        return self.model.describe()

    def to(self, device: torch.device | str) -> _View:
        return self
