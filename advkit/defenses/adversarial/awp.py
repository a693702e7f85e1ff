"""Adversarial weight perturbation around any training defense (Wu et al., arXiv 2004.05884)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.checks import at_least, not_negative
from advkit.core.errors import NoTrainingData, UsageError
from advkit.core.protocols import Data, Rng, Trains, TrainsFront
from advkit.core.registry import parse_spec
from advkit.defenses.adversarial.base import OnExamples
from advkit.training.loop import Epoch, Objective, Recipe, Review, fit
from advkit.training.ranks import mean_of_batch
from advkit.training.recipes import BY_NAME

_TINY = 1e-20


def perturbed_names(module: nn.Module) -> list[str]:
    """The weights that are perturbed: trained, called "weight", of two dimensions or more. Biases and norms are not."""
    named = module.named_parameters()
    return [name for name, p in named if p.requires_grad and p.dim() > 1 and "weight" in name]


def perturbation(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """gamma |w| d / (|d| + 1e-20): up the gradient d of the loss, as long as gamma times the weight's own 2-norm."""
    length = gamma * torch.linalg.vector_norm(weight)
    move: Tensor = length * gradient / (torch.linalg.vector_norm(gradient) + _TINY)
    return move


@dataclass(frozen=True, kw_only=True)
class AWP(Trains):
    """AWP, adversarial weight perturbation: any training defense, its gradients taken at slightly worse weights.

    Before every step the weights move a little up the loss of the same batch, the gradient is taken there, the
    optimiser steps, and the move is taken back. The move of each weight tensor is gamma times as long as the tensor.
    Where the defense makes adversarial examples, they are made once, on the unperturbed weights. The authors' code
    trains a copy for one step to get the direction; here it is one gradient. Batch statistics move only in the second
    pass.

    base:    the defense it goes around: pgd_at, trades, mart..., with its settings in brackets: [trades:beta=6]
    gamma:   length of the move in units of each weight tensor's 2-norm, >= 0; 0.01 for pgd_at and 0.005 for trades in
             the paper; 0 is the base defense
    warm_up: epochs of the base defense before the first move
    recipe:  epochs, optimizer, schedule...; the base's own is not used
    """

    needs_data: ClassVar[bool] = True

    base: str = "pgd_at"
    gamma: float = 0.005
    warm_up: int = 0
    recipe: Annotated[Recipe, BY_NAME] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        not_negative(self, "gamma", what="length")
        at_least(self, 0, "warm_up")
        _ = self.based_on

    @property
    def based_on(self) -> Any:
        """The base defense under this one's recipe; raises UsageError where it trains nothing."""
        from advkit.defenses import DEFENSES

        given = cast(Any, self.base)
        built: Any = DEFENSES.build(given)
        if not isinstance(built, Trains) or type(built) is AWP:
            kind = "is awp itself" if type(built) is AWP else "trains nothing"
            raise UsageError(f"base={given} {kind}; expected a training defense such as pgd_at or [trades:beta=6]")
        if isinstance(built, TrainsFront):
            raise UsageError(
                f"base={given} trains what stands in front of a finished model, whose weights awp would move; expected "
                "a defense that trains the model, such as pgd_at or [trades:beta=6]"
            )
        if isinstance(given, str) and any(each.key == "recipe" for each in parse_spec(given).arguments):
            raise UsageError(f"base={given} has a recipe; set it outside of the brackets: recipe=[...]")
        return replace(cast(Any, built), recipe=self.recipe)

    @property
    def claims(self) -> str:
        """What the base claims."""
        return str(self.based_on.claims)

    @override
    def objective(self) -> Objective:
        return AWPObjective(self)

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Any:
        """The model trained further on the data; the one handed over keeps its weights.

        Raises NoTrainingData without data.
        """
        if data is None:
            raise NoTrainingData("AWP trains and the task has no training data at hand: give it some (root=FOLDER)")
        return fit(model, data, self.objective(), self.recipe, rng).model


class _Moved(NamedTuple):
    """A weight that was moved: the live parameter, its value before, and its value after the move."""

    live: Tensor
    before: Tensor
    after: Tensor


class AWPObjective(Objective):
    """The base's objective, its loss taken at perturbed weights."""

    def __init__(self, defense: AWP) -> None:
        super().__init__()
        self.defense = defense
        self.base: Objective = defense.based_on.objective()
        self.replays, self.rolls_back = self.base.replays, self.base.rolls_back
        self.whole, self.eager = self.base.whole, self.base.eager
        self.epochs = 0
        self.moved: list[_Moved] = []

    @override
    def prepare(self, model: Any, data: Data, rng: Rng) -> None:
        self.base.prepare(model, data, rng)

    @override
    def parameters(self) -> Sequence[nn.Parameter]:
        return self.base.parameters()

    @override
    def buffers(self) -> Sequence[Tensor]:
        return self.base.buffers()

    @override
    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        self._take_back()  # of a step that never came, where gradients of several batches are added up
        base = self.base
        if self.defense.gamma == 0 or self.epochs < self.defense.warm_up:
            return base.loss(model, x, y, rows, rng)
        if not isinstance(base, OnExamples):
            self._move(model, lambda: base.loss(model, x, y, rows, rng))
            return base.loss(model, x, y, rows, rng)
        made = base.examples(model, x, y, rows, rng)
        self._move(model, lambda: base.loss_on(made, model, x, y, rows, rng))
        return base.loss_on(made, model, x, y, rows, rng)

    def _move(self, model: Any, loss: Any) -> None:
        """Perturb the weights up the gradient of this loss, of which nothing else remains."""
        module = model.module
        live = [module.get_parameter(name) for name in perturbed_names(module)]
        if not live:
            return
        with _unmoved(model), self.base.trial(), torch.enable_grad():
            found = torch.autograd.grad(loss(), live, allow_unused=True)
        used = [(weight, gradient) for weight, gradient in zip(live, found, strict=True) if gradient is not None]
        with torch.no_grad():
            for (weight, _), gradient in zip(used, mean_of_batch([each for _, each in used]), strict=True):
                before = weight.detach().clone()
                weight.add_(perturbation(before, gradient, self.defense.gamma))
                self.moved.append(_Moved(weight, before, weight.detach().clone()))
        torch.clear_autocast_cache()  # which holds half-precision copies of the weights before

    def _take_back(self) -> None:
        """The optimiser's change since the move, added to the weights before it: exact where there was none."""
        with torch.no_grad():
            for live, before, after in self.moved:
                live.copy_(before + (live - after))
        self.moved = []

    @override
    def stepped(self, model: Any) -> None:
        self._take_back()
        self.base.stepped(model)

    @override
    def score(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        return self.base.score(model, x, y, rows, rng)

    @override
    def measures(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Mapping[str, Tensor]:
        return self.base.measures(model, x, y, rows, rng)

    @override
    def review(self, entry: Epoch, log: Sequence[Epoch]) -> Review:
        self.epochs += 1
        return self.base.review(entry, log)

    @override
    def state(self) -> dict[str, Tensor]:
        """The base's, and how many epochs are done."""
        return {"epochs": torch.tensor(self.epochs), **{f"base/{k}": v for k, v in self.base.state().items()}}

    @override
    def load(self, state: dict[str, Tensor]) -> None:
        self.epochs = int(state["epochs"])
        self.base.load({k.removeprefix("base/"): v for k, v in state.items() if k.startswith("base/")})

    @override
    def fingerprint(self) -> str:
        return f"{super().fingerprint()}{self.base.fingerprint()}"


@contextmanager
def _unmoved(model: Any) -> Iterator[None]:
    """Batch statistics and torch's generators are given back as they were: dropout draws the same units again."""
    buffers = [(buffer, buffer.clone()) for top in model.modules() for buffer in top.buffers()]
    devices = sorted({p.device.index or 0 for top in model.modules() for p in top.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        yield
    with torch.no_grad():
        for buffer, held in buffers:
            buffer.copy_(held)
