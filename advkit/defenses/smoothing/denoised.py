"""Denoised smoothing and ZO-AE-DS: smoothing of a model that is finished, or may only be queried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from typing_extensions import override

from advkit.core.checks import at_least_one, one_of, positive
from advkit.core.zeroth_order import Mode
from advkit.defenses.smoothing.fronts import CGE, RGE, AutoEncoded, Estimator, FirstOrder, FrontDefense, Terms


@dataclass(frozen=True, kw_only=True)
class DenoisedSmoothing(FrontDefense):
    """Denoised smoothing: a denoiser before a finished model, the chain smoothed (Salman et al., arXiv 2003.01908).

    loss:  "mse": the denoised sample near the clean one, for which the model is not asked; "stability": the chain's
           answer on noisy samples is the model's on clean ones, which differentiates the model; "both": their sum
    gamma: weight of stability in "both", > 0
    """

    loss: Literal["mse", "stability", "both"] = "stability"
    gamma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "loss", ("mse", "stability", "both"))
        positive(self, "gamma", what="weight")

    @property
    @override
    def estimates(self) -> Estimator:
        return FirstOrder()

    @property
    @override
    def terms(self) -> Terms:
        return {"mse": Terms(1.0, 0.0), "stability": Terms(0.0, 1.0), "both": Terms(1.0, self.gamma)}[self.loss]


@dataclass(frozen=True, kw_only=True)
class FirstOrderDS(FrontDefense):
    """FO-DS: denoised smoothing by stability, with the model's gradients: the white-box reference of ZO-DS."""

    @property
    @override
    def estimates(self) -> Estimator:
        return FirstOrder()


@dataclass(frozen=True, kw_only=True)
class FirstOrderAEDS(AutoEncoded):
    """FO-AE-DS: denoised smoothing with an auto-encoder, with the model's gradients: the reference of ZO-AE-DS."""

    @property
    @override
    def estimates(self) -> Estimator:
        return FirstOrder()


@dataclass(frozen=True, kw_only=True)
class ZerothOrder(FrontDefense):
    """A front trained by values alone: the model may be any function, such as a web service.

    estimator:  rge, random directions; or cge, every number of the place where the gradient is estimated
    q:          directions of rge, >= 1
    mu:         length of a step, > 0
    antithetic: rge by differences to both sides, 2 q + 1 queries in place of q + 1
    mode:       cge: "central", 2 d + 1 queries, or "forward", d + 1
    """

    estimator: Literal["rge", "cge"] = "rge"
    q: int = 20
    mu: float = 0.005
    antithetic: bool = False
    mode: Mode = "central"

    def __post_init__(self) -> None:
        one_of(self, "estimator", ("rge", "cge"))
        one_of(self, "mode", ("central", "forward"))
        at_least_one(self, "q")
        positive(self, "mu", what="length of a step")
        super().__post_init__()

    @property
    @override
    def estimates(self) -> Estimator:
        return RGE(self.q, self.mu, self.antithetic) if self.estimator == "rge" else CGE(self.mu, self.mode)


@dataclass(frozen=True, kw_only=True)
class ZODS(ZerothOrder):
    """ZO-DS: denoised smoothing of a black box; the gradient is estimated at the denoised sample, by values alone.

    Images have many numbers, and the estimate is poor: the baseline of ZO-AE-DS (arXiv 2203.14195).
    """


@dataclass(frozen=True, kw_only=True)
class ZOAEDS(ZerothOrder, AutoEncoded):
    """ZO-AE-DS: denoised smoothing of a black box behind an auto-encoder (Zhang et al., arXiv 2203.14195).

    The gradient is estimated at the code of the auto-encoder, by values of the decoder and the model alone. As in the
    released code the loss is stability alone, and cge takes central differences: 2 d_z + 1 queries for each sample and
    epoch where the paper's text says d_z + 1. Reports have the true number. Other than in the released code, cge is not
    divided by the number of coordinates, labels of clean samples are asked for once, and checkpoints are chosen on
    validation rows.
    """

    estimator: Literal["rge", "cge"] = "cge"
