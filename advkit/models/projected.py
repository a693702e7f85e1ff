"""A model with a projection at one of its layers, put there by a hook while the model is called."""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from advkit.core.errors import BadModel, UsageError
from advkit.core.lanes import Lanes
from advkit.core.protocols import (
    Averages,
    Embeds,
    Headed,
    KnowsClasses,
    ModelInfo,
    Shaped,
    TakesCaptions,
    Undefended,
    Wraps,
)
from advkit.models.spectral import Filter, Place, load_filter, save_filter
from advkit.models.torch import same_device, tensors_sha256

POOLED = ("image_embeds", "pooler_output")
"""Where outputs of transformers keep the pooled embedding."""
Change = Callable[[Tensor], Tensor]


def layer(top: nn.Module, name: str) -> nn.Module:
    """The layer of a module by its name in `named_modules`; UsageError names near ones where there is none."""
    known: dict[str, nn.Module] = dict(top.named_modules())
    if name and name in known:
        return known[name]
    folded = {each.casefold(): each for each in known if each}
    tails = [each for each in known if each and name and each.rpartition(".")[2] == name.rpartition(".")[2]]
    near = [folded[each] for each in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.4)]
    said = list(dict.fromkeys(tails[:3] + near))[:4] or [each for each in known if each][:4]
    raise UsageError(
        f"the model has no layer {name!r}"
        + (f"; did you mean {' or '.join(map(repr, said))}?" if said else "; it has no layers that have names")
    )


@contextmanager
def changed(top: nn.Module, place: Place, change: Change) -> Iterator[None]:
    """Inside the block the embeddings at a place of a module are changed; differentiable.

    What goes in or out may be a tensor, a tuple whose first item is one, or an output of transformers with
    `image_embeds` or `pooler_output`. The hook is there during the block alone: the module is not copied, and whoever
    else holds it is back with it unchanged. Two threads must not call it at the same time.
    """
    target = layer(top, place.module)
    if place.before:

        def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if given:
                return (_replaced(given[0], change, place), *given[1:]), named
            key = next((key for key, value in named.items() if isinstance(value, Tensor)), None)
            if key is None:
                raise BadModel(f"{place} holds no tensor")
            return given, {**named, key: change(named[key])}

        handle = target.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = target.register_forward_hook(lambda _, __, answer: _replaced(answer, change, place))
    try:
        yield
    finally:
        handle.remove()


def _replaced(value: Any, change: Change, place: Place) -> Any:
    """The value with its embeddings changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and not hasattr(value, "_fields") and value and isinstance(value[0], Tensor):
        return (change(value[0]), *value[1:])
    key = next((key for key in POOLED if isinstance(value, Mapping) and isinstance(value.get(key), Tensor)), None)
    if key is None:
        raise BadModel(
            f"{place} is a {type(value).__name__}; expected a tensor, a tuple that begins with one, or an output with "
            f"{' or '.join(POOLED)}"
        )
    made = copy.copy(value)
    made[key] = change(value[key])
    return made


def top_of(model: Any, name: str = "") -> nn.Module:
    """The torch module of a model that has the layer, the first one where no name is said; BadModel without any."""
    tops: tuple[nn.Module, ...] = tuple(model.modules())
    if not tops:
        raise BadModel(f"{model.describe().name} has no torch module inside, and so no layer to be filtered")
    return next((top for top in tops if name and name in dict(top.named_modules())), tops[0])


def default_place(model: Any) -> Place:
    """Where a model's embeddings are: the layer that its module calls `pooled`, else what enters the head.

    The head is the last linear layer with as many outputs as there are classes. Raises UsageError where there is none.
    """
    top = top_of(model)
    said = getattr(top, "pooled", None)
    if isinstance(said, str) and said:
        return Place(said)
    classes = model.classes if isinstance(model, KnowsClasses) else None
    found = [
        name
        for name, each in top.named_modules()
        if isinstance(each, nn.Linear) and each.out_features == classes and name
    ]
    if not found:
        raise UsageError(
            f"{model.describe().name} has no linear layer of {classes} outputs before which its embeddings would be: "
            "name the layer whose output they are, module=NAME"
        )
    return Place(found[-1], before=True)


@contextmanager
def collected(top: nn.Module, place: Place) -> Iterator[list[Tensor]]:
    """Inside the block every call of the module adds what is at the place to the list, detached and on the CPU."""
    found: list[Tensor] = []

    def kept(z: Tensor) -> Tensor:
        found.append(z.detach().cpu())
        return z

    with changed(top, place, kept):
        yield found


def embeddings(model: Any, x: Tensor, place: Place, batch: int = 256) -> Tensor:
    """What is at a place of a model for rows x: [B, d], tokens [B, T, d] or maps [B, d, H, W], detached."""
    with torch.no_grad(), collected(top_of(model, place.module), place) as found:
        for rows in torch.split(x, batch):
            calls = len(found)
            model(rows)
            if len(found) != calls + 1 or len(found[-1]) != len(rows):
                raise BadModel(
                    f"{place} is asked for {len(found) - calls} times in one call of the model, or not sample by "
                    "sample; expected once, [B, ...]"
                )
    return torch.cat(found)


class Projected(Undefended, KnowsClasses, Shaped, Averages, Headed, Wraps):
    """A model whose embeddings at one place go through a spectral filter.

    model:  the model without the filter: it is not changed, and is what an oblivious attacker attacks
    fitted: the filter
    place:  where it stands
    """

    def __init__(self, model: Any, fitted: Filter, place: Place, *, view: bool = False) -> None:
        self._model = model
        self.fitted = fitted
        self.place = place
        self._view = view
        self._top = top_of(model, place.module)
        layer(self._top, place.module)

    def __repr__(self) -> str:
        return f"Projected({self._model!r}, {self.place})"

    def __call__(self, x: Tensor) -> Tensor:
        with changed(self._top, self.place, self.fitted.projection):
            answer: Tensor = self._model(x)
        return answer

    def embeddings(self, x: Tensor, batch: int = 256) -> Tensor:
        """The embeddings of rows before the filter, detached: what the detector looks at."""
        return embeddings(self._model, x, self.place, batch)

    @property
    def space(self) -> Any:
        """The model's."""
        return self._model.space

    @property
    @override
    def model(self) -> Any:
        return self._model

    @property
    @override
    def undefended(self) -> Any:
        return self._model

    @property
    @override
    def classes(self) -> int | None:
        return self._model.classes if isinstance(self._model, KnowsClasses) else None

    @property
    @override
    def lanes(self) -> Lanes | None:
        return Lanes.own(self._model)

    @property
    @override
    def passes(self) -> int:
        return self._model.passes if isinstance(self._model, Averages) else 1

    @override
    def head(self) -> Tensor | None:
        return self._model.head() if isinstance(self._model, Headed) else None

    @property
    def architecture(self) -> str:
        """The model's."""
        found: str = self._model.describe().architecture
        return found

    def attacker_view(self) -> Projected:
        """The model with its filter, which is a matrix product and is differentiated as it stands."""
        inner = self._model.attacker_view()
        return self if self._view and inner is self._model else type(self)(inner, self.fitted, self.place, view=True)

    def modules(self) -> tuple[nn.Module, ...]:
        """The model's, and the projection."""
        return (*self._model.modules(), self.fitted.projection)

    def describe(self) -> ModelInfo:
        """The model's, with the filter in name and hash."""
        info: ModelInfo = self._model.describe()
        held = tensors_sha256(self.fitted.projection.state_dict().items())
        word = f"projected|{held}|{self.place.module}|{self.place.before}|{info.state_sha256}"
        return replace(
            info,
            name=f"{info.name} with a spectral filter at {self.place}",
            state_sha256=hashlib.sha256(word.encode()).hexdigest(),
        )

    def to(self, device: torch.device | str) -> Projected:
        """The same model on a device, where a copy of the filter goes along."""
        moved = self._model.to(device)
        if moved is self._model and same_device(self.fitted.projection.mean.device, torch.device(device)):
            return self
        fitted = replace(self.fitted, projection=copy.deepcopy(self.fitted.projection).to(device))
        return type(self)(moved, fitted, self.place, view=self._view)

    def save(self, path: str | Path, **extra: Any) -> str:
        """Write the filter to a safetensors file (see `save_filter`); returns the file's sha256."""
        return save_filter(self.fitted, self.place, path, self._model.describe().state_sha256, extra)


class ProjectedImageText(Projected, Embeds, TakesCaptions):
    """The same around an image-text model: the filter is in its image encoder, before its embeddings have norm 1."""

    @override
    def toward(self, vector: Tensor) -> Any:
        inner = self._model.toward(vector)
        return None if inner is None else self._around(inner)

    @override
    def with_captions(self, captions: tuple[tuple[str, ...], ...] | None, names: tuple[str, ...]) -> Any:
        inner = self._model.with_captions(captions, names)
        return self if inner is self._model else self._around(inner)

    def _around(self, inner: Any) -> Projected:
        name, tops = self.place.module, inner.modules()
        if not any(name in dict(top.named_modules()) for top in tops):
            name = f"inner.{name}"  # a goal has put itself around the network
        return projected(inner, self.fitted, replace(self.place, module=name), view=self._view)


def projected(model: Any, fitted: Filter, place: Place, *, view: bool = False) -> Projected:
    """The model with a filter at a place; an image-text model stays one."""
    kind = ProjectedImageText if isinstance(model, Embeds) and isinstance(model, TakesCaptions) else Projected
    return kind(model, fitted, place, view=view)


def load_projected(path: str | Path, model: Any, sha256: str = "") -> Projected:
    """The model with the filter of a file.

    Raises CheckpointError for files that hold no filter, UsageError where the model lacks the layer, BadModel where the
    filter was fitted to other weights.
    """
    fitted, place, fitted_to = load_filter(path, sha256)
    if fitted_to and fitted_to != model.describe().state_sha256:
        raise BadModel(
            f"{path} holds a filter that was fitted to other weights than those of {model.describe().name}: name that "
            "model, or fit anew (leave weights out and give the task root=FOLDER)"
        )
    return projected(model, fitted, place)
