"""What all defenses share that train a front for a model which may only be queried, and smooth the chain.

The chain is front(x), then the model. The front's loss needs a gradient at the place where the model takes over: an
`Estimator` says where it comes from. Whatever that is, the front is trained by the mean of <z, a> over the rows, where
z is what the front answers and the constant a is the gradient.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.checks import at_least_one, one_of, positive
from advkit.core.errors import BadModel, NoTrainingData, UsageError
from advkit.core.protocols import Data, Rng, Trains, TrainsFront
from advkit.core.rng import RowRng
from advkit.core.spaces import Box
from advkit.core.state import frozen
from advkit.core.zeroth_order import Estimate, Mode, cge, cge_queries, rge, rge_queries
from advkit.defenses.smoothing.base import SmoothingDefense
from advkit.models.fronts import Denoised, Denoiser, Front, Networks, Queries, load_front
from advkit.models.torch import TorchModel, as_model, check_mode, device_of, seeded
from advkit.training.loop import Epoch, Objective, Recipe, Review, correct, fit, validation_rows
from advkit.training.ranks import launched
from advkit.training.recipes import BY_NAME

log = logging.getLogger("advkit")

Answers = Literal["logits", "probabilities", "labels"]
QUERIES = "victim_queries"
"""In the log's figures: how often the model has been asked about a sample since the training began."""
_UNKNOWN = -1


class Reconstruction(Objective):
    """Mean squared error of an auto-encoder, over pixels and rows."""

    for_samples = True

    @override
    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        return F.mse_loss(model(x), x)


class Estimator(ABC):
    """Where the gradient of the loss at z comes from.

    at_images: z is the sample that the model gets, behind a decoder; else what the trained part of the front answers
    """

    at_images: ClassVar[bool] = False

    @abstractmethod
    def queries(self, d: int) -> int:
        """Queries for each row whose z has d numbers, the value at z included."""

    @abstractmethod
    def __call__(self, loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, rng: RowRng) -> Estimate:
        """Gradient and value at z [B, ...] of a loss (points [n, ...], of [n]) -> [n]."""


class FirstOrder(Estimator):
    """The gradient by differentiation: white box."""

    at_images = True

    def queries(self, d: int) -> int:
        return 1

    def __call__(self, loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, rng: RowRng) -> Estimate:
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            value = loss(leaf, torch.arange(len(z), device=z.device))
            if not value.requires_grad:
                raise UsageError(
                    "the model has no gradient (a function that is not torch's, or a web service), and this defense "
                    "differentiates it: use zo_ae_ds or zo_ds"
                )
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        return Estimate(gradient, value.detach(), 1)


@dataclass(frozen=True)
class RGE(Estimator):
    """Random directions; see `advkit.core.zeroth_order.rge`."""

    q: int
    mu: float
    antithetic: bool

    def queries(self, d: int) -> int:
        return rge_queries(self.q, antithetic=self.antithetic, value=True)

    def __call__(self, loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, rng: RowRng) -> Estimate:
        return rge(loss, z, rng, q=self.q, mu=self.mu, antithetic=self.antithetic, value=True)


@dataclass(frozen=True)
class CGE(Estimator):
    """Coordinates; see `advkit.core.zeroth_order.cge`."""

    mu: float
    mode: Mode

    def queries(self, d: int) -> int:
        return cge_queries(d, mode=self.mode, value=True)

    def __call__(self, loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, rng: RowRng) -> Estimate:
        return cge(loss, z, mu=self.mu, mode=self.mode, value=True)


def surrogate(z: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
    """A scalar with the value mean(value) and the gradient of a mean over rows whose gradient at z is the one given.

    z: [B, ...] with its graph; gradient: like z, constant; value: [B]
    """
    product = (z.flatten(1) * gradient.detach().flatten(1)).sum(1).mean()
    return value.mean() + product - product.detach()


class Terms(NamedTuple):
    """How much of the two losses there is, each >= 0.

    mse:       squared distance of denoised noisy samples to the clean ones, summed over pixels
    stability: cross-entropy of the chain's answers on noisy samples with the model's own on the clean ones; where
               answers are samples, their mean squared error to these
    """

    mse: float
    stability: float


@dataclass(frozen=True, kw_only=True)
class FrontDefense(SmoothingDefense, Trains, TrainsFront):
    """A defense that trains a front for a finished model, which is queried and never changed, and smooths the chain.

    A model that answers reconstructed samples has no classes to vote on: its chain is trained under noise, by the mean
    squared error of its answers, and answers without noise. `n_predict`, `alpha`, `draws`, `answers`, `votes` and
    `vote_sigma` have no meaning then.

    denoiser: mlp, on flattened samples, or dncnn, for images; the identity at first
    width:    units or channels of its layers; 0 for 256 of mlp, 64 of dncnn
    depth:    hidden layers of mlp, convolutions of dncnn; 0 for 2 of mlp, 17 of dncnn
    targets:  "model": what the model answers on clean samples, asked once for each; "labels": those of the data. Where
              answers are samples, the label is the clean sample, and the loss that of reconstruction
    answers:  what the model answers: logits, probabilities, or labels (rows whose largest entry is the class)
    votes:    of labels: the loss is that of the votes of so many copies of a sample under noise; the same noise for all
              points at which a row's loss is asked for
    vote_sigma: standard deviation of that noise
    budget:   queries of the model that training may make, those of validation included; none: as many as it takes
    weights:  file of a front that `advkit train` made; nothing is trained then
    recipe:   how the front is trained
    """

    denoiser: Denoiser = "mlp"
    width: int = 0
    depth: int = 0
    targets: Literal["model", "labels"] = "model"
    answers: Answers = "logits"
    votes: int = 16
    vote_sigma: float = 0.1
    budget: int | None = None
    weights: str = ""
    recipe: Annotated[Recipe, BY_NAME] = field(default_factory=lambda: Recipe(batch_size=64, lr=1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "targets", ("model", "labels"))
        one_of(self, "answers", ("logits", "probabilities", "labels"))
        at_least_one(self, "votes", "budget")
        positive(self, "vote_sigma", what="standard deviation")
        _ = self.networks, self.estimates
        if self.answers == "labels" and isinstance(self.estimates, FirstOrder) and self.terms.stability:
            raise UsageError("answers=labels, and labels have no gradient: use zo_ae_ds or zo_ds")

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether there is a front to train."""
        return not self.weights

    @property
    def networks(self) -> Networks:
        """What the front is made of."""
        return Networks(denoiser=self.denoiser, width=self.width, depth=self.depth)

    @property
    @abstractmethod
    def estimates(self) -> Estimator:
        """Where the gradient comes from."""

    @property
    def terms(self) -> Terms:
        """The losses."""
        return Terms(0.0, 1.0)

    @override
    def around(self, model: Any, data: Data, rng: Rng) -> Denoised:
        """The model behind a front that is the identity; an auto-encoder is another matter (`AutoEncoded`)."""
        model = as_model(model, data)
        check_mode(model)
        if model.describe().randomized:
            raise BadModel("the model's answers vary from call to call; expected one answer per input")
        shape = tuple(int(length) for length in data.x.shape[1:])
        front = seeded(lambda: self.networks.build(shape), rng.at("front")).eval()
        assert isinstance(front, Front)
        places = [device_of(top) for top in model.modules()]
        front.to(next((place for place in places if place is not None), torch.device("cpu")))
        return Denoised(front, model, self.networks)

    @override
    def objective(self) -> Objective:
        """The losses on the chain, made afresh."""
        return FrontObjective(self)

    @override
    def deploy(self, model: Any) -> Any:
        """The smoothed chain, with a count of queries of its own; the chain itself where answers are samples."""
        chain = model.apart() if isinstance(model, Denoised) else load_front(self.weights, model, self.networks)
        return chain if chain.answer_shape else super().deploy(chain)

    @override
    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Any:
        """The model behind a front that was trained on the data, deployed. Raises NoTrainingData without data."""
        if self.weights:
            return self.deploy(model)
        if data is None:
            raise NoTrainingData(
                f"{type(self).__name__} trains and the task has no training data at hand: give it some (root=FOLDER)"
            )
        chain = self.around(model, data, rng)
        return self.deploy(fit(chain, data, self.objective(), self.recipe, rng).model)


@dataclass(frozen=True, kw_only=True)
class AutoEncoded(FrontDefense):
    """A front with an auto-encoder, which makes the place where the gradient is estimated small.

    autoencoder: mlp, or conv (images 3x32x32 or 1x28x28)
    d_z:         numbers between encoder and decoder; 0 for 32 of mlp, 192 of conv
    hidden:      units of the hidden layers of an mlp auto-encoder
    pretraining: how the auto-encoder is trained on clean samples before
    train:       "whole": denoiser and encoder; "part": the denoiser alone. The decoder stays as it was pre-trained
    """

    autoencoder: Literal["mlp", "conv"] = "mlp"
    d_z: int = 0
    hidden: int = 128
    pretraining: Annotated[Recipe, BY_NAME] = field(
        default_factory=lambda: Recipe(epochs=20, batch_size=64, lr=1e-3, validation=0.0)
    )
    train: Literal["whole", "part"] = "whole"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "train", ("whole", "part"))
        if self.pretraining.validation:
            raise UsageError(
                f"pretraining: validation is {self.pretraining.validation}; expected 0, an auto-encoder has no accuracy"
            )

    @property
    @override
    def networks(self) -> Networks:
        return replace(super().networks, autoencoder=self.autoencoder, d_z=self.d_z, hidden=self.hidden)

    @override
    def around(self, model: Any, data: Data, rng: Rng) -> Denoised:
        """With an auto-encoder that is pre-trained on the data, by first-order steps; the model is not asked."""
        chain = super().around(model, data, rng)
        if not (isinstance(chain.space, Box) and chain.space.is_unit):
            raise UsageError(f"a decoder answers samples in [0, 1], and this model's space is {chain.space!r}")
        front = chain.front
        assert front.encoder is not None
        assert front.decoder is not None
        coder = TorchModel(
            nn.Sequential(front.encoder, front.decoder),
            chain.space,
            name="auto-encoder",
            answer_shape=data.answer_shape,
        )
        done = fit(coder, data, Reconstruction(), self.pretraining, rng.at("autoencoder"), progress=False)
        coder.module.load_state_dict(done.last.module.state_dict())
        log.info("the auto-encoder's mean squared error is %.4f", done.log[-1].loss)
        front.decoder.requires_grad_(False)
        if self.train == "part":
            front.encoder.requires_grad_(False)
        return chain


class FrontObjective(Objective):
    """The losses of a front; judged by correctness under noise. Counts every query of the model.

    The model's labels of clean samples are asked for once per sample and kept.
    """

    eager = "the chain asks a model that is not torch's to compile"
    for_samples = True

    def __init__(self, defense: FrontDefense) -> None:
        super().__init__()
        self.defense = defense
        self.estimator = defense.estimates
        self.labels = torch.empty(0, dtype=torch.long)
        self.recovered: Tensor | None = None
        self.queries = Queries()
        self.base = 0

    @override
    def prepare(self, model: Any, data: Data, rng: Rng) -> None:
        """Refuses what is no chain, a budget that does not pay the first epoch, and several processes."""
        if not isinstance(model, Denoised):
            raise BadModel(f"{type(model).__name__} has no front to train: use protect, or train what `around` makes")
        if launched():
            raise UsageError("queries of the model are counted in one process: train without torchrun")
        self.data, self.queries, self.base = data, model.queries, model.queries.spent
        self.held = validation_rows(len(data), self.defense.recipe.validation)
        self.labels = torch.full((len(data),), _UNKNOWN, dtype=torch.long)
        if model.answer_shape and self._asks_labels:
            if self.defense.recipe.augment != "none":
                raise UsageError(
                    "targets=model keeps the model's answers to the samples as they are, and "
                    f"augment={self.defense.recipe.augment} changes them: use targets=labels, or augment=none"
                )
            self.recovered = torch.zeros(len(data), *model.answer_shape, dtype=data.x.dtype)
        front = model.front
        with torch.no_grad():
            at = front.encode(data.x[:1].to(model.device))
        self.d = at[0].numel()
        first, budget = self._price(1), self.defense.budget
        if budget is not None and budget < first:
            raise UsageError(f"budget is {budget:,} queries; the first epoch takes {first:,}: raise it, or lower q")

    def _price(self, epoch: int) -> int:
        """Queries of an epoch: the losses of its rows, labels that are not known yet, validation."""
        defense, trained = self.defense, len(self.labels) - self.held
        copies = defense.votes if defense.answers == "labels" and not self.data.answer_shape else 1
        price = trained * self.estimator.queries(self.d) * copies if defense.terms.stability else 0
        if self._asks_labels:
            price += int((self.labels[self.held :] == _UNKNOWN).sum())
        if self.held and (epoch % defense.recipe.select_every == 0 or epoch == defense.recipe.epochs):
            price += 2 * self.held
        return price

    @property
    def _asks_labels(self) -> bool:
        return bool(self.defense.terms.stability) and self.defense.targets == "model"

    @property
    def spent(self) -> int:
        """Queries of the model since the training began."""
        return self.queries.spent - self.base

    def _within_budget(self) -> AbstractContextManager[None]:
        budget = self.defense.budget
        return self.queries.within(None if budget is None else budget - self.spent)

    def _targets(self, model: Denoised, x: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        """The classes [B], or the samples [B, ...], that answers on noisy samples are held against."""
        if not self._asks_labels:
            return x if model.answer_shape else y
        self.labels = self.labels.to(y.device)
        unknown = rows[self.labels[rows] == _UNKNOWN]
        if len(unknown):
            clean = self.data.x[unknown.to(self.data.x.device)].to(y.device)
            with torch.no_grad():
                answer = model.ask(clean)
            if self.recovered is None:
                self.labels[unknown] = answer.argmax(1)
            else:  # the label says no more than that the answer is known
                self.recovered = self.recovered.to(y.device)
                self.recovered[unknown] = answer.to(self.recovered.dtype)
                self.labels[unknown] = 0
        return self.labels[rows] if self.recovered is None else self.recovered.to(y.device)[rows]

    def _losses(self, model: Denoised, images: Tensor, of: Tensor, targets: Tensor, rng: Rng) -> Tensor:
        """Cross-entropy [n] of the model's answers with the targets of their rows; of samples, mean squared error."""
        answers, target = self.defense.answers, targets[of]
        if model.answer_shape:
            return (model.ask(images) - target).square().flatten(1).mean(1)
        if answers == "logits":
            return F.cross_entropy(model.ask(images), target, reduction="none")
        if answers == "probabilities":
            given = model.ask(images)
            if bool((given < 0).any()) or not torch.allclose(given.sum(1), given.new_ones(()), atol=1e-3):
                raise BadModel(
                    "answers=probabilities, and the model answers numbers that are negative or do not sum to 1: leave "
                    "answers out (logits), also for probabilities of a web service, which arrive as logarithms"
                )
            return F.nll_loss(given.clamp_min(torch.finfo(images.dtype).tiny).log(), target, reduction="none")
        hits = torch.zeros(len(images), device=images.device)
        classes = 1
        for vote in range(self.defense.votes):
            noise = self.defense.vote_sigma * self._vote_noise(images, rng, vote)
            answer = model.ask(images + noise[of])
            classes = answer.shape[1]
            hits += answer.argmax(1) == target
        # one vote shared by all classes keeps the logarithm finite
        return -((hits + 1 / classes) / (self.defense.votes + 1)).log()

    def _vote_noise(self, images: Tensor, rng: Rng, vote: int) -> Tensor:
        return rng.at("votes", vote).normal(images.new_empty(self.rows_here, *images.shape[1:]))

    @override
    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        assert isinstance(model, Denoised)
        assert isinstance(rng, RowRng)
        terms, front, estimator = self.defense.terms, model.front, self.estimator
        denoised = front.denoiser(x + self.defense.sigma * rng.at("noise").normal(x))
        total = x.new_zeros(())
        if terms.mse:
            total = total + terms.mse * (denoised - x).square().flatten(1).sum(1).mean()
        if not terms.stability:
            return total
        z = front.encode(denoised)
        if estimator.at_images:
            z = front.decode(z)
        self.rows_here = len(x)
        with self._within_budget():
            targets = self._targets(model, x, y, rows)

            def losses(points: Tensor, of: Tensor) -> Tensor:
                images = points if estimator.at_images else front.decode(points)
                return self._losses(model, images, of, targets, rng)

            with frozen(*model.victim.modules()):
                found = estimator(losses, z.detach(), rng.at("directions"))
        assert found.value is not None
        return total + terms.stability * surrogate(z, found.gradient, found.value)

    @override
    def score(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        """Correctness under noise; where answers are samples, 1 minus the error to the clean ones."""
        with self._within_budget():
            return correct(model, x + self.defense.sigma * rng.at("noise").normal(x), y, x)

    @override
    def review(self, entry: Epoch, log: Sequence[Epoch]) -> Review:
        """The queries so far, and the end of training where the budget does not pay another epoch."""
        defense = self.defense
        figures = {QUERIES: float(self.spent)}
        if defense.budget is None or entry.epoch >= defense.recipe.epochs:
            return Review(figures)
        price = self._price(entry.epoch + 1)
        if self.spent + price <= defense.budget:
            return Review(figures)
        halt = (
            f"the query budget of {defense.budget:,} does not pay another epoch: {self.spent:,} queries were made, and "
            f"the next epoch takes {price:,}"
        )
        return Review(figures, halt)

    @override
    def state(self) -> dict[str, Tensor]:
        """The model's labels, or its answers where they are samples, and the count of queries."""
        told = {} if self.recovered is None else {"recovered": self.recovered}
        return {"labels": self.labels, "queries": torch.tensor(self.spent), **told}

    @override
    def load(self, state: dict[str, Tensor]) -> None:
        self.labels, self.base = state["labels"].clone(), self.queries.spent - int(state["queries"])
        if "recovered" in state:
            self.recovered = state["recovered"].clone()
