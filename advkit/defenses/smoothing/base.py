"""What every smoothing defense shares: how the model answers. What is smoothed, the defense says.

A defense below it names its chain: the trained model itself (`smoothing`), or one behind a denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

from typing_extensions import override

from advkit.core.protocols import Data, Deploys, Rng
from advkit.models.smoothed import Kind, Smoothed, Smoothing


@dataclass(frozen=True, kw_only=True)
class SmoothingDefense(Deploys):
    """A defense whose model is a smoothed classifier.

    sigma:     standard deviation of the noise, > 0, in units of the inputs
    noise:     gaussian | lattice: whole-number noise for 8-bit images, whose certificates hold in floating point, too
    n_predict: draws of an answer under `evaluate`, >= 1; few draws abstain often, and fewer than 11 always
    alpha:     share of the answers that may be another class than the smoothed classifier's, in (0, 1)
    draws:     noisy copies that an attacker with gradients averages over in every query, >= 1

    Raises UsageError for values out of range.
    """

    needs_data: ClassVar[bool] = False
    claims: ClassVar[str] = ""

    sigma: float = 0.25
    noise: Kind = "gaussian"
    n_predict: int = 1000
    alpha: float = 0.001
    draws: int = 8

    def __post_init__(self) -> None:
        _ = self.settings

    @property
    def settings(self) -> Smoothing:
        """How a chain is smoothed."""
        return Smoothing(**{each.name: getattr(self, each.name) for each in fields(Smoothing)})

    @property
    @override
    def trained_as(self) -> Self:
        told: dict[str, Any] = {each.name: each.default for each in fields(Smoothing) if each.name != "sigma"}
        return replace(self, **told)

    @override
    def deploy(self, model: Any) -> Smoothed:
        """The smoothed model of a chain."""
        return Smoothed(model, self.settings)

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Any:
        """The trained model as it is; `deploy` smooths it."""
        return self.deploy(model)
