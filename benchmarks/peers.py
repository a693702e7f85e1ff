"""Every attack class of foolbox, torchattacks and ART, run natively and by its adapter on the same samples.

python benchmarks/peers.py [--packages foolbox torchattacks art] [--only NAME ...] [--limit 120] [--out docs]

Writes OUT/peers.json and the tables of OUT/peers.md between its two marks; with --only, or where a package is left out,
the other lines of the file stay. Each class runs in a process of its own:
one that crashes or hangs costs its line. Packages that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import math
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import advkit
from advkit.attacks.peers import ART, Foolbox, Peer, TorchAttacks, foreign_randomness, read_settings
from advkit.core.errors import AdvkitError, UsageError
from advkit.core.spaces import Box
from advkit.models import MODELS
from advkit.models.torch import TorchModel
from advkit.tasks import TASKS
from advkit.threat_models.lp import L1, L2, Linf
from advkit.threat_models.sparse import L0

N = 8
RADII = {"Linf": 0.25, "L2": 2.0, "L1": 8.0, "L0": 20.0}
BALLS: dict[str, Any] = {"Linf": Linf, "L2": L2, "L1": L1, "L0": L0}
POWERS = {"Linf": math.inf, "L2": 2, "L1": 1, "L0": 0}
TOLERANCE = 2
"""Samples of N by which an adapter may fall behind the class's own run: random attacks draw other numbers."""

PACKAGES: dict[str, tuple[str, str, type[Peer], str]] = {
    "foolbox": ("foolbox", "foolbox.attacks", Foolbox, "foolbox"),
    "torchattacks": ("torchattacks", "torchattacks", TorchAttacks, "torchattacks"),
    "art": ("art", "art.attacks.evasion", ART, "adversarial-robustness-toolbox"),
}

# Settings that make a class affordable here, the same on both sides; and those without which it does not start.
SETTINGS = {
    "foolbox:BoundaryAttack": "steps=300",
    "foolbox:EADAttack": "steps=200,binary_search_steps=3,initial_const=10,initial_stepsize=0.05",
    "foolbox:GenAttack": "steps=100",
    "foolbox:HopSkipJumpAttack": "steps=5,initial_gradient_eval_steps=50,max_gradient_eval_steps=200",
    "foolbox:L0BrendelBethgeAttack": "steps=50",
    "foolbox:L1BrendelBethgeAttack": "steps=50",
    "foolbox:L2BrendelBethgeAttack": "steps=50",
    "foolbox:LinfinityBrendelBethgeAttack": "steps=50",
    "foolbox:L2CarliniWagnerAttack": "steps=200,binary_search_steps=3",
    "foolbox:GaussianBlurAttack": "steps=50",
    "foolbox:LinearSearchBlendedUniformNoiseAttack": "directions=20,steps=50",
    "foolbox:LinearSearchContrastReductionAttack": "steps=100",
    "foolbox:SaltAndPepperNoiseAttack": "steps=50,across_channels=false",
    "foolbox:VirtualAdversarialAttack": "steps=10",
    "torchattacks:EADEN": "initial_const=10,lr=0.05,binary_search_steps=3",
    "torchattacks:EADL1": "initial_const=10,lr=0.05,binary_search_steps=3",
    "torchattacks:LGV": "epochs=1,nb_models_epoch=1,verbose=false",
    "torchattacks:OnePixel": "pixels=10",
    "torchattacks:Square": "n_queries=300",
    "torchattacks:SPSA": "nb_iter=20",
    "art:AdversarialPatch": "max_iter=2",
    "art:AdversarialPatchNumpy": "max_iter=2",
    "art:AdversarialPatchPyTorch": "max_iter=2,patch_shape=[3+16+16]",
    "art:AutoConjugateGradient": "max_iter=20,nb_random_init=1",
    "art:AutoProjectedGradientDescent": "max_iter=20,nb_random_init=1",
    "art:RescalingAutoConjugateGradient": "max_iter=20,nb_random_init=1",
    "art:BoundaryAttack": "max_iter=100",
    "art:BrendelBethgeAttack": "steps=50",
    "art:CarliniL0Method": "max_iter=100,binary_search_steps=3,learning_rate=0.1",
    "art:CarliniLInfMethod": "max_iter=10,learning_rate=0.1",
    "art:GeoDA": "max_iter=1000,sub_dim=8",
    "art:HopSkipJump": "max_iter=3,max_eval=200,init_eval=20",
    "art:PixelAttack": "th=10,max_iter=10",
    "art:ThresholdAttack": "th=64,max_iter=10",
    "art:ShadowAttack": "nb_steps=50",
    "art:SignOPTAttack": "max_iter=20,query_limit=2000,k=50",
    "art:SimBA": "max_iter=200",
    "art:SpatialTransformation": "max_translation=20,num_translations=5,max_rotation=20,num_rotations=5",
    "art:SquareAttack": "max_iter=200",
    "art:UniversalPerturbation": "max_iter=3",
    "art:TargetedUniversalPerturbation": "max_iter=3",
    "art:VirtualAdversarialMethod": "max_iter=3,finite_diff=1/1000",
    "art:Wasserstein": "max_iter=20,regularization=100",
    "art:ZooAttack": "max_iter=50,use_resize=false,use_importance=false,learning_rate=0.1,nb_parallel=32",
    "art:OverTheAirFlickeringPyTorch": "max_iter=3",
    "art:FeatureAdversariesNumpy": "delta=0.25,layer=0",
    "art:FeatureAdversariesPyTorch": "delta=0.25,layer=0,max_iter=10,step_size=0.05",
}
# The norm in which a class is tried, where its own words do not say.
NORMS = {
    "foolbox:SpatialAttack": "L2",
    "torchattacks:CW": "L2",
    "torchattacks:DeepFool": "L2",
    "torchattacks:EADEN": "L1",
    "torchattacks:EADL1": "L1",
    "torchattacks:GN": "L2",
    "torchattacks:JSMA": "L0",
    "torchattacks:OnePixel": "L0",
    "torchattacks:Pixle": "L0",
    "torchattacks:SparseFool": "L0",
    "art:BoundaryAttack": "L2",
    "art:CarliniL0Method": "L0",
    "art:CarliniL2Method": "L2",
    "art:DeepFool": "L2",
    "art:ElasticNet": "L1",
    "art:GeoDA": "L2",
    "art:HopSkipJump": "L2",
    "art:NewtonFool": "L2",
    "art:PixelAttack": "L0",
    "art:SaliencyMapMethod": "L0",
    "art:ShadowAttack": "L2",
    "art:SignOPTAttack": "L2",
    "art:SimBA": "L2",
    "art:SpatialTransformation": "L2",
    "art:VirtualAdversarialMethod": "L2",
    "art:ZooAttack": "L2",
}
# Classes that take pictures of three channels alone: the same digits, grey in three channels of 16 by 16.
COLOURED = {
    "torchattacks:PIFGSM", "torchattacks:PIFGSMPP", "torchattacks:TIFGSM", "art:CompositeAdversarialAttackPyTorch",
    "art:AdversarialPatchPyTorch",
}  # fmt: skip
# Classes that reach for classes alone.
AIMING = {"foolbox:GenAttack", "art:TargetedUniversalPerturbation", "art:LowProFool"}


class Shrunk(nn.Module):
    """Pictures [3, 16, 16] to the grey [1, 8, 8] of a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.module(nn.functional.avg_pool2d(x.mean(1, keepdim=True), 2))
        return answer


class Bench:
    """The victim and the first N samples that it gets right."""

    def __init__(self, coloured: bool) -> None:
        task = TASKS.build("digits")
        victim = MODELS.build("zoo:digits-mlp")((1, 8, 8), 10, None)
        batch = next(iter(task.batches(200)))
        with torch.no_grad():
            right = (victim(batch.x).argmax(1) == batch.labels).nonzero().squeeze(1)[:N]
        self.x, self.y = batch.x[right].clone(), batch.labels[right].clone()
        self.module: nn.Module = victim.module
        if coloured:
            self.x = self.x.repeat(1, 3, 1, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
            self.module = Shrunk(self.module).eval()
        for parameter in self.module.parameters():
            parameter.requires_grad_(False)
        self.model = TorchModel(self.module, Box(shape=tuple(self.x.shape[1:])), 10, name="digits")
        self.targets = (self.y + 1) % 10

    def row(self, index: int) -> Bench:
        """The same victim with one of the samples."""
        one = copy.copy(self)
        one.x, one.y, one.targets = (each[index : index + 1] for each in (self.x, self.y, self.targets))
        return one

    def successes(self, z: Any, norm: str, targeted: bool) -> int:
        """Of points that a class returned: how many lie in ball and box and are what was wanted."""
        z = torch.as_tensor(np.asarray(z) if not isinstance(z, Tensor) else z.detach()).to(self.x)
        if z.shape != self.x.shape:
            raise TypeError(f"returned shape {list(z.shape)} for samples of {list(self.x.shape)}")
        ball = BALLS[norm](int(RADII[norm]) if norm == "L0" else RADII[norm]).bind(self.model.space)
        inside = ball.admits(z, self.x)
        with torch.no_grad():
            answer = self.module(torch.where(inside.view(-1, 1, 1, 1), z, self.x)).argmax(1)
        reached = answer == self.targets if targeted else answer != self.y
        return int((reached & inside).sum())


def classes(package: str) -> dict[str, Any]:
    """The public classes by the name in the package; aliases stand under the class's own name alone."""
    home = importlib.import_module(PACKAGES[package][1])
    named = {name: value for name, value in vars(home).items() if inspect.isclass(value)}
    named = {name: value for name, value in named.items() if not inspect.isabstract(value)}  # foolbox's base class
    found = {value.__name__: value for value in named.values()}
    return {name: found[name] for name in sorted(found)}


def installed(package: str) -> str | None:
    """The version, or None where it does not import."""
    try:
        importlib.import_module(PACKAGES[package][1])
    except ImportError:
        return None
    return importlib.metadata.version(PACKAGES[package][3])


def norm_of(package: str, name: str, cls: Any) -> str:
    """The norm in which a class is tried."""
    if said := NORMS.get(f"{package}:{name}"):
        return said
    if package == "foolbox":
        power = getattr(inspect.getattr_static(cls, "distance", None), "p", None)
        by_power = {2.0: "L2", 1.0: "L1", 0.0: "L0", math.inf: "Linf"}
        if power is not None and name != "HopSkipJumpAttack":
            return by_power[float(power)]
        return "Linf" if name.startswith(("Linf", "LInf")) else "L2"
    return "L2" if package == "torchattacks" and "L2" in name else "Linf"


# Natively: as the package's own documentation has it.


def native(package: str, name: str, bench: Bench, norm: str, targeted: bool) -> int:
    """Successes of the class by itself, with the same settings, radius and ratio of step sizes."""
    run, cls = _NATIVE[package], classes(package)[name]
    try:
        return run(cls, settings(package, name), bench, norm, targeted)
    except Exception as error:
        if "same dtype" in str(error):  # it hands over float64, where a model wants its own type
            bench.module = _Single(bench.module).eval()
            return native(package, name, bench, norm, targeted)
        if len(bench.x) == 1:
            raise
        # One sample on which a class raises ends its batch; the harness goes on without that sample, and so does this.
        counts = [
            attempt(lambda i=i: run(cls, settings(package, name), bench.row(i), norm, targeted)) for i in range(N)
        ]
        if not any("value" in count for count in counts):
            raise
        return sum(count.get("value", 0) for count in counts)


def settings(package: str, name: str) -> dict[str, Any]:
    given = read_settings(SETTINGS.get(f"{package}:{name}", ""))
    if isinstance(given.get("patch_shape"), str):
        given["patch_shape"] = tuple(int(side) for side in given["patch_shape"].split("+"))
    return given


def scaled(cls: Any, given: dict[str, Any], radius: str, eps: float, *lengths: str) -> dict[str, Any]:
    """eps, and default step sizes in the ratio that they have to the class's default eps."""
    takes = inspect.signature(cls).parameters
    if radius not in takes:
        return {}
    usual = {name: takes[name].default for name in (radius, *lengths) if name in takes and name not in given}
    return {radius: eps} | {name: usual[name] * eps / usual[radius] for name in lengths if name in usual}


def _native_foolbox(cls: Any, given: dict[str, Any], bench: Bench, norm: str, targeted: bool) -> int:
    import foolbox

    takes = inspect.signature(cls).parameters
    if "distance" in takes:
        given["distance"] = foolbox.distances.LpDistance(POWERS[norm])
    if "constraint" in takes:
        given["constraint"] = norm.casefold()
    attack = cls(**given)
    model = foolbox.PyTorchModel(bench.module, bounds=(0.0, 1.0), device="cpu")
    kinds = foolbox.TargetedMisclassification(bench.targets), foolbox.Misclassification(bench.y)
    criterion = kinds[0] if targeted else kinds[1]
    if cls.__name__ == "DatasetAttack":
        attack.feed(model, bench.x)
    if cls.__name__ == "PointwiseAttack":  # without a distance it can be run, not called
        return bench.successes(attack.run(model, bench.x, criterion), norm, targeted)
    more: dict[str, Any] = {}
    if cls.__name__ == "BinarizationRefinementAttack":
        start = foolbox.attacks.LinearSearchBlendedUniformNoiseAttack(distance=given["distance"], steps=50)
        more["starting_points"] = start.run(model, bench.x, criterion)
    radius = None if norm == "L0" else RADII[norm]
    return bench.successes(attack(model, bench.x, criterion, epsilons=radius, **more)[1], norm, targeted)


def _native_torchattacks(cls: Any, given: dict[str, Any], bench: Bench, norm: str, targeted: bool) -> int:
    import torchattacks

    takes = inspect.signature(cls).parameters
    radius = "max_epsilon" if "max_epsilon" in takes else "eps"
    known = scaled(cls, given, radius, RADII[norm], "lr" if cls.__name__ == "SPSA" else "alpha")
    if "norm" in takes:
        known["norm"] = norm
    if cls.__name__ == "MultiAttack":
        attack = cls(
            [torchattacks.FGSM(bench.module, eps=RADII[norm]), torchattacks.PGD(bench.module, eps=RADII[norm])]
        )
    elif cls.__name__ == "LGV":
        rows = torch.utils.data.TensorDataset(bench.x, bench.y)
        bench.module.requires_grad_(True)
        attack = cls(bench.module, torch.utils.data.DataLoader(rows, batch_size=4), eps=RADII[norm], **given)
        attack.collect_models()
    else:
        attack = cls(bench.module, **{**known, **given})
    if targeted:
        attack.set_mode_targeted_by_label(quiet=True)
    return bench.successes(attack(bench.x, bench.targets if targeted else bench.y), norm, targeted)


class _Single(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.float())


class _Softmax(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x).softmax(1)


def _native_art(cls: Any, given: dict[str, Any], bench: Bench, norm: str, targeted: bool) -> int:
    from art.attacks.evasion import FastGradientMethod
    from art.estimators.classification import PyTorchClassifier

    name, takes = cls.__name__, inspect.signature(cls).parameters
    probable = name in ("SimBA", "VirtualAdversarialMethod")
    estimator = PyTorchClassifier(
        model=_Softmax(bench.module).eval() if probable else bench.module,
        loss=nn.CrossEntropyLoss(),
        input_shape=tuple(bench.x.shape[1:]),
        nb_classes=10,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    known = scaled(cls, given, "eps", RADII[norm], "eps_step")
    wanted = {
        "norm": str(POWERS[norm]) if name == "Wasserstein" else POWERS[norm],
        "ball": str(POWERS[norm]),
        "targeted": targeted,
        "verbose": False,
        "batch_size": 1 if probable or name == "ZooAttack" else len(bench.x),
    }
    known |= {key: value for key, value in wanted.items() if key in takes}
    if name == "FrameSaliencyAttack":
        known["attacker"] = FastGradientMethod(estimator, eps=RADII[norm])
    attack = cls(estimator, **{**known, **given})
    x, one_hot = bench.x.numpy(), np.eye(10, dtype=np.float32)
    y: Any = one_hot[(bench.targets if targeted else bench.y).numpy()]
    if name == "SaliencyMapMethod" and not targeted:
        y = None
    if name.startswith("FeatureAdversaries"):
        y = np.roll(x, 1, 0)
    if name == "ShadowAttack":
        z = np.concatenate([attack.generate(x=x[i : i + 1], y=y[i : i + 1]) for i in range(len(x))])
        return bench.successes(z, norm, targeted)
    return bench.successes(attack.generate(x=x, y=y), norm, targeted)


_NATIVE: dict[str, Callable[..., int]] = {
    "foolbox": _native_foolbox,
    "torchattacks": _native_torchattacks,
    "art": _native_art,
}


# By the adapter: through the whole harness.


def adapted(package: str, name: str, bench: Bench, norm: str, targeted: bool) -> dict[str, Any]:
    """What the report says: outcomes, flags and the first message of an error."""
    eps = int(RADII[norm]) if norm == "L0" else RADII[norm]
    attack = PACKAGES[package][2](name=name, settings=SETTINGS.get(f"{package}:{name}", "").replace("[3+16+16]", "3"))
    goal = "targeted:how=next" if targeted else "untargeted"
    with tempfile.TemporaryDirectory() as folder:
        report = advkit.evaluate(
            attack,
            "none",
            (bench.x, bench.y),
            bench.model,
            BALLS[norm](eps),
            goal,
            device="cpu",
            batch_size=N,
            out=folder,
        )
        records = [json.loads(line) for line in (Path(folder) / "records.jsonl").read_text().splitlines()]
    records = [record for record in records if "outcome" in record]
    outcomes: dict[str, int] = {}
    for record in records:
        outcomes[record["outcome"]] = outcomes.get(record["outcome"], 0) + 1
    messages = [record["message"] for record in records if record.get("message")]
    held = [record["distance"] for record in records if record["outcome"] == "robust"]
    return {
        "outcomes": outcomes,
        "unchanged": sum(distance == 0 for distance in held),
        "near": sum(0 < distance < 0.5 * eps for distance in held),
        "message": messages[0] if messages else "",
        "flags": {flag["id"]: flag["severity"] for flag in report.flags},
    }


def follows(package: str, name: str) -> list[str]:
    """Settings of a class that follow eps by the adapter, with their ratio to it."""
    cls = classes(package)[name]
    adapter = PACKAGES[package][2](name=name)
    takes = inspect.signature(cls).parameters
    radius = adapter.radius.get(name, "eps")
    if package == "foolbox":
        return ["rel_stepsize (a ratio)"] if "rel_stepsize" in takes else []
    if radius not in takes:
        return []
    following = adapter._following(takes, radius, 1.0)
    renamed = [] if radius == "eps" else [f"{radius} = eps"]
    return renamed + [f"{setting} = {ratio:.3g} eps" for setting, ratio in following.items()]


# One class in one process.


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:160]


def attempt(do: Callable[[], Any]) -> Any:
    """What came back, or why nothing did."""
    try:
        with foreign_randomness(0):
            return {"value": do()}
    except UsageError as error:
        return {"refused": _first_line(error)}
    except AdvkitError as error:
        return {"error": _first_line(error)}
    except (Exception, SystemExit) as error:
        return {"error": f"{type(error).__name__}: {_first_line(error)}"}


def examine(package: str, name: str, part: str, benches: dict[bool, Bench]) -> dict[str, Any]:
    """One side of one class: `native` or `adapter`, with `-targeted` for the other goal."""
    side, _, goal = part.partition("-")
    key = f"{package}:{name}"
    bench = benches[key in COLOURED]
    norm = norm_of(package, name, classes(package)[name])
    targeted = goal == "targeted"
    run = native if side == "native" else adapted
    return {"norm": norm, **attempt(lambda: run(package, name, bench, norm, targeted))}


def _child(pipe: Any, package: str, name: str, part: str, benches: dict[bool, Bench]) -> None:
    os.setsid()
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(sink, stream)
    warnings.simplefilter("ignore")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        found = examine(package, name, part, benches)
    pipe.send(found)
    pipe.close()
    os._exit(0)


def alone(package: str, name: str, part: str, benches: dict[bool, Bench], limit: float) -> dict[str, Any]:
    """`examine` in a process of its own, ended after `limit` seconds."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(there, package, name, part, benches))
    child.start()
    there.close()
    try:
        found: dict[str, Any] = here.recv() if here.poll(limit) else {"error": f"not done after {limit:g} s"}
    except EOFError:
        found = {"error": "the process ended without an answer"}
    if child.is_alive():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # its own session: what it started goes with it
    child.join()
    return found


def aims(package: str, name: str) -> bool:
    """Whether the class says of itself that it can reach for a class."""
    cls = classes(package)[name]
    if package == "torchattacks":
        return '"targeted"' in inspect.getsource(cls.__init__)
    if package == "art":
        takes = inspect.signature(cls).parameters
        return "targeted" in takes or name in ("SaliencyMapMethod", "TargetedUniversalPerturbation", "LowProFool")
    return True


def warm(package: str, only: list[str]) -> None:
    """Let numba compile what the Brendel-Bethge attacks solve, once and not in every child: a minute each."""
    home = {"foolbox": "foolbox.attacks.brendel_bethge", "art": "art.attacks.evasion.brendel_bethge"}.get(package)
    named = any("BrendelBethge" in name and (not only or name in only) for name in classes(package))
    if home is None or not named or importlib.util.find_spec("numba") is None:
        return
    module = importlib.import_module(home)
    rows = np.random.default_rng(0).random((3, 64), dtype=np.float32)
    for name in ("LinfOptimizer", *(("L2Optimizer", "L1Optimizer", "L0Optimizer") if package == "foolbox" else ())):
        print(f"compiling {home}.{name}", file=sys.stderr, flush=True)
        with contextlib.suppress(ArithmeticError):
            getattr(module, name)().solve(*rows, 0.0, 1.0, np.float32(0.1), np.float64(0.5))


def lines(package: str, only: list[str], limit: float) -> Iterator[dict[str, Any]]:
    """One entry per class."""
    benches = {coloured: Bench(coloured) for coloured in (False, True)}
    warm(package, only)
    for name in classes(package):
        key = f"{package}:{name}"
        if only and name not in only and key not in only:
            continue
        entry: dict[str, Any] = {
            "package": package,
            "name": name,
            "norm": norm_of(package, name, classes(package)[name]),
            "settings": SETTINGS.get(key, ""),
            "follows": follows(package, name),
        }
        parts = ["native", "adapter"] if key not in AIMING else ["adapter"]
        parts += ["native-targeted", "adapter-targeted"] if aims(package, name) else []
        for part in parts:
            entry[part] = alone(package, name, part, benches, limit)
            print(f"{key} {part}: {said(entry[part])}", file=sys.stderr, flush=True)
        yield entry


# What it comes to.


def successes(found: dict[str, Any] | None) -> int | None:
    """Of one side: how many samples; None where it did not run through."""
    if found is None or "value" not in found:
        return None
    value = found["value"]
    if isinstance(value, int):
        return value
    return int(value["outcomes"].get("broken", 0))


def robust(found: dict[str, Any] | None) -> int:
    """Samples that the harness calls robust."""
    if found is None or "value" not in found or isinstance(found["value"], int):
        return 0
    return int(found["value"]["outcomes"].get("robust", 0) + found["value"]["outcomes"].get("invalid", 0))


def unfinished(found: dict[str, Any] | None) -> bool:
    """Whether one side was cut short by the clock."""
    return found is not None and found.get("error", "").startswith("not done")


def faults(entry: dict[str, Any]) -> list[str]:
    """What must not be: an adapter behind its class, or one that calls samples robust where the class does not run."""
    seen = []
    for goal in ("", "-targeted"):
        own, ours = entry.get(f"native{goal}"), entry.get(f"adapter{goal}")
        theirs = successes(own)
        if ours is not None and theirs is not None and "error" in ours and not unfinished(ours):
            seen.append(f"{entry['name']}{goal}: {ours['error']}, natively {theirs} of {N}")
        if ours is None or "value" not in ours:
            continue
        if own is not None and theirs is None and robust(ours) and not unfinished(own):
            seen.append(f"{entry['name']}{goal}: {robust(ours)} robust where the class does not run")
        elif theirs is not None and robust(ours) and (successes(ours) or 0) < theirs - TOLERANCE:
            seen.append(f"{entry['name']}{goal}: {successes(ours)} of {N} broken, natively {theirs}")
        value = ours["value"]
        for count, flag in (("unchanged", "returned_unchanged"), ("near", "far_inside_the_ball")):
            if value[count] and flag not in value["flags"]:
                seen.append(f"{entry['name']}{goal}: {value[count]} robust samples without the flag {flag}")
    return seen


CANNOT = "can't be run here: "


def said(found: dict[str, Any] | None) -> str:
    """One side in a cell of the table."""
    if found is None:
        return ""
    if "refused" in found:
        return f"refused: {found['refused'].partition(' ')[2].removeprefix(CANNOT)}"
    if "error" in found:
        return f"fails: {found['error']}"
    value = found["value"]
    if isinstance(value, int):
        return f"{value}/{N}"
    outcomes = value["outcomes"]
    if set(outcomes) == {"error"}:
        return f"error records: {value['message'][:140]}"
    more = [f"{count} {outcome}" for outcome, count in outcomes.items() if outcome not in ("broken", "robust")]
    more += [
        f"{value[count]} {word}" for count, word in (("unchanged", "unchanged"), ("near", "inside")) if value[count]
    ]
    return f"{outcomes.get('broken', 0)}/{N}" + (f" ({', '.join(more)})" if more else "")


MARKS = "<!-- tables: made by benchmarks/peers.py -->", "<!-- end of tables -->"


def page(entries: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """The tables in Markdown."""
    out = []
    for package, version in versions.items():
        mine = [entry for entry in entries if entry["package"] == package]
        out += [
            f"### {package} {version}: {len(mine)} classes\n",
            "| class | ball | natively | by the adapter | targeted, natively | by the adapter | follows eps |",
            "|---|---|---|---|---|---|---|",
        ]
        for entry in mine:
            cells = [said(entry.get(part)) for part in ("native", "adapter", "native-targeted", "adapter-targeted")]
            cells = [cell.replace("|", "/") for cell in cells]
            row = [f"`{entry['name']}`", entry["norm"], *cells, ", ".join(entry["follows"])]
            out.append("| " + " | ".join(row) + " |")
        out.append("")
    return "\n".join(out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", nargs="+", default=list(PACKAGES), choices=list(PACKAGES))
    parser.add_argument("--only", nargs="*", default=[], help="class names, or package:class")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for one side of one class")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    path = asked.out / "peers.json"
    old = json.loads(path.read_text()) if path.exists() else {"versions": {}, "classes": []}
    kept = {(entry["package"], entry["name"]): entry for entry in old["classes"]}
    entries, versions = [], dict(old["versions"])
    for package in asked.packages:
        version = installed(package)
        if version is None:
            print(f"{package} is not installed: left out", file=sys.stderr)
            continue
        if not asked.only or versions.get(package) != version:
            kept = {key: entry for key, entry in kept.items() if key[0] != package}
        versions[package] = version
        entries += list(lines(package, asked.only, asked.limit))
    asked.out.mkdir(parents=True, exist_ok=True)
    kept |= {(entry["package"], entry["name"]): entry for entry in entries}
    every = [kept[key] for key in sorted(kept, key=lambda key: (list(PACKAGES).index(key[0]), key[1]))]
    versions = {package: versions[package] for package in PACKAGES if package in versions}
    document = {"samples": N, "radii": RADII, "versions": versions, "tolerance": TOLERANCE, "classes": every}
    path.write_text(json.dumps(document, indent=1) + "\n")
    text = asked.out / "peers.md"
    before, after = "", "\n"
    if text.exists() and MARKS[0] in (written := text.read_text()):
        before, after = written.split(MARKS[0])[0], written.split(MARKS[1])[1]
    text.write_text(f"{before}{MARKS[0]}\n\n{page(every, versions)}\n{MARKS[1]}{after}")
    bad = [fault for entry in entries for fault in faults(entry)]
    print("\n".join(bad) or "no adapter falls behind", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    raise SystemExit(main())
