"""Several models as one: the mean of their logits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advkit.core.errors import BadModel
from advkit.core.protocols import Composite, KnowsClasses, ModelInfo


class Ensemble(Composite, KnowsClasses):
    """The mean of the logits of several models that share a space and answer the same classes.

    models: at least one; a member that cannot be differentiated as it is gives the attacker its attacker_view

    Raises BadModel where spaces or classes differ.
    """

    models: tuple[Any, ...] = ()
    classes: int | None = None

    def __init__(self, models: Sequence[Any], name: str = "") -> None:
        if not models:
            raise BadModel("an ensemble needs at least one model")
        self.models = tuple(models)
        self.space = self.models[0].space
        infos = [model.describe() for model in self.models]
        for info, model in zip(infos, self.models, strict=True):
            if model.space != self.space:
                raise BadModel(f"{info.name} takes {model.space}, {infos[0].name} takes {self.space}; they must agree")
        classes = {info.classes for info in infos if info.classes is not None}
        if len(classes) > 1:
            raise BadModel(f"the members answer different numbers of classes: {sorted(classes)}")
        self.classes = classes.pop() if classes else None
        self.name = name or "+".join(info.name for info in infos)

    def __repr__(self) -> str:
        return f"Ensemble({self.name})"

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([model(x) for model in self.models]).mean(dim=0)

    def attacker_view(self) -> Ensemble:
        views = [model.attacker_view() for model in self.models]
        if all(view is model for view, model in zip(views, self.models, strict=True)):
            return self
        return Ensemble(views, self.name)

    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(module for model in self.models for module in model.modules())

    def describe(self) -> ModelInfo:
        infos = [model.describe() for model in self.models]
        return ModelInfo(
            name=self.name,
            architecture="ensemble of " + " + ".join(info.architecture for info in infos),
            state_sha256=hashlib.sha256("|".join(info.state_sha256 for info in infos).encode()).hexdigest(),
            n_parameters=sum(info.n_parameters for info in infos),
            classes=self.classes,
            source="; ".join(dict.fromkeys(info.source for info in infos if info.source)),
            license="; ".join(dict.fromkeys(info.license for info in infos if info.license)),
            randomized=any(info.randomized for info in infos),
            differentiable=all(info.differentiable for info in infos),
            abstains=any(info.abstains for info in infos),
        )

    def to(self, device: torch.device | str) -> Ensemble:
        moved = [model.to(device) for model in self.models]
        if all(one is other for one, other in zip(moved, self.models, strict=True)):
            return self
        return Ensemble(moved, self.name)
