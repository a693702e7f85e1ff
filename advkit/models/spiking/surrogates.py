"""Backward rules of a spike: fixed surrogates, PDSG (arXiv 2503.03272), and rules of rates and of adaptive width.

A spike is a step; its derivative is zero or none. A rule says what stands for it in the backward pass and never changes
the forward pass. Which rule a network was trained with can't be read off its file: it is the attacker's choice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from advkit.core.errors import UsageError
from advkit.models.spiking import RULES

Leak = float | Tensor
"""1 / tau: a number, or the tensor [] that a parametric neuron learns; 0 without leak."""


@dataclass(frozen=True, kw_only=True)
class Dynamics:
    """The constants of a neuron, as a rule may use them.

    threshold:    a potential this high fires
    reset:        where a spike puts the potential (hard reset); None: it is lowered (soft)
    lowered:      by how much a soft reset lowers it; None: by the threshold
    decay_input:  whether the input leaks as the potential does
    detach_reset: whether gradients leave out the spike inside the reset
    strict:       fire above the threshold only, not at it
    """

    threshold: float = 1.0
    reset: float | None = 0.0
    lowered: float | None = None
    decay_input: bool = False
    detach_reset: bool = False
    strict: bool = False

    @property
    def rest(self) -> float:
        """Where the potential starts and leaks to."""
        return 0.0 if self.reset is None else self.reset

    @property
    def height(self) -> float:
        """From rest to threshold."""
        return self.threshold - self.rest

    @property
    def step(self) -> float:
        """What a soft reset takes away."""
        return self.threshold if self.lowered is None else self.lowered

    def fires(self, potential: Tensor, out: Tensor | None = None) -> Tensor:
        """Which of the charged potentials spike, 1.0 or 0.0; into `out` where it is given."""
        out = torch.empty_like(potential) if out is None else out
        if self.strict:
            return torch.gt(potential, self.threshold, out=out)
        return torch.ge(potential, self.threshold, out=out)


@dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """What stands for the derivative of a spike with respect to its potential: slopes, or a rate's gradient."""

    @abstractmethod
    def start(self) -> Stepper:
        """The slopes of a neuron that is called once per time step; UsageError where the rule needs all steps."""

    def entered(self, rows: int) -> Rule:
        """The rule for one call of a model on that many rows."""
        return self

    def _one_by_one(self) -> UsageError:
        return UsageError(
            f"the surrogate {RULES.label(self)} needs all time steps of a layer at once, and this network is "
            "called step by step: use pdsg or a fixed surrogate, or a network in multi-step mode"
        )


@dataclass(frozen=True, kw_only=True)
class SlopeRule(Rule):
    """A rule of slopes, which travel back through time with the potential.

    detach_reset: whether gradients leave out the spike inside the reset; none: as the victim was made
    """

    pointwise: ClassVar[bool] = False
    """Whether the slope at a potential depends on that potential alone."""
    remembers: ClassVar[bool] = False
    """Whether slopes depend on the attack's earlier steps."""

    detach_reset: bool | None = None

    @abstractmethod
    def slopes(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        """h [T, B, ...] from the potentials after charging and before the reset, [T, B, ...] or broadcastable to it."""

    def start(self) -> Stepper:
        if not self.pointwise:
            raise self._one_by_one()
        return Stepper(self)

    def detached(self, dynamics: Dynamics) -> bool:
        """Whether gradients of a neuron with these constants leave out the spike inside the reset."""
        return dynamics.detach_reset if self.detach_reset is None else self.detach_reset


@dataclass(frozen=True, kw_only=True)
class RateRule(Rule):
    """A rule that gives the gradient of a layer's input directly; nothing travels back through time."""

    @abstractmethod
    def input_gradient(
        self, upstream: Tensor, potentials: Tensor, spikes: Tensor, mean_input: Tensor, dynamics: Dynamics, leak: Leak
    ) -> Tensor:
        """Gradient of a layer's input [T, B, ...].

        upstream, potentials, spikes: [T, B, ...], of the layer's output and from its forward pass
        mean_input: [B, ...], over the time steps
        """

    def start(self) -> Stepper:
        raise self._one_by_one()


class Stepper:
    """Slopes of one layer, one time step after the other."""

    def __init__(self, rule: SlopeRule) -> None:
        self.rule = rule

    def __call__(self, potential: Tensor, dynamics: Dynamics) -> Tensor:
        """h [B, ...] at the next time step."""
        return self.rule.slopes(potential[None], dynamics)[0]


def _positive(rule: Rule, *names: str) -> None:
    for name in names:
        value = getattr(rule, name)
        if not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{type(rule).__name__.lower()}: {name} is {value}; expected a positive number")


def atan_slope(distance: Tensor, alpha: float | Tensor) -> Tensor:
    """alpha / (2 (1 + (pi alpha u / 2)^2)) at a distance u from the threshold."""
    return alpha / (2 + 2 * (distance * (math.pi / 2 * alpha)).square())


@dataclass(frozen=True, kw_only=True)
class ATan(SlopeRule):
    """Arctangent surrogate: alpha / (2 (1 + (pi alpha u / 2)^2)) at a distance u from the threshold.

    alpha: twice the peak; the larger the narrower, > 0
    """

    pointwise: ClassVar[bool] = True
    alpha: float = 2.0

    def __post_init__(self) -> None:
        _positive(self, "alpha")

    def slopes(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        return atan_slope(potentials - dynamics.threshold, self.alpha)


@dataclass(frozen=True, kw_only=True)
class Sigmoid(SlopeRule):
    """Sigmoid surrogate: alpha s (1 - s) with s = sigmoid(alpha u) at a distance u from the threshold.

    alpha: four times the peak, > 0
    """

    pointwise: ClassVar[bool] = True
    alpha: float = 4.0

    def __post_init__(self) -> None:
        _positive(self, "alpha")

    def slopes(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        s = torch.sigmoid((potentials - dynamics.threshold) * self.alpha)
        return self.alpha * s * (1 - s)


@dataclass(frozen=True, kw_only=True)
class Rect(SlopeRule):
    """Rectangular surrogate: 1 / width where |u| < width / 2, a box of unit area around the threshold.

    width: of the box, > 0
    """

    pointwise: ClassVar[bool] = True
    width: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "width")

    def slopes(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        inside = (potentials - dynamics.threshold).abs() < self.width / 2
        return inside.to(potentials.dtype) / self.width


def triangle_slope(potentials: Tensor, threshold: float, width: float) -> Tensor:
    """max(0, 1 - |u| / width) / width."""
    return (1 - (potentials - threshold).abs() / width).clamp_min(0) / width


@dataclass(frozen=True, kw_only=True)
class Triangle(SlopeRule):
    """Triangular surrogate: max(0, 1 - |u| / width) / width, of unit area around the threshold.

    width: half of its base, > 0
    """

    pointwise: ClassVar[bool] = True
    width: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "width")

    def slopes(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        return triangle_slope(potentials, dynamics.threshold, self.width)


def _bell(distance: Tensor, deviation: float | Tensor, centre: float) -> Tensor:
    """The normal density of a deviation, its mean `centre` deviations from 0."""
    # In units of the deviation, so that a network rescaled by a power of two gets rescaled slopes to the last bit.
    return (-0.5 * (distance / deviation - centre).square()).exp() / (math.sqrt(2 * math.pi) * deviation)


@dataclass(frozen=True, kw_only=True)
class Gaussian(SlopeRule):
    """Gaussian surrogate: a normal density around the threshold.

    deviation: its standard deviation, > 0
    """

    pointwise: ClassVar[bool] = True
    deviation: float = 0.5

    def __post_init__(self) -> None:
        _positive(self, "deviation")

    def slopes(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        return _bell(potentials - dynamics.threshold, self.deviation, 0.0)


class Running:
    """Count, mean and sum of squared deviations of values that come in portions (Chan et al., 1979)."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = torch.empty(0)
        self.squares = torch.empty(0)

    def add(self, count: int, mean: Tensor, squares: Tensor) -> None:
        """A portion of so many values, its mean and its sum of squared deviations from that."""
        if not self.count:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total = self.count + count
        gap = mean - self.mean
        self.squares = torch.add(self.squares + squares, gap.square(), alpha=self.count * count / total)
        self.mean = torch.add(self.mean, gap, alpha=count / total)
        self.count = total

    def deviation(self, otherwise: float) -> Tensor:
        """Sample standard deviation (divisor n - 1); `otherwise` where there is none, or none beyond round-off."""
        if self.count < 2:
            return torch.full_like(self.mean, otherwise)
        found = (self.squares / (self.count - 1)).sqrt()
        # The mean of equal values may be off by its last bits, which is no spread.
        spread = found > 8 * torch.finfo(found.dtype).eps * self.mean.abs()
        return torch.where(spread, found, otherwise)


@dataclass(frozen=True, kw_only=True)
class PDSG(SlopeRule):
    """PDSG: a Gaussian as wide as the potentials spread, its centre half a deviation above the threshold (arXiv
    2503.03272).

    The deviation at a time step is that of the layer's charged potentials up to that step, and gradients treat it as a
    constant. Wherever it is zero, or of one value only, the height of the threshold above rest takes its place: 1 at
    the usual constants, as in the released code, and of the potentials' own unit at others.

    stats: whose potentials: "sample", every row's own, over the positions of a channel (maps [B, C, H, W] and tokens
           [B, L, C]) or over the features [B, F]; "batch", as published: of all rows together, and for [B, F] per
           feature. Then a row's adversarial example depends on its company, and padding counts as rows
    shift: centre above the threshold, in deviations
    """

    stats: Literal["sample", "batch"] = "sample"
    shift: float = 0.5

    def __post_init__(self) -> None:
        if self.stats not in ("sample", "batch"):
            raise UsageError(f"pdsg: stats is {self.stats!r}; expected sample or batch")
        if not math.isfinite(self.shift):
            raise UsageError(f"pdsg: shift is {self.shift}; expected a finite number")

    def slopes(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        return _bell(potentials - dynamics.threshold, self.deviations(potentials, dynamics), self.shift)

    def start(self) -> Stepper:
        return _Spread(self)

    def deviations(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        """The standard deviation at every time step, broadcastable to the potentials [T, B, ...]."""
        count, mean, squares = self.moments(potentials)
        running = Running()
        found = []
        for each in zip(mean.unbind(0), squares.unbind(0), strict=True):
            running.add(count, *each)
            found.append(running.deviation(dynamics.height))
        return torch.stack(found)

    def moments(self, potentials: Tensor) -> tuple[int, Tensor, Tensor]:
        """Per time step: number of values, their mean, their squared deviations from it summed; reduced axes kept."""
        axes = self._reduced(potentials.ndim)
        if not axes:
            return 1, potentials, torch.zeros_like(potentials)
        mean = potentials.mean(axes, keepdim=True)
        squares = (potentials - mean).square_().sum(axes, keepdim=True)
        return math.prod(potentials.shape[axis] for axis in axes), mean, squares

    def _reduced(self, dimensions: int) -> tuple[int, ...]:
        """Axes of [T, B, ...] beside time."""
        batch = self.stats == "batch"
        if dimensions <= 3:  # [T, B, F], or [T, B]
            return (1,) if batch else tuple(range(2, dimensions))
        places = (2,) if dimensions == 4 else tuple(range(3, dimensions))  # tokens [T, B, L, C], maps [T, B, C, ...]
        return (1, *places) if batch else places


class _Spread(Stepper):
    """PDSG's slopes one time step after the other."""

    def __init__(self, rule: PDSG) -> None:
        super().__init__(rule)
        self.pdsg = rule
        self.running = Running()

    def __call__(self, potential: Tensor, dynamics: Dynamics) -> Tensor:
        count, mean, squares = self.pdsg.moments(potential[None])
        self.running.add(count, mean[0], squares[0])
        return _bell(potential - dynamics.threshold, self.running.deviation(dynamics.height), self.pdsg.shift)


@dataclass(frozen=True, kw_only=True)
class RGA(RateRule):
    """RGA, rate gradient approximation: the slope follows from a neuron's mean input; no gradient flows through time.

    With the mean input x in units of the threshold's height and l = 1 - 1 / tau: (1 - gamma (1 - l)) / (1 + l) where
    1 - l <= x <= 2, gamma where 0 <= x < 1 - l, 0 elsewhere. Published for a hard reset to zero and inputs that do not
    leak; elsewhere heights are measured from rest and inputs after their leak.

    gamma: slope below the rate's onset, >= 0
    """

    gamma: float = 0.2

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise UsageError(f"rga: gamma is {self.gamma}; expected 0 or more")

    def input_gradient(
        self, upstream: Tensor, potentials: Tensor, spikes: Tensor, mean_input: Tensor, dynamics: Dynamics, leak: Leak
    ) -> Tensor:
        rate = mean_input * leak if dynamics.decay_input else mean_input
        rate = rate / dynamics.height
        slope = torch.as_tensor((1 - self.gamma * leak) / (2 - leak), dtype=rate.dtype, device=rate.device)
        low = torch.as_tensor(self.gamma, dtype=rate.dtype, device=rate.device)
        h = torch.where(rate >= leak, slope, low) * ((rate >= 0) & (rate <= 2))
        return _leaked(upstream * (h / dynamics.height), dynamics, leak)


@dataclass(frozen=True, kw_only=True)
class BPTR(RateRule):
    """BPTR: gradients pass unchanged through neurons that spiked at least once, and not through the others."""

    def input_gradient(
        self, upstream: Tensor, potentials: Tensor, spikes: Tensor, mean_input: Tensor, dynamics: Dynamics, leak: Leak
    ) -> Tensor:
        return _leaked(upstream * (spikes.amax(0) > 0), dynamics, leak)


@dataclass(frozen=True, kw_only=True)
class HART(RateRule):
    """HART: a triangle without recursion through time, the input's gradient averaged over the time steps of every
    layer.

    gamma: half of the triangle's base, > 0. The released code tries 48 values on the test set and keeps the best; one
           value is used here, and it stands in the report
    """

    gamma: float = 1.0

    def __post_init__(self) -> None:
        _positive(self, "gamma")

    def input_gradient(
        self, upstream: Tensor, potentials: Tensor, spikes: Tensor, mean_input: Tensor, dynamics: Dynamics, leak: Leak
    ) -> Tensor:
        mean = (upstream * triangle_slope(potentials, dynamics.threshold, self.gamma)).mean(0)
        return _leaked(mean, dynamics, leak).expand_as(upstream)


def _leaked(gradient: Tensor, dynamics: Dynamics, leak: Leak) -> Tensor:
    return gradient * leak if dynamics.decay_input else gradient


@dataclass(frozen=True, kw_only=True)
class ASSG(SlopeRule):
    """ASSG: an arctangent whose width follows the distance from the threshold over an attack's steps, per neuron and
    time step (arXiv 2512.22522).

    Running averages of |u| (from 1) and of its deviation from that (from 0) give the width that keeps a share of the
    area near them. They live as long as one call of the attack; a model asked for one gradient starts afresh.

    share:  of the area of the ATan within the averages' reach, in (0, 1)
    spread: deviations added to the mean
    memory: weight of what was averaged so far, in [0, 1)
    """

    remembers: ClassVar[bool] = True
    share: float = 0.8
    spread: float = 1.5
    memory: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise UsageError(f"assg: share is {self.share}; expected a number between 0 and 1")
        if not 0 <= self.memory < 1:
            raise UsageError(f"assg: memory is {self.memory}; expected a number in [0, 1)")
        if not self.spread >= 0:
            raise UsageError(f"assg: spread is {self.spread}; expected 0 or more")

    def adapted(self, distance: Tensor, mean: Tensor, deviation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slopes at a distance from the threshold, and both averages after it."""
        size = distance.abs()
        mean = self.memory * mean + (1 - self.memory) * size
        deviation = self.memory * deviation + (1 - self.memory) * (size - mean).abs()
        reach = (2 / math.pi) * math.tan(math.pi / 2 * self.share)
        return atan_slope(distance, reach / (mean + self.spread * deviation + 1e-4)), mean, deviation

    def slopes(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        distance = potentials - dynamics.threshold
        return self.adapted(distance, torch.ones_like(distance), torch.zeros_like(distance))[0]

    def memory_of(self, rows: int) -> Memory:
        """A fresh memory for one attack on that many rows."""
        return Memory(self, rows)


class Memory:
    """What ASSG knows of the rows of one attack, layer by layer.

    rows:  how many
    state: per layer, mean and deviation [T, rows, ...]
    """

    def __init__(self, rule: ASSG, rows: int, state: list[tuple[Tensor, Tensor]] | None = None) -> None:
        self.rule = rule
        self.rows = rows
        self.state = state or []
        self._next = 0

    @property
    def remembering(self) -> Remembering:
        """The rule that reads and writes this memory."""
        return Remembering(held=self, detach_reset=self.rule.detach_reset)

    def rewind(self) -> None:
        """The next call of the model starts with the first row."""
        self._next = 0

    def take(self, rows: Tensor) -> Memory:
        """What is known of some of the rows (long or bool index)."""
        picked = rows.nonzero().squeeze(1) if rows.dtype == torch.bool else rows
        state = [(mean[:, picked.to(mean.device)], dev[:, picked.to(dev.device)]) for mean, dev in self.state]
        return Memory(self.rule, len(picked), state)

    def turn(self, rows: int) -> int:
        """First row of a call on that many; rows beyond the last are padding."""
        start, self._next = self._next, self._next + rows
        if start >= self.rows:
            raise UsageError(
                "assg follows an attack's samples in order; it can't follow several candidates of one sample"
            )
        return start


@dataclass(frozen=True, kw_only=True)
class Remembering(SlopeRule):
    """ASSG with the memory of an attack."""

    remembers: ClassVar[bool] = True
    held: Memory
    first: int = 0
    layers: list[int] | None = None

    def entered(self, rows: int) -> Rule:
        return replace(self, first=self.held.turn(rows), layers=[]) if torch.is_grad_enabled() else self

    def slopes(self, potentials: Tensor, dynamics: Dynamics) -> Tensor:
        if self.layers is None:
            raise UsageError("a rule with a memory is used through a model's with_rule, so that it knows the samples")
        memory, layer = self.held, len(self.layers)
        self.layers.append(layer)
        distance = potentials - dynamics.threshold
        if layer == len(memory.state):
            whole = (len(distance), memory.rows, *distance.shape[2:])
            memory.state.append((distance.new_ones(whole), distance.new_zeros(whole)))
        mean, deviation = memory.state[layer]
        rows = torch.arange(self.first, self.first + distance.shape[1], device=distance.device)
        rows = rows.clamp(max=memory.rows - 1)  # padding repeats the last row
        slopes, new_mean, new_deviation = memory.rule.adapted(distance, mean[:, rows], deviation[:, rows])
        real = slice(0, min(distance.shape[1], memory.rows - self.first))
        place = slice(self.first, self.first + len(rows[real]))
        mean[:, place], deviation[:, place] = new_mean[:, real], new_deviation[:, real]
        return slopes


_ACTIVE: ContextVar[Rule | None] = ContextVar("advkit_surrogate", default=None)


def active_rule() -> Rule | None:
    """The rule that the current context asks for; None where every neuron keeps its own."""
    return _ACTIVE.get()


@contextmanager
def use_surrogate(rule: Rule | str) -> Iterator[Rule]:
    """Every spiking network called inside gets this backward rule; outside, and after an exception, what was before.

    rule: an object or its spec, such as "pdsg" or "atan:alpha=50"
    """
    chosen = RULES.build(rule)
    token = _ACTIVE.set(chosen)
    try:
        yield chosen
    finally:
        _ACTIVE.reset(token)
