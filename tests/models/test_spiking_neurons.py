"""Spiking neurons: traces by hand, a plain reference, causality, and one backward pass in two ways."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advkit.core.errors import BadModel
from advkit.models.spiking.neurons import IF, LIF, PLIF, Neuron, Stepped, _simulated
from advkit.models.spiking.surrogates import PDSG, Rule
from advkit.models.torch import TorchModel

COMBINATIONS = list(itertools.product([False, True], [0.0, 0.3, None], [False, True]))  # decay input, reset, detach
KINDS = ["lif", "plif", "if"]


def neuron(kind: str, **more: Any) -> Neuron:
    if kind == "if":
        more.pop("tau", None)
        return IF(**more)
    return {"lif": LIF, "plif": PLIF}[kind](**more)


def steps(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def told(spikes: Tensor) -> list[int]:
    return [int(value) for value in spikes.flatten()]


def inputs(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.8 + 0.3


def reference(x: np.ndarray, tau: float | None, threshold: float, reset: float | None, decay: bool, strict: bool):
    """Potentials and spikes by the definition, one value after the other."""
    rest = 0.0 if reset is None else reset
    flat = x.reshape(len(x), -1)
    potentials, spikes = np.zeros_like(flat), np.zeros_like(flat)
    for i in range(flat.shape[1]):
        v = rest
        for t in range(len(flat)):
            leak = 0.0 if tau is None else 1 / tau
            u = v + (flat[t, i] - (v - rest)) * leak if decay else v - (v - rest) * leak + flat[t, i]
            fired = u > threshold if strict else u >= threshold
            potentials[t, i], spikes[t, i] = u, fired
            v = (u - threshold if reset is None else reset) if fired else u
    return potentials.reshape(x.shape), spikes.reshape(x.shape)


def test_traces_by_hand() -> None:
    constant = steps(*[0.6] * 6)  # U = .6 .9 1.05, reset, .6 .9 1.05
    assert told(LIF()(constant)) == [0, 0, 1, 0, 0, 1]
    # soft: 1.05 - 1 = .05 stays: .625 .9125 1.05625
    assert told(LIF(reset=None)(constant)) == [0, 0, 1, 0, 0, 1]
    # the input leaks too: U approaches .6 and never fires; at 2.1: 1.05 at once
    assert told(LIF(decay_input=True)(constant)) == [0] * 6
    assert told(LIF(decay_input=True)(steps(2.1, 0.0, 1.2, 1.4))) == [1, 0, 0, 1]  # 1.05 | 0 .6 1.0
    assert told(IF()(steps(0.5, 0.5, 0.5, 0.5))) == [0, 1, 0, 1]
    assert told(IF(strict=True)(steps(0.5, 0.5, 0.5, 0.5))) == [0, 0, 1, 0]
    # soft reset keeps what is above: 1.5 -> .5 -> 1.0
    assert told(IF(reset=None)(steps(1.5, 0.5, 0.0))) == [1, 1, 0]
    # rest at .5: 1.0 fires, then from .5 again
    assert told(IF(reset=0.5)(steps(0.5, 0.25, 0.25))) == [1, 0, 1]
    assert told(IF(reset=None, lowered=1.25)(steps(1.5, 0.5, 0.25))) == [1, 0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("constant", [1.7, 2.0])
@pytest.mark.parametrize(("decay", "reset", "strict"), list(itertools.product([0, 1], [0.0, 0.2, -0.5, None], [0, 1])))
def test_every_dynamics_is_its_definition(
    kind: str, decay: bool, reset: float | None, strict: bool, constant: float
) -> None:
    if kind == "if" and decay:
        with pytest.raises(BadModel, match="decay"):
            IF(decay_input=True)
        return
    made = neuron(kind, tau=constant, threshold=0.9, reset=reset, decay_input=bool(decay), strict=bool(strict)).double()
    x = inputs(3, 7, 2, 15) * (1.6 if decay else 1)
    tau = None if kind == "if" else 1 / float(made.w.detach().sigmoid()) if isinstance(made, PLIF) else constant
    spikes = reference(x.numpy(), tau, 0.9, reset, bool(decay), bool(strict))[1]
    assert 0.01 < spikes.mean() < 0.8
    assert np.array_equal(made(x).detach().numpy(), spikes)
    with torch.no_grad():  # potentials are not kept there
        assert np.array_equal(made(x).numpy(), spikes)


@pytest.mark.parametrize("reset", [0.0, 0.25, -0.5, None])
@pytest.mark.parametrize("tau", [2.0, 1.6])
def test_potentials_have_the_bits_of_the_definition(tau: float, reset: float | None) -> None:
    """Shortcuts are taken where they round as the definition does, and nowhere else."""
    x = inputs(7, 9, 3, 50).float() * 1.5
    made = LIF(tau=tau, reset=reset)
    rest = made.dynamics.rest
    potentials, spikes = _simulated(x, made.leak(), made.dynamics, keep=True)
    v = torch.full_like(x[0], rest)
    for t in range(9):
        u = v - (v - rest) / tau + x[t]
        assert torch.equal(potentials[t], u)
        assert torch.equal(spikes[t], (u >= 1).float())
        v = u - spikes[t] if reset is None else torch.where(u >= 1, reset, u)
    assert torch.equal(_simulated(x, made.leak(), made.dynamics, keep=False)[1], spikes)


@pytest.mark.parametrize("kind", KINDS)
def test_no_input_no_spike_and_no_memory_between_calls(kind: str) -> None:
    made = neuron(kind).double()
    assert not made(torch.zeros(5, 2, 3, dtype=torch.float64)).any()
    x = inputs(0, 5, 2, 3)
    first = made(x)
    made(torch.full_like(x, 0.9))
    assert torch.equal(made(x), first)


@pytest.mark.parametrize("kind", KINDS)
def test_the_future_changes_nothing_before_it(kind: str) -> None:
    made = neuron(kind, surrogate="pdsg").double()
    x = inputs(1, 6, 2, 4)
    before = made(x)
    for t in range(6):
        changed = x.clone()
        changed[t] = 1 - changed[t]
        assert torch.equal(made(changed)[:t], before[:t])


@pytest.mark.parametrize("rule", ["atan", "pdsg", "rect", "pdsg:stats=batch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("decay", "reset", "detach"), [*COMBINATIONS, (True, -0.4, True)])
def test_fused_and_unrolled_backward_agree(
    kind: str, decay: bool, reset: float | None, detach: bool, rule: str
) -> None:
    if kind == "if" and decay:
        return
    x, weight = inputs(2, 6, 3, 4, 2, 2), inputs(5, 6, 3, 4, 2, 2)
    found = []
    for fused in (True, False):
        made = neuron(
            kind, tau=1.7, decay_input=decay, reset=reset, detach_reset=detach, surrogate=rule, fused=fused
        ).double()
        leaf = x.clone().requires_grad_()
        spikes = made(leaf)
        (spikes * weight).sum().backward()
        learned = made.w.grad if isinstance(made, PLIF) else torch.zeros(())
        found.append((spikes.detach(), leaf.grad, learned))
    (s, g, w), (s2, g2, w2) = found
    assert torch.equal(s, s2)
    assert float(g.abs().max()) > 0.1
    assert float((g - g2).abs().max()) <= 1e-12
    assert float((w - w2).abs()) <= 1e-12 * max(1.0, float(w2.abs()))


@pytest.mark.parametrize(("decay", "reset", "detach"), COMBINATIONS)
def test_backward_is_the_recursion_with_frozen_slopes(decay: bool, reset: float | None, detach: bool) -> None:
    """Nothing flows through the deviation of PDSG: it is the plain recursion with its slopes as constants."""
    tau, x, upstream = 1.6, inputs(4, 5, 2, 6), inputs(6, 5, 2, 6)
    made = LIF(tau=tau, decay_input=decay, reset=reset, detach_reset=detach, surrogate="pdsg")
    leaf = x.clone().requires_grad_()
    made(leaf).backward(upstream)
    u, s = (torch.from_numpy(each) for each in reference(x.numpy(), tau, 1.0, reset, decay, False))
    h = PDSG().slopes(u, made.dynamics)
    g = torch.zeros_like(u[0])
    expected = torch.zeros_like(u)
    for t in range(4, -1, -1):
        back = 0.0 if detach else 1.0
        if reset is None:
            gu = g + h[t] * (upstream[t] - back * g)
        else:
            gu = g * (1 - s[t]) + h[t] * (upstream[t] + back * g * (reset - u[t]))
        expected[t] = gu / tau if decay else gu
        g = gu * (1 - 1 / tau)
    assert torch.allclose(leaf.grad, expected, rtol=0, atol=1e-12)


def test_a_learned_time_constant_has_the_derivative_of_a_smooth_spike() -> None:
    """With linear slopes everywhere (one step, no spike yet) the gradient of tau is that of the potential."""
    made = PLIF(tau=3.0, surrogate="rect:width=100", reset=None).double()
    x = steps(0.3, 0.2)
    made(x).sum().backward()
    rate = float(made.w.detach().sigmoid())
    # U1 = .3, U2 = .3 (1 - k) + .2, slopes 1 / 100; a soft reset sends dU1 through 1 - h back
    assert float(made.w.grad) == pytest.approx(-0.3 / 100 * rate * (1 - rate), rel=1e-12)


@pytest.mark.parametrize("rule", ["atan", "pdsg", "triangle"])
@pytest.mark.parametrize("reset", [0.0, None])
def test_step_by_step_is_all_at_once(rule: str, reset: float | None) -> None:
    whole, single = LIF(reset=reset, surrogate=rule), Stepped(LIF(reset=reset, surrogate=rule))
    one, other = (inputs(8, 5, 2, 3, 4, 4).requires_grad_() for _ in range(2))
    expected = whole(one)
    single.start()
    found = torch.stack([single(frame) for frame in other])
    assert torch.equal(found, expected)
    weight = inputs(9, *found.shape)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-12)


def test_rules_of_rates_refuse_single_steps() -> None:
    from advkit.core.errors import UsageError

    single = Stepped(LIF(surrogate="rga"))
    with pytest.raises(UsageError, match="all time steps"):
        single(torch.ones(2, 3, requires_grad=True))


def test_constants_are_part_of_a_models_hash() -> None:
    hashes = {
        TorchModel(LIF(**more)).state_sha256()
        for more in ({}, {"threshold": 1.5}, {"tau": 3.0}, {"reset": None}, {"decay_input": True}, {"strict": True})
    }
    assert len(hashes) == 6
    assert TorchModel(LIF(surrogate="pdsg")).state_sha256() in hashes  # the rule changes no answer
    assert LIF().state_dict() == {}


@pytest.mark.parametrize("more", [{"threshold": 0.0}, {"reset": 1.0}, {"tau": 1.0}, {"tau": float("nan")}])
def test_impossible_neurons(more: dict[str, float]) -> None:
    with pytest.raises(BadModel):
        LIF(**more)


def test_the_attackers_detach_overrules_the_victims() -> None:
    x = inputs(11, 5, 2, 3)

    def gradient(detach: bool, rule: Rule | str) -> Tensor:
        leaf = x.clone().requires_grad_()
        LIF(detach_reset=detach, surrogate=rule)(leaf).sum().backward()
        return leaf.grad

    assert not torch.equal(gradient(False, "atan"), gradient(True, "atan"))
    assert torch.equal(gradient(False, "atan:detach_reset=true"), gradient(True, "atan"))
    assert torch.equal(gradient(True, "atan:detach_reset=false"), gradient(False, "atan"))
