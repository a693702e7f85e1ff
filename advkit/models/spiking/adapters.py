"""Networks of spikingjelly and snnTorch as models: their neurons replaced by ours in a copy, state reset at every call.

Neither package is imported: neurons are known by their class names and read by their attributes. What can't be turned
into the same dynamics is refused, with its name; nothing is left behind that would keep state or lack a backward rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from advkit.core.errors import BadModel
from advkit.models.spiking.encoders import Direct
from advkit.models.spiking.model import SpikingModel, neurons, stepped
from advkit.models.spiking.neurons import IF, LIF, PLIF, Neuron, Stepped
from advkit.models.spiking.surrogates import ATan, Rule, Sigmoid

Picker = Callable[[Any], Tensor]


def from_spikingjelly(
    module: nn.Module,
    *,
    time: int | None = None,
    space: Any = None,
    classes: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    name: str = "",
    surrogate: Rule | str | None = None,
    answer: Picker | None = None,
) -> SpikingModel:
    """A spikingjelly network (LIF, IF and parametric LIF nodes, in either step mode) as a model.

    module:    stays as it is; a copy is turned
    time:      rows are repeated so many times; None: rows are frames [B, T, ...]
    surrogate: backward rule of its neurons; None: their own where it is an ATan or a sigmoid, else atan
    answer:    picks logits [B, classes] from what the network answers; None: the mean over time

    Raises BadModel for neurons of other kinds, for step modes that mix, and where there is no neuron.
    """

    def converted(layer: nn.Module) -> nn.Module | None:
        if not all(hasattr(layer, each) for each in ("v_threshold", "v_reset", "detach_reset")):
            return None
        return _spikingjelly(layer, surrogate)

    copied, names = _replaced(module, converted, "spikingjelly")
    loose = len(stepped(copied))
    if loose not in (0, len(names)):
        raise BadModel(f"{loose} of {len(names)} neurons are in single-step mode; set one mode for the whole network")
    turned = Foreign(copied, time, loops=False, stepwise=loose > 0, answer=answer)
    return _model(turned, names, "spikingjelly", space, classes, mean, std, name or type(module).__name__)


def from_snntorch(
    module: nn.Module,
    *,
    time: int | None = None,
    loops: bool = True,
    space: Any = None,
    classes: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    name: str = "",
    surrogate: Rule | str = "atan",
    answer: Picker | None = None,
) -> SpikingModel:
    """An snnTorch network of Leaky neurons as a model.

    Potentials are kept by the neurons themselves: a `mem` that the network passes on is what they answered before, and
    is not read. A reset by subtraction comes one step late there, after the leak, which is a soft reset by
    threshold / beta here.

    module:    stays as it is; a copy is turned
    time:      rows are repeated so many times where the network does not do so itself; None: rows are frames
               [B, T, ...], or, where it loops, go in as they are
    loops:     whether the network's forward runs over the time steps; False: it is called once per step
    surrogate: backward rule of its neurons, whose own is a closure that can't be read
    answer:    picks logits [B, classes] from what the network answers; None: the first of several answers, averaged
               over time

    Raises BadModel for neurons of other kinds or settings, and where there is no neuron.
    """

    def converted(layer: nn.Module) -> nn.Module | None:
        if not type(layer).__module__.startswith("snntorch.") or not hasattr(layer, "threshold"):
            return None
        return _snntorch(layer, surrogate)

    copied, names = _replaced(module, converted, "snntorch")
    turned = Foreign(copied, time, loops=loops, stepwise=True, answer=answer)
    return _model(turned, names, "snntorch", space, classes, mean, std, name or type(module).__name__)


def _model(
    turned: Foreign,
    names: list[str],
    package: str,
    space: Any,
    classes: int | None,
    mean: Sequence[float],
    std: Sequence[float],
    name: str,
) -> SpikingModel:
    kinds = [type(each).__name__ for each in neurons(turned)]
    told = f"a network of {package}; replaced: {', '.join(f'{n} ({k})' for n, k in zip(names, kinds, strict=True))}"
    return SpikingModel(turned, space=space, classes=classes, mean=mean, std=std, name=name, source=told)


def _replaced(
    module: nn.Module, converted: Callable[[nn.Module], nn.Module | None], package: str
) -> tuple[nn.Module, list[str]]:
    """A copy with every neuron replaced, and the names of what was."""
    made: dict[int, Any] = {}
    names = []
    for name, layer in module.named_modules():
        replacement = converted(layer)
        if replacement is not None:
            made[id(layer)] = replacement.train(module.training)
            names.append(name or "the network itself")
    if not made:
        raise BadModel(f"{type(module).__name__} holds no spiking neuron of {package}")
    try:
        # Taken for copies made already, so that state left over in the neurons is never looked at.
        copied = copy.deepcopy(module, made)
    except RuntimeError as error:
        raise BadModel(f"the network can't be copied ({error}); reset its state first") from error
    return copied, names


def _number(value: Any, what: str) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise BadModel(f"{what} has {value.numel()} values; only one per layer is served")
        return float(value.detach().reshape(()))
    return float(value)


def _spikingjelly(layer: Any, surrogate: Rule | str | None) -> nn.Module:
    kind = type(layer).__name__
    rule = _own_rule(getattr(layer, "surrogate_function", None)) if surrogate is None else surrogate
    common: dict[str, Any] = {
        "threshold": _number(layer.v_threshold, "v_threshold"),
        "reset": None if layer.v_reset is None else _number(layer.v_reset, "v_reset"),
        "detach_reset": bool(layer.detach_reset),
        "surrogate": rule,
    }
    neuron: Neuron
    if kind == "LIFNode":
        neuron = LIF(tau=_number(layer.tau, "tau"), decay_input=bool(layer.decay_input), **common)
    elif kind == "IFNode":
        neuron = IF(**common)
    elif kind == "ParametricLIFNode":
        neuron = PLIF(decay_input=bool(layer.decay_input), **common)
        neuron.w = nn.Parameter(layer.w.detach().clone(), requires_grad=layer.w.requires_grad)
    else:
        raise BadModel(f"{kind} neurons have no counterpart here; served: LIFNode, IFNode, ParametricLIFNode")
    return Stepped(neuron) if getattr(layer, "step_mode", "s") == "s" else neuron


def _own_rule(function: Any) -> Rule | str:
    alpha = getattr(function, "alpha", None)
    if alpha is not None and type(function).__name__ in ("ATan", "Sigmoid"):
        kind = ATan if type(function).__name__ == "ATan" else Sigmoid
        return kind(alpha=_number(alpha, "alpha"))
    return "atan"


class _Leaky(Stepped):
    """The calls that snnTorch networks make of a Leaky neuron."""

    def __init__(self, neuron: Neuron, alone: bool) -> None:
        super().__init__(neuron)
        self.alone = alone

    def reset_mem(self) -> Tensor:
        """Forget; the potential's place holder."""
        self.start()
        return torch.zeros(0)

    def init_leaky(self) -> Tensor:
        return self.reset_mem()

    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        spikes, potential = self.step(x)
        return spikes if self.alone else (spikes, potential)


def _snntorch(layer: Any, surrogate: Rule | str) -> nn.Module:
    kind = type(layer).__name__
    if kind != "Leaky":
        raise BadModel(f"{kind} neurons have no counterpart here; served: Leaky")
    odd = [each for each in ("inhibition", "state_quant", "surrogate_disable") if getattr(layer, each, False)]
    if odd or _number(getattr(layer, "graded_spikes_factor", 1.0), "graded_spikes_factor") != 1:
        raise BadModel(f"a Leaky neuron with {', '.join(odd) or 'graded spikes'} has no counterpart here")
    threshold, beta = _number(layer.threshold, "threshold"), _number(layer.beta, "beta")
    mechanism = layer.reset_mechanism
    late = getattr(layer, "reset_delay", True)
    if mechanism not in ("subtract", "zero") or (mechanism == "subtract" and not late):
        raise BadModel(
            f"reset_mechanism={mechanism!r} with reset_delay={late} has no counterpart here; served: zero, and "
            "subtract with reset_delay=True"
        )
    if not 0 < beta <= 1:
        raise BadModel(f"beta is {beta}; expected a number above 0 and at most 1")
    common: dict[str, Any] = {
        "threshold": threshold,
        "reset": 0.0 if mechanism == "zero" else None,
        "lowered": threshold / beta,
        "detach_reset": True,
        "strict": True,
        "surrogate": surrogate,
    }
    neuron = IF(**common) if beta == 1 else LIF(tau=1 / (1 - beta), **common)
    return _Leaky(neuron, alone=bool(layer.init_hidden) and not bool(layer.output))


class Foreign(nn.Module):
    """A network of another library, its neurons ours, on rows.

    module:   the network
    time:     rows are repeated so many times; None: they are frames [B, T, ...]
    loops:    whether its forward runs over the time steps
    stepwise: whether its neurons are called once per step
    answer:   picks logits from what it answers
    """

    def __init__(
        self, module: nn.Module, time: int | None, *, loops: bool, stepwise: bool, answer: Picker | None
    ) -> None:
        super().__init__()
        self.module = module
        self.encode = None if time is None else Direct(time)
        self.loops = loops
        self.stepwise = stepwise
        self.answer = answer

    def _forget(self) -> None:
        for layer in self.module.modules():
            reset = layer.start if isinstance(layer, Stepped) else getattr(layer, "reset", None)
            if callable(reset):  # other layers with memory: filters, dropout that keeps its mask
                reset()

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]."""
        self._forget()
        try:
            if self.loops:
                answers = self.module(x if self.encode is None else self.encode(x))
            else:
                frames = x.transpose(0, 1) if self.encode is None else self.encode(x)
                if self.stepwise:
                    steps = [self.module(frame) for frame in frames]
                    answers = torch.stack([each if isinstance(each, Tensor) else each[0] for each in steps])
                else:
                    answers = self.module(frames.contiguous())
            return self._logits(answers, len(x))
        finally:
            self._forget()

    def _logits(self, answers: Any, rows: int) -> Tensor:
        if self.answer is not None:
            return self.answer(answers)
        found = answers[0] if isinstance(answers, tuple | list) else answers
        if isinstance(found, Tensor) and found.ndim == 3:
            found = found.mean(0)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != rows:
            seen = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise BadModel(
                f"the network answers {seen} for {rows} rows; expected [T, rows, classes] or [rows, classes], or say "
                "answer=... to pick the logits"
            )
        return found
