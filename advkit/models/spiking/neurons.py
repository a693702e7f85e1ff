"""Leaky integrate-and-fire neurons, exact: charge, fire, reset; stateless from call to call.

At every time step with input X and potential V from before: U = V - (V - r) / tau + X, or U = V + (X - (V - r)) / tau
where the input leaks, too; S = 1[U >= threshold]; then V = r where it spiked (hard reset) or U - threshold S (soft).
The backward pass is one operation for all time steps, or plain autograd step by step (`fused=False`): the same numbers.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from advkit.core.errors import BadModel
from advkit.models.spiking import RULES
from advkit.models.spiking.ruled import Ruled
from advkit.models.spiking.surrogates import Dynamics, RateRule, Rule, SlopeRule, Stepper, active_rule


class _Leak:
    """1 / tau, kept as it is applied: a division by a number, a multiplication by what was learned, or nothing.

    rate:  1 / tau as a number or a tensor []; 0 without leak
    """

    def __init__(self, tau: float | None, rate: Tensor | None) -> None:
        self.tau = tau
        self.tensor = rate
        self.rate: float | Tensor = rate if rate is not None else 0.0 if tau is None else 1 / tau

    def of(self, value: Tensor) -> Tensor:
        """value / tau."""
        return value * self.tensor if self.tensor is not None else value / (self.tau or math.inf)

    def charged(self, potential: Tensor | None, x: Tensor, dynamics: Dynamics) -> Tensor:
        """U; potential None before the first step, where it is at rest."""
        rest = dynamics.rest
        if potential is None:
            x = self.of(x) if dynamics.decay_input else x
            return x + rest if rest else x
        if self.tensor is None and self.tau is None:
            return potential + x
        away = potential - rest if rest else potential
        if dynamics.decay_input:
            return potential + self.of(x - away)
        return potential - self.of(away) + x

    def charge(self, out: Tensor, potential: Tensor | None, x: Tensor, dynamics: Dynamics) -> None:
        """The same into `out`, without memory of its own."""
        if potential is None or (self.tensor is None and self.tau is None):
            out.copy_(self.charged(potential, x, dynamics))
            return
        rest = dynamics.rest
        if dynamics.decay_input:
            torch.sub(x, potential, out=out)
            if rest:
                torch.sub(x, potential - rest, out=out)
            self._of_inplace(out).add_(potential)
            return
        if self.tau == 2 and not rest:
            # One pass in place of four; halving is exact, so these are the same bits.
            torch.add(x, potential, alpha=0.5, out=out)
            return
        out.copy_(potential)
        if rest:
            out.sub_(rest)
        self._of_inplace(out)
        torch.sub(potential, out, out=out).add_(x)

    def _of_inplace(self, value: Tensor) -> Tensor:
        return value.mul_(self.tensor) if self.tensor is not None else value.div_(self.tau or math.inf)


def _simulated(x: Tensor, leak: _Leak, dynamics: Dynamics, keep: bool) -> tuple[Tensor, Tensor]:
    """Charged potentials and spikes [T, B, ...]; without `keep` the potentials of the last step alone."""
    spikes = torch.empty_like(x, memory_format=torch.contiguous_format)
    potentials = torch.empty_like(spikes) if keep else spikes.new_empty((1, *spikes.shape[1:]))
    after: Tensor | None = None
    for t in range(len(x)):
        charged = potentials[t if keep else 0]
        leak.charge(charged, after, x[t], dynamics)
        fired = dynamics.fires(charged, spikes[t])
        if t + 1 < len(x):
            # Products with the spikes, which on a CPU take a fifth of what filling by a mask does.
            after = torch.empty_like(charged) if after is None else after
            if dynamics.reset is None:
                torch.sub(charged, fired, alpha=dynamics.step, out=after)
            else:
                torch.addcmul(charged, charged, fired, value=-1, out=after)
                if dynamics.reset:
                    after.add_(fired, alpha=dynamics.reset)
    return potentials, spikes


class _Spiking(torch.autograd.Function):
    """All time steps of a layer: the exact recursion backwards, one fused operation per step."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rate: Tensor | None, tau: float | None, dynamics: Dynamics, rule: Rule) -> Tensor:
        potentials, spikes = _simulated(x, _Leak(tau, rate), dynamics, keep=True)
        ctx.dynamics, ctx.rule, ctx.tau = dynamics, rule, tau
        slopes = rule.slopes(potentials, dynamics) if isinstance(rule, SlopeRule) and rule.remembers else None
        inputs = None
        if isinstance(rule, RateRule):
            inputs = x.mean(0)
        elif ctx.needs_input_grad[1]:
            inputs = x
        ctx.save_for_backward(potentials, spikes, slopes, inputs, rate)
        return spikes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        potentials, spikes, slopes, inputs, rate = ctx.saved_tensors
        dynamics, rule = ctx.dynamics, ctx.rule
        leak = _Leak(ctx.tau, rate).rate
        if isinstance(rule, RateRule):
            gradient = rule.input_gradient(upstream, potentials, spikes, inputs, dynamics, leak)
            return gradient, None if rate is None else torch.zeros_like(rate), None, None, None
        h = rule.slopes(potentials, dynamics) if slopes is None else slopes
        flow = h * upstream
        if len(flow) > 1:
            # dV/dU of the step before, times what the leak lets through to the next
            detached = rule.detached(dynamics)
            if dynamics.reset is None:
                passed = torch.ones_like(h) if detached else 1 - h * dynamics.step
            else:
                passed = 1 - spikes
                if not detached:
                    passed = passed.addcmul_(h.expand_as(passed), potentials - dynamics.reset, value=-1)
            passed = passed.mul_(1 - leak)
            for t in range(len(flow) - 2, -1, -1):
                flow[t].addcmul_(flow[t + 1], passed[t])
        if rate is None:
            return flow.mul_(leak) if dynamics.decay_input else flow, None, None, None, None
        learned = _rate_gradient(flow, potentials, spikes, inputs, dynamics) if ctx.needs_input_grad[1] else None
        return flow * leak if dynamics.decay_input else flow, learned, None, None, None


def _rate_gradient(flow: Tensor, potentials: Tensor, spikes: Tensor, x: Tensor, dynamics: Dynamics) -> Tensor:
    """dL / d(1 / tau)."""
    before = torch.empty_like(potentials)
    before[0] = dynamics.rest
    if dynamics.reset is None:
        before[1:] = potentials[:-1] - dynamics.step * spikes[:-1]
    else:
        before[1:] = torch.where(spikes[:-1] > 0, dynamics.reset, potentials[:-1])
    away = before - dynamics.rest
    return (flow * ((x - away) if dynamics.decay_input else -away)).sum()


class _Spike(torch.autograd.Function):
    """One step's spikes; its derivative is what it is told."""

    @staticmethod
    def forward(ctx: Any, potential: Tensor, slope: Tensor, dynamics: Dynamics) -> Tensor:
        ctx.save_for_backward(slope)
        return dynamics.fires(potential)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return upstream * slope, None, None


def spike(potential: Tensor, slope: Tensor, dynamics: Dynamics) -> Tensor:
    """Spikes [B, ...] of charged potentials, with a slope as their derivative."""
    fired: Tensor = _Spike.apply(potential, slope, dynamics)
    return fired


def reset_potential(potential: Tensor, spikes: Tensor, dynamics: Dynamics, detached: bool) -> Tensor:
    """The potential after the reset, differentiable."""
    spikes = spikes.detach() if detached else spikes
    if dynamics.reset is None:
        return potential - dynamics.step * spikes
    return potential * (1 - spikes) + dynamics.reset * spikes


def _unrolled(x: Tensor, leak: _Leak, dynamics: Dynamics, rule: SlopeRule) -> Tensor:
    """Spikes [T, B, ...] with autograd's own graph from step to step."""
    slopes = None
    if not rule.pointwise:
        with torch.no_grad():
            frozen = _Leak(leak.tau, None if leak.tensor is None else leak.tensor.detach())
            slopes = rule.slopes(_simulated(x.detach(), frozen, dynamics, keep=True)[0], dynamics)
    detached = rule.detached(dynamics)
    potential: Tensor | None = None
    answer = []
    for t in range(len(x)):
        charged = leak.charged(potential, x[t], dynamics)
        slope = rule.slopes(charged.detach()[None], dynamics)[0] if slopes is None else slopes[t]
        answer.append(spike(charged, slope, dynamics))
        potential = reset_potential(charged, answer[-1], dynamics, detached)
    return torch.stack(answer)


class Neuron(nn.Module, ABC):
    """What the kinds of neurons share: spikes [T, B, ...] of inputs [T, B, ...], every call from rest.

    threshold:    a potential this high fires
    reset:        where a spike puts the potential; None lowers it by the threshold instead (soft reset)
    lowered:      by how much a soft reset lowers it, where it is not the threshold
    decay_input:  whether the input leaks as the potential does
    detach_reset: whether gradients leave out the spike inside the reset
    strict:       fire above the threshold only, not at it
    surrogate:    the backward rule it is trained with, an object or a spec; `use_surrogate` and a model's `with_rule`
                  set another one for attacks
    fused:        the backward pass as one operation; False: autograd's graph, step by step

    Raises BadModel where the threshold is not above the reset.
    """

    def __init__(
        self,
        *,
        threshold: float = 1.0,
        reset: float | None = 0.0,
        lowered: float | None = None,
        decay_input: bool = False,
        detach_reset: bool = False,
        strict: bool = False,
        surrogate: Rule | str = "atan",
        fused: bool = True,
    ) -> None:
        super().__init__()
        self.dynamics = Dynamics(
            threshold=float(threshold),
            reset=None if reset is None else float(reset),
            lowered=lowered,
            decay_input=decay_input,
            detach_reset=detach_reset,
            strict=strict,
        )
        if not (self.dynamics.height > 0 and math.isfinite(self.dynamics.height)):
            raise BadModel(f"threshold {threshold} is not above {self.dynamics.rest}, where a potential rests")
        self.surrogate = RULES.build(surrogate)
        self.fused = fused
        # Two neurons that differ in a constant are different models: what is hashed must tell them apart.
        self.register_buffer("constants", torch.tensor(self._constants()), persistent=False)

    def _constants(self) -> list[float]:
        told = self.dynamics
        reset = told.reset is not None
        flags = (told.decay_input, told.strict, reset)
        return [told.threshold, told.rest, told.step, *map(float, flags), *self._leaks()]

    def _leaks(self) -> list[float]:
        return []

    @abstractmethod
    def leak(self) -> _Leak:
        """How the potential decays."""

    def rule(self) -> Rule:
        """The backward rule of the next call."""
        return active_rule() or self.surrogate

    def forward(self, x: Tensor) -> Tensor:
        leak = self.leak()
        follows = torch.is_grad_enabled() and (
            x.requires_grad or (leak.tensor is not None and leak.tensor.requires_grad)
        )
        if not follows:
            return _simulated(x, leak, self.dynamics, keep=False)[1]
        rule = self.rule()
        if not self.fused and isinstance(rule, SlopeRule):
            return _unrolled(x, leak, self.dynamics, rule)
        spikes: Tensor = _Spiking.apply(x, leak.tensor, leak.tau, self.dynamics, rule)
        return spikes

    @staticmethod
    def model_under(model: Any, rule: Rule | str | None) -> Any:
        """A model that holds neurons, under a backward rule: for those who know the model by its modules alone."""
        return model if rule is None else Ruled(model, RULES.build(rule))

    def extra_repr(self) -> str:
        return (
            f"threshold={self.dynamics.threshold}, reset={self.dynamics.reset}, surrogate={RULES.label(self.surrogate)}"
        )


class LIF(Neuron):
    """A leaky neuron with a given time constant.

    tau: of the leak, > 1; the potential keeps 1 - 1 / tau of its distance from rest per step
    """

    def __init__(self, *, tau: float = 2.0, **more: Any) -> None:
        if not (tau > 1 and math.isfinite(tau)):
            raise BadModel(f"tau is {tau}; a leaky neuron needs a time constant above 1 (or IF, which does not leak)")
        self.tau = float(tau)
        super().__init__(**more)

    def _leaks(self) -> list[float]:
        return [self.tau]

    def leak(self) -> _Leak:
        return _Leak(self.tau, None)


class IF(Neuron):
    """A neuron without leak: the potential is the sum of what came in since the last spike."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        if self.dynamics.decay_input:
            raise BadModel("a neuron without leak has no decay for its input; leave decay_input out")

    def leak(self) -> _Leak:
        return _Leak(None, None)


class PLIF(Neuron):
    """A leaky neuron that learns its time constant: tau = 1 / sigmoid(w), one w per layer (arXiv 2007.05785).

    tau: the initial time constant, > 1
    """

    def __init__(self, *, tau: float = 2.0, **more: Any) -> None:
        if not (tau > 1 and math.isfinite(tau)):
            raise BadModel(f"tau is {tau}; a leaky neuron needs a time constant above 1")
        super().__init__(**more)
        self.w = nn.Parameter(torch.tensor(-math.log(tau - 1)))

    def leak(self) -> _Leak:
        return _Leak(None, self.w.sigmoid())


class Stepped(nn.Module):
    """A neuron for networks that call it once per time step, [B, ...] -> [B, ...]; it remembers within a forward pass.

    Whoever holds the network calls `start` before every pass; adapters do.

    neuron: whose dynamics it has
    """

    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        self.neuron = neuron
        self.start()

    def start(self) -> None:
        """Forget."""
        self.potential: Tensor | None = None
        self.stepper: Stepper | None = None

    def step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Spikes and charged potential of the next time step."""
        neuron, dynamics = self.neuron, self.neuron.dynamics
        charged = neuron.leak().charged(self.potential, x, dynamics)
        if not (torch.is_grad_enabled() and charged.requires_grad):
            spikes = dynamics.fires(charged)
            self.potential = reset_potential(charged, spikes, dynamics, True)
            return spikes, charged
        if self.stepper is None:
            self.stepper = neuron.rule().start()
        with torch.no_grad():
            slope = self.stepper(charged.detach(), dynamics)
        spikes = spike(charged, slope, dynamics)
        self.potential = reset_potential(charged, spikes, dynamics, self.stepper.rule.detached(dynamics))
        return spikes, charged

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x)[0]
