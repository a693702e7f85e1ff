"""Models of other packages: timm, torchvision, and factories in the user's own code."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from advkit.core.errors import BadModel, UnknownName, UsageError
from advkit.core.protocols import Model, Rng
from advkit.core.registry import imported
from advkit.core.spaces import Box
from advkit.core.state import as_caller
from advkit.models.checkpoint import fill_from_file
from advkit.models.torch import FunctionModel, TorchModel, as_model, checked_logits, seeded


def _space(space: Any, shape: tuple[int, ...]) -> Any:
    return Box(0.0, 1.0, tuple(shape)) if space is None else space


def _answer(module: nn.Module, shape: tuple[int, ...], name: str, hint: str) -> Any:
    """What the module answers to one sample of zeros; BadModel where it does not take this shape."""
    try:
        floating = next((each.dtype for each in module.parameters() if each.is_floating_point()), torch.float32)
        with torch.no_grad():
            return as_caller(module, torch.zeros(1, *shape, dtype=floating, device="cpu"))
    except Exception as error:  # code of others raises whatever it likes
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise BadModel(
            f"{name} does not take samples of shape {list(shape)} ({type(error).__name__}: {first}); {hint}"
        ) from error


def _probed(module: nn.Module, shape: tuple[int, ...], name: str, hint: str) -> int:
    """How many logits the module answers to one sample of zeros; BadModel where it does not take this shape."""
    logits = checked_logits(_answer(module, shape, name, hint), 1)
    if logits.ndim != 2:
        raise BadModel(
            f"{name} answers decisions of shape {list(logits.shape)}; expected logits of shape [rows, classes]"
        )
    return int(logits.shape[1])


def _unknown(name: str, names: Iterable[str], package: str) -> UnknownName:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return UnknownName(
        f"{package} knows no model {name!r}" + (f"; did you mean {' or '.join(map(repr, near))}?" if near else "")
    )


def _unreachable(name: str, error: BaseException) -> UsageError:
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return UsageError(
        f"the weights of {name} can't be fetched ({type(error).__name__}: {first}); connect to the network once, or "
        f"fetch the file yourself and say {name},checkpoint=FILE, or {name},pretrained=false for random weights"
    )


@dataclass(frozen=True, kw_only=True)
class Named:
    """A model that another package knows by name.

    name:       as the package spells it
    pretrained: fetch the package's weights; its classes must then be the task's
    checkpoint: .safetensors, .pt or .pth of this architecture with the task's classes, instead of fetching
    sha256:     of the checkpoint; checked before it is opened
    """

    name: str
    pretrained: bool = True
    checkpoint: str = ""
    sha256: str = ""

    @property
    def fetches(self) -> bool:
        """Whether the package's weights are fetched."""
        return self.pretrained and not self.checkpoint

    def fill(self, module: nn.Module, spec: str) -> None:
        """Put the checkpoint's weights into the module, where one is named."""
        if self.checkpoint:
            fill_from_file(module, self.checkpoint, self.sha256, spec)

    def architecture(self) -> str:
        """The spec that builds the network without weights."""
        from advkit.models import MODELS

        return MODELS.spec(replace(self, pretrained=False, checkpoint="", sha256=""))


@dataclass(frozen=True, kw_only=True)
class Timm(Named):
    """timm model by name, normalised inside as its data configuration says.

    name: such as resnet18 or vit_tiny_patch16_224.augreg_in21k_ft_in1k
    """

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> TorchModel:
        import timm
        from timm.data.config import resolve_model_data_config

        shape = tuple(shape)
        spec = f"timm:{self.name}"
        if not timm.is_model(self.name.partition(".")[0]):
            raise _unknown(self.name, timm.list_models(), "timm")
        if len(shape) != 3:
            raise BadModel(f"{spec} takes images of shape [C, H, W], this task's samples are {list(shape)}")
        fetch = self.fetches

        def build() -> nn.Module:
            made: nn.Module
            if fetch:
                made = timm.create_model(self.name, pretrained=True)
            else:
                made = timm.create_model(self.name, pretrained=False, num_classes=classes, in_chans=shape[0])
            return made

        try:
            module = seeded(build, rng).eval()
        except Exception as error:  # hub clients raise whatever their transport raises
            if not fetch:
                raise BadModel(f"{spec} can't be built: {error}") from error
            raise _unreachable(spec, error) from error
        self.fill(module, spec)
        config: dict[str, Any] = resolve_model_data_config(module)  # type: ignore[no-untyped-call]
        size = "x".join(str(length) for length in config["input_size"])
        hint = f"it was made for {size} and {getattr(module, 'num_classes', '?')} classes" + (
            "; pretrained=false gives it the task's channels and classes" if fetch else ""
        )
        answered = _probed(module, shape, spec, hint)
        mean, std = tuple(config["mean"]), tuple(config["std"])
        if len(mean) not in (1, shape[0]):
            mean, std = (), ()  # colour statistics say nothing about other channels
        details = getattr(module, "pretrained_cfg", None) or {}
        return TorchModel(
            module,
            _space(space, shape),
            answered,
            mean,
            std,
            name=spec,
            source=str(details.get("hf_hub_id") or details.get("url") or "timm") if fetch else "timm architecture",
            license=str(details.get("license") or "") if fetch else "",
            architecture=self.architecture(),
        )


@dataclass(frozen=True, kw_only=True)
class TorchVision(Named):
    """torchvision classification model by name, with the normalisation of its default weights inside.

    name:       such as resnet18 or vit_b_16
    pretrained: fetch the package's default weights (1,000 ImageNet classes)
    """

    def __call__(self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None) -> TorchModel:
        import torchvision.models

        shape = tuple(shape)
        spec = f"torchvision:{self.name}"
        names = torchvision.models.list_models(module=torchvision.models)
        if self.name not in names:
            raise _unknown(self.name, names, "torchvision")
        fetch = self.fetches
        weights = torchvision.models.get_model_weights(self.name).DEFAULT
        # the published weights have a thousand classes; anything else would fail on the last layer
        outputs = len(weights.meta["categories"]) if fetch else classes
        module = seeded(lambda: torchvision.models.get_model(self.name, weights=None, num_classes=outputs), rng).eval()
        if fetch:
            try:
                state = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
            except Exception as error:  # whatever the transport raises
                raise _unreachable(spec, error) from error
            module.load_state_dict(state, strict=True)
        self.fill(module, spec)
        transform = weights.transforms()
        hint = f"it was made for 3x{transform.crop_size[0]}x{transform.crop_size[0]} images" + (
            f" and {outputs} classes" if fetch else ""
        )
        answered = _probed(module, shape, spec, hint)
        return TorchModel(
            module,
            _space(space, shape),
            answered,
            tuple(transform.mean),
            tuple(transform.std),
            name=spec,
            source=weights.url if fetch else "torchvision architecture",
            license="",  # weights carry the licence of the data that they were trained on
            architecture=self.architecture(),
        )


@dataclass(frozen=True, kw_only=True)
class PythonFactory:
    """Python model of the user's own: `python:module:name` imports the module and takes its model or its factory.

    target:     module:name of a torch module, an advkit model or a factory; the module may lie in the working
                directory. A torch module is copied, so that the module's own stays as it is. A factory gets `shape` (of
                one row) and `classes` where it has parameters of these names, and returns a torch module, an advkit
                model or a function from rows to logits (to reconstructed samples, where the task wants those). A torch
                module is put into evaluation mode
    mean, std:  normalisation of a torch module, per channel; empty: samples enter as they are
    checkpoint: .safetensors, .pt or .pth for a torch module
    sha256:     of the checkpoint; checked before it is opened
    """

    target: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    checkpoint: str = ""
    sha256: str = ""

    def __call__(
        self, shape: tuple[int, ...], classes: int, rng: Rng, *, space: Any = None, answer_shape: tuple[int, ...] = ()
    ) -> Any:
        """The factory's model; `answer_shape` is that of one answer where answers are reconstructed samples."""
        from advkit.models import MODELS

        shape = tuple(shape)
        spec = f"python:{self.target}"
        factory = self._factory()
        wanted = inspect.signature(factory).parameters
        takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in wanted.values())
        given = {key: value for key, value in (("shape", shape), ("classes", classes)) if takes_any or key in wanted}
        made: list[Any] = []

        def build() -> nn.Module:
            made.append(as_caller(factory, **given))
            return made[0] if isinstance(made[0], nn.Module) else nn.Identity()

        try:
            seeded(build, rng, dtype=None)
        except TypeError as error:
            raise BadModel(
                f"{spec} can't be called with {', '.join(given) or 'no arguments'}: {error}; expected a factory, which "
                "takes no arguments (or shape and classes) and returns the model"
            ) from error
        thing = made[0]
        if not isinstance(thing, nn.Module):
            if self.checkpoint or self.mean or self.std:
                raise BadModel(f"{spec} returns no torch module: checkpoint, mean and std do not apply to it")
            model = as_model(thing)
            if isinstance(model, FunctionModel) and model is not thing:
                model.space, model.classes = _space(space, shape), None if answer_shape else classes
                model.answer_shape = answer_shape
            return model
        if self.checkpoint:
            fill_from_file(thing, self.checkpoint, self.sha256, spec)
        thing.eval()
        hint = "let the factory use its parameter shape, or give the task samples that the network takes"
        if len(shape) == 3:
            hint += " (of image folders: resize=32,crop=32)"
        if answer_shape:
            checked_logits(_answer(thing.cpu(), shape, spec, hint), 1, answer_shape)
        answered = None if answer_shape else _probed(thing.cpu(), shape, spec, hint)
        return TorchModel(
            thing,
            _space(space, shape),
            answered,
            self.mean,
            self.std,
            name=spec,
            source="python factory",
            answer_shape=answer_shape,
            architecture=MODELS.spec(replace(self, mean=(), std=(), checkpoint="", sha256="")),
        )

    def _factory(self) -> Any:
        found = imported(self.target, "a torch module, or a function or class that returns a model")
        if isinstance(found, nn.Module):
            return partial(copy.deepcopy, found)
        if isinstance(found, Model) and not isinstance(found, type):
            return lambda: found
        if not callable(found):
            raise BadModel(f"python:{self.target} is a {type(found).__name__}; expected a function or class")
        return found
