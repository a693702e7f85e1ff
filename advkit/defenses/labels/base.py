"""Defenses against poisoned labels, as ways to learn: `learner(seed)` gives an unfitted scikit-learn classifier.

Writing one takes a frozen dataclass with a `learner`:

    @dataclass(frozen=True, kw_only=True)
    class Forest(LabelDefense):
        trees: int = 100
        def learner(self, seed): return RandomForestClassifier(self.trees, random_state=seed)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from typing_extensions import override

from advkit.core.errors import NoTrainingData
from advkit.core.learners import fitted, seed_of
from advkit.core.protocols import Data, Learns, Rng
from advkit.models.learned import LearnedModel, flat


@dataclass(frozen=True, kw_only=True)
class LabelDefense(Learns, ABC):
    """A way to learn a classifier from labels of which some may have been flipped.

    The learner has scikit-learn's interface: fit(X, y, sample_weight=None) with X float64 [n, d] and y whole numbers
    [n], any of the task's classes and at least two of them; `classes_`, `predict`, and `decision_function` ([m] of two
    classes, else [m, classes]) or `predict_proba`. It never sees clean labels, and the same seed gives the same model.

    defends: it is made to withstand flipped labels; False of plain learners, the references
    duals:   fitted learners are kernel machines that can be read from the inside: `duals_` [n], the dual variable of
             each training sample, from 0 to `C`, and `gram(x, z)`, the kernel matrix [n, m]
    """

    needs_data: ClassVar[bool] = True
    claims: ClassVar[str] = ""
    duals: ClassVar[bool] = False
    defends: ClassVar[bool] = True

    @abstractmethod
    @override
    def learner(self, seed: int) -> Any:
        """A fresh classifier, not fitted; seed: of everything that it draws."""

    def ablation(self) -> LabelDefense | None:
        """The same defense without what makes it one, evaluated beside it (FLORAL without its attacker); or None."""
        return None

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> LearnedModel:
        """A model learned from the data's labels as they are; the one handed over is not used.

        Raises NoTrainingData where there are none.
        """
        from advkit.defenses import DEFENSES

        name = DEFENSES.label(self)
        if data is None:
            raise NoTrainingData(f"{name} learns from labels, and there is no training data: name a task that has some")
        learned = fitted(self.learner(seed_of(rng)), flat(data.x), data.y.cpu().numpy())
        return LearnedModel(learned, data.x, data.y, data.space, data.classes, name)
