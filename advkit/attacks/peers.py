"""Attacks of other packages: foolbox, torchattacks, ART (arXiv 1707.04131, 2010.01950, 1807.01069) and adv-lib.

The package's attack gets the oracle as a torch module, the rows and their labels, and eps and norm of the ball, or the
norm alone where there is no radius; all else is its own. What it returns is judged like any other attack's: by the
threat model, and by the victim.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import random
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from advkit.attacks.base import TensorGoal, TensorOracle, lp_ball, per_row
from advkit.core.errors import BudgetExhausted, MissingExtra, UnknownName, UsageError
from advkit.core.oracle import MeteredOracle
from advkit.core.protocols import Access, Ball, Rng
from advkit.core.registry import parse_arguments
from advkit.core.rows import finite_rows
from advkit.threat_models.goals.targeted import Targeted
from advkit.threat_models.goals.untargeted import Untargeted
from advkit.threat_models.lp import NormBall
from advkit.threat_models.minimum import Minimum

ADV_LIB = "adv-lib==0.2.8"
_POWERS = {"Linf": math.inf, "L2": 2.0, "L1": 1.0, "L0": 0.0}


def peer_package(name: str) -> Any:
    """An optional package, imported now; MissingExtra where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingExtra(f"the package {package} does not import ({error}): {_brings(package)}") from error


def _brings(package: str) -> str:
    """The command that installs a package."""
    if package == "adv_lib":  # it requires visdom, which does not build with current setuptools
        return f"pip install --no-deps {ADV_LIB} tqdm"
    return f"pip install 'advkit[{'torchattacks' if package == 'torchattacks' else 'peers'}]'"


@contextmanager
def stand_in(name: str) -> Iterator[None]:
    """An empty module of that name inside the block, where none is installed: for packages that import what they need
    for drawing alone."""
    if name in sys.modules or importlib.util.find_spec(name) is not None:
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    try:
        yield
    finally:
        del sys.modules[name]


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
    eps:     radius; None where there is none and the least distance is wanted
    """

    module: nn.Module
    x: Tensor
    classes: Tensor
    targeted: bool
    norm: str
    eps: float | None
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

    Under minimum-l2 and its kind an attack that searches the nearest adversarial point gets no eps, and one that works
    within a radius is refused. Where queries or propagations are limited, the attack ends when they do, and the best
    point that it had asked about counts.

    A package's attack that searches the nearest adversarial point and takes no eps is judged inside the ball: a point
    beyond it comes back as the nearest one of the ball. Points outside the ball from an attack that
    was given eps stay as they are, for the harness to call invalid.

    Default step sizes that are lengths, of attacks that take eps, follow it: they keep their ratio to the class's own
    default eps. Those in `settings` are taken as they are. docs/peers.md has every class of each package.

    Raises MissingExtra without the package, UnknownName for a class that it lacks, UsageError for settings, goals,
    norms or spaces that the attack can't take.
    """

    package: ClassVar[str]
    radius: ClassVar[Mapping[str, str]] = {}  # classes that call their eps otherwise
    lengths: ClassVar[Mapping[str, str]] = {}  # what follows eps: settings by class, "" for every other one
    fixed: ClassVar[Mapping[str, str]] = {}  # the norm of classes that take eps and no norm, where it is not Linf
    refused: ClassVar[Mapping[str, str]] = {}  # classes that no setting makes an attack on these rows, and why

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
        if not isinstance(inner, NormBall | Minimum):
            raise UsageError(
                f"{self} needs an Lp ball such as linf:eps=8/255, or minimum-l2 and its kind, not "
                f"{type(inner).__name__}"
            )
        if isinstance(goal, Targeted):
            classes, targeted = goal.targets, True
        elif isinstance(goal, Untargeted):
            classes, targeted = goal.labels, False
        else:
            raise UsageError(f"{self} takes labels or targets, not the goal {type(goal).__name__}")
        low, high = (torch.as_tensor(bound) for bound in (inner.box.low, inner.box.high))
        if low.numel() != 1 or high.numel() != 1 or not math.isfinite(float(high - low)):
            raise UsageError(f"{self} needs one lower and one upper bound for all features, not {inner.box!r}")
        eps = inner.eps if isinstance(inner, NormBall) else None
        seed = int(rng.at("peer").integers(2**31 - 1, torch.empty(len(x), 1))[0])
        with foreign_randomness(seed):
            package = peer_package(self.package)
            module: nn.Module = oracle.differentiable(x)
            seen = None if oracle.left is None else _Watched(module, goal, ball, x)
            request = Request(
                module if seen is None else seen, x.clone(), classes, targeted, inner.norm, eps, float(low),
                float(high), seed,
            )  # fmt: skip
            try:
                z, bounded = self._run(package, request)
            except BudgetExhausted:
                if seen is None or not oracle.meter.calls:
                    raise
                z, bounded = seen.best, True
            except ImportError as error:  # what one attack of the package needs besides
                raise MissingExtra(
                    f"{self} needs a package more ({_first_line(error)}): {_brings(self.package)}"
                ) from error
        z = z.detach().to(x)
        if bounded or z.shape != x.shape:
            return z
        # A point beyond the ball is no find, but it is where the attack came to: the way back may still cross.
        sane = per_row(finite_rows(z), x)
        return torch.where(sane, ball.project(torch.where(sane, z, x), x), x)

    def __str__(self) -> str:
        return f"{self.package}:{self.name}"

    @abstractmethod
    def _run(self, package: Any, request: Request) -> tuple[Tensor, bool]:
        """The package's points, and whether it was given eps."""

    def _class(self, home: Any) -> Any:
        """The attack class in a module of the package."""
        attack = getattr(home, self.name, None)
        if self.name in self.refused:
            raise UsageError(f"{self} can't be run here: it {self.refused[self.name]}")
        if not inspect.isclass(attack) or inspect.isabstract(attack):
            classes = {each: value for each, value in vars(home).items() if inspect.isclass(value)}
            names = {each.casefold(): each for each, value in classes.items() if not inspect.isabstract(value)}
            near = difflib.get_close_matches(self.name.casefold(), names, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(repr(names[one]) for one in near)}?" if near else ""
            raise UnknownName(f"{self.package} has no attack {self.name!r}{hint}")
        return attack

    def _make(self, cls: Any, *leading: Any, **known: Any) -> tuple[Any, set[str]]:
        """The attack, and which of the known arguments its constructor took."""
        takes = inspect.signature(cls).parameters
        free = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values())
        radius = self.radius.get(self.name, "eps")
        given = read_settings(self.settings)
        if known.get("eps", 0.0) is None:
            del known["eps"]
        if "eps" in known and radius in takes:
            known[radius] = known.pop("eps")
            known = {**self._following(takes, radius, known[radius]), **known}
        taken = {key: value for key, value in known.items() if key in takes}
        if ours := sorted({radius, "norm", "targeted", "distance"} & set(taken) & set(given)):
            raise UsageError(f"{self}: {', '.join(ours)} come from the threat model and the goal; leave them out")
        unknown = sorted(set(given) - set(takes)) if not free else []
        if unknown:
            raise UsageError(
                f"{self} has no setting {', '.join(unknown)}; it has {', '.join(list(takes)[len(leading) :])}"
            )
        try:
            return cls(*leading, **{**taken, **given}), {"eps" if key == radius else key for key in taken}
        except (TypeError, ValueError, AssertionError, NotImplementedError) as error:
            raise UsageError(f"{self} refuses its settings: {_first_line(error)}") from error

    def _check_radius(self, request: Request, takes: bool) -> None:
        """UsageError for an attack within a radius where there is none."""
        if takes and request.eps is None:
            raise UsageError(
                f"{self} works within a radius, and this threat model has none: give it one "
                f"({request.norm.casefold()}:eps=...), or choose an attack that looks for the nearest point"
            )

    def _following(self, takes: Mapping[str, inspect.Parameter], radius: str, eps: float) -> dict[str, float]:
        """The default lengths, in the ratio that they have to the class's own default eps."""
        names = self.lengths.get(self.name, self.lengths.get("", "")).split()
        usual = {name: takes[name].default for name in (radius, *names) if name in takes}
        if not all(isinstance(value, (int, float)) for value in usual.values()) or not usual[radius]:
            return {}
        return {name: usual[name] * eps / usual[radius] for name in names if name in usual}

    def _without_targets(self) -> UsageError:
        return UsageError(f"{self} has no targeted mode; use the goal untargeted")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True, kw_only=True)
class Foolbox(Peer):
    """Foolbox: an attack of that package by class name, run and judged here (arXiv 1707.04131).

    Foolbox clips every point to the ball itself before it hands it back, those of attacks that search the nearest
    adversarial point included, but not in L0. Attacks with a free distance get the ball's norm, HopSkipJumpAttack its
    constraint; DatasetAttack draws from the batch that it attacks.
    """

    package: ClassVar[str] = "foolbox"
    refused: ClassVar[Mapping[str, str]] = {
        "BinarizationRefinementAttack": "refines adversarial points of other attacks, and starts from none of its own"
    }

    def _run(self, package: Any, request: Request) -> tuple[Tensor, bool]:
        cls, kinds = self._class(package.attacks), package.attacks.base
        distance = package.distances.LpDistance(_POWERS[request.norm])
        known = {"constraint": request.norm.casefold()} if request.norm in ("L2", "Linf") else {}
        attack, took = self._make(cls, distance=distance, **known)
        if issubclass(cls, kinds.FlexibleDistanceMinimizationAttack) and "distance" not in took:
            attack._distance = distance  # PointwiseAttack has no argument for what it is asked for
        power = getattr(getattr(attack, "distance", None), "p", None)
        if power is not None and power != _POWERS[request.norm]:
            raise UsageError(f"{self} works in L{power:g}, this ball is {request.norm}")
        model = package.PyTorchModel(request.module, bounds=(request.low, request.high), device=request.x.device)
        criterion = package.TargetedMisclassification if request.targeted else package.Misclassification
        if issubclass(cls, package.attacks.DatasetAttack):
            attack.feed(model, request.x)
        self._check_radius(request, not issubclass(cls, kinds.MinimizationAttack))
        searches = (
            request.eps is None or power is None or (request.norm == "L0" and issubclass(cls, kinds.MinimizationAttack))
        )
        radius = {} if power is None else {"epsilons": None if searches else request.eps}
        try:
            _, points, _ = attack(model, request.x, criterion(request.classes), **radius)
        except ValueError as error:
            if "criterion" not in str(error):
                raise
            served = "untargeted" if request.targeted else "targeted"
            raise UsageError(f"{self} serves the goal {served} alone") from error
        return points, not searches


class _Watched(nn.Module):
    """A module that keeps the best point it was asked about for every row: one that reached the goal, the nearest where
    there is no radius, the first one inside the ball where there is."""

    def __init__(self, module: nn.Module, goal: TensorGoal, threat: Any, x: Tensor) -> None:
        super().__init__()
        self.module = module
        self._goal, self._threat, self._x = goal, threat, x
        self.best = x.clone()
        self._away = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.module(x)
        self._keep(x.detach().to(self._x), answer.detach())
        return answer

    def _keep(self, z: Tensor, answer: Tensor) -> None:
        of = torch.arange(len(z), device=z.device)
        if len(z) != len(self._x):
            of = torch.cdist(z.flatten(1), self._x.flatten(1)).argmin(1)
        near = self._x[of]
        counts = self._goal.take(of).reached(answer) & finite_rows(answer) & self._threat.admits(z, near)
        away = torch.where(counts, self._threat.distance(z, near).double(), torch.inf)
        if isinstance(lp_ball(self._threat), NormBall):
            away = torch.where(counts, 0.0, away)
        # Rows that are asked about several times at once come one after the other, the nearest last.
        order = away.argsort(descending=True, stable=True)
        order = order[away[order] < self._away[of[order]]]
        for place in order.tolist():
            self._away[of[place]], self.best[of[place]] = away[place], z[place]


class _Unit(nn.Module):
    """A module of rows in [low, high] for packages that know [0, 1] alone."""

    def __init__(self, module: nn.Module, low: float, high: float) -> None:
        super().__init__()
        self.module = module
        self.low, self.width = low, high - low

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.module(x * self.width + self.low)
        return answer


class _Probabilities(nn.Module):
    """A module that answers softmax probabilities, for attacks written for these."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.module(x)
        return answer.softmax(1)


class _Positive(nn.Module):
    """A module whose lowest score of a row is 1, for attacks that take a class's score times a mask of 0 and 1.

    Classes, margins and gradients of margins stay as they are.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.module(x)
        return answer - answer.detach().amin(1, keepdim=True) + 1


def _classes(request: Request) -> int:
    """How many classes there are, for one answer per row."""
    with torch.no_grad():
        return int(request.module(request.x).shape[1])


@dataclass(frozen=True, kw_only=True)
class TorchAttacks(Peer):
    """Torchattacks: an attack of that package by class name, run and judged here (arXiv 2010.01950).

    The package knows the box [0, 1] alone; rows of another box are stretched to it and back. Attacks with eps and
    without a norm of their own are taken for Linf, those with L2 in their names for L2. Its AutoAttack runs 10 steps
    per attack where AutoAttack standard has 100. Attacks that want the number of classes (FAB, APGDT, AutoAttack, JSMA
    without targets) cost one answer more per batch. CW, EADL1 and EADEN, whose gradient vanishes where scores are
    negative, are shown scores above zero. JSMA without targets aims at the next of the victim's classes, not of ten.
    """

    package: ClassVar[str] = "torchattacks"
    radius: ClassVar[Mapping[str, str]] = {"PIFGSM": "max_epsilon", "PIFGSMPP": "max_epsilon"}
    lengths: ClassVar[Mapping[str, str]] = {"": "alpha", "SPSA": "lr"}
    refused: ClassVar[Mapping[str, str]] = {
        "LGV": "trains copies of the model on a loader of training data; the threat model transfer attacks surrogates",
        "MultiAttack": "is made of attack objects; run them one by one",
    }
    coloured: ClassVar[frozenset[str]] = frozenset({"PIFGSM", "PIFGSMPP", "TIFGSM"})
    masks: ClassVar[frozenset[str]] = frozenset({"CW", "EADL1", "EADEN"})  # scores times 0 and 1, then the largest

    def _run(self, package: Any, request: Request) -> tuple[Tensor, bool]:
        unit = (request.low, request.high) == (0.0, 1.0)
        width = request.high - request.low
        module = request.module if unit else _Unit(request.module, request.low, request.high).eval()
        if self.name in self.masks:
            module = _Positive(module).eval()
        eps = request.eps if request.eps is None or request.norm == "L0" else request.eps / width
        cls = self._class(package)
        self._check_radius(request, self.radius.get(self.name, "eps") in inspect.signature(cls).parameters)
        known: dict[str, Any] = {"eps": eps, "norm": request.norm, "seed": request.seed}
        if "n_classes" in inspect.signature(cls).parameters:
            known["n_classes"] = _classes(request)
        attack, took = self._make(cls, module, **known)
        bounded = "eps" in took
        fixed = "L2" if "L2" in self.name else "Linf"
        if bounded and "norm" not in took and fixed != request.norm:
            raise UsageError(f"{self} works in {fixed}, this ball is {request.norm}")
        if self.name in self.coloured and request.x.shape[1:2] != (3,):
            raise UsageError(f"{self} takes images of three channels alone, not {list(request.x.shape[1:])}")
        if request.targeted:
            if self.name == "FAB":
                # It says that it has the mode, and aims by the rank of a class where it is given one.
                raise UsageError(f"{self} does not aim at a class; use the goal untargeted, or advkit's own fab-t")
            try:
                attack.set_mode_targeted_by_label(quiet=True)
            except ValueError as error:
                raise self._without_targets() from error
        elif self.name == "JSMA":
            classes = _classes(request)
            attack.set_mode_targeted_by_function(lambda _, labels: (labels + 1) % classes, quiet=True)
        z = attack(request.x if unit else ((request.x - request.low) / width).clamp(0, 1), request.classes)
        return (z if unit else z * width + request.low), bounded


_TABLES = "works on rows of a table, not on images"
_PATCH = "returns a patch and its mask, not samples"
_GUIDES = "steers the features of a layer towards those of guide images, which no goal of ours has"
_OBJECTS = "attacks object detectors"
_SPEECH = "attacks speech recognisers"
_TENSORFLOW = "needs a TensorFlow model"


@dataclass(frozen=True, kw_only=True)
class ART(Peer):
    """Adversarial Robustness Toolbox (ART): an evasion attack of that package by class name (arXiv 1807.01069).

    One answer more than the attack's own is asked per batch, to learn the number of classes. SimBA and
    VirtualAdversarialMethod are given probabilities; they, ZooAttack and ShadowAttack work row by row.
    SaliencyMapMethod reaches for classes: without targets it draws them. Wasserstein enlarges its ball as it goes; its
    points are taken back into ours.
    """

    package: ClassVar[str] = "art"
    lengths: ClassVar[Mapping[str, str]] = {"": "eps_step"}
    fixed: ClassVar[Mapping[str, str]] = {"VirtualAdversarialMethod": "L2"}
    probabilities: ClassVar[frozenset[str]] = frozenset({"SimBA", "VirtualAdversarialMethod"})
    draws_targets: ClassVar[frozenset[str]] = frozenset({"SaliencyMapMethod"})
    aims_only: ClassVar[frozenset[str]] = frozenset({"TargetedUniversalPerturbation"})
    enlarges: ClassVar[frozenset[str]] = frozenset({"Wasserstein"})
    batches_of_one: ClassVar[frozenset[str]] = frozenset({"SimBA", "VirtualAdversarialMethod", "ZooAttack"})
    singly: ClassVar[frozenset[str]] = frozenset({"ShadowAttack"})
    needs_starts: ClassVar[frozenset[str]] = frozenset({"SignOPTAttack"})
    refused: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("AdversarialPatch", "AdversarialPatchNumpy", "AdversarialPatchPyTorch"), _PATCH),
        **dict.fromkeys(("FeatureAdversariesNumpy", "FeatureAdversariesPyTorch"), _GUIDES),
        **dict.fromkeys(("DPatch", "RobustDPatch", "OverloadPyTorch", "SNAL"), _OBJECTS),
        **dict.fromkeys(("CarliniWagnerASR", "ImperceptibleASR", "ImperceptibleASRPyTorch"), _SPEECH),
        **dict.fromkeys(
            (
                "AdversarialPatchTensorFlowV2", "FeatureAdversariesTensorFlowV2", "MalwareGDTensorFlow",
                "ProjectedGradientDescentTensorFlowV2",
            ),
            _TENSORFLOW,
        ),
        "AdversarialTexturePyTorch": "attacks object trackers",
        "DecisionTreeAttack": "attacks decision trees of scikit-learn",
        "HighConfidenceLowUncertainty": "attacks Gaussian processes",
        "LowProFool": _TABLES,
        "FrameSaliencyAttack": "is made of another attack object, and works on frames of films",
        "OverTheAirFlickeringPyTorch": "works on frames of films",
        "GRAPHITEBlackbox": "wants a mask and the points of an object in every picture",
        "GRAPHITEWhiteboxPyTorch": "wants a mask and the points of an object in every picture",
        "LaserAttack": "is made of a generator object of laser beams",
    }  # fmt: skip

    def _run(self, package: Any, request: Request) -> tuple[Tensor, bool]:
        home = peer_package("art.attacks.evasion")
        estimators = peer_package("art.estimators.classification")
        cls = self._class(home)
        if request.norm == "L0" and {"eps", "norm"} & set(inspect.signature(cls).parameters):
            raise UsageError(f"{self} knows no L0 ball")
        self._check_radius(request, "eps" in inspect.signature(cls).parameters)
        classes = _classes(request)
        probable = self.name in self.probabilities
        estimator = estimators.PyTorchClassifier(
            model=_Probabilities(request.module).eval() if probable else request.module,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(request.x.shape[1:]),
            nb_classes=classes,
            clip_values=(request.low, request.high),
            device_type="gpu" if request.x.is_cuda else "cpu",
        )
        power = _POWERS[request.norm]
        norm: Any = power if math.isinf(power) else int(power)
        known: dict[str, Any] = {"norm": norm}
        if self.name in self.enlarges:
            known = {"norm": str(norm), "ball": str(norm)}
        attack, took = self._make(
            cls,
            estimator,
            eps=request.eps,
            targeted=request.targeted,
            batch_size=1 if self.name in self.batches_of_one else len(request.x),
            verbose=False,
            **known,
        )
        aims = self.name in self.aims_only | self.draws_targets
        if request.targeted and "targeted" not in took and not aims:
            raise self._without_targets()
        if request.targeted and self.name in self.needs_starts:
            raise UsageError(f"{self} wants samples of the target class to start from; use the goal untargeted")
        if not request.targeted and self.name in self.aims_only:
            raise UsageError(f"{self} wants classes to reach; use the goal targeted")
        fixed = self.fixed.get(self.name, "Linf")
        if "eps" in took and "norm" not in took and request.norm != fixed:
            raise UsageError(f"{self} works in {fixed}, this ball is {request.norm}")
        y: Any = np.eye(classes, dtype=np.float32)[request.classes.cpu().numpy()]
        if self.name in self.draws_targets and not request.targeted:
            y = None  # labels to leave would be taken for classes to reach
        x: Any = request.x.cpu().numpy()
        if self.name in self.singly:
            z = np.concatenate([attack.generate(x=x[i : i + 1], y=y[i : i + 1]) for i in range(len(x))])
        else:
            z = attack.generate(x=x, y=y)
        return torch.as_tensor(z), "eps" in took and self.name not in self.enlarges


@dataclass(frozen=True, kw_only=True)
class AdvLib(Peer):
    """Adv-lib: an attack of that package by the name of its function, such as ddn, fmn or alma, run and judged here.

    Install it with `pip install --no-deps adv-lib==0.2.8 tqdm`: it requires visdom, which does not build with current
    setuptools and is needed for drawing alone; an empty module stands in for it. The package knows the box [0, 1];
    rows of another box are stretched to it and back. Nothing is rounded to 8 bits on the way, as `ddn` and others do by
    default: the threat model's lattice does that.
    """

    package: ClassVar[str] = "adv_lib"
    radius: ClassVar[Mapping[str, str]] = {"pgd_linf": "ε"}
    fixed: ClassVar[Mapping[str, str]] = {
        "carlini_wagner_l2": "L2", "carlini_wagner_linf": "Linf", "ddn": "L2", "fga": "L0", "pdgd": "L2",
        "pgd_linf": "Linf", "sdf": "L2", "sigma_zero": "L0", "str_attack": "L0", "vfga": "L0",
    }  # fmt: skip
    refused: ClassVar[Mapping[str, str]] = {"perc_al": "looks for small differences of colour, in no norm of ours"}
    called: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
        "alma": ("distance", {"L2": "l2", "L1": "l1"}),
        "tr": ("p", {"L2": 2, "Linf": math.inf}),
        "df": ("norm", {"L2": 2, "Linf": math.inf}),
        "pdpgd": ("norm", _POWERS),
        "": ("norm", _POWERS),
    }

    def __str__(self) -> str:
        return f"advlib:{self.name}"

    def _run(self, package: Any, request: Request) -> tuple[Tensor, bool]:
        with stand_in("visdom"):
            home = peer_package("adv_lib.attacks")
        attack = self._function(home)
        takes = inspect.signature(attack).parameters
        radius = self.radius.get(self.name, "eps")
        within = radius in takes and self.name != "tr"
        self._check_radius(request, within)
        width = request.high - request.low
        unit = (request.low, request.high) == (0.0, 1.0)
        known: dict[str, Any] = {"targeted": request.targeted, **({"levels": None} if "levels" in takes else {})}
        known |= self._norm(request.norm, takes)
        if within and request.eps is not None:
            known[radius] = request.eps if request.norm == "L0" else request.eps / width
        given = read_settings(self.settings)
        if ours := sorted(set(known) & set(given) - {"levels"}):
            raise UsageError(f"{self}: {', '.join(ours)} come from the threat model and the goal; leave them out")
        if unknown := sorted(set(given) - set(takes)):
            raise UsageError(f"{self} has no setting {', '.join(unknown)}; it has {', '.join(list(takes)[3:])}")
        module = request.module if unit else _Unit(request.module, request.low, request.high).eval()
        x = request.x if unit else ((request.x - request.low) / width).clamp(0, 1)
        try:
            z = attack(module, x, request.classes, **{**known, **given})
        except NotImplementedError as error:
            raise UsageError(f"{self} refuses its settings: {_first_line(error)}") from error
        return (z if unit else z * width + request.low), within

    def _function(self, home: Any) -> Any:
        attacks = {name: each for name, each in vars(home).items() if inspect.isfunction(each)}
        if self.name in self.refused:
            raise UsageError(f"{self} can't be run here: it {self.refused[self.name]}")
        if self.name not in attacks:
            near = difflib.get_close_matches(self.name.casefold(), attacks, n=3, cutoff=0.4)
            hint = (
                f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; it has {', '.join(sorted(attacks))}"
            )
            raise UnknownName(f"adv-lib has no attack {self.name!r}{hint}")
        return attacks[self.name]

    def _norm(self, norm: str, takes: Mapping[str, Any]) -> dict[str, Any]:
        """The norm as this function is told of it; UsageError where it has it not."""
        fixed = self.fixed.get(self.name)
        if fixed is not None:
            if fixed != norm:
                raise UsageError(f"{self} works in {fixed}, this threat model is {norm}")
            return {}
        argument, values = self.called.get(self.name, self.called[""])
        if argument not in takes:
            return {}
        if norm not in values:
            raise UsageError(f"{self} works in {' and '.join(values)}, this threat model is {norm}")
        return {argument: values[norm]}
