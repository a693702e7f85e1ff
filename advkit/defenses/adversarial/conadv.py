"""Concurrent adversarial learning for large batches (Liu et al., ICLR 2022, arXiv 2106.00221)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from advkit.attacks import ATTACKS
from advkit.core.checks import at_least, fraction, one_of
from advkit.core.protocols import Data, Rng
from advkit.defenses.adversarial.base import Mode, OnExamples, TrainingDefense, attacked
from advkit.defenses.adversarial.one_step import input_gradient
from advkit.models.torch import named_tensors
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.training.loop import Epoch, Objective, Review
from advkit.training.ranks import gathered
from advkit.training.second_norm import SecondNorm

COSINE = "stale_cosine"


class Branches:
    """A model and, where there are two branches, its second batch normalisation for adversarial inputs."""

    def __init__(self, model: Any, dual: bool) -> None:
        self.model = model
        self.second = SecondNorm(model.module) if dual else None

    def adversarial(self) -> Any:
        """Inside, the model is its adversarial branch."""
        return nullcontext() if self.second is None else self.second.active()

    def tensors(self) -> dict[str, Tensor]:
        """All that its outputs depend on, by name; not copied."""
        held = {f"model/{name}": tensor.detach() for name, tensor in named_tensors(self.model.module).items()}
        further = {} if self.second is None else self.second.tensors()
        return held | {f"second/{name}": tensor for name, tensor in further.items()}


class Schedule:
    """Which weights the attack on the batch of a step sees: those of tau steps before, the initial ones at first.

    One process makes examples when their batch comes, with stored weights. Several would make them tau steps ahead with
    the weights of that moment, which are the same: nothing else here knows how it is done.
    """

    def __init__(self, live: Branches, tau: int) -> None:
        self.live, self.tau = live, tau
        self._past: deque[dict[str, Tensor]] = deque(maxlen=tau + 1)
        self._seen = live
        if tau:
            self._seen = Branches(live.model.copy(), live.second is not None)
            self.advance()

    def seen(self) -> Branches:
        """The model as it was; the live one where tau is 0."""
        if self.tau:
            oldest = self._past[0]
            with torch.no_grad():
                for name, tensor in self._seen.tensors().items():
                    tensor.copy_(oldest[name])
        return self._seen

    def advance(self) -> None:
        """A step was made: keep the weights that it made."""
        if self.tau:
            self._past.append({name: tensor.clone() for name, tensor in self.live.tensors().items()})

    def state(self) -> dict[str, Tensor]:
        """The weights that steps to come will see; the oldest first."""
        return {f"{age:04d}/{name}": t for age, held in enumerate(self._past) for name, t in held.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in state.items():
            age, _, rest = name.partition("/")
            found.setdefault(age, {})[rest] = tensor
        self._past = deque((found[age] for age in sorted(found)), maxlen=self.tau + 1)


@dataclass(frozen=True, kw_only=True)
class ConAdv(TrainingDefense):
    """ConAdv: cross-entropy on clean images and on adversarial ones made with the weights of some steps before.

    Concurrent adversarial learning, made for very large batches, in which adversarial images are an augmentation and
    can be made on other machines while the step before is still running. No robustness is claimed; the default radius
    is small. One process makes both streams one after the other: the same mathematics, no gain of time. The paper
    trains with LARS (`optimizer=lars`).

    tau:     age of the weights that the attack sees, in steps, >= 0; 0 is the sequential method (DisAdv)
    weight:  of the adversarial loss, in [0, 1]; the clean one gets the rest
    dual_bn: adversarial images have batch normalisation of their own (AdvProp): statistics, scale and shift. The attack
             goes through it; evaluation and checkpoints have the clean one alone
    attack:  spec of the attack: fgsm, one step to the boundary, or any other, such as [pgd:steps=3,keep=last]
    mode:    "eval": the attack sees the model as it is evaluated; "train": as it is trained
    watch:   every so many steps, measure the cosine between the input gradients of the old and of the present weights
             (`stale_cosine` in the log); two more passes each time, 0 never
    """

    claims: ClassVar[str] = ""

    eps: float = 1 / 255
    tau: int = 1
    weight: float = 0.5
    dual_bn: bool = True
    attack: str = "fgsm"
    mode: Mode = "eval"
    watch: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "tau", "watch")
        fraction(self, "weight", ends="[]", what="weight")
        one_of(self, "mode", ("eval", "train"))
        _ = self.made_with

    @property
    def made_with(self) -> Any:
        """The attack."""
        return ATTACKS.build(self.attack)

    @override
    def objective(self) -> Objective:
        return ConAdvObjective(self)


class ConAdvObjective(OnExamples):
    """Clean and adversarial cross-entropy, the schedule of weights for the attack, and the second normalisation."""

    schedule: Schedule
    live: Branches

    def __init__(self, defense: ConAdv) -> None:
        super().__init__()
        self.defense = defense
        self.steps = 0
        self.cosines = torch.zeros(2, dtype=torch.float64)  # their sum and number

    @override
    def prepare(self, model: Any, data: Data, rng: Rng) -> None:
        """The initial weights are what the first tau steps see."""
        _ = self.defense.ball(model.space)
        self.live = Branches(model, self.defense.dual_bn)
        self.schedule = Schedule(self.live, self.defense.tau)

    @override
    def parameters(self) -> Sequence[nn.Parameter]:
        return () if self.live.second is None else self.live.second.parameters()

    @override
    def buffers(self) -> Sequence[Tensor]:
        return () if self.live.second is None else self.live.second.buffers()

    @override
    def examples(self, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        defense, seen = self.defense, self.schedule.seen()
        ball = defense.ball(model.space)
        with seen.adversarial():
            made = attacked(seen.model, defense.made_with, x, Untargeted(y), ball, rng.at("attack"), defense.mode)
        if defense.watch and self.steps % defense.watch == 0:
            self._compare(seen, x, y)
        return made

    def _compare(self, seen: Branches, x: Tensor, y: Tensor) -> None:
        """Note the mean cosine over the rows between old and present input gradients."""
        pair = []
        for branches in (seen, self.live):
            with branches.adversarial():
                pair.append(input_gradient(branches.model, x, y, "eval")[0].flatten(1))
        old, present = pair
        cosine = gathered(functional.cosine_similarity(old, present).double()).mean()
        self.cosines = self.cosines.to(cosine) + torch.stack((cosine, torch.ones_like(cosine)))

    @override
    def loss_on(self, made: Tensor, model: Any, x: Tensor, y: Tensor, rows: Tensor, rng: Rng) -> Tensor:
        weight = self.defense.weight
        clean = functional.cross_entropy(model(x), y)
        with self.live.adversarial():
            adversarial = functional.cross_entropy(model(made), y)
        return (1 - weight) * clean + weight * adversarial

    @override
    def stepped(self, model: Any) -> None:
        """The weights of this step are those that a later one sees."""
        self.steps += 1
        self.schedule.advance()

    @contextmanager
    @override
    def trial(self) -> Iterator[None]:
        """Of what is kept, a loss on examples moves the second statistics alone: the stored weights need no copies."""
        second, cosines = self.live.second, self.cosines
        held = {} if second is None else {name: tensor.clone() for name, tensor in second.tensors().items()}
        try:
            yield
        finally:
            self.cosines = cosines
            if second is not None:
                second.fill(held)

    @override
    def review(self, entry: Epoch, log: Sequence[Epoch]) -> Review:
        """The mean of the cosines that were measured."""
        total, number = self.cosines.tolist()
        self.cosines = torch.zeros_like(self.cosines)
        return Review({COSINE: total / number} if number else {})

    @override
    def state(self) -> dict[str, Tensor]:
        """The stored weights, the second normalisation and the count of steps."""
        second = {} if self.live.second is None else self.live.second.tensors()
        past = self.schedule.state()
        return (
            {"steps": torch.tensor(self.steps), "cosines": self.cosines}
            | {f"second/{name}": tensor for name, tensor in second.items()}
            | {f"past/{name}": tensor for name, tensor in past.items()}
        )

    @override
    def load(self, state: dict[str, Tensor]) -> None:
        """Take it back; of a run that is over, whose objective was never prepared, nothing is needed."""
        if "schedule" not in vars(self):
            return
        groups: dict[str, dict[str, Tensor]] = {"second": {}, "past": {}}
        for name, tensor in state.items():
            group, _, rest = name.partition("/")
            groups.setdefault(group, {})[rest] = tensor
        self.steps, self.cosines = int(state["steps"]), state["cosines"]
        if self.live.second is not None:
            self.live.second.fill(groups["second"])
        self.schedule.load(groups["past"])
