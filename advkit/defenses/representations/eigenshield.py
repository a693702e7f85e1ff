"""EigenShield-style filter of embeddings by random matrix theory (after Darabi et al., arXiv 2502.14976)."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from advkit.attacks import ATTACKS
from advkit.core.checks import at_least, at_least_one
from advkit.core.errors import BadInput, NoTrainingData, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Data, Radius, Rng
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.core.state import frozen
from advkit.models.projected import Projected, changed, default_place, embeddings, load_projected, projected, top_of
from advkit.models.spectral import Edge, Filter, Place, Projection, Score, Sigma, SpectralFilter, as_vectors, taken
from advkit.threat_models import THREAT_MODELS
from advkit.threat_models.goals.untargeted import Untargeted

_UNATTACKED = ("none", "noise")


@dataclass(frozen=True, kw_only=True)
class EigenShield:
    """EigenShield-style filter: embeddings are projected onto the directions that carry meaning and resist attacks.

    A covariance of clean training embeddings is compared with what noise would give (random matrix theory). Directions
    inside the bulk are dropped; of those above its edge, the ones along which a calibration attack moves samples most,
    compared with their natural spread, may be dropped, too. The weights of the model stay. The projection is
    differentiable: the headline is an adaptive attacker, who differentiates through it, and beside it stands one who
    attacks the model without it.

    module:             layer whose output is projected; empty takes the model's embedding, or what enters the layer of
                        the logits
    before:             project what enters `module`, as for the projector of a vision-language model
    edge:               tw (Tracy-Widom quantile) | mp (bare Marchenko-Pastur edge) | topk (the first `top`)
    level:              of the Tracy-Widom edge, in (0, 1)
    top:                eigenvectors of topk, >= 1
    sigma:              median | iterative: how the noise's variance is found
    rbns:               normalised | abs | corr: the nonconformity score; its formula is ours
    q:                  directions with scores up to this quantile stay, in (0, 1], 1 keeps all above the edge; auto
                        takes the smallest of 1, .95, .9, .75, .5, .25 that costs at most `max_clean_drop`
    max_clean_drop:     clean accuracy that auto may cost on validation samples, in [0, 1]
    center:             take the mean off before the projection
    weight:             of the projection in a blend with the embedding, in (0, 1]
    calibration:        training samples for the covariance, >= 2; 10 per dimension are better
    pairs:              of them, samples that are attacked for the scores, >= 1
    validation:         further training samples, which auto is judged on, >= 1
    tokens_per_image:   tokens drawn of each sample where a layer has tokens or maps, >= 1
    calibration_attack: attack on the model without the filter that the scores are of; noise (Gaussian, as long as the
                        radius allows) for scores that know of no attack; none keeps all directions
    threat_model:       of the calibration attack, a ball
    weights:            file of a fitted filter (`Projected.save`); empty fits on the task's training data

    Other than the paper, whose text on this was not to be had: the score, its quantile and auto are ours, and so are
    the Tracy-Widom edge and the blend. A calibration attack that is also the attack evaluated is an advantage: reports
    name it (`calibration_attack`).
    """

    claims: ClassVar[str] = ""

    module: str = ""
    before: bool = False
    edge: Edge = "tw"
    level: float = 0.99
    top: int = 0
    sigma: Sigma = "median"
    rbns: Score = "normalised"
    q: float | Literal["auto"] = "auto"
    max_clean_drop: float = 0.01
    center: bool = True
    weight: float = 1.0
    calibration: int = 4000
    pairs: int = 400
    validation: int = 1000
    tokens_per_image: int = 8
    calibration_attack: str = "pgd:steps=10"
    threat_model: str = "linf:eps=0.1"
    weights: str = ""

    def __post_init__(self) -> None:
        _ = self.settings
        at_least(self, 2, "calibration")
        at_least_one(self, "pairs", "validation", "tokens_per_image")
        if self.before and not self.module:
            raise UsageError("before=true says that what enters a layer is projected: name the layer, module=NAME")
        if self.calibration_attack not in _UNATTACKED:
            ATTACKS.build(self.calibration_attack)
        threat = THREAT_MODELS.build(self.threat_model)
        if not isinstance(threat, Radius) or not hasattr(threat, "project"):
            raise UsageError(f"threat_model is {self.threat_model}; expected a ball, such as linf:eps=0.1")

    @property
    def settings(self) -> SpectralFilter:
        """How the filter is fitted to embeddings."""
        return SpectralFilter(**{each.name: getattr(self, each.name) for each in fields(SpectralFilter)})

    @property
    def needs_data(self) -> bool:
        """Unless a fitted filter is named."""
        return not self.weights

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Projected:
        """The model with the filter, fitted on the data unless `weights` names one; the model itself is not changed.

        Raises NoTrainingData without data, BadInput for too few, UsageError for layers that the model does not have.
        """
        if self.weights:
            return load_projected(self.weights, model)
        if data is None:
            raise NoTrainingData(
                "eigenshield fits a filter to training embeddings and the task has no training data at hand: give it "
                "some (root=FOLDER), or name a fitted filter (weights=FILE)"
            )
        place = Place(self.module, self.before) if self.module else default_place(model)
        return projected(model, self.fitted(model, data, place, rng), place)

    def fitted(self, model: Any, data: Data, place: Place, rng: Rng) -> Filter:
        """The filter of a model's embeddings at a place.

        Calibration and validation samples are disjoint, and drawn from the data by rng. Raises BadInput for too few.
        """
        order = torch.randperm(len(data), generator=rng.at("samples").generator(), device="cpu")
        held_out = min(self.validation, len(data) // 4) if self.q == "auto" else 0
        chosen = order[held_out : held_out + self.calibration]
        if self.q == "auto" and not held_out:
            raise BadInput(
                f"q=auto is judged on a fourth of the training samples, and there are {len(data)} in all: give "
                "more, or say q=1 or another number"
            )
        x, y = data.x[chosen], data.y[chosen]
        pairs = min(self.pairs, len(x))
        z = embeddings(model, x, place)
        vectors, drawn = as_vectors(z, self.tokens_per_image, rng.at("tokens").generator())
        attacked = None
        if self.calibration_attack != "none":
            moved = embeddings(model, self.attacked(model, x[:pairs], y[:pairs], rng), place)
            attacked = (taken(z[:pairs], drawn[:pairs]), taken(moved, drawn[:pairs]))
        return self.settings.fit(
            vectors, attacked, _Agreement(model, place, data.x[order[:held_out]], data.y[order[:held_out]])
        )

    def attacked(self, model: Any, x: Tensor, y: Tensor, rng: Rng) -> Tensor:
        """Rows under the calibration attack on the model as it is."""
        seed = int(torch.randint(2**62, (), generator=rng.at("attack").generator(), device="cpu"))
        streams = RowRng.from_ids(seed, [f"calibration-{row}" for row in range(len(x))])
        threat: Any = THREAT_MODELS.build(self.threat_model)
        ball = threat.bind(model.space)
        if self.calibration_attack == "noise":
            noise = streams.at("noise").normal(x)
            noise = noise / noise.flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1)) * _longest(threat, x)
            space = model.space
            moved: Tensor = x + noise
            return space.clamp(moved) if isinstance(space, Box) else moved
        attack: Any = ATTACKS.build(self.calibration_attack)
        # No row stops once it is misclassified: the scores are of the whole displacement.
        with frozen(*model.modules()):
            found: Tensor = attack(MeteredOracle(model, rows=len(x), decides=False), x, Untargeted(y), ball, streams)
        return found.detach()


def _longest(threat: Any, x: Tensor) -> float:
    """The largest L2 norm that a ball allows."""
    norm = threat.describe().get("norm")
    return float(threat.eps) * (math.sqrt(x[0].numel()) if norm == "Linf" else 1.0)


@dataclass(frozen=True)
class _Agreement:
    """Clean accuracy on validation samples with a projection, or without."""

    model: Any
    place: Place
    x: Tensor
    y: Tensor

    def __call__(self, projection: Projection | None) -> float:
        with torch.no_grad():
            right = [self._answers(rows, projection).argmax(1) for rows in torch.split(self.x, 256)]
        return float((torch.cat(right) == self.y).double().mean()) if right else 1.0

    def _answers(self, rows: Tensor, projection: Projection | None) -> Tensor:
        if projection is None:
            answer: Tensor = self.model(rows)
            return answer
        with changed(top_of(self.model, self.place.module), self.place, projection):
            again: Tensor = self.model(rows)
        return again
