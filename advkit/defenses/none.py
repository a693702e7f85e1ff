"""No defense: the reference that every other one is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from typing_extensions import override

from advkit.core.protocols import Data, Rng, Trains
from advkit.training.loop import Objective, Recipe
from advkit.training.recipes import BY_NAME


@dataclass(frozen=True, kw_only=True)
class NoDefense(Trains):
    """No defense: cross-entropy training where nothing is trained yet; a trained model is left as it is.

    recipe: how an architecture without weights is trained
    """

    needs_data: ClassVar[bool] = False
    claims: ClassVar[str] = ""

    recipe: Annotated[Recipe, BY_NAME] = field(default_factory=Recipe)

    @override
    def objective(self) -> Objective:
        """Cross-entropy on clean images, judged by clean accuracy."""
        return Objective()

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Any:
        """The model itself."""
        return model
