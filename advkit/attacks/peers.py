"""Attacks of other packages in this harness: foolbox, torchattacks, ART (arXiv 1707.04131, 2010.01950, 1807.01069).

The package's attack gets the oracle as a torch module, the rows and their labels, and eps and norm of the ball; all
else is its own. What it returns is judged like any other attack's: by the threat model, and by the victim.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from advkit.attacks.base import TensorGoal, TensorOracle, lp_ball, per_row
from advkit.core.errors import MissingExtra, UnknownName, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Ball, Rng
from advkit.core.registry import parse_arguments
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import NormBall

_POWERS = {"Linf": math.inf, "L2": 2.0, "L1": 1.0, "L0": 0.0}


def peer_package(name: str) -> Any:
    """An optional package, imported now; MissingExtra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        extra = "torchattacks" if package == "torchattacks" else "peers"
        raise MissingExtra(
            f"the package {package} does not import ({error}): pip install 'advkit[{extra}]' brings it"
        ) from error


def read_settings(text: str) -> dict[str, Any]:
    """`steps=20,rel_stepsize=1/40` as keyword arguments: whole numbers, fractions, true, false, none, else text."""
    settings: dict[str, Any] = {}
    for argument in parse_arguments(text):
        if argument.key is None or argument.key in settings:
            raise UsageError(f"settings {text!r}: {argument.text!r} is not one key=value of its own")
        settings[argument.key] = _value(argument.value)
    return settings


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.casefold() in words:
        return words[text.casefold()]
    try:
        return int(text)
    except ValueError:
        pass
    numerator, slash, denominator = text.partition("/")
    try:
        return float(numerator) / float(denominator) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        return text[1:-1] if text.startswith("[") and text.endswith("]") else text


@contextmanager
def foreign_randomness(seed: int) -> Iterator[None]:
    """The global generators of torch, numpy and Python seeded inside the block and given back after it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    theirs = np.random.get_state(), random.getstate()  # noqa: NPY002 - other packages draw from the legacy state
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(theirs[0])  # noqa: NPY002
            random.setstate(theirs[1])


@dataclass(frozen=True)
class Request:
    """What an adapter hands to its package.

    module:  the oracle as a torch module, of rows in [low, high]
    x:       the rows, a copy that the package may do anything to
    classes: labels to leave or, where targeted, classes to reach; long [B]
    """

    module: nn.Module
    x: Tensor
    classes: Tensor
    targeted: bool
    norm: str
    eps: float
    low: float
    high: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Peer(ABC):
    """What the adapters share.

    Packages draw from global generators; these are seeded for every batch by its first row, and given back. A row's
    result may therefore depend on the batch it is in, unlike that of our own attacks: keep --batch-size when comparing.

    name:     class name in the package, such as LinfPGD
    settings: its keyword arguments, key=value joined by commas, in brackets: settings=[steps=20,rel_stepsize=1/40].
              eps, norm, goal and model come from the evaluation
    access:   what the attack asks of the victim; say scores or labels for black-box attacks

    A package's attack that searches the nearest adversarial point and takes no eps is judged by its points inside
    the ball: elsewhere the row comes back unchanged. Points outside the ball from an attack that
    was given eps stay as they are, for the harness to call invalid.

    Raises MissingExtra without the package, UnknownName for a class that it lacks, UsageError for settings, goals,
    norms or spaces that the attack can't take. Answers beyond the threat model's budget end the row in an error.
    """

    package: ClassVar[str]
    name: str
    settings: str = ""
    access: Access = Access.GRADIENTS

    def __post_init__(self) -> None:
        read_settings(self.settings)

    @property
    def needs(self) -> Access:
        """As declared by `access`."""
        return Access(self.access)

    def __call__(self, oracle: TensorOracle, x: Tensor, goal: TensorGoal, ball: Ball[Tensor], rng: Rng, /) -> Tensor:
        if not isinstance(oracle, MeteredOracle):
            raise UsageError(f"{self} needs the plain oracle, not one wrapped by {type(oracle).__name__}")
        inner = lp_ball(ball)
        if not isinstance(inner, NormBall):
            raise UsageError(f"{self} needs an Lp ball such as linf:eps=8/255, not {type(inner).__name__}")
        if isinstance(goal, Targeted):
            classes, targeted = goal.targets, True
        elif isinstance(goal, Untargeted):
            classes, targeted = goal.labels, False
        else:
            raise UsageError(f"{self} takes labels or targets, not the goal {type(goal).__name__}")
        low, high = (torch.as_tensor(bound) for bound in (inner.box.low, inner.box.high))
        if low.numel() != 1 or high.numel() != 1 or not math.isfinite(float(high - low)):
            raise UsageError(f"{self} needs one lower and one upper bound for all features, not {inner.box!r}")
        seed = int(rng.at("peer").integers(2**31 - 1, torch.empty(len(x), 1))[0])
        with foreign_randomness(seed):
            package = peer_package(self.package)
            request = Request(
                oracle.differentiable(x), x.clone(), classes, targeted, inner.norm, inner.eps, float(low), float(high),
                seed,
            )  # fmt: skip
            z, bounded = self._run(package, request)
        z = z.detach().to(x)
        return z if bounded else torch.where(per_row(ball.admits(z, x), x), z, x)

    def __str__(self) -> str:
        return f"{self.package}:{self.name}"

    @abstractmethod
    def _run(self, package: Any, request: Request) -> tuple[Tensor, bool]:
        """The package's points, and whether it was given eps."""

    def _class(self, home: Any) -> Any:
        """The attack class in a module of the package."""
        attack = getattr(home, self.name, None)
        if not inspect.isclass(attack):
            names = {each.casefold(): each for each, value in vars(home).items() if inspect.isclass(value)}
            near = difflib.get_close_matches(self.name.casefold(), names, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(repr(names[one]) for one in near)}?" if near else ""
            raise UnknownName(f"{self.package} has no attack {self.name!r}{hint}")
        return attack

    def _make(self, cls: Any, *leading: Any, **known: Any) -> tuple[Any, set[str]]:
        """The attack, and which of the known arguments its constructor took."""
        takes = inspect.signature(cls).parameters
        free = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
        taken = {key: value for key, value in known.items() if key in takes}
        given = read_settings(self.settings)
        if ours := sorted({"eps", "norm", "targeted"} & set(taken) & set(given)):
            raise UsageError(f"{self}: {', '.join(ours)} come from the threat model and the goal; leave them out")
        unknown = sorted(set(given) - set(takes)) if not free else []
        if unknown:
            raise UsageError(
                f"{self} has no setting {', '.join(unknown)}; it has {', '.join(list(takes)[len(leading) :])}"
            )
        try:
            return cls(*leading, **{**taken, **given}), set(taken)
        except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
            raise UsageError(f"{self} refuses its settings: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Foolbox(Peer):
    """Foolbox: an attack of that package by class name, run and judged here (arXiv 1707.04131).

    Foolbox clips every point to the ball itself before it hands it back.
    """

    package: ClassVar[str] = "foolbox"

    def _run(self, package: Any, request: Request) -> tuple[Tensor, bool]:
        attack, _ = self._make(self._class(package.attacks))
        power = getattr(getattr(attack, "distance", None), "p", None)
        if power is not None and power != _POWERS[request.norm]:
            raise UsageError(f"{self} works in L{power:g}, this ball is {request.norm}")
        model = package.PyTorchModel(request.module, bounds=(request.low, request.high), device=request.x.device)
        kind = package.TargetedMisclassification if request.targeted else package.Misclassification
        _, clipped, _ = attack(model, request.x, kind(request.classes), epsilons=request.eps)
        return clipped, True


class _Unit(nn.Module):
    """A module of rows in [low, high] for packages that know [0, 1] alone."""

    def __init__(self, module: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.module = module
        self.low, self.width = low, high - low

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.module(x * self.width + self.low)
        return answer


@dataclass(frozen=True, kw_only=True)
class TorchAttacks(Peer):
    """Torchattacks: an attack of that package by class name, run and judged here (arXiv 2010.01950).

    The package knows the box [0, 1] alone; rows of another box are stretched to it and back. Attacks with eps and
    without a norm of their own are taken for Linf, those with L2 in their names for L2. Its AutoAttack runs 10 steps
    per attack where AutoAttack standard has 100.
    """

    package: ClassVar[str] = "torchattacks"

    def _run(self, package: Any, request: Request) -> tuple[Tensor, bool]:
        unit = (request.low, request.high) == (0.0, 1.0)
        width = request.high - request.low
        module = request.module if unit else _Unit(request.module, request.low, request.high).eval()
        eps = request.eps if request.norm == "L0" else request.eps / width
        attack, took = self._make(self._class(package), module, eps=eps, norm=request.norm, seed=request.seed)
        bounded = "eps" in took
        fixed = "L2" if "L2" in self.name else "Linf"
        if bounded and "norm" not in took and fixed != request.norm:
            raise UsageError(f"{self} works in {fixed}, this ball is {request.norm}")
        if request.targeted:
            try:
                attack.set_mode_targeted_by_label(quiet=True)
            except ValueError as error:
                raise UsageError(f"{self} has no targeted mode; use the goal untargeted") from error
        z = attack(request.x if unit else ((request.x - request.low) / width).clamp(0, 1), request.classes)
        return (z if unit else z * width + request.low), bounded


@dataclass(frozen=True, kw_only=True)
class ART(Peer):
    """Adversarial Robustness Toolbox (ART): an evasion attack of that package by class name (arXiv 1807.01069).

    Its step sizes are absolute and do not follow eps: settings=[eps_step=0.01]. One answer more than the attack's own
    is asked per batch, to learn the number of classes.
    """

    package: ClassVar[str] = "art"

    def _run(self, package: Any, request: Request) -> tuple[Tensor, bool]:
        home = peer_package("art.attacks.evasion")
        estimators = peer_package("art.estimators.classification")
        if request.norm == "L0":
            raise UsageError(f"{self} knows no L0 ball")
        with torch.no_grad():
            classes = request.module(request.x).shape[1]
        estimator = estimators.PyTorchClassifier(
            model=request.module,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(request.x.shape[1:]),
            nb_classes=classes,
            clip_values=(request.low, request.high),
            device_type="gpu" if request.x.is_cuda else "cpu",
        )
        power = _POWERS[request.norm]
        attack, took = self._make(
            self._class(home),
            estimator,
            eps=request.eps,
            norm=power if math.isinf(power) else int(power),
            targeted=request.targeted,
            batch_size=len(request.x),
            verbose=False,
        )
        if request.targeted and "targeted" not in took:
            raise UsageError(f"{self} has no targeted mode; use the goal untargeted")
        if "eps" in took and "norm" not in took and request.norm != "Linf":
            raise UsageError(f"{self} works in Linf, this ball is {request.norm}")
        z = attack.generate(x=request.x.cpu().numpy(), y=request.classes.cpu().numpy())
        return torch.as_tensor(z), "eps" in took
