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
from typing_extensions import override

from advkit.core.errors import BadModel
from advkit.models.spiking.encoders import Direct
from advkit.models.spiking.model import SpikingModel, neurons, stepped
from advkit.models.spiking.neurons import IF, LIF, PLIF, Neuron, Stepped, reset_potential
from advkit.models.spiking.surrogates import ATan, Rule, Sigmoid, Stepper

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

    Containers of the library that step through time themselves keep doing so. Raises BadModel for neurons of other
    kinds (subclasses of these included), for step modes that mix, where there is no neuron, and, when it is called, for
    a multi-step neuron that the network calls more than once.
    """

    def converted(layer: nn.Module) -> nn.Module | None:
        of_library = _derives(layer, "spikingjelly.activation_based.neuron", "spikingjelly.activation_based.rnn")
        if not of_library and not all(hasattr(layer, each) for each in ("v_threshold", "v_reset", "detach_reset")):
            return None
        return _spikingjelly(layer, surrogate)

    copied, names = _replaced(module, converted, "spikingjelly")
    held = _stepped_inside(copied)
    outside = len(names) - len(held)
    loose = sum(id(each) not in held for each in stepped(copied))
    if loose not in (0, outside):
        raise BadModel(f"{loose} of {outside} neurons are in single-step mode; set one mode for the whole network")
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

    A `mem` that the network hands to a neuron is where it goes on from, whatever was done to it; without one, it goes
    on from its own. A reset by subtraction comes one step late there, after the leak, which is a soft reset by
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
        return _snntorch(layer, surrogate) if _derives(layer, "snntorch.") else None

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


def _derives(layer: nn.Module, *packages: str) -> bool:
    """Whether a layer is of one of these packages, or of a class that derives from one of theirs."""
    return any(kind.__module__.startswith(packages) for kind in type(layer).__mro__)


def _stepped_inside(module: nn.Module) -> set[int]:
    """Ids of the single-step neurons inside containers of spikingjelly that run through the time steps themselves."""
    return {
        id(each)
        for layer in module.modules()
        if _derives(layer, "spikingjelly.activation_based.layer.container") and getattr(layer, "step_mode", "m") == "m"
        for each in stepped(layer)
    }


def _fires(function: Any, kind: str) -> None:
    """BadModel where a neuron's surrogate is no step function when it goes forward."""
    if not callable(function):
        return
    with torch.no_grad():
        above = function(torch.tensor([-2.0, -0.01, 0.01, 2.0]))
    if not isinstance(above, Tensor) or above.tolist() != [0, 0, 1, 1]:
        seen = above.tolist() if isinstance(above, Tensor) else above
        raise BadModel(
            f"the surrogate of a {kind} answers {seen} at -2, -0.01, 0.01 and 2; expected 0, 0, 1 and 1: only neurons "
            "that spike have a counterpart here"
        )


def _replaced(
    module: nn.Module, converted: Callable[[nn.Module], nn.Module | None], package: str
) -> tuple[nn.Module, list[str]]:
    """A copy with every neuron replaced, and the names of what was."""
    made: dict[int, Any] = {}
    names = []
    for name, layer in module.named_modules():
        replacement = converted(layer)
        if replacement is not None:
            made[id(layer)] = replacement.train(layer.training)
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


SPIKINGJELLY = ("LIFNode", "IFNode", "ParametricLIFNode")
"""Neurons of spikingjelly that have a counterpart."""


def _spikingjelly(layer: Any, surrogate: Rule | str | None) -> nn.Module:
    kind = type(layer).__name__
    own = [each.__name__ for each in type(layer).__mro__[1:]]
    # a class of the user's own may do anything: it is not taken for the one that it derives from, whatever its name
    if kind not in SPIKINGJELLY or any(each in own for each in SPIKINGJELLY):
        raise BadModel(f"{kind} neurons have no counterpart here; served: {', '.join(SPIKINGJELLY)}")
    function = getattr(layer, "surrogate_function", None)
    _fires(function, kind)
    rule = _own_rule(function) if surrogate is None else surrogate
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
    else:
        neuron = PLIF(decay_input=bool(layer.decay_input), **common)
        neuron.w = nn.Parameter(layer.w.detach().clone(), requires_grad=layer.w.requires_grad)
    return _Node(neuron) if getattr(layer, "step_mode", "s") == "s" else _MultiStep(neuron)


class _Node(Stepped):
    """A single-step node: the library's networks reset theirs by `reset`."""

    def reset(self) -> None:
        """Forget."""
        self.start()


class _MultiStep(nn.Module):
    """A multi-step node. The library's goes on from where its last call ended, ours from rest: one call in a pass."""

    def __init__(self, neuron: Neuron) -> None:
        super().__init__()
        self.neuron = neuron
        self.called = False

    def reset(self) -> None:
        """Forget."""
        self.called = False

    def forward(self, x: Tensor) -> Tensor:
        if self.called:
            raise BadModel(
                f"the network calls one multi-step neuron ({type(self.neuron).__name__}) twice in a pass, and the "
                "library would go on from the first call's potential: give every layer a neuron of its own, or use "
                "single-step mode"
            )
        self.called = True
        spikes: Tensor = self.neuron(x)
        return spikes


def _own_rule(function: Any) -> Rule | str:
    alpha = getattr(function, "alpha", None)
    if alpha is not None and type(function).__name__ in ("ATan", "Sigmoid"):
        kind = ATan if type(function).__name__ == "ATan" else Sigmoid
        return kind(alpha=_number(alpha, "alpha"))
    return "atan"


class _Leaky(Stepped):
    """The calls that snnTorch networks make of a Leaky neuron.

    alone: it answers spikes only
    late:  the reset comes with the next step; False: at once, in the potential that is answered (reset to zero)
    """

    def __init__(self, neuron: Neuron, alone: bool, late: bool = True) -> None:
        super().__init__(neuron)
        self.alone = alone
        self.late = late

    @override
    def start(self) -> None:
        super().start()
        self._answered: Tensor | None = None
        self._handed = False
        self._after: dict[int, tuple[Tensor, Tensor | None, Stepper | None]] = {}

    def reset_mem(self) -> Tensor:
        """Forget; the potential's place holder."""
        self.start()
        return torch.zeros(0)

    def init_leaky(self) -> Tensor:
        return self.reset_mem()

    @property
    def mem(self) -> Tensor:
        """The potential that it answered last, or that it was handed."""
        return torch.zeros(0) if self._answered is None else self._answered

    @mem.setter
    def mem(self, value: Tensor) -> None:
        self._answered, self._handed = value, True

    def forward(self, x: Tensor, mem: Tensor | None = None) -> Any:
        if mem is None and self._handed:
            mem = self._answered
        if mem is not None:
            self._go_on(mem, x)
        if self.late:
            spikes, answered = self.step(x)
        else:
            spikes, answered = self._at_once(x)
        # networks hand the potential back: its own graph and the backward rule's memory go with it
        self._after[id(answered)] = answered, self.potential, self.stepper
        self._answered, self._handed = answered, False
        return spikes if self.alone else (spikes, answered)

    def _go_on(self, mem: Tensor, x: Tensor) -> None:
        """Take up the state that a potential stands for: one of its own answers, or any other."""
        known = self._after.pop(id(mem), None)
        if known is not None and known[0] is mem:
            _, self.potential, self.stepper = known
        elif mem.shape != x.shape:  # the library begins at zero then
            self.potential = self.stepper = None
        else:
            dynamics = self.neuron.dynamics
            self.potential = reset_potential(mem, dynamics.fires(mem.detach()), dynamics, True)
            self.stepper = None

    def _at_once(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.mem
        late = self.neuron.dynamics.fires(before.detach()) if before.shape == x.shape else torch.zeros_like(x)
        spikes, charged = self.step(x)
        # what was handed over above the threshold was reset before this step; the library does not do so twice
        self.potential = charged - (spikes - late) * charged
        return spikes, self.potential


def _snntorch(layer: Any, surrogate: Rule | str) -> nn.Module:
    kind = type(layer).__name__
    if kind != "Leaky" or any(each.__name__ == "Leaky" for each in type(layer).__mro__[1:]):
        raise BadModel(f"{kind} neurons have no counterpart here; served: Leaky")
    _fires(getattr(layer, "spike_grad", None), kind)
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
        "detach_reset": late,
        "strict": True,
        "surrogate": surrogate,
    }
    neuron = IF(**common) if beta == 1 else LIF(tau=1 / (1 - beta), **common)
    return _Leaky(neuron, alone=bool(layer.init_hidden) and not bool(layer.output), late=bool(late))


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
        # the copy is in its own layers' modes: this wrapper and its coding have none of theirs
        self.training = module.training
        if self.encode is not None:
            self.encode.train(module.training)

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
        except AttributeError as error:
            raise BadModel(
                f"the network reads what neurons of this package do not have ({error}); of a Leaky it may read mem"
            ) from error
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
