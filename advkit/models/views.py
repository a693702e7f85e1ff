"""What an adaptive attacker differentiates: BPDA and EOT (Athalye et al., arXiv 1802.00420).

A defense that cuts or scrambles gradients answers for itself with an honest `attacker_view`. Two functions make one:
`straight_through` gives an operation without a useful derivative the derivative of another one, and `averaged` stands
for a random model by the mean of its draws. `Preprocessed`, a model behind an input transformation, needs only to be
told which of the two its transformation wants.
"""

from __future__ import annotations

import copy
import hashlib
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from typing_extensions import override

from advkit.core.errors import BadModel
from advkit.core.protocols import Averages, Embeds, KnowsClasses, ModelInfo, TakesStandIn, Undefended
from advkit.models.torch import tensors_sha256

Transform = Callable[[Tensor], Tensor]


def identity(x: Tensor) -> Tensor:
    """x: the stand-in of BPDA for whatever changes its input little."""
    return x


class _Through(torch.autograd.Function):
    """See `straight_through`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: Transform, backward: Transform) -> Tensor:
        """The true operation; autograd records nothing of it."""
        ctx.save_for_backward(x)
        ctx.stand_in = backward
        answer = forward(x.detach())
        if not answer.is_floating_point():
            raise BadModel(f"the operation answers {answer.dtype}; what has a derivative is of a floating type")
        if backward is identity and answer.shape != x.shape:
            raise BadModel(
                f"the operation makes {list(answer.shape)} of {list(x.shape)}, so the identity can't stand for its "
                "derivative: give straight_through a `backward` that answers the same shape"
            )
        return answer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        """The stand-in's vector-Jacobian product."""
        (x,) = ctx.saved_tensors
        if ctx.stand_in is identity:
            return upstream.to(x.dtype), None, None
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            answer = ctx.stand_in(leaf)
            if answer.shape != upstream.shape:
                raise BadModel(
                    f"the backward stand-in answers {list(answer.shape)} where the operation answers "
                    f"{list(upstream.shape)}; they must agree"
                )
            if not answer.requires_grad:
                raise BadModel("the backward stand-in has no gradient of its own (a detach or no_grad inside?)")
            (gradient,) = torch.autograd.grad(answer, leaf, upstream.to(answer.dtype))
        return gradient, None, None


@dataclass(frozen=True)
class _StraightThrough:
    """See `straight_through`; an object, so that it travels to worker processes."""

    forward: Transform
    backward: Transform

    def __call__(self, x: Tensor) -> Tensor:
        answer: Tensor = _Through.apply(x, self.forward, self.backward)
        return answer


def straight_through(forward: Transform, backward: Transform = identity) -> Transform:
    """A function that answers exactly what `forward` answers and has the derivative of `backward` (BPDA).

    backward: differentiable, answers the same shape; called anew on the same input in every backward pass, so that a
              random one draws anew, too. Default: the derivative of the identity

    Works under no_grad and on any batch. Can be differentiated once. Raises BadModel where shapes or types do not fit.
    """
    return _StraightThrough(forward, backward)


class Averaged(Averages, KnowsClasses, TakesStandIn):
    """The mean answer over draws of a random model (EOT).

    Answers are averaged, as `Ensemble` averages its members'; draws come one after the other, so that a model that
    draws once per call draws anew for each. Every call costs `passes` calls of the model.

    model: a model whose answers vary from call to call
    draws: calls averaged
    seed:  None: fresh draws in every call. A number: the same draws in every call, for which torch's global generators
           are put aside; the mean is then a fixed function of the batch that the attack may overfit to
    """

    def __init__(self, model: Any, draws: int, seed: int | None = None) -> None:
        if draws < 1:
            raise BadModel(f"an average needs at least one draw, got {draws}")
        self.model = model
        self.draws = draws
        self.seed = seed
        self.space = model.space

    def __repr__(self) -> str:
        return f"Averaged({self.model!r}, draws={self.draws}, seed={self.seed})"

    @property
    @override
    def classes(self) -> int | None:
        return self.model.classes if isinstance(self.model, KnowsClasses) else None

    @property
    @override
    def passes(self) -> int:
        return self.draws * (self.model.passes if isinstance(self.model, Averages) else 1)

    def __call__(self, x: Tensor) -> Tensor:
        with self._generators(x.device):
            answer: Tensor = self.model(x)
            for _ in range(self.draws - 1):
                answer = answer + self.model(x)
        return answer / self.draws

    def _generators(self, device: torch.device) -> AbstractContextManager[None]:
        return nullcontext() if self.seed is None else _Seeded(self.seed, device)

    @override
    def with_identity(self) -> Averaged:
        inner = self.model.with_identity() if isinstance(self.model, TakesStandIn) else self.model
        return Averaged(inner, self.draws, self.seed)

    def attacker_view(self) -> Averaged:
        view = self.model.attacker_view()
        return self if view is self.model else Averaged(view, self.draws, self.seed)

    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.modules())

    def describe(self) -> ModelInfo:
        info: ModelInfo = self.model.describe()
        mark = f"averaged|{info.state_sha256}|{self.draws}|{self.seed}"
        return replace(
            info,
            name=f"mean of {self.draws} draws of {info.name}",
            state_sha256=hashlib.sha256(mark.encode()).hexdigest(),
            randomized=info.randomized and self.seed is None,
        )

    def to(self, device: torch.device | str) -> Averaged:
        moved = self.model.to(device)
        return self if moved is self.model else Averaged(moved, self.draws, self.seed)


class _Seeded(AbstractContextManager[None]):
    """Torch's generators of one device seeded inside the block and given back after it."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.seed = seed
        self.fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])

    def __enter__(self) -> None:
        self.fork.__enter__()
        torch.manual_seed(self.seed)

    def __exit__(self, *error: Any) -> None:
        self.fork.__exit__(*error)


def averaged(model: Any, draws: int, seed: int | None = None) -> Any:
    """The model's mean answer over draws (EOT), for an `attacker_view`; the model itself where draws is 1.

    The wrapper of the same name in `advkit.attacks.wrappers` is the attacker's: an attack's `eot=N` averages losses and
    gradients over N calls of whatever view it is given. This one is the defender's: handed out as the view, it makes
    every attack average, those without an `eot` and whole suites included. Of both, the numbers of draws multiply.
    """
    return model if draws == 1 and seed is None else Averaged(model, draws, seed)


class Preprocessed(Undefended, KnowsClasses, TakesStandIn, Embeds):
    """A model behind an input transformation: x -> transform(x) -> model.

    model:      what answers; its own attacker_view is kept to
    transform:  rows [B, ...] to rows that the model takes; treats every row alike and none by its neighbours. A torch
                module goes along to other devices, and its weights count
    backward:   BPDA: the function whose derivative stands for the transformation's; None where its own is useful
    randomized: the transformation draws (from torch's generators) in every call
    draws:      EOT: draws that the attacker's view averages where the transformation is random
    space:      legal inputs; None takes the model's
    label:      names the transformation with all its settings and enters the weights' hash. Empty: a fresh one per
                object, so that unnamed transformations are never taken for one another
    """

    def __init__(
        self,
        model: Any,
        transform: Transform,
        *,
        backward: Transform | None = None,
        randomized: bool = False,
        draws: int = 10,
        space: Any = None,
        label: str = "",
    ) -> None:
        if draws < 1:
            raise BadModel(f"draws must be at least 1, got {draws}")
        self.model = model
        self.transform = transform
        self.backward = backward
        self.randomized = randomized
        self.draws = draws
        self.space = model.space if space is None else space
        self.label = label
        self.mark = label or uuid.uuid4().hex

    def __repr__(self) -> str:
        return f"Preprocessed({self.model!r}, {self.label or self.transform!r})"

    def __call__(self, x: Tensor) -> Tensor:
        answer: Tensor = self.model(self.transform(x))
        return answer

    @property
    @override
    def classes(self) -> int | None:
        return self.model.classes if isinstance(self.model, KnowsClasses) else None

    @property
    @override
    def undefended(self) -> Any:
        return self.model

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The transformation where it is a module."""
        inside = self.transform.forward if isinstance(self.transform, _StraightThrough) else self.transform
        return (inside,) if isinstance(inside, nn.Module) else ()

    @override
    def with_identity(self) -> Preprocessed:
        inside = self.transform.forward if isinstance(self.transform, _StraightThrough) else self.transform
        return self._around(self.model, straight_through(inside), None)

    @property
    @override
    def embeds(self) -> bool:
        return isinstance(self.model, Embeds) and self.model.embeds

    @override
    def toward(self, vector: Tensor) -> Preprocessed | None:
        """The same around the model seen toward the vector; None where that has no embeddings."""
        inner = self.model.toward(vector) if isinstance(self.model, Embeds) else None
        return None if inner is None else self._around(inner, self.transform, self.backward)

    def attacker_view(self) -> Any:
        """The same answers with a useful backward pass, averaged over draws where they vary."""
        inner = self.model.attacker_view()
        view = self
        if self.backward is not None:
            view = self._around(inner, straight_through(self.transform, self.backward), None)
        elif inner is not self.model:
            view = self._around(inner, self.transform, None)
        return averaged(view, self.draws) if self.randomized else view

    def _around(self, model: Any, transform: Transform, backward: Transform | None) -> Preprocessed:
        made = Preprocessed(
            model,
            transform,
            backward=backward,
            randomized=self.randomized,
            draws=self.draws,
            space=self.space,
            label=self.label,
        )
        made.mark = self.mark
        return made

    def modules(self) -> tuple[nn.Module, ...]:
        return (*self.networks, *self.model.modules())

    def describe(self) -> ModelInfo:
        info: ModelInfo = self.model.describe()
        word = f"preprocessed|{self.mark}|{info.state_sha256}"
        for each in self.networks:
            word += f"|{tensors_sha256(each.state_dict().items())}"
        return replace(
            info,
            n_parameters=info.n_parameters + sum(w.numel() for each in self.networks for w in each.parameters()),
            name=f"{info.name} behind {self.label or 'an input transformation'}",
            state_sha256=hashlib.sha256(word.encode()).hexdigest(),
            randomized=info.randomized or self.randomized,
            differentiable=info.differentiable and self.backward is None,
        )

    def to(self, device: torch.device | str) -> Preprocessed:
        moved = self.model.to(device)
        if moved is self.model:
            return self
        transform = self.transform
        if isinstance(transform, nn.Module):
            transform = copy.deepcopy(transform).to(device)
        return self._around(moved, transform, self.backward)
