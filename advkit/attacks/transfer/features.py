"""Parts that attack the features of a layer instead of the answer.

Every one of them descends <h(z), w>, h being the layer's output. What makes up w differs: gradients of the score that
the goal wants lower (`Scored`), so that targeted goals are served, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from advkit.attacks.base import per_row
from advkit.attacks.transfer.engine import Ask, Composed, Objective, Run
from advkit.attacks.transfer.gradients import Scored
from advkit.attacks.transfer.layers import Steered, Tap, layer_named, packed
from advkit.core.checks import at_least_one, fraction, not_negative
from advkit.core.rows import PerRow


@dataclass(frozen=True, eq=False)
class Along(PerRow):
    """The goal of features [B, ...] far down a direction w [B, n]; its loss is <h, w>."""

    weight: Tensor
    kind: ClassVar[str] = "features"

    def loss(self, answer: Tensor) -> Tensor:
        """Float [B]."""
        return (answer.flatten(1) * self.weight.to(answer)).sum(1)

    def margin(self, answer: Tensor) -> Tensor:
        return self.loss(answer)

    def reached(self, answer: Tensor) -> Tensor:
        return self.loss(answer) < 0

    def under(self, loss: str) -> Along:
        return self


@dataclass(frozen=True)
class Layer:
    """A layer of the source during a run: its features, and gradients with respect to them."""

    run: Run
    module: nn.Module

    @classmethod
    def of(cls, run: Run, name: str, part: str) -> Layer:
        found: list[nn.Module] = []

        def look(model: Any) -> Any:
            found.append(layer_named(model, name, run.x, part))
            return model

        run.oracle.seen_as(look)
        return cls(run, found[0])

    def features(self, x: Tensor) -> Tensor:
        """h(x) [B, ...]; one answer."""
        answer: Tensor = self.run.oracle.seen_as(lambda model: Tap(model, self.module))(x)
        return answer

    def steered(self, shape: tuple[int, ...], keep: float = 1.0) -> tuple[Any, Steered]:
        """The oracle of the source with something added to its features, and how rows are packed for it."""
        made: list[Steered] = []

        def view(model: Any) -> Steered:
            made.append(Steered(model, self.module, tuple(self.run.x.shape[1:]), shape, keep))
            return made[0]

        return self.run.oracle.seen_as(view), made[0]

    def slopes(self, points: list[Tensor], goal: Any) -> Tensor:
        """The mean over the points of d loss / d h [B, n]; one gradient each."""
        shape = tuple(self._shape())
        oracle, view = self.steered(shape)
        nothing = self.run.x.new_zeros(len(self.run.x), int(torch.Size(shape).numel()))
        total = torch.zeros_like(nothing)
        for point in points:
            total = total + view.unpacked(oracle.gradient(packed(point, nothing), goal)[1])[1]
        return total / len(points)

    def _shape(self) -> torch.Size:
        shapes: list[torch.Size] = []

        def look(model: Any) -> Any:
            with torch.no_grad():
                shapes.append(Tap(model, self.module)(torch.zeros_like(self.run.x[:1])).shape[1:])
            return model

        self.run.oracle.seen_as(look)
        return shapes[0]

    def down(self, weight: Tensor) -> Ask:
        """Gradients of <h, w>, w [B, n]."""
        return self.run.asking(self.run.oracle.seen_as(lambda model: Tap(model, self.module)), Along(weight))


def unit(weight: Tensor) -> Tensor:
    """Every row divided by its L2 norm; a row of zeros stays."""
    length = weight.flatten(1).square().sum(1).sqrt()
    return weight / per_row(torch.where(length > 0, length, 1.0), weight)


@dataclass(frozen=True, kw_only=True)
class NAA(Objective):
    """Take away what the features contribute to the class, integrated from black to the image (neuron attribution,
    arXiv 2204.00008).

    layer:  name of a module of the source; empty: the one whose output is nearest to the middle in multiplications
    points: points on the way from black, >= 1

    The attribution goes down. PubDef's release ascends it and mixes the labels of the batch.
    """

    layer: str = ""
    points: int = 30

    def __post_init__(self) -> None:
        at_least_one(self, "points")

    def begin(self, run: Run) -> Ask:
        layer = Layer.of(run, self.layer, "naa")
        points = [run.x * (i / self.points) for i in range(1, self.points + 1)]
        return layer.down(layer.slopes(points, Scored(run.goal, soft=True)))


@dataclass(frozen=True, kw_only=True)
class FIA(Objective):
    """Take away features that matter to the class whichever pixels are dropped (feature importance, arXiv 2107.14185).

    layer: as in naa
    masks: random masks, >= 1
    keep:  probability that a value stays, in (0, 1]
    """

    layer: str = ""
    masks: int = 30
    keep: float = 0.7

    def __post_init__(self) -> None:
        at_least_one(self, "masks")
        fraction(self, "keep", what="probability")

    def begin(self, run: Run) -> Ask:
        layer = Layer.of(run, self.layer, "fia")
        points = [run.x * (run.rng.at("fia", i).uniform(run.x) < self.keep) for i in range(self.masks)]
        return layer.down(unit(layer.slopes(points, Scored(run.goal, soft=True))))


@dataclass(frozen=True, kw_only=True)
class BFA(Objective):
    """Take away features that matter to the class along a path across the boundary (black-box feature attack).

    layer:  as in naa
    points: points on the path, >= 1
    length: of one step on it, in L2, on a 3 x 224 x 224 image; scaled to the size at hand, >= 0
    """

    layer: str = ""
    points: int = 30
    length: float = 28.0

    def __post_init__(self) -> None:
        at_least_one(self, "points")
        not_negative(self, "length")

    def begin(self, run: Run) -> Ask:
        layer = Layer.of(run, self.layer, "bfa")
        length = self.length * (run.x[0].numel() / (3 * 224 * 224)) ** 0.5
        points, point = [], run.x
        for _ in range(self.points):
            point = run.x - length * unit(run.ask(point))
            points.append(point)
        return layer.down(unit(layer.slopes(points, Scored(run.goal))))


@dataclass(frozen=True, kw_only=True)
class ILA(Objective):
    """A second run from the clean row, along what an attack did to the features (intermediate level, arXiv 1907.10823).

    layer: as in naa
    base:  parts of the attack that runs first, with as many and as long steps
    """

    layer: str = ""
    base: tuple[str, ...] = ("mi",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "base", Composed(parts=self.base).parts)

    def begin(self, run: Run) -> Ask:
        layer = Layer.of(run, self.layer, "ila")
        base = Composed(parts=self.base, steps=run.steps, step_size=run.step_size)
        # The run's goal has its surrogate loss already.
        found = base.one_run(run.oracle, run.x, run.goal, run.ball, run.rng.at("ila"))
        return layer.down((layer.features(run.x) - layer.features(found)).flatten(1))


@dataclass(frozen=True, kw_only=True)
class ILPD(Objective):
    """Ask with features drawn back to those of the noisy origin (intermediate-level perturbation decay,
    arXiv 2304.13410).

    layer: as in naa
    keep:  weight of the candidate's own features, in [0, 1]
    noise: deviation of the origin's Gaussian noise, in units of the inputs, >= 0; drawn anew at every step
    """

    layer: str = ""
    keep: float = 0.1
    noise: float = 0.05

    def __post_init__(self) -> None:
        not_negative(self, "noise")
        fraction(self, "keep", ends="[]", what="weight")

    def begin(self, run: Run) -> Ask:
        return _Decayed(run, Layer.of(run, self.layer, "ilpd"), self.keep, self.noise)


@dataclass
class _Decayed:
    """Gradients of the goal's loss with features drawn back; the origin's are asked once per step."""

    run: Run
    layer: Layer
    keep: float
    noise: float
    at: int = -1
    reference: Tensor | None = None
    made: tuple[Ask, Steered] | None = field(default=None)

    def __call__(self, points: Tensor, copies: int = 1) -> Tensor:
        run = self.run
        if self.at != run.step or self.reference is None:
            noisy = run.x + self.noise * run.rng.at("ilpd", run.step).normal(run.x)
            self.reference = (1 - self.keep) * self.layer.features(noisy)
            self.at = run.step
        if self.made is None:
            oracle, view = self.layer.steered(tuple(self.reference.shape[1:]), self.keep)
            self.made = run.asking(oracle, run.goal), view
        ask, view = self.made
        added = self.reference.repeat(copies, *(1 for _ in self.reference.shape[1:]))
        return view.unpacked(ask(packed(points, added), copies))[0]
