"""Single-step adversarial training: FGSM-AT (Goodfellow et al., arXiv 1412.6572), FGSM-RS (Wong et al., arXiv
2001.03994) and N-FGSM (de Jorge et al., arXiv 2202.01181) as one step with other settings."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from advkit.core.checks import not_negative, one_of, positive
from advkit.core.protocols import Rng
from advkit.defenses.adversarial.base import Mode
from advkit.defenses.adversarial.one_step import Move, Step, take
from advkit.defenses.adversarial.watched import WatchedObjective, WatchedTraining, abnormal, row_losses
from advkit.training.loop import Objective
from advkit.training.ranks import gathered


@dataclass(frozen=True, kw_only=True)
class OneStepTraining(WatchedTraining):
    """Training on the end of one step away from every image.

    mode: "train": the step sees the model as it is trained, and moves batch statistics, as in the authors' codes;
          "eval": as it is evaluated
    """

    mode: Mode = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self, "norm", ("linf", "l2", "l1"))
        one_of(self, "mode", ("eval", "train"))

    @property
    @abstractmethod
    def step(self) -> Step:
        """The step trained on."""

    @override
    def objective(self) -> Objective:
        return OneStepObjective(self)


class OneStepObjective(WatchedObjective):
    """Cross-entropy at the end of the step: two forward and two backward passes."""

    def __init__(self, defense: OneStepTraining) -> None:
        super().__init__(defense)
        self.step, self.mode = defense.step, defense.mode

    @override
    def loss(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        ball = self.defense.ball(model.space)
        move = take(model, x, y, ball, self.step, rng, self.mode)
        return self.outer(model, x, y, move, model(move.end), rng)

    def outer(self, model: Any, x: Tensor, y: Tensor, move: Move, after: Tensor, rng: Rng) -> Tensor:
        """The scalar to descend, and a note of the abnormal rows; `after` are the logits at the step's end, with their
        graph."""
        self.note(gathered(abnormal(row_losses(move.before, y), row_losses(after.detach(), y))))
        return functional.cross_entropy(after, y)


@dataclass(frozen=True, kw_only=True)
class SingleStep(OneStepTraining):
    """A plain single-step method: a start, a step, and whether its end is clipped.

    noise:     radius of the random start, in units of eps
    step_size: length of the step, in units of eps
    """

    clip: ClassVar[bool] = True

    noise: float = 0.0
    step_size: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "noise", what="length in units of eps")
        positive(self, "step_size", what="length in units of eps")

    @property
    @override
    def step(self) -> Step:
        return Step(self.noise, self.step_size, self.clip)


@dataclass(frozen=True, kw_only=True)
class FGSMAT(SingleStep):
    """FGSM adversarial training: cross-entropy after one step of length eps from the image.

    The known failing case: it overfits catastrophically (FGSM accuracy rises, PGD accuracy goes to zero) at radii at
    which the methods with a random start do not yet.
    """


@dataclass(frozen=True, kw_only=True)
class FGSMRS(SingleStep):
    """FGSM-RS, fast adversarial training: one step of 1.25 eps from a random start in the ball, clipped to the ball.

    Overfits catastrophically at large eps. The authors' code draws the start of every channel up to the first
    channel's eps; here eps is one radius in the model's own space.
    """

    noise: float = 1.0
    step_size: float = 1.25


@dataclass(frozen=True, kw_only=True)
class NFGSM(SingleStep):
    """N-FGSM: one step of length eps from a random start in twice the ball; the end is not clipped to the ball.

    So it trains on points up to 3 eps away from the image (always inside the space), and is evaluated within eps.
    """

    clip: ClassVar[bool] = False

    noise: float = 2.0
