"""How one change for all samples is learned on the attacker's own data (the gradient form of Shafahi et al.,
arXiv 1811.11304).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from advkit.attacks.base import TensorGoal, TensorOracle, per_row
from advkit.core.checks import at_least_one, positive
from advkit.core.errors import UsageError
from advkit.core.protocols import PerSample, Rng
from advkit.core.rng import RowRng
from advkit.threat_models.shared import Shared


@dataclass(frozen=True)
class Lessons:
    """The attacker's samples, each with the goal that it would have were it attacked.

    x:    [N, ...]
    goal: of these rows
    pays: which of the oracle's rows each counts for, long [N]: what is asked about the attacker's own data is shared
          out among the rows that are attacked
    """

    x: Tensor
    goal: TensorGoal
    pays: Tensor

    @classmethod
    def of(cls, oracle: TensorOracle, x: Tensor, rng: Rng, samples: int, attack: str) -> Lessons:
        """So many samples of the oracle's data, drawn; UsageError where there is none, or none like the rows x."""
        data = oracle.data
        if data is None or data.rule is None:
            raise UsageError(
                f"{attack} learns on labelled data of the attacker's own, and this task has no training set: use one "
                "that has, such as fashion-mnist or digits"
            )
        if data.x.shape[1:] != x.shape[1:]:
            raise UsageError(
                f"{attack} learns on samples of shape {tuple(data.x.shape[1:])} and attacks samples of shape "
                f"{tuple(x.shape[1:])}; expected equal"
            )
        rule = data.rule
        if isinstance(rule, PerSample) and rule.over(()) is not rule:
            raise UsageError(
                f"{attack} learns on samples that have no targets of their own: name a goal that makes some, such as "
                "untargeted or targeted:how=class,target=0"
            )
        generator = rng.at("samples").generator()
        chosen = torch.randperm(len(data.x), generator=generator)[:samples]
        # Streams of its own, by place in the draw: the rows that are attacked have nothing to do with what is learned.
        seed = int(torch.randint(1 << 62, (), generator=generator))
        streams = RowRng.from_ids(seed, [str(i) for i in range(len(chosen))], device=x.device)
        known, labels = data.x[chosen].to(x), data.y[chosen].to(x.device)
        pays = torch.arange(len(chosen)) % len(x)
        return cls(known, rule(labels, oracle(known, pays), streams), pays)

    def take(self, rows: Tensor) -> Lessons:
        """Some of them, long."""
        return Lessons(self.x[rows], self.goal.take(rows), self.pays[rows.cpu()])

    def batches(self, rng: Rng, steps: int, size: int) -> Iterator[tuple[int, Lessons]]:
        """`steps` batches, epoch by epoch in an order that is drawn for each."""
        done, epoch = 0, 0
        while done < steps:
            order = torch.randperm(len(self.x), generator=rng.at("order", epoch).generator()).to(self.x.device)
            for rows in torch.split(order, size)[: steps - done]:
                yield done, self.take(rows)
                done += 1
            epoch += 1


class Learns:
    """Settings of attacks that learn one change for all samples; a frozen dataclass below declares them in its order.

    samples:   of the attacker's data, at most, drawn; >= 1
    steps:     gradient steps, >= 1
    batch:     samples per step, >= 1
    step_size: length of the first step in the threat model's unit, > 0; it falls to 0
    clip:      a sample whose loss is below -clip pulls no more, > 0
    loss:      surrogate loss, of the goal's
    """

    samples: int
    steps: int
    batch: int
    step_size: float
    clip: float
    loss: str

    def __post_init__(self) -> None:
        at_least_one(self, "steps", "samples", "batch")
        positive(self, "clip")

    def learned(self, oracle: TensorOracle, x: Tensor, threat: Shared, rng: Rng, attack: str) -> Tensor:
        """The change that descends the goal's mean loss over the attacker's samples, by projected stochastic gradients.

        A step goes along the threat model's steepest direction; its length falls linearly from `step_size` to 0. A
        sample whose loss is below -clip pulls no more, so that one that has fallen far does not outweigh those that
        stand. `attack` is what errors call the attack.
        """
        lessons = Lessons.of(oracle, x, rng, self.samples, attack)
        change = threat.within(threat.blank(x, rng.at("start").generator()))
        for step, some in lessons.batches(rng, self.steps, self.batch):
            drawn = rng.at("step", step).generator()
            with torch.enable_grad():
                leaf = change.detach().clone().requires_grad_()
                z = threat.applied(leaf, some.x, drawn)
            losses, gradient, _ = oracle.gradient(z.detach(), some.goal.under(self.loss), some.pays)
            (back,) = torch.autograd.grad(z, leaf, gradient * per_row(losses > -self.clip, gradient))
            size = self.step_size * (1 - step / self.steps)
            change = threat.within(change + size * threat.direction(-back))
        return change
