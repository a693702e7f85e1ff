"""What every training defense shares: settings, the inner attack, and judging a checkpoint by its robustness."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from advkit.attacks.gradient.pgd import PGD, Start
from advkit.core.checks import check, one_of, positive
from advkit.core.errors import NoTrainingData
from advkit.core.lanes import Lanes
from advkit.core.meter import Meter
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Ball, Data, Goal, Rng, Trains
from advkit.core.state import frozen
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.transfer import BALLS, Norm
from advkit.training.loop import Objective, Recipe, fit
from advkit.training.recipes import BY_NAME

Mode = Literal["eval", "train"]


@contextmanager
def in_mode(model: Any, training: bool) -> Iterator[None]:
    """The model's modules in training or evaluation mode inside the block; every module's own mode is given back."""
    held = [(module, module.training) for top in model.modules() for module in top.modules()]
    if any(mode != training for _, mode in held):  # else it would cost as much as a small network's layer
        for top in model.modules():
            top.train(training)
    try:
        yield
    finally:
        for module, mode in held:
            if module.training != mode:
                module.training = mode


def attacked(
    model: Any, attack: Any, x: Tensor, goal: Goal[Tensor], ball: Ball[Tensor], rng: Rng, mode: Mode = "eval"
) -> Tensor:
    """Adversarial rows on a model that is being trained: parameters frozen, mode given back.

    The whole batch goes through at once: a training step depends on its batch anyway. No row stops early: a loss is
    taken on rows that are wrong already, too.
    """
    with in_mode(model, mode == "train"), frozen(*model.modules()):
        lanes = Lanes(chunk=max(1, len(x)), multiple=1)
        meter = Meter(len(x), looks=False)  # nobody asks it: a step of training keeps no record
        oracle = MeteredOracle(model, rows=len(x), decides=False, lanes=lanes, meter=meter)
        found: Tensor = attack(oracle, x, goal, ball, rng)
    return found.detach()


def correct_under(model: Any, attack: Any, x: Tensor, y: Tensor, ball: Ball[Tensor], rng: Rng) -> Tensor:
    """Bool [B]: rows still classified right after the attack, asked anew."""
    goal = Untargeted(y)
    with in_mode(model, False), frozen(*model.modules()):
        found = attack(MeteredOracle(model, rows=len(x)), x, goal, ball, rng)
        answer = MeteredOracle(model, rows=len(x))(found)
    return answer.argmax(1) == y


@dataclass(frozen=True, kw_only=True)
class TrainingDefense(Trains, ABC):
    """A defense that is a way to train.

    eps:    radius of the ball trained for, > 0, in units of the model's space
    norm:   linf | l2 | l1 | l0
    recipe: epochs, optimizer, schedule...
    """

    needs_data: ClassVar[bool] = True

    eps: float = 8 / 255
    norm: Norm = "linf"
    recipe: Annotated[Recipe, BY_NAME] = field(default_factory=Recipe)

    def __post_init__(self) -> None:
        one_of(self, "norm", tuple(BALLS))
        positive(self, "eps", what="radius")
        _ = self.ball(None)

    def ball(self, space: Any) -> Ball[Tensor]:
        """The ball trained for, inside a model's space."""
        made: Ball[Tensor] = BALLS[self.norm](eps=self.eps)
        return made if space is None else made.bind(space)

    @override
    @abstractmethod
    def objective(self) -> Objective:
        """The loss to train with, made afresh."""

    def protect(self, model: Any, data: Data | None, rng: Rng, /) -> Any:
        """The model trained further on the data; the one handed over keeps its weights.

        Raises NoTrainingData without data.
        """
        if data is None:
            raise NoTrainingData(
                f"{type(self).__name__} trains and the task has no training data at hand: give it some (root=FOLDER)"
            )
        return fit(model, data, self.objective(), self.recipe, rng).model


@dataclass(frozen=True, kw_only=True)
class AdversarialTraining(TrainingDefense):
    """Training on examples that PGD makes on the model as it stands.

    steps:     gradient steps of the inner attack
    step_size: in units of eps; 0 stands for 2.5 / steps
    mode:      "eval": the inner attack sees the model as it is evaluated, batch statistics untouched; "train": as it is
               trained, which moves them
    """

    steps: int = 10
    step_size: float = 0.0
    mode: Mode = "eval"

    start: ClassVar[Start] = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "step_size", self.step_size >= 0, "a positive number, or 0 for 2.5 / steps")
        _ = self.attack  # whose own settings are checked where it is made
        one_of(self, "mode", ("eval", "train"))

    @property
    def claims(self) -> str:
        """The threat model it trains against."""
        return f"{self.norm}:eps={self.eps!r}"

    @property
    def attack(self) -> PGD:
        """The inner attack: the last point of the walk, no early stop."""
        length = self.step_size or 2.5 / max(1, self.steps)
        return PGD(steps=self.steps, step_size=length, start=self.start, keep="last", stop=False)


class OnExamples(Objective, ABC):
    """A loss in two parts: examples are made on the model as it stands, then there is a loss on them.

    So a loss may be taken twice on the same examples (`awp`).
    """

    @abstractmethod
    def examples(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Any:
        """What the loss is taken on, constant: mostly adversarial rows [B, ...]."""

    @abstractmethod
    def loss_on(self, made: Any, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        """The scalar to descend, on what `examples` made of the same batch."""

    @override
    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        return self.loss_on(self.examples(model, x, y, rows, rng), model, x, y, rows, rng)


class RobustObjective(Objective):
    """A training loss whose checkpoints are judged by correctness under PGD on the validation split."""

    def __init__(self, defense: AdversarialTraining) -> None:
        super().__init__()
        self.defense = defense
        self.attack = defense.attack
        self.judge = PGD(steps=self.attack.steps, step_size=self.attack.step_size)

    def score(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        """1.0 where a row is still right after PGD with as many steps as in training, else 0.0."""
        ball = self.defense.ball(model.space)
        return correct_under(model, self.judge, x, y, ball, rng.at("judge")).to(torch.float32)


class Misclassified(OnExamples, RobustObjective):
    """A loss on the examples by which the defense's own attack raises the cross-entropy."""

    @override
    def examples(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        ball = self.defense.ball(model.space)
        return attacked(model, self.attack, x, Untargeted(y), ball, rng.at("attack"), self.defense.mode)
