"""PyTorch models as the harness sees them: normalising happens inside, the weights have one hash."""

from __future__ import annotations

import copy
import hashlib
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from advkit.core.errors import BadModel, UnknownName
from advkit.core.lanes import Lanes
from advkit.core.protocols import (
    AnswersSamples,
    Copies,
    Data,
    Headed,
    KnowsClasses,
    Model,
    ModelInfo,
    Rng,
    Task,
    answer_shape,
)
from advkit.core.spaces import Box
from advkit.core.state import as_caller

BIG_ENDIAN: bool = sys.byteorder == "big"
MOST_WEIGHTS = 2**30
"""Weights of the linear layers of one network, 4 GiB of float32; more is taken for a slip."""
NamedTensors = Iterable[tuple[str, Tensor]]


def tensors_sha256(tensors: NamedTensors) -> str:
    """sha256 over the tensors sorted by name, each as name, dtype, shape and raw little-endian bytes.

    Independent of device, memory layout and listing order.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        row = dense.cpu().contiguous().reshape(-1)
        raw = row.view(torch.uint8).numpy().tobytes()
        if BIG_ENDIAN:
            raw = np.frombuffer(raw, np.dtype(f"u{row.element_size()}")).byteswap().tobytes()
        shape = ",".join(str(length) for length in tensor.shape)
        digest.update(f"{name}|{str(tensor.dtype).removeprefix('torch.')}|{shape}|".encode())
        digest.update(raw)
    return digest.hexdigest()


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, also those that are tied or kept out of the state dict."""
    tensors: dict[str, Tensor] = {}
    listed = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    for name, tensor in chain(*listed):
        if is_lazy(tensor):
            raise BadModel(f"{name!r} has no shape yet (a lazy layer); run one batch through the model first")
        tensors[name] = tensor
    return tensors


def device_of(module: nn.Module) -> torch.device | None:
    """The device of the first parameter or buffer; None where the module holds none."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return None


def _indexed(device: torch.device) -> torch.device:
    """A device with its index said: "cuda" is the current one."""
    index: int | None = device.index  # torch's stubs deny the None
    if index is None:
        index = torch.cuda.current_device() if device.type == "cuda" else 0
    return torch.device(device.type, index)


def same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and _indexed(one) == _indexed(other)


@dataclass(frozen=True)
class Calls:
    """How a module or function of the user's has to be called, as its first call showed (`evaluation.first_call`).

    copies: it changes its input in place: every call gets a copy
    alone:  it takes one sample at a time
    masked: classes whose score is minus infinity whatever the input
    floor:  the finite score that stands for minus infinity in them, below all others: differences stay numbers
    """

    copies: bool = False
    alone: bool = False
    masked: tuple[int, ...] = ()
    floor: float = -1e4

    @property
    def lanes(self) -> Lanes | None:
        """The shapes of its calls; None where any will do."""
        return Lanes(chunk=1, multiple=1) if self.alone else None

    def input(self, x: Tensor) -> Tensor:
        return x.clone() if self.copies else x

    def output(self, answer: Any) -> Any:
        """The logits in what came back."""
        answer = answer if isinstance(answer, Tensor) else logits_of(answer)
        if self.masked and answer.ndim == 2:
            masked = torch.zeros(answer.shape[1], dtype=torch.bool, device=answer.device)
            masked[list(self.masked)] = True
            answer = torch.where(masked & (answer == -torch.inf), self.floor, answer)
        return answer


def logits_of(answer: Any) -> Any:
    """The tensor in an output with `logits`, as networks of transformers return it, or in a list of one.

    BadModel for what holds several tensors, or none: nobody says which of them the logits are.
    """
    if isinstance(answer, Tensor):
        return answer
    named = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    if isinstance(named, Tensor):
        return named
    if isinstance(answer, (tuple, list)) and len(answer) == 1 and isinstance(answer[0], Tensor):
        return answer[0]
    raise BadModel(
        f"the model returns {_described(answer)}; expected a tensor of logits, float [B, C]: pick them, such as "
        "lambda x: net(x)[0]"
    )


def _described(answer: Any) -> str:
    """What came back in place of a tensor, in a few words."""

    def short(each: Any) -> str:
        return f"tensor {list(each.shape)}" if isinstance(each, Tensor) else type(each).__name__

    if isinstance(answer, Mapping):
        inside = ", ".join(f"{key}: {short(value)}" for key, value in list(answer.items())[:4])
    elif isinstance(answer, (tuple, list)):
        inside = ", ".join(short(each) for each in answer[:4])
    else:
        return type(answer).__name__
    return f"{type(answer).__name__} ({inside})"


def checked_logits(answer: Any, rows: int, shape: tuple[int, ...] = ()) -> Tensor:
    """The logits [rows, classes], or decisions [rows] as whole numbers, in what a model returned for `rows` inputs.

    shape: of one answer where answers are samples: float [rows, *shape] is expected then

    BadModel names what came back in place of them.
    """
    if shape and isinstance(answer, Tensor) and (answer.shape != (rows, *shape) or not answer.is_floating_point()):
        raise BadModel(
            f"the model returns a tensor {list(answer.shape)} of type {answer.dtype} for {rows} inputs; this task "
            f"wants reconstructed samples, float {[rows, *shape]}"
        )
    logits = logits_of(answer)
    if shape:
        return cast(Tensor, logits) if logits is answer else checked_logits(logits, rows, shape)
    seen = f"the model returns a tensor of shape {list(logits.shape)} for {rows} inputs"
    one = (logits.ndim == 2 and logits.shape[1] == 1) or (logits.ndim == 1 and logits.is_floating_point())
    if one and len(logits) == rows:
        raise BadModel(
            f"{seen}: one score per sample, and two are needed (logits, float [B, C]); for a score s whose sign "
            "decides return torch.stack([-s, s], 1), for a probability p torch.stack([1 - p, p], 1).log()"
        )
    if len(logits.shape) not in (1, 2) or len(logits) != rows:
        raise BadModel(f"{seen}; expected logits, float [{rows}, C], or decisions, whole numbers [{rows}]")
    if logits.ndim == 2 and not logits.is_floating_point():
        raise BadModel(f"{seen}, of type {logits.dtype}; expected logits, float [{rows}, C]")
    return cast(Tensor, logits)


def misleading_mode(tops: Iterable[nn.Module]) -> list[nn.Module]:
    """Layers whose training flag makes the model another one than the deployed: empty where nothing is wrong.

    The flag matters in layers that act on it alone. Where the network as a whole is in evaluation mode and layers of
    it drop units all the same, that was done on purpose (Monte Carlo dropout): its output varies. Batch statistics
    would be moved by every query, and are never taken for purpose.
    """
    tops = tuple(tops)
    acting = [layer for top in tops for layer in top.modules() if layer.training and _acts_in_training(layer)]
    forgotten = any(top.training for top in tops)
    return acting if forgotten else [layer for layer in acting if _statistics(layer)]


def check_mode(model: Any, name: str = "the model") -> None:
    """BadModel where a training flag makes the model another than the deployed, or its weights take no gradient."""
    tops = model.modules()
    if any(tensor.is_inference() for top in tops for tensor in top.parameters()):
        raise BadModel(
            f"{name} was made under torch.inference_mode(): its weights take part in no gradient; build or load it "
            "outside of that block"
        )
    layers = misleading_mode(tops)
    if layers:
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})[:4])
        raise BadModel(
            f"{name} is in training mode (dropout and batch statistics would answer; layers: {kinds}): call .eval() on "
            "it first. Dropout on purpose: call .eval() on the network, then .train() on its dropout layers alone, and "
            "it is evaluated as a random victim"
        )


def _statistics(layer: nn.Module) -> bool:
    return getattr(layer, "running_mean", None) is not None


def _acts_in_training(layer: nn.Module) -> bool:
    """Whether a layer's output depends on its training flag, as far as its settings and its code say."""
    if isinstance(layer, (nn.modules.batchnorm._NormBase,)):
        return _statistics(layer)
    if isinstance(layer, nn.modules.dropout._DropoutNd):
        return layer.p > 0
    if isinstance(layer, (nn.MultiheadAttention, nn.RNNBase)):
        return float(layer.dropout) > 0
    if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder)):
        return False  # the flag chooses a kernel; their dropout layers have flags of their own
    if isinstance(layer, torch.jit.ScriptModule):
        return True  # its code can't be read
    ours = (base for base in type(layer).__mro__ if base not in (nn.Module, object))
    codes = (getattr(member, "__code__", None) for base in ours for member in vars(base).values())
    return any(code is not None and "training" in code.co_names for code in codes)


def _first_floating(module: nn.Module) -> Tensor | None:
    """The first floating one of `module.parameters()`, without the generators that cost as much as an operation."""
    for parameter in module._parameters.values():
        if parameter is not None and parameter.is_floating_point():
            return parameter
    for child in module._modules.values():
        found = None if child is None else _first_floating(child)
        if found is not None:
            return found
    return None


class TorchModel(Headed, KnowsClasses, AnswersSamples, Copies):
    """A torch module that speaks the attacker's space and answers logits [B, classes], or samples.

    module:       takes normalised rows; its mode, weights and flags are never changed here
    space:        legal inputs, before normalising (default: the box [0, 1])
    classes:      number of logits; None where unknown
    mean, std:    per channel (dimension 1) or one for all: the module gets (x - mean) / std; empty: x
    name:         for reports
    source:       where the weights come from
    license:      of the weights
    architecture: spec that builds the module again ("cnn:width=16"); empty where unknown
    calls:        how the module has to be called
    answer_shape: of one answer where answers are reconstructed samples [B, *answer_shape]; empty: logits

    Raises BadModel where mean and std do not fit each other or a std is not positive.
    """

    classes: int | None = None
    answer_shape: tuple[int, ...] = ()

    def __init__(
        self,
        module: nn.Module,
        space: Any = None,
        classes: int | None = None,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        name: str = "",
        source: str = "",
        license: str = "",
        *,
        architecture: str = "",
        calls: Calls | None = None,
        answer_shape: tuple[int, ...] = (),
    ) -> None:
        if not isinstance(cast(object, module), nn.Module):
            raise BadModel(f"a torch module was expected, got {type(module).__name__}; wrap functions with as_model")
        if len(mean) != len(std):
            raise BadModel(f"mean has {len(mean)} values and std {len(std)}; give both, one per channel or one for all")
        if any(not value > 0 for value in std):
            raise BadModel(f"std must be positive, got {tuple(std)}")
        self.module = module
        self.space = Box() if space is None else space
        self.classes = classes
        self.mean = tuple(float(value) for value in mean)
        self.std = tuple(float(value) for value in std)
        self.name = name or type(module).__name__
        self.source = source
        self.license = license
        self.architecture = architecture
        self.calls = calls or Calls()
        self.answer_shape = tuple(answer_shape)
        self._constants: dict[tuple[torch.device, torch.dtype, int], tuple[Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        return f"TorchModel({self.name}, classes={self.classes}, space={self.space})"

    def __call__(self, x: Tensor) -> Tensor:
        """Logits [B, classes] of rows in `space`; half-precision answers come back as float32."""
        if self.mean:
            mean, std = self._normalisation(x)
            x = (x - mean) / std
        dtype = self.dtype
        if dtype is not None and x.is_floating_point() and x.dtype != dtype:
            x = x.to(dtype)
        given = self.calls.input(x)
        # A network of the caller's own may rely on what he has set in torch; those that a name builds know nothing of
        # it.
        named = self.architecture and not self.architecture.startswith("python:")
        answer: Tensor = self.calls.output(self.module(given) if named else as_caller(self.module, given))
        if answer.dtype in (torch.float16, torch.bfloat16):
            answer = answer.float()
        return answer

    def _normalisation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = (x.device, x.dtype, x.dim())
        if key not in self._constants:
            shape = (1, len(self.mean)) + (1,) * max(0, x.dim() - 2)
            # outside inference mode: a constant born inside it could not be saved for a later backward pass
            with torch.inference_mode(False):
                self._constants[key] = (
                    torch.tensor(self.mean, device=x.device, dtype=x.dtype).reshape(shape),
                    torch.tensor(self.std, device=x.device, dtype=x.dtype).reshape(shape),
                )
        return self._constants[key]

    @property
    def lanes(self) -> Lanes | None:
        """The shapes in which the module wants to be called; None where any will do."""
        return self.calls.lanes

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating type the module computes in; None where it has no floating parameter."""
        found = _first_floating(self.module)
        return None if found is None else found.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.module) or torch.device("cpu")

    def attacker_view(self) -> TorchModel:
        """Itself: what it computes is what an attacker differentiates."""
        return self

    def modules(self) -> tuple[nn.Module, ...]:
        return (self.module,)

    @override
    def head(self) -> Tensor | None:
        """Weight [classes, features] of the linear layer that makes the logits; None where there is none.

        Taken to be the last linear layer, or 1x1 convolution, with as many outputs as there are classes. What may come
        after it (a softmax, a temperature) changes the order of no two classes.
        """
        found: Tensor | None = None
        for layer in self.module.modules():
            if isinstance(layer, nn.Linear) or (
                isinstance(layer, nn.Conv2d) and layer.groups == 1 and all(size == 1 for size in layer.kernel_size)
            ):
                found = layer.weight if len(layer.weight) == self.classes else found
        return None if found is None else found.detach().flatten(1).float()

    def state(self) -> dict[str, Tensor]:
        """Parameters and buffers by name, and the normalisation, since it changes every answer."""
        tensors = named_tensors(self.module)
        if self.mean:
            tensors["preprocessing.mean"] = torch.tensor(self.mean, dtype=torch.float64)
            tensors["preprocessing.std"] = torch.tensor(self.std, dtype=torch.float64)
        return tensors

    def state_sha256(self) -> str:
        return tensors_sha256(self.state().items())

    def describe(self) -> ModelInfo:
        return ModelInfo(
            name=self.name,
            architecture=self.architecture or type(self.module).__name__,
            state_sha256=self.state_sha256(),
            n_parameters=sum(parameter.numel() for parameter in self.module.parameters()),
            classes=self.classes,
            source=self.source,
            license=self.license,
        )

    def settings(self) -> dict[str, Any]:
        """What it was made with beside its module, by name."""
        return {
            "space": self.space,
            "classes": self.classes,
            "mean": self.mean,
            "std": self.std,
            "name": self.name,
            "source": self.source,
            "license": self.license,
            "architecture": self.architecture,
            "calls": self.calls,
            "answer_shape": self.answer_shape,
        }

    @classmethod
    def of(cls, model: TorchModel) -> TorchModel:
        """The model as one of this class, which a subclass may make of it."""
        return model

    def with_module(self, module: nn.Module) -> TorchModel:
        """The same description around another module."""
        return TorchModel(module, **self.settings())

    @override
    def copy(self) -> TorchModel:
        """A model with its own weights."""
        try:
            return self.with_module(copy.deepcopy(self.module))
        except RuntimeError as error:
            raise BadModel(f"{self.name} can't be copied ({error}); give it leaf tensors only") from error

    def to(self, device: torch.device | str) -> TorchModel:
        """Itself where its weights are there already, else a copy there: the caller's module stays where it is."""
        target = torch.device(device)
        if all(same_device(tensor.device, target) for tensor in named_tensors(self.module).values()):
            return self
        moved = self.copy()
        moved.module.to(target)
        return moved


class FunctionModel(KnowsClasses, AnswersSamples):
    """A bare callable as a model: rows in, logits out, nothing known of what is inside.

    function: tensor [B, ...] -> logits [B, classes], or samples [B, *answer_shape]
    identity: what its hash is made of. Empty: a fresh one per object, so that a run of an unnamed function is never
              taken for the run of another
    calls:    how it has to be called
    answer_shape: of one answer where answers are reconstructed samples; empty: logits
    """

    classes: int | None = None
    answer_shape: tuple[int, ...] = ()

    def __init__(
        self,
        function: Callable[[Any], Any],
        space: Any = None,
        classes: int | None = None,
        name: str = "",
        identity: str = "",
        *,
        calls: Calls | None = None,
        answer_shape: tuple[int, ...] = (),
    ) -> None:
        self.function = function
        self.space = Box() if space is None else space
        self.classes = classes
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.identity = identity or uuid.uuid4().hex
        self.calls = calls or Calls()
        self.answer_shape = tuple(answer_shape)

    def __repr__(self) -> str:
        return f"FunctionModel({self.name}, classes={self.classes}, space={self.space})"

    def __call__(self, x: Tensor) -> Tensor:
        answer: Tensor = self.calls.output(as_caller(self.function, self.calls.input(x)))
        return answer

    @property
    def lanes(self) -> Lanes | None:
        """The shapes in which the function wants to be called; None where any will do."""
        return self.calls.lanes

    def attacker_view(self) -> FunctionModel:
        return self

    def modules(self) -> tuple[nn.Module, ...]:
        return ()

    def describe(self) -> ModelInfo:
        return ModelInfo(
            name=self.name,
            architecture="function",
            state_sha256=hashlib.sha256(f"function|{self.identity}".encode()).hexdigest(),
            n_parameters=0,
            classes=self.classes,
            source="python callable",
        )

    def to(self, device: torch.device | str) -> FunctionModel:
        """Itself: a function runs where its author put it."""
        return self


class NumpyModel(FunctionModel):
    """A numpy function as a model: an array float32 [B, ...] in, an array of logits [B, classes] out; no gradient."""

    @override
    def __call__(self, x: Tensor) -> Tensor:
        answer = as_caller(self.function, x.detach().to("cpu", torch.float32).numpy())
        return cast(Tensor, self.calls.output(torch.as_tensor(np.asarray(answer)).to(x.device)))

    @override
    def describe(self) -> ModelInfo:
        return replace(super().describe(), source="numpy function", differentiable=False)


def is_model(thing: object) -> bool:
    """Whether an object has every member of protocols.Model."""
    return not isinstance(thing, type) and isinstance(thing, Model)


def as_model(thing: Any, task: Task | Data | None = None) -> Model[Any, Any]:
    """A model from a model, a torch module or a bare callable; the task says the space and the number of classes.

    A module or callable is taken to accept rows as the task hands them out; one that wants normalised rows goes into
    `TorchModel(module, mean=..., std=...)`. Raises BadModel for anything else.
    """
    space = None if task is None else task.space
    shape = () if task is None else answer_shape(task)
    classes = None if task is None or shape else task.classes
    if isinstance(thing, nn.Module):
        return TorchModel(thing, space=space, classes=classes, answer_shape=shape)
    if isinstance(thing, Model) and not isinstance(thing, type):
        return thing
    if callable(thing) and not isinstance(thing, type):
        return FunctionModel(thing, space=space, classes=classes, answer_shape=shape)
    from advkit.models.familiar import what_it_is

    advice = what_it_is(thing)
    raise BadModel(
        f"a model, a torch module or a function from samples to logits was expected, got {type(thing).__name__}"
        + (f" ({advice})" if advice else "")
    )


@dataclass(frozen=True, kw_only=True)
class Architecture(ABC):
    """What builds an untrained model for rows of a shape.

    mean, std: normalisation inside the model, per channel; empty: samples enter as they are
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @abstractmethod
    def network(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The module, its weights drawn from torch's global generator."""

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> TorchModel:
        """An untrained model in evaluation mode, on the CPU; shape is one row's, space by default the box [0, 1]."""
        from advkit.models import MODELS

        shape = tuple(int(length) for length in shape)
        if not shape or any(length < 1 for length in shape):
            raise BadModel(f"{type(self).__name__} needs the shape of one sample, such as (3, 32, 32); got {shape}")
        if classes < 1:
            raise BadModel(f"{type(self).__name__} needs at least one class, got {classes}")
        network = seeded(lambda: self.network(shape, classes), rng).eval()
        try:
            spec = MODELS.spec(self)
        except UnknownName:  # an architecture of the user's own, passed as an object
            spec = ""
        return TorchModel(
            network,
            Box(0.0, 1.0, shape) if space is None else space,
            classes,
            self.mean,
            self.std,
            name=spec or type(self).__name__,
            source="trained from random weights",
            architecture=spec,
        )


def check_widths(owner: str, *widths: int) -> None:
    """BadModel where linear layers from each width to the next have more weights than MOST_WEIGHTS in all."""
    weights = sum(one * two for one, two in pairwise(widths))
    if weights > MOST_WEIGHTS:
        raise BadModel(
            f"{owner} with layers of {', '.join(map(str, widths))} units has {weights:,} weights; expected at most "
            f"{MOST_WEIGHTS:,}: choose smaller layers"
        )


def image_shape(shape: tuple[int, ...], owner: str) -> tuple[int, int, int]:
    """(channels, height, width), or BadModel where rows are no images."""
    if len(shape) != 3:
        raise BadModel(f"{owner} takes images of shape [C, H, W], got samples of shape {list(shape)}; use mlp")
    channels, height, width = shape
    return channels, height, width


_place: ContextVar[str] = ContextVar("the device on which modules are built", default="cpu")


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Modules built inside have names and shapes, but no memory and no values."""
    token = _place.set("meta")
    try:
        yield
    finally:
        _place.reset(token)


@contextmanager
def floats_of(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors without a dtype of their own are of this one inside the block; None leaves the caller's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def seeded(build: Callable[[], nn.Module], rng: Rng, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """A module built on the CPU with weights drawn from rng; the global generators are given back as they were.

    dtype: of its weights, whatever the caller's default is; None leaves it to that default, for code of the caller's
    """
    seed = int(torch.randint(2**62, (), generator=rng.generator("cpu"), device="cpu"))
    with torch.random.fork_rng(devices=[]), torch.device(_place.get()), floats_of(dtype):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach every accelerator's too
        return build()
